#!/usr/bin/env bash
# Train on the GPUs of a Slurm cluster: one process a GPU, prepared text by a job array, requeued until it is finished.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/launcher.sh
source "$root/scripts/launcher.sh"

usage() {
  cat <<'HELP'
usage: scripts/slurm.sh COMMAND [--flag=VALUE …] [-- ARGUMENTS OF DISTILJAX]

  submit   write the batch scripts into --logs and submit them: with --prepare_tasks a job array that prepares the text,
           then the training, which waits for it
  status   the jobs, and whether the run is finished (status 75 if not)
  logs     follow the log of the training
  stop     tell the training to save and leave, and not to be requeued; `submit` goes on
  cancel   end the jobs at once; what the last checkpoint holds stays

  --name            of the jobs (default distiljax)
  --workdir         the run directory, on a file system that all nodes share, or gs://…
  --config          a config file, such as configs/distilbert_base.py
  --task            distill or pretrain (default distill)
  --nodes           default 1
  --gpus            of a node, and so processes on it (default 8)
  --cpus            of a process (default 8)
  --time            limit of one job; a run that needs longer is requeued (default 24:00:00)
  --grace           seconds before the limit at which the training is told to save (default 180)
  --max_requeues    how often at most, preemptions included (default 100)
  --max_failures    how many of these after a training that failed and was not stopped (default 5)
  --data_dir        prepared text, on a file system that all nodes share
  --prepare_tasks   jobs that prepare the text into --data_dir, in any order; 0 = it is there already (default 0)
  --prepare_cpus    of each (default 16)
  --prepare_time    limit of each (default 12:00:00)
  --setup           a shell line at the start of each job, such as 'module load cuda && source .venv/bin/activate'
  --logs            where batch scripts and logs go (default logs)
  --job             the number that `submit` printed, for stop and cancel; for logs the newest is the default
  --sbatch=FLAG     a further flag for the training's sbatch, such as --partition=gpu; may be repeated
  --prepare_sbatch=FLAG   the same for the preparing
  --dry_run         print the batch scripts and the commands, as a shell takes them, and run none

Each flag with a value has a default in the environment: SLURM_RUN_CONFIG is that of --config. What stands after a lone
-- goes to distiljax; what of it says which text (--config.data.KEY=VALUE) and whose tokenizer, to the preparing too.
JAX finds the other processes by the variables that srun sets.

  scripts/slurm.sh submit --nodes=2 --config=configs/distilbert_base.py --workdir=runs/distilbert \
      --data_dir=rows --prepare_tasks=20 --sbatch=--partition=gpu --prepare_sbatch=--partition=cpu --dry_run

exit status: 0 done    2 bad input    otherwise that of the command of Slurm which failed
HELP
}

flags=(name workdir config task nodes gpus cpus time grace max_requeues max_failures data_dir prepare_tasks prepare_cpus
  prepare_time setup logs job)
switches=(dry_run)
lists=(sbatch prepare_sbatch)
name=distiljax workdir='' config='' task=distill nodes=1 gpus=8 cpus=8 time=24:00:00 grace=180 max_requeues=100
max_failures=5 data_dir='' prepare_tasks=0 prepare_cpus=16 prepare_time=12:00:00 setup='' logs=logs job='' dry_run=''
sbatch=() prepare_sbatch=()

command=${1:-}
case $command in
  '' | -h | --help | help)
    usage
    exit 0
    ;;
  submit | status | logs | stop | cancel) shift ;;
  *) fail "unknown command '$command'; scripts/slurm.sh --help lists them" ;;
esac
from_environment SLURM_RUN
parse_flags "$@"

check_name
for key in nodes gpus cpus prepare_cpus; do
  whole "$key" 1
done
for key in grace max_requeues max_failures prepare_tasks; do
  whole "$key" 0
done
case $command in
  submit)
    needed workdir "the run directory, which all nodes reach"
    needed config "a config file, such as configs/distilbert_base.py"
    [[ -f ${config%%:*} ]] || fail "--config is '$config'; expected a Python file with get_config()"
    [[ $task == distill || $task == pretrain ]] || fail "--task is '$task'; expected distill or pretrain"
    if ((prepare_tasks)); then
      needed data_dir "where the $prepare_tasks tasks prepare the text to"
    fi
    check_extra workdir config config.data_dir
    for key in ${sbatch[@]+"${sbatch[@]}"} ${prepare_sbatch[@]+"${prepare_sbatch[@]}"}; do
      [[ $key == --* && $key != *$'\n'* ]] || fail "'$key' is no flag of sbatch; write --sbatch=--partition=NAME"
    done
    ;;
  status) needed workdir "the run directory" ;;
  stop | cancel)
    needed job "the number that submit printed"
    whole job 1
    ;;
esac

# The batch scripts.

sbatch_lines() {
  local line
  for line in "$@"; do
    printf '#SBATCH %s\n' "$(quote "$line")"
  done
  cat <<SCRIPT
set -uo pipefail
SCRIPT
  if [[ -n $setup ]]; then
    printf '{\n  %s\n} || exit\n' "$setup"
  fi
}

train_script() {
  printf '#!/usr/bin/env bash\n'
  # --signal without B: is for the steps, so that this script lives on to requeue the job.
  sbatch_lines "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" \
    "--cpus-per-task=$cpus" "--time=$time" "--signal=TERM@$grace" --requeue --open-mode=append \
    "--output=$logs/$name-%j.log" ${sbatch[@]+"${sbatch[@]}"}
  cat <<SCRIPT
# Every task must see all GPUs of its node, as JAX takes the one of its local number: no --gpus-per-task.
# A task that fails does not take the others along at once: they say which process was lost, then end.
$(quote "$root/scripts/until_finished.sh" --tries=1 "--workdir=$workdir" --) \\
  srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task="\$SLURM_CPUS_PER_TASK" \\
  $(quote distiljax "$task" "--config=$config" "--workdir=$workdir" ${data_dir:+"--config.data_dir=$data_dir"} \
    ${extra[@]+"${extra[@]}"})
status=\$?
if ((status == 0 || status == 2)); then
  exit "\$status"
fi
failures=$(quote "$logs/$name")-"\$SLURM_JOB_ID".failures
((status == 75)) || echo "\$(date) status \$status" >>"\$failures"
if [[ -f \$failures ]] && ((\$(wc -l <"\$failures") > $max_failures)); then
  echo "failed more than $max_failures times, see \$failures; submitted again it goes on"
  exit "\$status"
fi
if ((\${SLURM_RESTART_COUNT:-0} >= $max_requeues)); then
  echo "not finished (status \$status) after $max_requeues requeues; submitted again it goes on"
  exit "\$status"
fi
echo "not finished (status \$status); requeued to go on"
scontrol requeue "\$SLURM_JOB_ID" || exit "\$status"
SCRIPT
}

# What of the arguments concerns the text; the config says the rest.
prepare_arguments() {
  local argument tokenizer=''
  for argument in ${extra[@]+"${extra[@]}"}; do
    case $argument in
      --config.data.*=*) text+=("$argument") ;;
      --config.tokenizer=*) tokenizer=${argument#*=} ;;
      --config.teacher=* | --config.model=*) tokenizer=${tokenizer:-${argument#*=}} ;;
    esac
  done
  if [[ -n $tokenizer ]]; then
    text+=("--tokenizer=$tokenizer")
  fi
}

prepare_script() {
  local text=()
  prepare_arguments
  printf '#!/usr/bin/env bash\n'
  sbatch_lines "--job-name=$name-prepare" "--array=0-$((prepare_tasks - 1))" --ntasks=1 "--cpus-per-task=$prepare_cpus" \
    "--time=$prepare_time" --requeue --open-mode=append "--output=$logs/$name-prepare-%A-%a.log" \
    ${prepare_sbatch[@]+"${prepare_sbatch[@]}"}
  cat <<SCRIPT
$(quote distiljax prepare "--config=$config" "--out=$data_dir" ${text[@]+"${text[@]}"}) \\
  --shard_index="\$SLURM_ARRAY_TASK_ID" --shard_count=$prepare_tasks --workers="\$SLURM_CPUS_PER_TASK"
SCRIPT
}

# write FILE TEXT
write() {
  if [[ -n $dry_run ]]; then
    printf "cat >%s <<'END_OF_SCRIPT'\n%s\nEND_OF_SCRIPT\n" "$(quote "$1")" "$2"
  else
    printf '%s\n' "$2" >"$1"
  fi
}

submit() {
  local train=$logs/$name.train.sbatch prepare=$logs/$name.prepare.sbatch prepare_job dependency=()
  run mkdir -p "$logs"
  if ((prepare_tasks)); then
    write "$prepare" "$(prepare_script)"
    if [[ -n $dry_run ]]; then
      # shellcheck disable=SC2016
      printf 'prepare_job=$(%s)\n' "$(quote sbatch --parsable "$prepare")"
    else
      prepare_job=$(sbatch --parsable "$prepare")
      echo "prepare: job ${prepare_job%%;*}"
      dependency=("--dependency=afterok:${prepare_job%%;*}" --kill-on-invalid-dep=yes)
    fi
  fi
  write "$train" "$(train_script)"
  if [[ -n $dry_run ]]; then
    # shellcheck disable=SC2016
    ((prepare_tasks == 0)) || dependency=('--dependency=afterok:${prepare_job%%;*}' --kill-on-invalid-dep=yes)
    printf '%s\n' "sbatch --parsable ${dependency[*]:+"\"${dependency[0]}\" ${dependency[1]} "}$(quote "$train")"
    return
  fi
  job=$(sbatch --parsable ${dependency[@]+"${dependency[@]}"} "$train")
  echo "train: job ${job%%;*}, log $logs/$name-${job%%;*}.log"
}

status() {
  run squeue "--user=${USER:-$(id -un)}" "--name=$name,$name-prepare" \
    '--format=%.12i %.28j %.9T %.12M %.12l %.6D %R'
  # Nothing is run: this only says whether result.json is there.
  run "$root/scripts/until_finished.sh" "--workdir=$workdir" --linger=0 -- true
}

logs() {
  local newest
  if [[ -z $job ]]; then
    newest=$({ find "$logs" -name "$name-[0-9]*.log" 2>/dev/null || true; } | sort -V | tail -n 1)
    [[ -n $newest ]] || fail "there is no $logs/$name-*.log; it comes with the first line of the training"
  else
    newest=$logs/$name-$job.log
  fi
  run tail -n 100 -F "$newest"
}

stop() {
  run scontrol update "JobId=$job" Requeue=0
  # The steps get it, not the batch script, which sees the training end.
  run scancel --signal=TERM "$job"
}

case $command in
  cancel) run scancel "$job" ;;
  *) "$command" ;;
esac
