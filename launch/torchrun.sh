#!/usr/bin/env bash
# One machine, a rank for each GPU; without GPUs, as many ranks as EXFLOW_RANKS says (2 unless set).
#
#   bash launch/torchrun.sh run MODEL --plan plan.json --prompts prompts.jsonl -o out.jsonl
#   EXFLOW_RANKS=4 bash launch/torchrun.sh profile MODEL 'pile/*.jsonl.zst' -o trace.safetensors
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "error: say what exflow shall do, as in: bash launch/torchrun.sh run MODEL --prompts ..." >&2
  exit 2
fi
if ! command -v torchrun >/dev/null; then
  echo "error: torchrun was not found; activate the environment that ExFlow is installed in" >&2
  exit 2
fi

count_gpus() {
  nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
}

if [[ ! ${EXFLOW_RANKS:-1} =~ ^[1-9][0-9]{0,3}$ ]]; then
  echo "error: EXFLOW_RANKS must be a number of ranks from 1, got '$EXFLOW_RANKS'" >&2
  exit 2
fi
ranks=${EXFLOW_RANKS:-$(count_gpus)}
if [ "$ranks" -eq 0 ]; then
  ranks=2
fi
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

exec torchrun --standalone --nproc-per-node "$ranks" -m exflow "$@"
