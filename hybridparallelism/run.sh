#!/usr/bin/env bash
# Tensor, pipeline and data parallelism together (CAI_Hybrid): the same launcher, variables and flags as run_gemini.sh.
#
#     bash run.sh                                     TP 2 x PP 2 on four ranks, CPU processes where there is no GPU
#     bash run.sh --tp_degree 4                       TP 4 x PP 2: as many ranks as one copy of the model needs
#     TPDEGREE=4 PPDEGREE=2 GPUNUM=16 bash run.sh     TP 4 x PP 2 x DP 2

set -euo pipefail
root="$(dirname "$(dirname "$(readlink -f -- "${BASH_SOURCE[0]}")")")"

# With fewer than four GPUs to be seen: TP on two of them, or on one nothing to split.
gpus="$(bash "$root/launchers/visible_gpus.sh")"
case "$gpus" in
    1) tp=1 pp=1 ;;
    2 | 3) tp=2 pp=1 ;;
    *) tp=2 pp=2 ;;
esac
export DISTPLAN="${DISTPLAN:-CAI_Hybrid}" TPDEGREE="${TPDEGREE:-$tp}" PPDEGREE="${PPDEGREE:-$pp}"
exec bash "$root/run_gemini.sh" "$@"
