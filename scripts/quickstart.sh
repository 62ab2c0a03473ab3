#!/usr/bin/env bash
# The whole way from text to affinity-placed decode on four ranks, with all set-up; writes out/quickstart/report.html.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/environment.sh
source scripts/lib/environment.sh
prepare_environment
exec python scripts/quickstart.py "$@"
