#!/usr/bin/env bash
# Trains one configuration after another and compares them: which plan, which placement, how many GPUs.
#
#     bash benchmark_gemini.sh                          the Colossal-AI example's grid; without a GPU: quick
#     bash benchmark_gemini.sh plans --out my_plans     a ready-made sweep (--list names them) or a TOML file
#     bash benchmark_gemini.sh --help                   every flag
#
# Started again it repeats no run that is done. The first start installs what is needed (install.sh).

set -euo pipefail
# Streams that were closed lead to nowhere: else the next file that is opened would take their place.
[[ -e /proc/self/fd/0 ]] || exec </dev/null
[[ -e /proc/self/fd/1 ]] || exec >/dev/null
[[ -e /proc/self/fd/2 ]] || exec 2>/dev/null
root="$(dirname "$(readlink -f -- "${BASH_SOURCE[0]}")")"

python="$(bash "$root/install.sh")"
# By its path: a module's name would be looked up in the current folder first.
exec "$python" "$root/benchmarks/sweep" "$@"
