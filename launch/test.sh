#!/usr/bin/env bash
# Fresh machine → .venv, data, the test suite.
#
#   launch/test.sh [--all] [arguments of pytest]
#
# --all adds the slow tests. Every check runs even when one before it failed, so that one round
# shows everything; the exit code is 0 only if all passed. Paths are relative to the repository.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"

failed=()

check() { # check NAME COMMAND...
  printf '\n== %s\n' "$1"
  "${@:2}" </dev/null || failed+=("$1")
}

set_up test
cd "$ROOT"

select_tests=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [[ $argument == --all ]]; then select_tests=(); else arguments+=("$argument"); fi
done

python=$PYTHON_IN_VENV
check "ruff check" "$python" -m ruff check
check "ruff format" "$python" -m ruff format --check
check "mypy" "$python" -m mypy
check "pytest" "$python" -m pytest ${select_tests[@]+"${select_tests[@]}"} ${arguments[@]+"${arguments[@]}"}

if ((${#failed[@]})); then
  printf -v names '%s, ' "${failed[@]}"
  die 1 "failed: ${names%, }"
fi
say "all checks passed"
