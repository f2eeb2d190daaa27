#!/usr/bin/env bash
# Prints how many GPUs a program started from here would see: bash visible_gpus.sh [GPUS]
#
# GPUS is how many there are where that is known; else nvidia-smi is asked, and 0 is the answer where it has none.
# CUDA_VISIBLE_DEVICES leaves out all that it does not name, and whatever stands behind the first name that is none
# (so says CUDA's programming guide): "0,1" are two, "0,-1,1" is one, an empty text is none.

set -euo pipefail

there="${1:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}"
if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
    echo "$there"
    exit
fi
visible=0
IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES"
for name in ${names[@]+"${names[@]}"}; do
    name="${name//[[:space:]]/}"
    case "$name" in
        GPU-* | MIG-*) ;;
        '' | *[!0-9]*) break ;;
        *) ((10#$name < there)) || break ;;
    esac
    visible=$((visible + 1))
done
# Where no driver answers, nothing is there to be seen.
echo "$((there == 0 ? 0 : visible))"
