#!/usr/bin/env bash
# Run a training command until its run is finished, which is when WORKDIR/result.json is there.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: until_finished.sh --workdir=DIR [--tries=N] [--pause=SECONDS] [--linger=SECONDS] [--status=FILE] -- COMMAND …

Runs COMMAND, such as `distiljax distill --workdir=DIR …`, and again if it ends before the run is finished. distiljax
ends with status 0 both when a run is finished and when it was told to stop and has saved; WORKDIR/result.json tells
the two apart.

  --workdir  the run directory; local, or gs:// or whatever epath knows (then $DISTILJAX_PYTHON looks, or else python)
  --tries    how often COMMAND is run at most; 1 = leave it to the caller to start it again (default 1)
  --pause    seconds before it is run again; more than distiljax's --lost_after, so that all hosts have ended (default 90)
  --linger   seconds to wait for result.json after status 0: another host may be writing it (default 60)
  --status   a file that gets the exit status

SIGTERM and SIGINT are passed on as SIGTERM, and COMMAND is not run again.

exit status:  0 finished    75 stopped, state saved, not finished: start it again to go on
              2 bad input, or no such command: starting it again is of no use
               otherwise that of COMMAND: the run failed
HELP
}

fail() {
  echo "until_finished.sh: error: $*" >&2
  exit 2
}

note() { echo "until_finished.sh: $*" >&2; }

# Whether the run is finished. What cannot be looked up counts as not finished: COMMAND finds out by itself.
finished() {
  if [[ $workdir != *://* ]]; then
    [[ -f $workdir/result.json ]]
    return
  fi
  "${DISTILJAX_PYTHON:-python}" -c '
import sys
from etils import epath
sys.exit(0 if (epath.Path(sys.argv[1]) / "result.json").exists() else 3)' "$workdir" && return 0
  (($? == 3)) || note "cannot look for $workdir/result.json (see above)"
  return 1
}

finished_soon() {
  local deadline=$((SECONDS + linger))
  until finished; do
    # Who is told to stop has little time, and result.json is written by runs that are not.
    if [[ -n $told ]] || ((SECONDS >= deadline)); then
      return 1
    fi
    sleep 2
  done
}

tell() {
  told=1
  if [[ -n $child ]]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
}

# Runs the command in the background, as only `wait` lets the shell act on a signal at once. Sets `status`.
run_command() {
  "$@" &
  child=$!
  # A signal may have come between two lines.
  if [[ -n $told ]]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
  while true; do
    status=0
    wait "$child" || status=$?
    # `wait` ends early when a signal has been passed on.
    kill -0 "$child" 2>/dev/null || break
  done
  # The command ended while the shell acted on a signal: ask again for its own status.
  if ((status > 128)); then
    status=0
    wait "$child" 2>/dev/null || status=$?
  fi
  child=''
}

workdir='' tries=1 pause=90 linger=60 status_file='' told='' child='' status=0
while (($#)); do
  case $1 in
    --workdir=*) workdir=${1#*=} ;;
    --tries=*) tries=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --linger=*) linger=${1#*=} ;;
    --status=*) status_file=${1#*=} ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) fail "unexpected argument '$1'; see until_finished.sh --help" ;;
  esac
  shift
done
[[ -n $workdir ]] || fail "--workdir is missing: the run directory"
(($#)) || fail "no command; give it after a lone --"
for key in tries pause linger; do
  [[ ${!key} =~ ^[0-9]{1,9}$ ]] || fail "--$key is '${!key}'; expected a whole number"
done
((10#$tries)) || fail "--tries is 0; expected at least 1"

trap tell TERM INT
if [[ -n $status_file ]]; then
  rm -f "$status_file"
  trap 'echo $? >"$status_file"' EXIT
fi
for ((try = 1; ; try++)); do
  run_command "$@"
  if ((status == 0)) && finished_soon; then
    note "finished: $workdir/result.json is there"
    exit 0
  fi
  if ((status == 2 || status == 126 || status == 127)); then
    note "bad input, or no such command (status $status): not run again"
    exit 2
  fi
  # 143: ended by SIGTERM itself, before it had anything to save.
  if ((status == 0)) || [[ -n $told && $status == 143 ]]; then
    status=75
  fi
  if [[ -n $told ]]; then
    note "told to stop (status $status); the same command goes on"
    exit "$status"
  fi
  if ((try >= tries)); then
    note "not finished (status $status) after $try of $tries tries; the same command goes on"
    exit "$status"
  fi
  note "not finished (status $status); try $((try + 1)) of $tries in $pause s"
  run_command sleep "$pause"
  [[ -z $told ]] || exit 75
done
