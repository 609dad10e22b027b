# Sourced by quickstart and test: makes .venv in the checkout, once, with the pinned versions. Leaves $CHECKOUT set.
# Extras of the package to install: $1 (such as "[dev]").
set -euo pipefail
CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() { # the newest of the Pythons on PATH that will do; $PYTHON overrides
    local candidate
    for candidate in "${PYTHON:-python3.13}" python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "expected Python 3.11 or newer on PATH, found none; set PYTHON to one" >&2
    return 1
}

make_environment() {
    local venv="$CHECKOUT/.venv" extras=$1 state
    if [ ! -x "$venv/bin/python" ]; then
        "$(find_python)" -m venv "$venv"
    elif [ ! -x "$venv/bin/uv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "$venv/bin/python" -m ensurepip >/dev/null # making it was interrupted
    fi
    # Installing takes seconds even when nothing is missing: skip it while neither the pins nor the project changed.
    # What `test` installed is more than enough for `quickstart`.
    state=$(cat "$CHECKOUT/pyproject.toml" "$CHECKOUT/tools/constraints.txt" <(echo "$CHECKOUT") | cksum)
    case "$(cat "$venv/installed" 2>/dev/null)" in
    "$state $extras"* | "$state [dev]") return ;;
    esac
    echo "installing torch, Lightning and others into $venv: minutes, the first time" >&2
    [ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
    "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" \
        --constraint "$CHECKOUT/tools/constraints.txt" --editable "$CHECKOUT$extras"
    echo "$state $extras" >"$venv/installed"
}
