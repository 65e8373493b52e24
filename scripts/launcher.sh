# shellcheck shell=bash
# What the launchers share: flags, errors, quoting, dry runs. Sourced by them, not run.
#
# A launcher sets `flags` (flags that take a value), `switches` (flags that do not) and `lists` (flags that may be
# repeated), gives each its default as a variable of that name, and calls `parse_flags`.

# One line on standard error; status 2, as distiljax has for bad input.
fail() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

note() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# The words as one line that a shell reads back as the same words.
quote() {
  local word quoted line='' escaped="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,^-]+$ ]]; then
      quoted=$word
    else
      quoted="'${word//"'"/$escaped}'"
    fi
    line+="${line:+ }$quoted"
  done
  printf '%s\n' "$line"
}

# Run a command, or only print it in a dry run.
run() {
  if [[ -n ${dry_run:-} ]]; then
    quote "$@"
  else
    "$@"
  fi
}

# In a dry run, a comment on what the launcher does between two commands.
remark() {
  if [[ -n ${dry_run:-} ]]; then
    printf '# %s\n' "$*"
  fi
}

# from_environment PREFIX: PREFIX_ZONE is the default of --zone, and so on for every flag but the repeated ones; a switch
# is on if its variable is not empty.
from_environment() {
  local key variable upper
  # shellcheck disable=SC2154 # the launcher sets the three lists
  upper=" $(tr '[:lower:]' '[:upper:]' <<<"${flags[*]} ${switches[*]}") "
  for key in "${flags[@]}" "${switches[@]}"; do
    read -r variable upper <<<"$upper"
    variable=$1_$variable
    if [[ -n ${!variable:-} ]]; then
      printf -v "$key" %s "${!variable}"
    fi
  done
}

_is_in() {
  local word=$1 known
  shift
  for known in "$@"; do
    [[ $word != "$known" ]] || return 0
  done
  return 1
}

# Sets the variables named by the flags; what stands after `--` goes to `extra`.
parse_flags() {
  local argument key
  extra=()
  while (($#)); do
    argument=$1
    shift
    case $argument in
      --)
        extra=("$@")
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --*) ;;
      *) fail "unexpected argument '$argument'; flags begin with --, arguments of distiljax stand after a lone --" ;;
    esac
    key=${argument%%=*}
    key=${key#--}
    # shellcheck disable=SC2154
    if _is_in "$key" "${switches[@]}"; then
      [[ $argument != *=* ]] || fail "--$key takes no value; got '$argument'"
      printf -v "$key" 1
      continue
    fi
    # shellcheck disable=SC2154
    _is_in "$key" "${flags[@]}" "${lists[@]}" ||
      fail "unknown flag --$key; '$(basename "$0") --help' lists them; arguments of distiljax stand after a lone --"
    if [[ $argument != *=* ]]; then
      # A flag that has lost its value must not eat the next one, which may be --dry_run.
      [[ $# -gt 0 && $1 != --* ]] || fail "--$key needs a value; write --$key=VALUE"
      argument="--$key=$1"
      shift
    fi
    if _is_in "$key" "${lists[@]}"; then
      eval "$key+=(\"\${argument#*=}\")"
    else
      printf -v "$key" %s "${argument#*=}"
    fi
  done
}

# needed NAME WHAT: the flag has a value.
needed() {
  [[ -n ${!1} ]] || fail "--$1 is missing: $2"
}

# whole NAME LEAST: the flag is a whole number of at least LEAST.
whole() {
  if ! [[ ${!1} =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < $2)); then
    fail "--$1 is '${!1}'; expected a whole number of at least $2"
  fi
}

# The name goes into host names: what DNS allows, with room for what is appended to it.
check_name() {
  # shellcheck disable=SC2154
  if ! [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || ((${#name} > 40)); then
    fail "--name is '$name'; expected at most 40 of a-z, 0-9 and -, a letter first, no - at the end"
  fi
}

# The arguments after `--` must not give what the launcher itself gives to distiljax.
check_extra() {
  local argument key
  for argument in ${extra[@]+"${extra[@]}"}; do
    [[ $argument != --config.* || $argument == *=* ]] || fail "$argument needs a value; write $argument=VALUE"
    for key in "$@"; do
      case $argument in
        "--$key" | "--$key="*) fail "$argument stands after --; give --$key before it, the launcher needs to know it" ;;
      esac
    done
  done
}
