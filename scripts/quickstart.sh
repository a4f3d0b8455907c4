#!/usr/bin/env bash
# From nothing to a trained model: environment, encoder, training on sample_data on the CPU, predictions.
#
#   scripts/quickstart.sh [RUN_FOLDER]        # default: runs/quickstart
#
# Needs Python 3.10 or newer and a Python package index; no GPU, no model host. Takes under ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
run=${1:-runs/quickstart}
if [ -e "$run" ]; then
    echo "error: $run already exists; name another folder: scripts/quickstart.sh runs/second" >&2
    exit 2
fi
scripts/setup.sh
"$venv/bin/python" scripts/fetch_small_encoder.py models/small
"$venv/bin/python" train.py --device cpu --encoder models/small --data-dir sample_data \
    --test-file sample_data/test.*.tsv --batch-size 16 --lr 6e-5 --epochs 5 --layerwise-lr-decay 0.9 --dropout 0.2 --output-dir "$run"
echo
"$venv/bin/python" - "$run/metrics.jsonl" <<'PYTHON'
import json, sys

lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
evaluations = [line for line in lines if "split" in line]
languages = [line["accuracy"] for line in evaluations if line["split"].startswith("test.")]
print(f"dev accuracy               {[line for line in evaluations if line['split'] == 'dev'][-1]['accuracy']:.4f}")
print(f"mean of other languages    {sum(languages) / len(languages):.4f}  ({len(languages)} languages, trained on English only)")
PYTHON
echo
"$venv/bin/python" scripts/predict.py --model "$run/model" \
    "I grinned from the first scene to the last." \
    "Two hours of my life that nobody will give back." \
    "Das Essen war kalt und der Kellner unfreundlich." \
    "这家酒店干净又安静,我们还会再来。"
