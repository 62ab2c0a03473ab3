#!/usr/bin/env bash
# Style, types and tests, with all set-up: a machine needs only bash and Python 3.10 or newer.
# Arguments go to pytest: `bash scripts/test.sh tests/unit -k plan`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/environment.sh
source scripts/lib/environment.sh
prepare_environment test lint

failed=()
check() {
  say "$*"
  "$@" || failed+=("$*")
}

check ruff check .
check ruff format --check .
check shellcheck --severity warning -x scripts/*.sh scripts/lib/*.sh launch/*.sh launch/slurm.sbatch .ci/run
check mypy
check python -m pytest -q "$@"

if [ ${#failed[@]} -gt 0 ]; then
  fail "not clean:$(printf '\n  %s' "${failed[@]}")"
fi
