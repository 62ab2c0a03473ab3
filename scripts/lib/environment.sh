# shellcheck shell=bash
# Sourced from the root of the checkout. `prepare_environment EXTRA...` activates a virtual environment in which
# ExFlow is installed with those extras: the active one, or .venv, which is made if need be.
#
#   PYTHON              the interpreter that makes .venv       (default: the first of python3, python3.13 ... python3.10)
#   EXFLOW_TORCH_INDEX  a package index for torch alone        (default: pip's own settings)

prepare_environment() {
  activate_environment
  if ! is_installed "$@"; then
    install_exflow "$@"
  fi
}

activate_environment() {
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
      make_environment
    fi
    VIRTUAL_ENV="$PWD/.venv"
  fi
  export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"
  hash -r
}

make_environment() {
  local python
  python=$(find_python)
  say "making .venv with $("$python" --version)"
  if ! "$python" -m venv .venv >&2; then
    rm -rf .venv
    fail "$python cannot make virtual environments; install its venv package (python3-venv on Debian and Ubuntu)" \
      "or activate a virtual environment of your own, then run this again"
  fi
}

find_python() {
  local python
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$python"
      return
    fi
  done
  fail "ExFlow needs Python 3.10 or newer, and none was found; name one with PYTHON=/path/to/python3"
}

is_installed() {
  local extra stamp="$VIRTUAL_ENV/.exflow-installed"
  if [ ! -f "$stamp" ] || [ "$(head -n 1 "$stamp")" != "$(fingerprint)" ]; then
    return 1
  fi
  for extra in "$@"; do
    grep -qx "$extra" "$stamp" || return 1
  done
}

install_exflow() {
  local extras stamp="$VIRTUAL_ENV/.exflow-installed"
  extras=$({ tail -n +2 "$stamp" 2>/dev/null; printf '%s\n' "$@"; } | sed '/^$/d' | sort -u)
  if ! python -m pip --version >/dev/null 2>&1 && ! python -m ensurepip >&2; then
    fail "there is no pip in $VIRTUAL_ENV; install it there, then run this again"
  fi
  rm -f "$stamp"
  say "installing torch"
  pip_install ${EXFLOW_TORCH_INDEX:+--index-url "$EXFLOW_TORCH_INDEX"} torch
  say "installing ExFlow"
  pip_install --editable ".${extras:+[${extras//$'\n'/,}]}"
  printf '%s\n' "$(fingerprint)" "$extras" >"$stamp"
}

pip_install() {
  python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt "$@" >&2 ||
    fail "pip could not install $*; what it says is above"
}

# What an installation depends on: where the checkout is, what it asks for, and the Python it is for.
fingerprint() {
  python - <<'PYTHON'
import hashlib, pathlib, sys

parts = [sys.version, str(pathlib.Path.cwd())]
parts += [pathlib.Path(name).read_text() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

say() {
  echo "==> $*" >&2
}

fail() {
  echo "error: $*" >&2
  exit 1
}
