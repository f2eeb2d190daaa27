#!/usr/bin/env bash
# Runs the tests: bash run_tests.sh [pytest's arguments]
#
#     bash run_tests.sh                     everything that needs no GPU, two test files at a time
#     bash run_tests.sh --smoke             every plan once, on two CPU ranks: under two minutes on two cores
#     bash run_tests.sh -m gpu              what needs GPUs (GEMINI_PARITY_OUT=FILE: its parity table in FILE.md)
#     bash run_tests.sh tests/cli/test_config.py -k placement
#     bash run_tests.sh --mutate [MODULE]   whether the tests notice small changes of a module: docs/contributing.md
#
# The first start installs what is needed (install.sh --dev). The exit code is pytest's. Nothing outlives it: a process
# that a test left behind is named and killed.

set -euo pipefail
cd "$(dirname "$(readlink -f -- "${BASH_SOURCE[0]}")")"

[[ ${1:-} != --mutate ]] || exec bash tests/mutation/run.sh "${@:2}"
marked="not gpu and not smoke" # a later -m among the arguments wins
if [[ ${1:-} == --smoke ]]; then
    marked="smoke"
    set -- tests/test_smoke.py "${@:2}" # alone, since collecting the others takes longer than a run
elif (($# == 0)); then
    set -- --numprocesses 2 --dist loadfile # by file: fixtures that train are made once
fi
python="$(bash install.sh --dev)"

# Two ranks with a thread pool each would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Every process that a test starts inherits it, whatever session or process group it moves to.
run_id="$$-$(date +%s%N)"
export GEMINI_TEST_RUN="$run_id"

# stragglers: ids of the processes of this test run, without grep itself.
# shellcheck disable=SC2329  # called by sweep
stragglers() {
    env -u GEMINI_TEST_RUN grep -lzxsF "GEMINI_TEST_RUN=$run_id" /proc/[0-9]*/environ | cut -d/ -f3
}

# shellcheck disable=SC2329  # called by a trap
sweep() {
    local pids pid command
    trap '' INT TERM # a second Ctrl-C does not stop it
    for _ in 1 2 3 4 5 6; do # what is just ending was not left behind
        mapfile -t pids < <(stragglers)
        ((${#pids[@]})) || return 0
        sleep 0.5
    done
    for pid in "${pids[@]}"; do
        command="$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | cut -c1-150)" || continue # it ended meanwhile
        echo "run_tests.sh: killed a process left behind: $pid ($command)" >&2
        kill -KILL "$pid" 2>/dev/null || true
    done
    for _ in {1..50}; do # on a busy machine a killed process is there for a moment more
        mapfile -t pids < <(stragglers)
        ((${#pids[@]})) || return 0
        sleep 0.1
    done
}

# Its own process group: a signal that reaches this script alone ends pytest too.
set -m
"$python" -m pytest -m "$marked" --durations=15 "$@" &
pytest=$!
trap 'kill -INT -- "-$pytest" 2>/dev/null || true' INT TERM
trap 'sweep' EXIT
code=0
# `wait` returns as soon as a trapped signal comes, but pytest still has its summary to print
while wait "$pytest" || code=$?; kill -0 "$pytest" 2>/dev/null; do :; done
exit "$code"
