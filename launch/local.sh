#!/usr/bin/env bash
# Fresh machine → .venv, data, training on min(cores, logical shards) workers.
#
#   launch/local.sh [flags of fmnist_dist.train]
#
# Called again with the same flags, it goes on with the run. Relative paths in flags are relative to
# where you are. NPROC_PER_NODE sets the number of workers: the weights are the same for each.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

DRAINED=143 # of the agent: its workers have saved

main() {
  set_up run
  local flag
  for flag in "$@"; do
    [[ $flag != --help && $flag != -h ]] || exec "$PYTHON_IN_VENV" -m fmnist_dist.train --help
  done

  # Before anything that takes seconds.
  local config logical_shards run_dir extra
  config=$("$PYTHON_IN_VENV" -m fmnist_dist.settings "$@")
  logical_shards=$(setting "$config" logical_shards)
  run_dir=$(setting "$config" run_dir)
  if [[ $run_dir == *://* ]]; then
    extra=$("$PYTHON_IN_VENV" -c 'import sys
from fmnist_dist.checkpoint.place import extra_of
print(extra_of(sys.argv[1]))' "$run_dir")
    [[ -z $extra ]] || set_up "$extra"
  fi

  local workers=${NPROC_PER_NODE:-}
  if [[ -z $workers ]]; then
    workers=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    ((workers <= logical_shards)) || workers=$logical_shards
  fi
  say "training in $(place "$run_dir") on $workers workers"

  local code=0
  train "$workers" "$@" || code=$?
  if ((code == 0)); then
    report "$config" "$run_dir" "$@" || say "training has finished, but its run could not be read"
  elif [[ -n $signalled || $code == "$DRAINED" ]]; then
    say "stopped on ${signalled:-a signal}; the same command goes on with the last finished step"
  elif ((code > 128)); then
    say "the agent was ended by SIG$(kill -l "$code"), with its workers;" \
      "the same command goes on with the newest checkpoint"
  else
    say "training failed (exit code $code): the first error above says why;" \
      "when it is mended, the same command goes on with the newest checkpoint"
  fi
  return "$code"
}

setting() { # setting CONFIG KEY; CONFIG is TOML
  "$PYTHON_IN_VENV" -c 'import sys, tomllib
print(tomllib.loads(sys.argv[1])[sys.argv[2]])' "$@"
}

place() { # place RUN_DIR
  case $1 in
  /* | *://*) echo "$1" ;;
  *) echo "$PWD/$1" ;;
  esac
}

# Runs the agent on a port of its own, so that two runs may go on side by side; on 127.0.0.1, since
# not every machine can resolve its own name. Job control gives it a process group of its own, so
# that Ctrl-C reaches it once, from here, and a signal to this script alone reaches it at all.
train() { # train WORKERS FLAGS...
  local workers=$1 child signal code
  shift
  set -m
  OMP_NUM_THREADS=1 "$PYTHON_IN_VENV" -m launch.agent --standalone --local-addr=127.0.0.1 \
    --nproc-per-node="$workers" --max-restarts=100 -m fmnist_dist.train "$@" </dev/null &
  child=$!
  set +m
  for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # the child is known now
    trap "signalled=SIG$signal; is_interrupted=1; kill -s $signal $child 2>/dev/null || true" "$signal"
  done
  while :; do # a trapped signal ends `wait`, not the child
    is_interrupted=""
    code=0
    wait "$child" || code=$?
    [[ -n $is_interrupted ]] || break
  done
  trap - INT TERM HUP
  return "$code"
}

report() { # report CONFIG RUN_DIR FLAGS...
  local config=$1 run_dir=$2 summary status step accuracy max_steps continued
  shift 2
  summary=$("$PYTHON_IN_VENV" -m fmnist_dist.runs show "$run_dir" --json) || return
  read -r status step accuracy < <("$PYTHON_IN_VENV" -c 'import json, sys
run = json.loads(sys.argv[1])
accuracy = run["metrics"].get("test_accuracy")
print(run["status"], run["step"], "unknown" if accuracy is None else f"{accuracy:.4f}")' "$summary") || return
  max_steps=$(setting "$config" max_steps)
  if [[ $max_steps != none && $step -ge $max_steps ]]; then
    continued=$(command_without --max-steps "$@")
  else
    continued="$(command_without --epochs "$@") --epochs $((2 * $(setting "$config" epochs)))"
  fi
  echo "run            $(place "$run_dir") ($status, step $step)"
  echo "test accuracy  $accuracy"
  echo "to go on       $continued"
}

# Prints the command that was called, without one of its flags; a flag may stand there only once.
command_without() { # command_without FLAG FLAGS...
  local unwanted=$1 kept=()
  shift
  while (($#)); do
    case $1 in
    "$unwanted") shift ;;
    "$unwanted"=*) ;;
    *) kept+=("$1") ;;
    esac
    shift
  done
  printf '%q' "$0"
  ((${#kept[@]} == 0)) || printf ' %q' "${kept[@]}"
}

signalled=""
main "$@"
