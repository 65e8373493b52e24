#!/usr/bin/env bash
# Train on a Cloud TPU pod slice, from creating it to fetching the run, and again whenever it is preempted.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/launcher.sh
source "$root/scripts/launcher.sh"

usage() {
  cat <<'HELP'
usage: scripts/tpu_pod.sh COMMAND [--flag=VALUE …] [-- ARGUMENTS OF DISTILJAX]

  create   ask for the slice (a queued resource) and wait until it is there
  copy     copy this checkout to all workers and install distiljax[tpu,gcs] there
  run      start the training on all workers, detached from this machine; the same command goes on with a stopped run
  watch    until the run is finished: look every --poll seconds, and when the slice was preempted, delete it, create it
           again, copy, run. Begins with whatever is missing, so that `watch` alone does all of the above
  resume   what watch does after a preemption, at once
  status   the state of the slice, of the training on each worker, and whether the run is finished
  logs     follow the log of one worker (--worker)
  stop     tell the training on all workers to save and leave; `run` goes on
  fetch    copy the run to --out, as `distiljax export`, `evaluate` and `report` take it
  delete   delete the slice; the run on gs:// stays

  --name               of the slice (default distiljax)
  --zone               such as us-west4-a; needed by all but fetch
  --project            default: gcloud's
  --accelerator_type   default v5litepod-16
  --runtime_version    default: what fits the accelerator type
  --spot               ask for spot capacity: much cheaper, and preempted at any time
  --workdir            gs://BUCKET/…: the run directory, which all workers and the next slice share
  --config             a file of configs/, relative to the checkout
  --task               distill or pretrain (default distill)
  --tries              how often a training that failed is started again on the same slice (default 10)
  --pause              seconds before that; more than --lost_after of distiljax, which is 60 (default 90)
  --poll               seconds between two looks of watch and create (default 60)
  --worker             whose log `logs` follows (default 0)
  --out                where `fetch` puts the run (default: the last part of --workdir, in runs/)
  --all                `fetch` takes the checkpoints too, which are large and only needed to go on with the run
  --env=KEY=VALUE      set on the workers; may be repeated
  --create_flag=FLAG   passed to `gcloud … queued-resources create`, such as --reserved; may be repeated
  --ssh_flag=FLAG      passed to `gcloud … ssh` and `scp`, such as --internal-ip; may be repeated
  --dry_run            print the commands, each as a shell takes it, and run none

Each flag with a value has a default in the environment: POD_ZONE is that of --zone. What stands after a lone -- goes to
distiljax, the same on every worker. Several workers are reached at once only if ssh finds your key in its agent:
ssh-add ~/.ssh/google_compute_engine.

  export POD_ZONE=us-west4-a POD_SPOT=1 POD_WORKDIR=gs://bucket/runs/distilbert POD_CONFIG=configs/distilbert_base.py
  scripts/tpu_pod.sh watch --dry_run -- --config.data_dir=gs://bucket/rows
  scripts/tpu_pod.sh watch -- --config.data_dir=gs://bucket/rows
  scripts/tpu_pod.sh fetch
  scripts/tpu_pod.sh delete

exit status: 0 done    1 the run failed, or the slice cannot be had    2 bad input
HELP
}

flags=(name zone project accelerator_type runtime_version workdir config task tries pause poll worker out)
switches=(spot all dry_run)
lists=(env create_flag ssh_flag)
name=distiljax zone='' project='' accelerator_type=v5litepod-16 runtime_version='' workdir='' config='' task=distill
tries=10 pause=90 poll=60 worker=0 out='' spot='' all='' dry_run=''
env=() create_flag=() ssh_flag=()

command=${1:-}
case $command in
  '' | -h | --help | help)
    usage
    exit 0
    ;;
  create | copy | run | watch | resume | status | logs | stop | fetch | delete) shift ;;
  *) fail "unknown command '$command'; scripts/tpu_pod.sh --help lists them" ;;
esac
from_environment POD
parse_flags "$@"

check_name
[[ $command == fetch ]] || needed zone "the zone of the slice, such as us-west4-a"
for key in tries pause poll; do
  whole "$key" 1
done
whole worker 0
case $command in
  run | watch | resume | status | fetch)
    needed workdir "the run directory, such as gs://bucket/runs/distilbert"
    [[ $workdir == gs://?*/?* ]] || fail "--workdir is '$workdir'; expected gs://BUCKET/PATH, which every worker can reach"
    workdir=${workdir%/}
    ;;
esac
case $command in
  run | watch | resume)
    needed config "a file of configs/, such as configs/distilbert_base.py"
    [[ $config == configs/* && -f $root/${config%%:*} ]] ||
      fail "--config is '$config'; expected a file of configs/ in $root, which is what is copied to the workers"
    [[ $task == distill || $task == pretrain ]] || fail "--task is '$task'; expected distill or pretrain"
    check_extra workdir config
    for key in ${env[@]+"${env[@]}"}; do
      [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env is '$key'; expected KEY=VALUE"
    done
    ;;
esac
if [[ -z $runtime_version ]]; then
  case $accelerator_type in
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v4-*) runtime_version=tpu-ubuntu2204-base ;;
    *) fail "--runtime_version is missing: --accelerator_type=$accelerator_type is none of v4-, v5litepod-, v5p- and v6e-" ;;
  esac
fi

place=("--zone=$zone" ${project:+"--project=$project"})
tpus=(gcloud compute tpus)

# What is said to the workers.

on_workers() {
  run "${tpus[@]}" tpu-vm ssh "$name" "${place[@]}" ${ssh_flag[@]+"${ssh_flag[@]}"} "--worker=$1" "--command=$2"
}

# The runtime's own Python may be older than 3.11, which is why uv brings one.
setup_script() {
  cat <<'REMOTE'
set -e
mkdir -p distiljax/src
tar -xzf distiljax.tar.gz -C distiljax/src
cd distiljax/src
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python=3.12 ../venv
python3 -m uv pip install --quiet --python=../venv/bin/python '.[tpu,gcs]'
REMOTE
}

# A worker on which it runs already is left alone, so `run` may be repeated.
run_script() {
  local training
  training=$(quote setsid nohup env ${env[@]+"${env[@]}"} DISTILJAX_PYTHON=../venv/bin/python \
    bash scripts/until_finished.sh "--workdir=$workdir" "--tries=$tries" "--pause=$pause" --status=../status -- \
    ../venv/bin/distiljax "$task" "--config=$config" "--workdir=$workdir" ${extra[@]+"${extra[@]}"})
  cat <<REMOTE
cd distiljax/src || { echo "distiljax is not here yet; copy it first" >&2; exit 1; }
if kill -0 "\$(cat ../pid 2>/dev/null)" 2>/dev/null; then
  echo "runs already"
else
  rm -f ../status
  $training >>../run.log 2>&1 </dev/null &
  echo \$! >../pid
fi
REMOTE
}

state_script() {
  cat <<'REMOTE'
cd distiljax/src 2>/dev/null || { echo distiljax_state=missing; exit; }
if kill -0 "$(cat ../pid 2>/dev/null)" 2>/dev/null; then
  echo distiljax_state=running
else
  echo "distiljax_state=$(cat ../status 2>/dev/null || echo gone)"
fi
tail -n 1 ../run.log 2>/dev/null || true
REMOTE
}

# What is asked of Cloud TPU. `list` says nothing about what is not there, where `describe` fails as it does for want of
# a network: a slice must not be deleted because of the latter.

slice_state() { run "${tpus[@]}" tpu-vm list "${place[@]}" "--filter=name~(^|/)$name\$" '--format=value(state)'; }

request_state() {
  run "${tpus[@]}" queued-resources list "${place[@]}" "--filter=name~(^|/)$name\$" '--format=value(state.state)'
}

create() {
  run "${tpus[@]}" queued-resources create "$name" "--node-id=$name" "${place[@]}" \
    "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" ${spot:+--spot} \
    ${create_flag[@]+"${create_flag[@]}"} && wait_until_active
}

wait_until_active() {
  local state last=''
  if [[ -n $dry_run ]]; then
    remark "every $poll s, until it says ACTIVE:"
    request_state
    return
  fi
  while true; do
    state=$(request_state) || state='no answer'
    [[ $state == "$last" ]] || note "$name: ${state:-gone}"
    last=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | '')
        note "$name cannot be had (${state:-gone}); 'gcloud compute tpus queued-resources describe' says why"
        return 1
        ;;
    esac
    sleep "$poll"
  done
}

delete() { run "${tpus[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet; }

copy() {
  local archive=${TMPDIR:-/tmp}/distiljax-$name.tar.gz
  run tar -czf "$archive" --exclude=__pycache__ -C "$root" \
    pyproject.toml README.md LICENSE distiljax configs scripts/until_finished.sh &&
    run "${tpus[@]}" tpu-vm scp "$archive" "$name:distiljax.tar.gz" "${place[@]}" ${ssh_flag[@]+"${ssh_flag[@]}"} \
      --worker=all &&
    on_workers all "$(setup_script)"
}

start() { on_workers all "$(run_script)"; }

# From nothing, or from what a preemption has left, to a training that runs.
recover() {
  local state
  if [[ -n $dry_run ]]; then
    remark "unless this says nothing:"
    request_state
    delete
  else
    state=$(request_state) || return 1
    if [[ -n $state ]]; then
      delete || return 1
    fi
  fi
  create && copy && start
}

finished() { gcloud storage ls "$workdir/result.json" >/dev/null 2>&1; }

# One look; status 0: look again later, and the run ends the script when it is finished or of no use to go on with.
look() {
  local state answers worker_state
  if finished; then
    note "finished: $workdir/result.json is there; next: fetch, delete"
    exit 0
  fi
  if ! state=$(slice_state); then
    note "no answer about $name; looking again"
    return
  fi
  case $state in
    READY) ;;
    '' | PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING)
      note "$name: ${state:-not there}; making a new one"
      recover || note "that came to nothing; looking again"
      return
      ;;
    *)
      note "$name: $state"
      return
      ;;
  esac
  if ! answers=$(on_workers all "$(state_script)"); then
    note "the workers of $name do not answer; looking again"
    return
  fi
  worker_state=$(sed -n 's/^distiljax_state=//p' <<<"$answers" | sort -u | tr '\n' ' ')
  case " $worker_state" in
    ' running ') ;;
    *' 2 '*)
      note "bad input; the log says what: scripts/tpu_pod.sh logs --name=$name --zone=$zone"
      exit 2
      ;;
    *' missing '*)
      note "distiljax is not on all workers; copying it"
      { copy && start; } || note "that came to nothing; looking again"
      ;;
    *' gone '* | *' 75 '* | *' 0 '*)
      note "stopped on some workers ($worker_state); starting it again"
      start || note "that came to nothing; looking again"
      ;;
    *' running '*) ;; # the others are about to notice
    *)
      note "the run failed $tries times, at last with status ${worker_state% }; the log says why:" \
        "scripts/tpu_pod.sh logs --name=$name --zone=$zone"
      exit 1
      ;;
  esac
}

watch() {
  if [[ -n $dry_run ]]; then
    remark "every $poll s; the end, if it is there:"
    quote gcloud storage ls "$workdir/result.json"
    slice_state
    remark "READY: what the workers are doing; started again where it has stopped"
    on_workers all "$(state_script)"
    remark "not there, or preempted:"
    recover
    return
  fi
  while true; do
    look
    sleep "$poll"
  done
}

status() {
  if [[ -n $dry_run ]]; then
    request_state
    slice_state
    on_workers all "$(state_script)"
    quote gcloud storage ls "$workdir/result.json"
    return
  fi
  local state
  state=$(request_state)
  echo "request: ${state:-not there}"
  state=$(slice_state)
  echo "slice: ${state:-not there}"
  if [[ $state == READY ]]; then
    on_workers all "$(state_script)"
  fi
  if finished; then
    echo "run: finished"
  else
    echo "run: not finished"
  fi
}

fetch() {
  local target=${out:-runs/${workdir##*/}}
  run mkdir -p "$target"
  # data/ holds rows that were prepared into the run directory.
  if [[ -n $all ]]; then
    run gcloud storage rsync --recursive "$workdir" "$target"
  else
    run gcloud storage rsync --recursive '--exclude=^(checkpoints|data)/' "$workdir" "$target"
  fi
}

case $command in
  create | copy | delete | watch | status | fetch) "$command" ;;
  run) start ;;
  resume) recover ;;
  logs) on_workers "$worker" "tail -n 100 -F distiljax/run.log" ;;
  stop) on_workers all "kill -TERM \"\$(cat distiljax/pid)\"" ;;
esac
