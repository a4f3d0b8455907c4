#!/usr/bin/env bash
# Set up and run everything that has to be green: ruff, mypy, all quick tests, two at a time. Arguments go to pytest.
#
#   STACK=newest VENV=.venv-newest scripts/test.sh     # on the newest stack (see scripts/setup.sh)
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
scripts/setup.sh dev
# Tests on real weights skip without it; a machine that cannot fetch it still runs all others.
"$venv/bin/python" scripts/fetch_small_encoder.py models/small || echo "going on without the small encoder" >&2
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
# Types are those that torch 2.3 and transformers 4 declare; newer ones declare others.
[ "$(cat "$venv/stack")" != torchtext ] || "$venv/bin/mypy"
"$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
