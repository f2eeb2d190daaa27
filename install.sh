#!/usr/bin/env bash
# Makes a Python environment ready for the suite and prints the path of its interpreter, alone on stdout:
#
#     python="$(bash install.sh)"
#
# It uses the active environment if that has everything in the tested versions (commons/versions.py), and then
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
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT ...) and proxies are respected.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
venv="${GEMINI_VENV:-$root/.venv}"
# First word: "installing" or "done". No such file in a folder: we did not make it, so we never clear it.
state_file="$venv/install.state"
versions="$root/commons/versions.py"

# EXIT_UNTESTED in commons/versions.py
readonly untested=10
readonly tested_pythons=(3.12 3.11 3.10)

dev=""
findings=""          # what the last `check` printed
untested_python=""   # an active interpreter that would do, though its versions were not tested

say() { printf 'install.sh: %s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; }

# check PYTHON: commons/versions.py's exit code; its output is left in $findings.
check() { findings="$("$1" "$versions" ${dev:+--tests} 2>&1)"; }

# one_line TEXT: its lines joined by "; ".
one_line() {
    local text="${1//$'\n'/; }"
    printf '%s' "${text%; }"
}

hash_of() { cat "$@" | sha256sum | cut -d' ' -f1; }
runtime_hash() { hash_of "$root/requirements.txt" "$root/requirements-nodeps.txt"; }
dev_hash() { hash_of "$root/requirements-dev.txt"; }

# venv_ready: whether our .venv is finished, of today's pins, and still works.
venv_ready() {
    local state="" runtime="" tools=""
    { read -r state runtime tools <"$state_file"; } 2>/dev/null || return 1
    [[ $state == done && $runtime == "$(runtime_hash)" ]] || return 1
    [[ -z $dev || $tools == "$(dev_hash)" ]] || return 1
    local code=0
    check "$venv/bin/python" || code=$?
    ((code == 0 || code == untested))
}

# use_if_ready PYTHON: whether this interpreter can be used as it is.
use_if_ready() {
    local code=0
    check "$1" || code=$?
    if ((code == untested)); then
        [[ -n $untested_python ]] || untested_python="$1"
        [[ -n ${GEMINI_USE_ACTIVE:-} ]] && warn_untested
    elif ((code != 0)) && [[ -n ${GEMINI_USE_ACTIVE:-} ]]; then
        fail "$1 cannot be used (GEMINI_USE_ACTIVE is set): $(one_line "$findings")"
    fi
    ((code == 0)) || [[ $code == "$untested" && -n ${GEMINI_USE_ACTIVE:-} ]]
}

# explain_unused PYTHON: why it is not enough.
explain_unused() {
    [[ -n $1 ]] || return 1
    check "$1" || say "not using the active environment ($1): $(one_line "$findings")"
}

warn_untested() { say "warning: $(one_line "$findings")"; }

# activated_python: the interpreter of the virtual or conda environment that the user activated, if any.
activated_python() {
    local prefix
    for prefix in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [[ -n $prefix && $prefix != "$venv" && -x $prefix/bin/python ]]; then
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
    [[ $on_path != "$venv/"* ]] || on_path=""
    if [[ -n $activated ]] && use_if_ready "$activated"; then
        python="$activated"
    elif [[ -z ${GEMINI_USE_ACTIVE:-} ]] && venv_ready; then
        python="$venv/bin/python"
    elif [[ -n $on_path ]] && use_if_ready "$on_path"; then
        python="$on_path"
    else
        return 1
    fi
}

# base_pythons: the interpreters that could make .venv, one a line, best first.
base_pythons() {
    activated_python
    type -aP python3 python "${tested_pythons[@]/#/python}" || true
}

# choose_base: set $base (an interpreter that can make .venv) and $base_version, or say what is missing.
choose_base() {
    local probe='import sys
try:
    import ensurepip, venv
    has_venv = "venv"
except ImportError:
    has_venv = "no-venv"
print("%d.%d %s" % (sys.version_info[0], sys.version_info[1], has_venv))'
    local candidate answer version has_venv without_venv="" newer="" newer_version="" seen=""
    while read -r candidate; do
        [[ $candidate != "$venv/"* ]] || continue # it may be cleared below
        # A version manager's shim may lie on PATH for a version that is not there: it fails, the next is asked.
        answer="$("$candidate" -c "$probe" 2>/dev/null)" || continue
        read -r version has_venv <<<"$answer"
        if [[ " ${tested_pythons[*]} " == *" $version "* && $has_venv == venv ]]; then
            base="$candidate" base_version="$version"
            return
        elif [[ " ${tested_pythons[*]} " == *" $version "* ]]; then
            without_venv="${without_venv:-$version}"
        elif [[ $version == 3.* && ${version#3.} -gt 12 && $has_venv == venv && -z $newer ]]; then
            newer="$candidate" newer_version="$version"
        fi
        [[ ", $seen" == *", $version, "* ]] || seen+="$version, "
    done < <(base_pythons)

    [[ -z $without_venv ]] || fail "Python $without_venv has no venv module:" \
        "apt-get install python$without_venv-venv (or your system's package of that name), then start again"
    [[ -n $newer ]] || fail "no suitable Python found (${seen:+found ${seen%, }; }needed 3.10 to 3.12):" \
        "apt-get install python3.12 python3.12-venv, or activate an environment that has one"
    base="$newer" base_version="$newer_version"
    say "warning: Python $base_version is outside the tested range, 3.10 to 3.12"
}

has_nvidia_gpu() { [[ -e /dev/nvidiactl || -e /dev/dxg ]]; }

# require_space DIR MIB: fail unless the file system that holds DIR (or will) has that much free.
require_space() {
    local dir="$1" needed="$2" free
    while [[ ! -d $dir ]]; do dir="$(dirname "$dir")"; done
    free="$(df -Pk "$dir" | tail -n 1 | tr -s ' ' | cut -d' ' -f4)" || return 0
    ((free / 1024 >= needed)) || fail "disk full: $dir has $((free / 1024)) MiB free, $needed are needed;" \
        "make room, or set GEMINI_VENV (and TMPDIR) to a folder with more"
}

# lock: one install at a time for one .venv; the kernel lets go of it even if we are killed.
lock() {
    local problem
    if [[ -e $venv && ! -d $venv ]]; then fail "$venv is not a folder: move it away or set GEMINI_VENV"; fi
    problem="$( (mkdir -p "$venv" && : >>"$venv.lock" && : >>"$venv/.writable" && rm "$venv/.writable") 2>&1)" ||
        explain "cannot make $venv" "$problem"
    exec 9>>"$venv.lock"
    if ! flock -n 9 2>/dev/null; then
        say "another install.sh is at work on $venv, waiting for it"
        flock 9 2>/dev/null || say "warning: $venv.lock cannot be locked on this file system, going on without"
    fi
}

# explain WHAT OUTPUT: end with one line for the failure that OUTPUT (of pip, venv or mkdir) tells of.
explain() {
    local what="$1" output="$2" last
    last="$(grep -v '^[[:space:]]*$' <<<"$output" | grep -iE 'error|denied|cannot' | tail -n 1 || true)"
    case "$output" in
        *"No space left on device"* | *"Disk quota exceeded"* | *"Errno 28"*)
            fail "$what: disk full; make room, or set GEMINI_VENV (and TMPDIR) to a folder with more" ;;
        *"Permission denied"* | *"Read-only file system"* | *"PermissionError"* | *"Errno 30"*)
            fail "$what: not writable; set GEMINI_VENV to a folder that is ($last)" ;;
        *CERTIFICATE_VERIFY_FAILED*)
            fail "$what: the package index's certificate was refused; set PIP_CERT to your network's certificates" ;;
        *"Retrying ("* | *"Failed to establish a new connection"* | *"Temporary failure in name resolution"* | \
            *"Could not fetch URL"* | *"ReadTimeoutError"* | *"ProxyError"*)
            explain_no_network "$what" ;;
        *"No matching distribution"* | *"Could not find a version"*)
            fail "$what: no package for Python ${base_version:-3} on $(uname -sm) (${last#ERROR: });" \
                "check PIP_INDEX_URL and PIP_FIND_LINKS, or try another Python from 3.10 to 3.12" ;;
        *) fail "$what: ${last:-see above}" ;;
    esac
}

# Where nothing can be fetched, an environment that might do is better than none.
explain_no_network() {
    [[ -n $untested_python ]] || fail "$1: no network, the package index did not answer;" \
        "go online, set PIP_INDEX_URL or a proxy, or activate an environment that has the packages"
    say "$1: no network; using the active environment (GEMINI_USE_ACTIVE=1 does so without trying)"
    check "$untested_python" || true
    warn_untested
    printf '%s\n' "$untested_python" >&3
    exit 0
}

# run_or_explain WHAT COMMAND...: progress goes straight to the terminal, stderr there too and to `explain`.
run_or_explain() {
    local what="$1" errors line code=0
    shift
    errors="$("$@" 3>&1 1>&2 2>&3 3>&- | while IFS= read -r line; do
        printf '%s\n' "$line" >&2
        printf '%s\n' "$line"
    done)" || code=$?
    ((code == 0)) || explain "$what" "$errors"
}

# A package on PYTHONPATH would count as installed; BUILD_EXT would compile Colossal-AI's CUDA kernels.
pip_install() {
    run_or_explain "pip could not install $1" env -u PYTHONPATH -u PYTHONHOME -u PIP_TARGET PIP_USER=0 BUILD_EXT=0 \
        "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "${@:2}"
}

# clear_venv: empty our own .venv but for its state, so that a start that breaks off in here is repaired as well.
clear_venv() {
    run_or_explain "cannot clear $venv" find "$venv/" -mindepth 1 ! -path "$venv/${state_file##*/}" -delete
}

# make_venv: an interpreter with pip in $venv. What an earlier start left half made is cleared first, since pip takes
# a package whose files were half written for installed; what it had downloaded is still in pip's cache.
make_venv() {
    local state="" works="" has_pip=""
    { read -r state _ <"$state_file"; } 2>/dev/null || true
    ! "$venv/bin/python" -c "" 2>/dev/null || works=yes
    ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || has_pip=yes

    if [[ -n $has_pip && $state != installing ]]; then
        say "completing $venv"
    elif [[ -z $state && -n $works ]]; then
        run_or_explain "$venv has no pip" "$venv/bin/python" -m ensurepip
    elif [[ -z $state && -n "$(ls -A "$venv")" ]]; then
        fail "$venv is there, but its Python does not work, and install.sh did not make it: move it away"
    else
        [[ $state != installing ]] || say "$venv was left half made, starting it again"
        printf 'installing\n' >"$state_file"
        clear_venv
        say "[1/3] making $venv with Python $base_version ($base)"
        run_or_explain "cannot make $venv" "$base" -m venv "$venv"
    fi
    [[ -z $state ]] || printf 'installing\n' >"$state_file"
}

install() {
    run_or_explain "pip could not install $1" env -u PYTHONPATH -u PYTHONHOME -u PIP_TARGET PIP_USER=0 BUILD_EXT=0 \
        "$venv/bin/python" -m pip install --no-input --disable-pip-version-check "${@:2}"
}

# make_venv: an interpreter with pip in $venv, cleared first if an earlier start broke off: pip takes a package
# whose files were half written for installed. What it had downloaded is still in its cache.
make_venv() {
    local state="" clear=()
    { read -r state _ <"$state_file"; } 2>/dev/null || true
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1 && [[ $state != installing ]]; then
        say "completing $venv"
    else
        [[ $state != installing ]] || say "$venv was left half made, starting it again"
        # only what we made ourselves is ours to clear
        [[ -z $state ]] || clear=(--clear)
        say "[1/3] making $venv with Python $base_version ($base)"
        run_or_explain "cannot make $venv" "$base" -m venv "${clear[@]}" "$venv"
        state=installing
    fi
    [[ -z $state ]] || printf 'installing\n' >"$state_file"
}

install() {
    local needed=2000 start=$SECONDS
    ! has_nvidia_gpu || needed=9000 # the CUDA libraries
    lock
    if venv_ready; then return; fi # made by the install.sh that we waited for
    choose_base
    require_space "$venv" "${GEMINI_MIN_FREE_MIB:-$needed}"
    require_space "${TMPDIR:-/tmp}" "$((${GEMINI_MIN_FREE_MIB:-$needed} / 4))"
    if ! has_nvidia_gpu && [[ -z ${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-} ]]; then
        say "no NVIDIA GPU seen: if pip starts on CUDA libraries (5 GB), stop it and set PIP_EXTRA_INDEX_URL to" \
            "PyTorch's package index for CPUs"
    fi

    make_venv
    say "[2/3] requirements.txt${dev:+, requirements-dev.txt}: torch is the large one, this can take minutes"
    pip_install requirements.txt -r "$root/requirements.txt" ${dev:+-r "$root/requirements-dev.txt"}
    say "[3/3] requirements-nodeps.txt: Colossal-AI, without the packages that it declares"
    pip_install requirements-nodeps.txt --no-deps -r "$root/requirements-nodeps.txt"
    local code=0
    check "$venv/bin/python" || code=$?
    ((code == 0)) || say "warning: $(one_line "$findings")"
    ((code == 0 || code == untested)) || fail "$venv is not complete: remove it and start again"
    printf 'done %s %s\n' "$(runtime_hash)" "$([[ -z $dev ]] || dev_hash)" >"$state_file"
    say "ready in $((SECONDS - start)) s: $venv"
}

main() {
    local which=""
    while (($#)); do
        case "$1" in
            --dev) dev=yes ;;
            --which) which=yes ;;
            --help | -h) usage && exit 0 ;;
            *) fail "unknown option $1; there are --dev, --which and --help" ;;
        esac
        shift
    done
    exec 3>&1 1>&2
    trap 'say "interrupted; the next start goes on from here"; exit 130' INT TERM
    if ! find_ready; then
        [[ -z $which ]] || exit 1
        explain_unused "$untested_python" || explain_unused "$(activated_python)" || true
        install
        python="$venv/bin/python"
    fi
    printf '%s\n' "$python" >&3
}

main "$@"
