#!/usr/bin/env bash
# Train in a Kubernetes cluster as a JobSet: on a TPU slice of GKE, or on GPU hosts.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/launcher.sh
source "$root/scripts/launcher.sh"

usage() {
  cat <<'HELP'
usage: scripts/jobset.sh COMMAND [--flag=VALUE …] [-- ARGUMENTS OF DISTILJAX]

  build    build --image from this checkout and push it
  apply    start the run; it is restarted by itself until it is finished
  status   the JobSet and its pods
  logs     follow the log of one host (--worker)
  suspend  tell the run to save and leave; the nodes are free
  resume   go on with a suspended run
  delete   delete the JobSet; the run in --workdir stays, and `apply` goes on with it

  --kind             tpu or gpu (default tpu)
  --name             of the JobSet (default distiljax)
  --image            such as us-docker.pkg.dev/PROJECT/REPOSITORY/distiljax:1
  --workdir          the run directory: gs://BUCKET/…, or below /shared with --pvc
  --config           a file of configs/, which is in the image
  --task             distill or pretrain (default distill)
  --accelerator      TPU: default tpu-v5-lite-podslice; or tpu-v6e-slice, tpu-v4-podslice, …
  --topology         TPU: of the slice (default 4x4)
  --chips_per_host   TPU: of the node pool's machine type (default 4)
  --hosts            GPU: how many (default 1)
  --gpus             GPU: of a host (default 8)
  --gpu_type         GPU: GKE's name for it, such as nvidia-h100-80gb; needed where there are several kinds
  --spot             on GKE's spot nodes
  --pvc              a volume claim, mounted at /shared on every host
  --service_account  the Kubernetes service account that may write to the bucket
  --secret           a secret whose keys become environment variables, such as HF_TOKEN
  --env=KEY=VALUE    an environment variable; may be repeated
  --max_restarts     after this many the run has failed; preemptions count (default 30)
  --grace            seconds that a pod has for saving when it is told to end (default 300)
  --context, --namespace   of kubectl; its own by default
  --worker           whose log `logs` follows (default 0)
  --dry_run          print the commands and the YAML, as a shell takes them, and run none

Each flag with a value has a default in the environment: JOBSET_IMAGE is that of --image. What stands after a lone --
goes to distiljax. The cluster needs JobSet 0.6 or newer (https://jobset.sigs.k8s.io).

  scripts/jobset.sh apply --image=IMAGE --topology=4x4 --workdir=gs://bucket/runs/distilbert \
      --config=configs/distilbert_base.py --dry_run -- --config.data_dir=gs://bucket/rows

exit status: 0 done    2 bad input    otherwise that of the command which failed
HELP
}

flags=(kind name image workdir config task accelerator topology chips_per_host hosts gpus gpu_type pvc service_account
  secret max_restarts grace context namespace worker)
switches=(spot dry_run)
lists=(env)
# shellcheck disable=SC2034 # some are only read by the name that stands in the template
kind=tpu name=distiljax image='' workdir='' config='' task=distill accelerator=tpu-v5-lite-podslice topology=4x4 \
  chips_per_host=4 hosts=1 gpus=8 gpu_type='' pvc='' service_account='' secret='' max_restarts=30 grace=300 context='' \
  namespace='' worker=0 spot='' dry_run=''
env=()

command=${1:-}
case $command in
  '' | -h | --help | help)
    usage
    exit 0
    ;;
  build | apply | status | logs | suspend | resume | delete) shift ;;
  *) fail "unknown command '$command'; scripts/jobset.sh --help lists them" ;;
esac
from_environment JOBSET
parse_flags "$@"

check_name
[[ $kind == tpu || $kind == gpu ]] || fail "--kind is '$kind'; expected tpu or gpu"
for key in chips_per_host hosts gpus grace; do
  whole "$key" 1
done
for key in max_restarts worker; do
  whole "$key" 0
done
if [[ $command == build || $command == apply ]]; then
  needed image "the image of the run, such as us-docker.pkg.dev/PROJECT/REPOSITORY/distiljax:1"
fi
if [[ $command == apply ]]; then
  needed workdir "the run directory, such as gs://bucket/runs/distilbert"
  [[ $workdir == *://* || (-n $pvc && $workdir == /shared/*) ]] ||
    fail "--workdir is '$workdir'; expected gs://BUCKET/PATH, or a path below /shared with --pvc"
  needed config "a file of configs/, such as configs/distilbert_base.py"
  [[ $config == configs/* && -f $root/${config%%:*} ]] ||
    fail "--config is '$config'; expected a file of configs/ in $root, which is what the image holds"
  [[ $task == distill || $task == pretrain ]] || fail "--task is '$task'; expected distill or pretrain"
  check_extra workdir config coordinator_address num_processes process_id
  for key in "$image" "$workdir" ${extra[@]+"${extra[@]}"} ${env[@]+"${env[@]}"}; do
    key=${key//[$'\t\n']/}
    [[ $key != *[[:cntrl:]]* ]] || fail "$(quote "$key") holds a control character; remove it"
  done
  for key in ${env[@]+"${env[@]}"}; do
    [[ $key =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env is '$key'; expected KEY=VALUE"
  done
fi
if [[ $kind == tpu ]]; then
  [[ $topology =~ ^[1-9][0-9]?(x[1-9][0-9]?){1,2}$ ]] || fail "--topology is '$topology'; expected such as 4x4 or 2x2x4"
  all_chips=$((${topology//x/*}))
  chips=$((all_chips < chips_per_host ? all_chips : chips_per_host))
  ((all_chips % chips == 0)) ||
    fail "--topology=$topology has $all_chips chips, which do not divide by --chips_per_host=$chips_per_host"
  hosts=$((all_chips / chips))
else
  chips=$gpus
fi

kube=(kubectl ${context:+"--context=$context"} ${namespace:+"--namespace=$namespace"})

# The word as a JSON string, which is one of YAML too. Goes to `string`.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\t'/\\t}
  text=${text//$'\n'/\\n}
  string="\"$text\""
}

# The words as a JSON list.
json_list() {
  local word string list=''
  for word in "$@"; do
    json "$word"
    list+="${list:+, }$string"
  done
  printf '[%s]' "$list"
}

# A text in which Kubernetes shall not replace $(NAME). Goes to `text`.
literal() {
  local dollar='$'
  text=${1//"$dollar"/$dollar$dollar}
}

container_arguments() {
  local word text words=()
  for word in "--workdir=$workdir" --tries=1 -- distiljax "$task" "--config=$config" "--workdir=$workdir" \
    ${extra[@]+"${extra[@]}"}; do
    literal "$word"
    words+=("$text")
  done
  if [[ $kind == gpu ]] && ((hosts > 1)); then
    # shellcheck disable=SC2016 # Kubernetes replaces it
    words+=("--coordinator_address=$name-hosts-0-0.$name:8476" "--num_processes=$hosts" \
      '--process_id=$(JOB_COMPLETION_INDEX)')
  fi
  json_list "${words[@]}"
}

environment() {
  local pair text string list=''
  for pair in ${env[@]+"${env[@]}"}; do
    literal "${pair#*=}"
    json "$text"
    list+="${list:+, }{\"name\": \"${pair%%=*}\", \"value\": $string}"
  done
  printf '[%s]' "$list"
}

# The template with its places filled in and the lines of flags that are not given left out.
manifest() {
  local line key value string condition args environment
  # shellcheck disable=SC2034 # the condition of the template's nodeSelector
  local select=$gpu_type$spot
  args=$(container_arguments)
  environment=$(environment)
  while IFS= read -r line; do
    if [[ $line =~ ^(.*[^\ ])\ *'#? '([a-z_]+)$ ]]; then
      condition=${BASH_REMATCH[2]}
      line=${BASH_REMATCH[1]}
      [[ -n ${!condition} ]] || continue
    fi
    # One place a line, so that what is filled in is not looked at again.
    if [[ $line != '#'* && $line =~ ^(.*)'{{'([a-z_]+)'}}'(.*)$ ]]; then
      key=${BASH_REMATCH[2]}
      case $key in
        args) value=$args ;;
        env) value=$environment ;;
        hosts | chips | grace | max_restarts) value=${!key} ;;
        *)
          json "${!key}"
          value=$string
          ;;
      esac
      line=${BASH_REMATCH[1]}$value${BASH_REMATCH[3]}
    fi
    printf '%s\n' "$line"
  done <"$root/scripts/jobset/$kind.yaml"
}

apply() {
  local yaml
  yaml=$(manifest)
  if [[ -n $dry_run ]]; then
    printf "%s <<'END_OF_YAML'\n%s\nEND_OF_YAML\n" "$(quote "${kube[@]}" apply --filename=-)" "$yaml"
  else
    "${kube[@]}" apply --filename=- <<<"$yaml"
  fi
}

build() {
  run docker build --platform=linux/amd64 "--file=$root/scripts/jobset/Dockerfile" "--build-arg=EXTRAS=$kind,gcs" \
    "--tag=$image" "$root"
  run docker push "$image"
}

status() {
  run "${kube[@]}" get jobset "$name"
  run "${kube[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

logs() {
  run "${kube[@]}" logs --follow --tail=100 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=$worker"
}

# suspend: the pods are deleted, which tells them to save; resume: they are made again.
patch() { run "${kube[@]}" patch jobset "$name" --type=merge "--patch={\"spec\": {\"suspend\": $1}}"; }

case $command in
  suspend) patch true ;;
  resume) patch false ;;
  delete) run "${kube[@]}" delete jobset "$name" ;;
  *) "$command" ;;
esac
