#!/usr/bin/env bash
# Make a virtual environment, once, and install the project into it.
#
#   scripts/setup.sh                    # what training needs
#   scripts/setup.sh dev                # and what tests need: pyproject.toml's extra of that name
#   STACK=newest scripts/setup.sh       # the newest torch tested; STACK=torchtext: torch 2.3.1 with torchtext (see constraints/)
#
# Without STACK, an environment that is there keeps its stack; a new one gets torchtext's with Python 3.10 to 3.12, the
# newest with a newer Python. PYTHON=python3.10 takes another Python, VENV=FOLDER another folder than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
venv=${VENV:-.venv}
fail() {
    echo "error: $1" >&2
    exit 2
}
# A version manager's stand-in for a Python may be there and not work, so each is run. Prints 11 for Python 3.11.
minor_version() {
    "$1" -c 'import sys; sys.version_info[0] == 3 and print(sys.version_info[1])' 2>/dev/null
}
python=${PYTHON:-}
if [ -x "$venv/bin/python" ]; then
    python=$venv/bin/python
elif [ -z "$python" ]; then
    [ "${STACK:-}" = newest ] && candidates="3.13 3.12 3.11 3.10 3.14" || candidates="3.11 3.10 3.12 3.13 3.14"
    for version in $candidates none; do
        [ "$version" != none ] || fail "no Python from 3.10 on is installed (set PYTHON to name it)"
        python=python$version
        [ -z "$(minor_version "$python")" ] || break
    done
fi
minor=$(minor_version "$python") || true
[ -n "$minor" ] || fail "$python does not run; set PYTHON to name a Python from 3.10 on"
there=$(cat "$venv/stack" 2>/dev/null) || true
[ "$minor" -le 12 ] && default=torchtext || default=newest
STACK=${STACK:-${there:-$default}}
case $STACK in
    torchtext) latest=12 what=torchtext ;;
    newest) latest=99 what= ;;
    *) fail "STACK=$STACK: there are torchtext and newest" ;;
esac
[ "$minor" -ge 10 ] && [ "$minor" -le "$latest" ] ||
    fail "STACK=$STACK does not go with Python 3.$minor (torchtext: 3.10 to 3.12; newest: from 3.10); set PYTHON or STACK"

# The stamps say for which stack, pyproject.toml and constraints this was installed.
constraints=constraints/$STACK.txt
stamp=$venv/installed${extra:+-$extra}
[ "${there:-$STACK}" = "$STACK" ] ||
    fail "$venv has the stack $there, not $STACK; remove it, or name another folder: VENV=.venv-$STACK"
if ! cat pyproject.toml "$constraints" | cmp -s - "$stamp"; then
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -m venv "$venv"
    fi
    echo "$STACK" >"$venv/stack"
    extras=${what}${what:+${extra:+,}}$extra
    echo "installing the stack $STACK into $venv with $("$venv/bin/python" --version) (torch takes about two minutes)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".${extras:+[$extras]}"
    cat pyproject.toml "$constraints" >"$stamp"
fi
