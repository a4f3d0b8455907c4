#!/usr/bin/env bash
# Make the virtual environment .venv, once, and install the project into it.
#
#   scripts/setup.sh              # what training needs
#   scripts/setup.sh dev          # and what tests need: pyproject.toml's extra of that name
#
# PYTHON=python3.10 scripts/setup.sh dev takes another Python (3.9 to 3.12).
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
python=${PYTHON:-}
if [ -z "$python" ]; then
    for python in python3.11 python3.10 python3.9 python3.12 none; do
        if [ "$python" = none ]; then
            echo "error: no Python from 3.9 to 3.12 is installed; torch 2.3.1 needs one (set PYTHON to name it)" >&2
            exit 2
        fi
        "$python" --version >/dev/null 2>&1 && break # a version manager's stand-in may be there and not work
    done
fi
# The stamp says for which pyproject.toml this was installed.
stamp=.venv/installed${extra:+-$extra}
if ! cmp -s pyproject.toml "$stamp"; then
    if [ ! -x .venv/bin/python ]; then
        "$python" -m venv .venv
    fi
    echo "installing into .venv with $(.venv/bin/python --version) (torch takes about two minutes)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extra:+[$extra]}"
    cp pyproject.toml "$stamp"
fi
