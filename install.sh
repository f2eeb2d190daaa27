#!/usr/bin/env bash
# Makes a Python environment ready for the suite and prints the path of its interpreter, alone on stdout:
#
#     python="$(bash install.sh)"
#
# It uses the active environment if that has everything in the tested versions (commons/doctor/versions.py), and then
# touches no network. Else it makes .venv beside this file, or finishes one that was left half made.
# What it does, and why it could not, goes to stderr; the exit code is 0 only if the environment is ready.
#
#     --dev     with what the tests and the lint need (requirements-dev.txt)
#     --which   install nothing: print the interpreter that is ready, or exit with 1
#     --help    this text
#
# Environment variables:
#     GEMINI_VENV=DIR          make the environment there instead of in .venv
#     GEMINI_USE_ACTIVE=1      use the active environment even if its versions are untested
#     GEMINI_MIN_FREE_MIB=N    free space asked for before installing
#     GEMINI_CUDA=1            torch for CUDA, though no NVIDIA GPU is seen here
#     GEMINI_TORCH_INDEX=URL   where torch for CPUs is taken from, where no NVIDIA GPU is seen (default: PyTorch's own)
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT ...) and proxies are respected.

set -euo pipefail
# Streams that were closed lead to nowhere: else the next file that is opened would take their place.
[[ -e /proc/self/fd/0 ]] || exec </dev/null
[[ -e /proc/self/fd/1 ]] || exec >/dev/null
[[ -e /proc/self/fd/2 ]] || exec 2>/dev/null

root="$(dirname "$(readlink -f -- "${BASH_SOURCE[0]}")")"
venv="${GEMINI_VENV:-$root/.venv}"
[[ $venv == /* ]] || venv="$PWD/$venv"
lock_file="$venv/install.lock"
# "installing", "done", or "adopted" (complete, but made by somebody else and so never cleared), then the hashes of
# the requirements that it fulfils.
state_file="$venv/install.state"

torch_index="${GEMINI_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
pins_file="$venv/install.requirements" # requirements.txt, with the torch that this machine can run

readonly untested=10 # EXIT_UNTESTED in commons/doctor/versions.py
readonly tested_pythons=(3.12 3.11 3.10)
readonly needed_mib=2000 needed_with_cuda_mib=9000

dev=""             # yes: with requirements-dev.txt
gpu=""             # yes: an NVIDIA GPU is here
cuda="${GEMINI_CUDA:-}"
python=""          # the interpreter that is ready
base=""            # the interpreter that makes .venv
findings=""        # what the last `check` printed
untested_python="" # an active interpreter that would do, though its versions were not tested
last_state=""      # what state_file held before an update
told=""            # yes: the user knows why it failed
failure=1          # the exit code of a failure; 2 where it is the user's setting

say() { printf 'install.sh: %s\n' "$*" >&2; }
fail() {
    told=yes
    say "error: $*"
    exit "$failure"
}

# ---- what is there

# check PYTHON: exits with commons/doctor/versions.py's code; what it printed is left in $findings, as one line.
check() {
    local code=0
    findings="$("$1" "$root/commons/doctor/versions.py" ${dev:+--tests} ${gpu:+--gpu} 2>&1)" || code=$?
    findings="${findings//$'\n'/; }"
    return "$code"
}

hash_of() { cat "$@" | sha256sum | cut -d' ' -f1; }
runtime_hash() { hash_of "$root/requirements.txt" "$root/requirements-nodeps.txt"; }
dev_hash() { hash_of "$root/requirements-dev.txt"; }

# venv_ready: whether .venv is finished, of today's pins, and still works.
venv_ready() {
    local runtime="" tools="" code=0
    { read -r _ runtime tools <"$state_file"; } 2>/dev/null || return 1
    [[ $runtime == "$(runtime_hash)" ]] || return 1
    [[ -z $dev || $tools == "$(dev_hash)" ]] || return 1
    check "$venv/bin/python" || code=$?
    ((code == 0 || code == untested))
}

# active_ready PYTHON: whether this interpreter can be used as it is.
active_ready() {
    local code=0
    check "$1" || code=$?
    if ((code == untested)); then
        untested_python="${untested_python:-$1}"
        [[ -n ${GEMINI_USE_ACTIVE:-} ]]
    elif ((code != 0)); then
        [[ -z ${GEMINI_USE_ACTIVE:-} ]] || fail "GEMINI_USE_ACTIVE is set, but $1 cannot be used: $findings"
        return 1
    fi
}

# activated_python: the interpreter of the virtual or conda environment that the user activated, if any.
activated_python() {
    local prefix
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [[ -n $prefix && ! $prefix -ef $venv && -x $prefix/bin/python ]]; then
            printf '%s\n' "$prefix/bin/python"
            return
        fi
    done
}

# find_ready: set $python to an interpreter that needs no installing.
find_ready() {
    local activated on_path
    activated="$(activated_python)"
    on_path="$(type -P python3 || type -P python || true)"
    if [[ -n $activated ]] && active_ready "$activated"; then
        python="$activated"
    elif [[ -z ${GEMINI_USE_ACTIVE:-} ]] && venv_ready; then
        python="$venv/bin/python"
    elif [[ -n $on_path ]] && active_ready "$on_path"; then
        python="$on_path"
    else
        return 1
    fi
    [[ -z $findings ]] || say "warning: $findings"
}

# explain_unused PYTHON: why an environment that the user may count on is not enough.
explain_unused() {
    [[ -n $1 ]] || return 1
    check "$1" || say "not using the active environment ($1): $findings"
}

# ---- what goes wrong

# explain WHAT OUTPUT: end with one line for the failure that OUTPUT (of pip, venv or mkdir) tells of.
explain() {
    local what="$1" output="$2" last
    last="$(grep -iE 'error|denied|cannot' <<<"$output" | tail -n 1 || true)"
    case "$output" in
        *"No space left on device"* | *"Disk quota exceeded"*)
            fail "$what: disk full; make room, or set GEMINI_VENV (and TMPDIR) to a folder with more"
            ;;
        *"Permission denied"* | *"Read-only file system"* | *"Operation not permitted"*)
            fail "$what: not writable ($last); set GEMINI_VENV to a folder that is"
            ;;
        *CERTIFICATE_VERIFY_FAILED*)
            fail "$what: the package index's certificate was refused; set PIP_CERT to your network's certificates"
            ;;
        *"Retrying ("* | *"Failed to establish a new connection"* | *"Could not fetch URL"* | *ReadTimeoutError*)
            use_untested_or_fail "$what: no network, the package index does not answer"
            ;;
        *"No matching distribution"*)
            fail "$what: ${last#ERROR: } for this Python and $(uname -sm);" \
                "look at PIP_INDEX_URL and PIP_FIND_LINKS, or try another Python from 3.10 to 3.12"
            ;;
        *)
            tail -n 20 <<<"$output" >&2
            fail "$what: ${last:-see above}"
            ;;
    esac
}

# use_untested_or_fail WHY: where nothing can be fetched, an environment that might do is better than none.
use_untested_or_fail() {
    # pip fetches everything before it installs anything, so .venv is what it was
    [[ -z $last_state ]] || record "$last_state"
    [[ -n $untested_python ]] || fail "$1; go online, set PIP_INDEX_URL or a proxy," \
        "or activate an environment that has the packages"
    say "$1; using $untested_python after all (GEMINI_USE_ACTIVE=1 does so at once)"
    check "$untested_python" || say "warning: $findings"
    printf '%s\n' "$untested_python" >&3
    exit 0
}

# show_progress: of the lines on stdin, show those that tell how far pip is; all go on to stdout for `explain`.
show_progress() {
    local line
    while IFS= read -r line; do
        case "$line" in
            *" Downloading "* | *" Building wheel for "*started | "Installing collected"*)
                printf '%s\n' "${line%% (from *}" >&2
                ;;
            *"Retrying ("*) say "the package index does not answer, pip tries again" ;;
        esac
        printf '%s\n' "$line"
    done
}

# run_or_explain WHAT COMMAND...
run_or_explain() {
    local what="$1" output code=0
    shift
    if [[ -t 2 ]]; then
        # stdout is the terminal itself: pip draws its progress bars there
        output="$("$@" 3>&1 1>&2 2>&3 3>&- | show_progress)" || code=$?
    else
        output="$("$@" 2>&1 | show_progress)" || code=$?
    fi
    ((code == 0)) || explain "$what" "$output"
}

record() {
    local problem
    problem="$( (printf '%s\n' "$*" >"$state_file") 2>&1)" || explain "cannot write $state_file" "$problem"
}

# ---- making it ready

# lock: one install at a time for one .venv; the kernel lets go of it even if we are killed.
lock() {
    local problem
    [[ $venv != *:* ]] || failure=2 fail "$venv cannot hold a Python environment, which allows no ':' in its path:" \
        "set GEMINI_VENV to a folder without, or activate an environment that has the packages"
    [[ -d $venv || ! -e $venv ]] || fail "$venv is not a folder: move it away, or set GEMINI_VENV to another place"
    problem="$( (mkdir -p "$venv" && : >>"$lock_file") 2>&1)" || explain "cannot make $venv" "$problem"
    exec 9>>"$lock_file"
    if ! flock -n 9 2>/dev/null; then
        say "another install.sh is at work on $venv, waiting for it"
        flock 9 2>/dev/null || say "warning: $lock_file cannot be locked on this file system, going on without"
    fi
}

# has_nvidia_gpu: whether the driver's device, or that of WSL 2, is there, or nvidia-smi knows of a GPU.
has_nvidia_gpu() {
    [[ -e /dev/nvidiactl || -e /dev/dxg ]] || nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU'
}

# require_space DIR MIB: fail unless the file system that holds DIR has that much free.
require_space() {
    local free_mib
    free_mib="$(($(df -Pk "$1" | tail -n 1 | tr -s ' ' | cut -d' ' -f4) / 1024))"
    ((free_mib >= $2)) || fail "disk full: $1 has $free_mib MiB free, $2 are needed;" \
        "make room, or set GEMINI_VENV (and TMPDIR) to a folder with more"
}

require_room() {
    local needed="$needed_mib"
    [[ -z $gpu$cuda ]] || needed="$needed_with_cuda_mib"
    needed="${GEMINI_MIN_FREE_MIB:-$needed}"
    require_space "$venv" "$needed"
    require_space "${TMPDIR:-/tmp}" "$((needed / 4))" # what pip downloads and builds
}

# choose_base: set $base to an interpreter that can make .venv, the best on PATH, or say what is missing.
choose_base() {
    # what the current folder happens to hold is none of Python's modules: here, and with -I below
    local probe='import sys
"" in sys.path and sys.path.remove("")
try:
    import ensurepip, venv
except ImportError:
    venv = None
print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], "venv" if venv else "no-venv"))'
    local candidate answer version has_venv without_venv="" newer="" found=""
    while read -r candidate; do
        [[ ! ${candidate%/*} -ef $venv/bin ]] || continue # it is about to be cleared
        # A version manager's shim can stand for a version that is not installed: it fails, the next is asked.
        answer="$("$candidate" -c "$probe" 2>/dev/null)" || continue
        read -r version has_venv <<<"$answer"
        case " ${tested_pythons[*]} : $has_venv" in
            *" $version "*": venv")
                base="$candidate"
                return
                ;;
            *" $version "*": no-venv") without_venv="${without_venv:-$version}" ;;
            *": venv") [[ $version != 3.* || ${version#3.} -lt 13 ]] || newer="${newer:-$candidate}" ;;
        esac
        [[ " $found " == *" $version "* ]] || found+=" $version"
    done < <(
        activated_python
        type -aP python3 python "${tested_pythons[@]/#/python}"
    )
    [[ -z $without_venv ]] || fail "Python $without_venv has no venv module:" \
        "apt-get install python$without_venv-venv (or your system's package with it), then start again"
    [[ -n $newer ]] || fail "Python 3.10 to 3.12 is needed, found${found:- none}:" \
        "apt-get install python3.12 python3.12-venv, or activate an environment that has one"
    base="$newer"
    say "warning: no Python from the tested range, 3.10 to 3.12, was found (only$found); trying $base"
}

# new_venv: what an earlier start left half made is cleared first, since pip takes a package whose files were half
# written for installed. What it had downloaded is still in pip's cache.
new_venv() {
    choose_base
    record installing
    run_or_explain "cannot clear $venv" find "$venv/" -mindepth 1 -maxdepth 1 \
        ! -name "${state_file##*/}" ! -name "${lock_file##*/}" -exec rm -rf {} +
    say "[1/3] making $venv with $("$base" --version) ($base)"
    # in two steps, since venv keeps to itself why pip could not be put in
    run_or_explain "cannot make $venv" "$base" -I -m venv --without-pip "$venv"
    run_or_explain "cannot make $venv" "$venv/bin/python" -I -m ensurepip --default-pip
}

# make_venv: an interpreter with pip in $venv, whatever is there now.
make_venv() {
    local state="" works=""
    { read -r last_state <"$state_file"; } 2>/dev/null || true
    state="${last_state%% *}"
    ! "$venv/bin/python" -c "" 2>/dev/null || works=yes

    if [[ $state == installing ]]; then
        last_state=""
        say "$venv was left half made, starting it again"
        new_venv
    elif [[ $state == "done" && -n $works ]]; then
        say "bringing $venv up to date"
        record installing
    elif [[ -n $works ]]; then
        say "completing $venv, which install.sh did not make"
        record adopted
        "$venv/bin/python" -I -m pip --version >/dev/null 2>&1 ||
            run_or_explain "$venv has no pip" "$venv/bin/python" -I -m ensurepip --default-pip
    elif [[ $state == "done" || -z "$(ls -A -I "${lock_file##*/}" "$venv")" ]]; then
        last_state=""
        new_venv
    else
        fail "$venv is there, but its Python does not work and install.sh did not make it: move it away"
    fi
}

# pip_command ARGUMENT_OF_ENV...: sets $pip, the words before those of an install.
# A package on PYTHONPATH would count as installed; BUILD_EXT would compile Colossal-AI's CUDA kernels.
pip_command() {
    local bar=on
    [[ -t 2 ]] || bar=off
    pip=(env -u PYTHONPATH -u PYTHONHOME -u PIP_TARGET "$@" PIP_USER=0 BUILD_EXT=0
        "$venv/bin/python" -I -m pip install --no-input --disable-pip-version-check --progress-bar "$bar")
}

# pip_install WHAT ARGUMENT...
pip_install() {
    local pip
    pip_command
    run_or_explain "pip could not install $1" "${pip[@]}" "${@:2}"
}

# wants_cpu_torch: not where there is a GPU, nor where pip has an index of the user's own.
wants_cpu_torch() {
    [[ -z $gpu$cuda ]] || return 1
    [[ -z ${GEMINI_TORCH_INDEX:-} ]] || return 0
    [[ -z ${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}${PIP_NO_INDEX:-} ]] || return 1
    ! "$venv/bin/python" -I -m pip config list 2>/dev/null | grep -qE '(index-url|find-links|no-index)='
}

# install_cpu_torch: from PyTorch's own index, since the plain one's torch brings CUDA's libraries, some 3 GB. Where it
# has none, or cannot be reached, the plain index is next.
install_cpu_torch() {
    local pip output
    pip_command -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL -u PIP_FIND_LINKS -u PIP_NO_INDEX
    say "no NVIDIA GPU seen: torch for CPUs (GEMINI_CUDA=1 takes the one for CUDA)"
    output="$("${pip[@]}" --retries 1 --timeout 20 --no-deps --index-url "$torch_index" \
        "$(grep '^torch==' "$pins_file")" 2>&1 | show_progress)" ||
        say "$torch_index gave none ($(grep -i error <<<"$output" | tail -n 1 || true)): pip's own index is next"
}

# choose_torch: print requirements.txt, with another torch where this machine's driver or GPU cannot run the pinned one.
# The doctor knows; where it does not, or is not done in time, the pins are what they are.
choose_torch() {
    local pinned answer version reason
    pinned="$(sed -n 's/^torch==//p' "$root/requirements.txt")"
    answer="$(timeout 60 "$venv/bin/python" "$root/commons/doctor" --torch-for "$pinned" 2>/dev/null)" || answer=""
    { read -r version && read -r reason; } <<<"$answer" || true
    [[ -z ${reason:-} ]] || say "torch ${version:=$pinned}: $reason"
    [[ ${version:-} =~ ^[0-9][0-9.]*$ ]] || version="$pinned"
    sed "s/^torch==.*/torch==$version/" "$root/requirements.txt"
}

# finish: record what $venv fulfils, once it has been looked at.
finish() {
    local code=0 state="" tools=""
    check "$venv/bin/python" || code=$?
    ((code == 0 || code == untested)) || fail "$venv is not complete ($findings): remove it and start again"
    ((code == 0)) || say "warning: $findings"
    read -r state _ <"$state_file"
    [[ -z $dev ]] || tools="$(dev_hash)"
    record "${state/installing/done}" "$(runtime_hash)" "$tools"
}

install() {
    local requirements problem
    lock
    ! venv_ready || return 0 # made by the install.sh that we waited for
    require_room
    make_venv
    say "[2/3] requirements.txt${dev:+, requirements-dev.txt}: torch is the large one, this can take minutes"
    requirements="$(choose_torch)"
    problem="$( (printf '%s\n' "$requirements" >"$pins_file") 2>&1)" || explain "cannot write $pins_file" "$problem"
    if wants_cpu_torch; then install_cpu_torch; fi
    pip_install requirements.txt -r "$pins_file" ${dev:+-r "$root/requirements-dev.txt"}
    say "[3/3] requirements-nodeps.txt: Colossal-AI, without the packages that it declares"
    pip_install requirements-nodeps.txt --no-deps -r "$root/requirements-nodeps.txt"
    finish
    say "ready in $SECONDS s: $venv"
}

main() {
    local which=""
    while (($#)); do
        case "$1" in
            --dev) dev=yes ;;
            --which) which=yes ;;
            --help | -h)
                sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
                exit 0
                ;;
            *) fail "unknown option $1; there are --dev, --which and --help" ;;
        esac
        shift
    done
    exec 3>&1 1>&2
    trap 'told=yes; say "interrupted; the next start repairs it"; exit 130' INT TERM
    trap 'code=$?; ((code == 0)) || [[ -n $told ]] || say "error: a step failed with exit code $code"' EXIT
    ! has_nvidia_gpu || gpu=yes
    if ! find_ready; then
        if [[ -n $which ]]; then
            told=yes
            exit 1
        fi
        explain_unused "$untested_python" || explain_unused "$(activated_python)" || true
        install
        python="$venv/bin/python"
    fi
    printf '%s\n' "$python" >&3
}

main "$@"
