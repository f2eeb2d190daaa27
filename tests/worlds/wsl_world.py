"""A WSL 2 for real processes, in a mount namespace: this machine's files under the name of a WSL kernel, with Windows'
libcuda, and a Linux driver's libcuda that stands before it. Nothing outside the namespace changes; it needs root and
overlayfs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from suite_runs import REPOSITORY
from worlds.fake_machine import compile_libcuda

from commons.doctor.machine import Machine
from commons.doctor.probes import mapped_libraries

KERNEL = "5.15.146.1-microsoft-standard-WSL2"
NO_DEVICE = 100
NODES = ("null", "zero", "full", "random", "urandom", "tty")
# $1: the world's folder with its files in fake/; $2: torch's version.py; $3: folders to be seen; the rest: a command
ENTER = f"""
set -e
here="$PWD" world="$1" version="$2" seen="$3"; shift 3
mkdir -p "$world/layers"
mount -t tmpfs none "$world/layers"
cd "$world/layers"
mkdir upper work root
mount -t overlay none -o "lowerdir=/,upperdir=$PWD/upper,workdir=$PWD/work" root
cp -a "$world/fake/." root
rm -rf root/.dockerenv root/run/.containerenv root/.singularity.d
for node in {" ".join(NODES)}; do touch "root/dev/$node"; mount --bind "/dev/$node" "root/dev/$node"; done
mkdir -p root/dev/shm; mount -t tmpfs none root/dev/shm
ln -sfn /proc/self/fd root/dev/fd
touch root/dev/dxg
mount --rbind /sys root/sys
mount --rbind /proc root/proc
mount --bind "$world/osrelease" root/proc/sys/kernel/osrelease
mount --bind "$world/cgroup" root/proc/1/cgroup
for folder in $seen; do
    [ -e "root$folder" ] || {{ mkdir -p "root$folder"; mount --bind "$folder" "root$folder"; }}
done
mkdir -p "root$world"; mount --bind "$world" "root$world"
mount --bind "$world/version.py" "root$version"
unset KUBERNETES_SERVICE_HOST container CUDA_VISIBLE_DEVICES
exec chroot root sh -c 'cd "$1"; shift; exec "$@"' sh "$here" "$@"
"""


def build(folder: Path, nvidia_smi: str) -> tuple[str, ...]:
    """Makes the world's files in ``folder``; returns what stands before a command to have it run in there.

    torch is a CUDA build in there, by what its files say.
    """
    fake, loaders_folder = folder / "fake", Path(mapped_libraries("libc.so.6")[0]).parent
    windows, linux = fake / "usr/lib/wsl/lib", fake / str(loaders_folder).lstrip("/")
    for each in (windows, linux, fake / "usr/bin", fake / "etc/ld.so.conf.d"):
        each.mkdir(parents=True)
    compile_libcuda(windows / "libcuda.so.1", 0)
    compile_libcuda(linux / "libcuda.so.535.183.01", NO_DEVICE)
    (linux / "libcuda.so.1").symlink_to("libcuda.so.535.183.01")
    (fake / "etc/ld.so.conf.d/ld.wsl.conf").write_text("/usr/lib/wsl/lib\n")
    for path, text in {windows / "nvidia-smi": nvidia_smi, fake / "usr/bin/sudo": '#!/bin/sh\nexec "$@"\n'}.items():
        path.write_text(text)
        path.chmod(0o755)
    (folder / "osrelease").write_text(f"{KERNEL}\n")
    (folder / "cgroup").write_text("0::/init.scope\n")
    torch = Machine().torch_files
    (folder / "version.py").write_text(
        f"__version__ = '{torch.version}'\ndebug = False\ncuda = '12.8'\nhip = xpu = rocm = git_version = None\n"
    )
    seen = " ".join(str(Path(each).resolve()) for each in (sys.prefix, sys.base_prefix, REPOSITORY, torch.path))
    return ("unshare", "-m", "sh", "-c", ENTER, "sh", str(folder), f"{torch.path}/version.py", seen)


def cannot_be_built(folder: Path, prefix: tuple[str, ...]) -> str:
    """What keeps such a world from being entered here; empty where nothing does."""
    try:
        tried = subprocess.run([*prefix, sys.executable, "-c", ""], capture_output=True, text=True, cwd=folder)
    except OSError as problem:
        return str(problem)
    return tried.stderr.strip() if tried.returncode else ""


def tools_missing() -> str:
    missing = [name for name in ("cc", "unshare", "chroot", "ldconfig") if not shutil.which(name)]
    return f"no {', no '.join(missing)}" if missing else ""
