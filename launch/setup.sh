# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment in .venv, installed once.
#
#   set_up run | test | s3 | gcs | azure    afterwards $PYTHON_IN_VENV has the package, with what
#                                           its tests or that storage need, if anything
#
# A stamp in .venv holds what was installed, and is written last: while it fits, a call costs one
# start of Python. Two calls at once wait for each other. LAUNCH_PYTHON=path/to/python uses an
# environment that somebody else has made, and installs nothing.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
SCRIPT=${0##*/}

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }

die() { # die CODE MESSAGE
  say "${@:2}"
  exit "$1"
}

# shellcheck disable=SC2034 # PYTHON_IN_VENV is for the scripts that source this
set_up() {
  local extra=$1
  PYTHON_IN_VENV=$VENV/bin/python
  if [[ -n ${LAUNCH_PYTHON:-} ]]; then
    [[ -x $LAUNCH_PYTHON ]] || die 64 "LAUNCH_PYTHON: found no program at $LAUNCH_PYTHON"
    PYTHON_IN_VENV=$LAUNCH_PYTHON
    export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
    return
  fi
  is_installed "$extra" && return
  # The lock is on a file that is never removed, unlike .venv. Children inherit it: a pip that
  # outlives this script keeps others out until it ends.
  exec 9<"$ROOT/pyproject.toml"
  if command -v flock >/dev/null && ! flock --nonblock 9; then
    say "waiting for another set-up of $VENV"
    flock 9
  fi
  is_installed "$extra" || install_package "$extra"
  exec 9<&-
}

# The place belongs to the identity: an editable install points to it.
identity() {
  [[ -x $VENV/bin/python ]] || return 1
  { "$VENV/bin/python" -c 'import sys; print(sys.version)' && echo "$ROOT" && cat "$ROOT/pyproject.toml"; } \
    2>/dev/null | cksum
}

is_installed() { # is_installed EXTRA
  local wanted
  wanted=$(identity) || return 1
  [[ $(cat "$VENV/installed-$1" 2>/dev/null) == "$wanted" ]]
}

install_package() { # install_package EXTRA
  local what=$ROOT python
  [[ $1 == run ]] || what="${ROOT}[$1]"
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "creating $VENV with $python"
    "$python" -m venv --clear "$VENV" >&2
  fi
  rm -f "$VENV/installed-$1"
  say "installing $what and what it needs into $VENV (minutes on the first call: torch is large)"
  "$VENV/bin/python" -m pip install --disable-pip-version-check --editable "$what" >&2 </dev/null ||
    die 75 "pip could not install the package; its lines above say why. Call $SCRIPT again"
  "$VENV/bin/python" -c 'import torch, fmnist_dist' ||
    die 75 "what pip installed does not work; remove $VENV and call $SCRIPT again"
  identity >"$VENV/stamp-$$"
  # What suffices for the tests, or for any storage, suffices for a run; the tests have S3 as well.
  [[ $1 == run ]] || cp "$VENV/stamp-$$" "$VENV/installed-run"
  [[ $1 != test ]] || cp "$VENV/stamp-$$" "$VENV/installed-s3"
  mv "$VENV/stamp-$$" "$VENV/installed-$1"
}

# Prints the first Python that can make a virtual environment. Found is not enough: pyenv has shims
# for versions that are not there, and Debian ships Python without ensurepip.
find_python() {
  local python name="" probe='import sys; sys.exit(sys.version_info < (3, 11))'
  for python in python3.13 python3.12 python3.11 python3; do
    "$python" -c "$probe" >/dev/null 2>&1 || continue
    if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      echo "$python"
      return
    fi
    name=${name:-$python}
  done
  [[ -n $name ]] || die 64 "found no Python 3.11 or newer; on Debian: apt-get install python3 python3-venv"
  die 64 "found $name, but it cannot make virtual environments; on Debian: apt-get install $name-venv"
}
