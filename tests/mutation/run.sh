#!/usr/bin/env bash
# bash run_tests.sh --mutate [MODULE ...]: mutation testing (mutate.py), of all modules without a name
# bash run_tests.sh --mutate planted [WORD ...]: faults planted by hand where it takes ranks (planted.py)

set -euo pipefail
here="$(dirname "$(readlink -f -- "${BASH_SOURCE[0]}")")"
root="$(dirname "$(dirname "$here")")"
python="$(bash "$root/install.sh" --dev)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [[ ${1:-} == planted ]]; then
    exec "$python" "$here/planted.py" "${@:2}"
fi
# Beside the environment, which stays as the tests have it.
tools="$root/.mutation"
if ! cmp -s "$root/requirements-mutate.txt" "$tools/installed"; then
    rm -rf "$tools"
    "$python" -m pip install --quiet --no-deps --target "$tools" -r "$root/requirements-mutate.txt"
    cp "$root/requirements-mutate.txt" "$tools/installed"
fi
PYTHONPATH="$tools${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$here/mutate.py" "$@"
