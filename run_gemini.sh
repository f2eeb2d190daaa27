#!/usr/bin/env bash
# Trains GPT-2 with Colossal-AI Gemini on whatever this machine has: GPUs, or two processes on the CPU.
#
#     bash run_gemini.sh                                                  the defaults for this machine
#     GPUNUM=2 DISTPLAN=CAI_ZeRO2 MODEL_TYPE=gpt2_xl bash run_gemini.sh   settings from the environment
#     bash run_gemini.sh --distplan CAI_ZeRO2 --train_step 100            settings as flags; flags win
#     bash run_gemini.sh --help                                           every flag
#     bash run_gemini.sh --doctor [--json] [--failure "the error's text"] why does it not start?
#
# Variables: DISTPLAN MODEL_TYPE BATCH_SIZE TRAIN_STEP GPUNUM TPDEGREE PPDEGREE PLACEMENT SEQ_LEN PRECISION, and for
# more than one machine NNODES NODE_RANK MASTER_ADDR MASTER_PORT. They are read by commons/launch.
# The first start installs what is needed (install.sh). The exit code is the training's.

set -euo pipefail
# Streams that were closed lead to nowhere: else the next file that is opened would take their place.
[[ -e /proc/self/fd/0 ]] || exec </dev/null
[[ -e /proc/self/fd/1 ]] || exec >/dev/null
[[ -e /proc/self/fd/2 ]] || exec 2>/dev/null
root="$(dirname "$(readlink -f -- "${BASH_SOURCE[0]}")")"

doctor="" others=() # --doctor stands anywhere, among flags that are the doctor's own then
for word in "$@"; do
    if [[ $word == --doctor ]]; then doctor=yes; else others+=("$word"); fi
done
if [[ -n $doctor ]]; then
    # It has to work where nothing can be installed, so any Python will do.
    python="$(bash "$root/install.sh" --which 2>/dev/null)" ||
        python="$(type -P "$root/.venv/bin/python" python3 python | head -n 1)" || true
    if [[ -z $python ]]; then
        echo "run_gemini.sh: error: no Python found: apt-get install python3 python3-venv" >&2
        exit 1
    fi
    exec "$python" "$root/commons/doctor" ${others[@]+"${others[@]}"}
fi

python="$(bash "$root/install.sh")"
# By its path: a module's name would be looked up in the current folder first.
exec "$python" "$root/commons/launch" "$@"
