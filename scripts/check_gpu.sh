#!/usr/bin/env bash
# Check on one GPU that this project computes what it computes on a CPU, and measure how fast.
#
#   scripts/check_gpu.sh                          # with the environment's Python, .venv/bin/python
#   PYTHON=python3 scripts/check_gpu.sh | tee gpu.txt
#
# Needs torch, numpy, safetensors, tqdm, tensorboard and sentencepiece, and no network: weights are random, texts those
# of sample_data. Where transformers and accelerate are installed, the Trainer is measured beside it. Prints results as
# they come on standard error, then one line of JSON; ends with status 1 if a check fails.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/${VENV:-.venv}/bin/python}
if ! command -v "$python" >/dev/null; then
    echo "error: $python not found; run scripts/setup.sh, or set PYTHON" >&2
    exit 2
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$root/scripts/bench/check_gpu.py" "$@"
