"""What a run ran on: versions, device, commit and command line, as written to env.json.

Nothing here raises and nothing needs the network: what cannot be found out is null.
Only the standard library is imported at the top; torch is asked only if the process already imported it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from commons.lifecycle.cpu_name import cpu_name
from commons.lifecycle.job import read_job
from commons.lifecycle.suite_root import SUITE_ROOT

# The packages whose version can change a number or a crash.
PACKAGES = ("torch", "triton", "colossalai", "transformers", "numpy", "safetensors", "rich", "psutil", "einops")

# Environment variables that change what a run does or how fast it is. A list of what to keep, not of what to
# drop: an env.json is passed around, so a variable nobody thought of (a token, a password) must stay out.
LAUNCH_VARIABLES = (
    "DISTPLAN", "MODEL_TYPE", "BATCH_SIZE", "TRAIN_STEP", "SEQ_LEN", "PRECISION", "PLACEMENT", "GPUNUM",
    "TPDEGREE", "PPDEGREE", "NNODES", "NODE_RANK",
)  # fmt: skip
MACHINE_VARIABLE = re.compile(
    r"CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|DEVICE_MAX_CONNECTIONS|LAUNCH_BLOCKING|MODULE_LOADING)"
    r"|(NCCL|GLOO|OMP|MKL)_[A-Z0-9_]+"
    r"|TORCH_(NCCL|CUDA|DISTRIBUTED|LOGS)[A-Z0-9_]*"
    r"|TORCH(_COMPILE|INDUCTOR|DYNAMO)_[A-Z0-9_]+|CUBLAS(LT)?_[A-Z0-9_]+"
    r"|PYTORCH_(CUDA_)?ALLOC_CONF|PYTORCH_NO_CUDA_MEMORY_CACHING|NVIDIA_TF32_OVERRIDE"
    r"|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE"
)
COMMAND_TIMEOUT_SECONDS = 5.0


def describe_environment(
    device_name: str | None = None,
    argv: list[str] | None = None,
    environ: Mapping[str, str] | None = None,
    repository: Path = SUITE_ROOT,
) -> dict[str, Any]:
    """Collect the contents of env.json.

    Args:
        device_name: the training device's name as the engine calls it, for example "NVIDIA H200" or "cpu".
        argv: the command line; by default the interpreter's own, as it was typed.
        environ: the environment variables; by default the process's.
        repository: the folder whose commit is recorded.

    Returns:
        A dict of JSON values. Sizes in MiB, time UTC in ISO 8601; None where nothing was found out.
    """
    environ = os.environ if environ is None else environ
    questions: dict[str, Callable[[], Any]] = {
        "started_at": lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": lambda: typed(sys.orig_argv if argv is None else argv),
        "launcher": lambda: _launcher_command(environ),
        "environment": lambda: relevant_variables(environ),
        "commit": lambda: git_state(repository)[0] or stated_commit(environ),
        "uncommitted_changes": lambda: git_state(repository)[1],
        "python": platform.python_version,
        "platform": platform.platform,
        "versions": package_versions,
        "device_name": lambda: device_name,
        "gpus": _gpus,
        "gpu_memory_mib": _gpu_memory_mib,
        "torch_cuda": lambda: _loaded_torch().version.cuda,
        "nccl": _nccl_version,
        "nvidia_driver": nvidia_driver,
        "cpu": lambda: cpu_name() or None,
        "cpu_cores": os.cpu_count,
        "cpu_cores_usable": _usable_cores,
        "host_memory_mib": _host_memory_mib,
    }
    return {name: _or_none(question) for name, question in questions.items()}


def relevant_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to a run, sorted; no other variable is ever recorded."""
    return {
        name: environ[name] for name in sorted(environ) if name in LAUNCH_VARIABLES or MACHINE_VARIABLE.fullmatch(name)
    }


def package_versions() -> dict[str, str | None]:
    """Versions by package name, None for those that are neither installed nor imported; imports none of them."""
    return {name: _or_none(lambda name=name: _version(name)) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(sys.modules[package].__version__)  # a checkout on PYTHONPATH; KeyError where there is none


def git_state(repository: Path) -> tuple[str | None, bool | None]:
    """The commit that is checked out in `repository`, and whether tracked files differ from it.

    Where git is missing, the commit alone. (None, None) where `repository` is not itself a checkout: a copy of the
    suite that lies inside somebody else's repository must not be labelled with that repository's commit.
    """
    top = _git(repository, "rev-parse", "--show-toplevel")
    if top is None:
        return _head_commit(repository), None
    if Path(top).resolve() != repository.resolve():
        return None, None
    commit = _git(repository, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(repository: Path, *words: str) -> str | None:
    """What git says of `repository`, whoever owns it; None if it fails.

    Git refuses a checkout of another user, since it would follow that user's settings: a risk that who trains with that
    user's code has taken. Variables by which git would look at another repository are kept from it.
    """
    allowed = ["-c", f"safe.directory={repository.resolve()}", "--no-optional-locks"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return _output_of(["git", "-C", str(repository), *allowed, *words], environ)


def _head_commit(repository: Path) -> str | None:
    """The commit by the files of the repository itself, for a container without git; None where it is no checkout."""
    try:
        folder = repository / ".git"
        if folder.is_file():  # a linked worktree
            folder = repository / folder.read_text().removeprefix("gitdir:").strip()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return _if_commit(head)
        branch = head.removeprefix("ref:").strip()
        shared = folder / (folder / "commondir").read_text().strip() if (folder / "commondir").exists() else folder
        if (shared / branch).exists():
            return _if_commit((shared / branch).read_text().strip())
        packed = re.search(rf"^([0-9a-f]+) {re.escape(branch)}$", (shared / "packed-refs").read_text(), re.MULTILINE)
        return packed and _if_commit(packed.group(1))
    except (OSError, UnicodeDecodeError):
        return None


def _if_commit(text: str) -> str | None:
    """`text` if it looks like a commit, whole or shortened."""
    return text if re.fullmatch(r"[0-9a-f]{7,64}", text) else None


def stated_commit(environ: Mapping[str, str]) -> str | None:
    """What SUITE_COMMIT says, for a copy of the suite without its git folder (a container, another machine).

    Only what looks like a commit counts, and a checkout knows better than a variable.
    """
    return _if_commit(environ.get("SUITE_COMMIT", "").strip().lower())


def nvidia_driver(proc_file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver's version, from the kernel module or, where that says nothing (WSL), nvidia-smi."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", proc_file.read_text())
        if found:
            return found.group(1)
    except OSError:
        pass
    answer = _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return answer.splitlines()[0].strip() if answer else None


def _or_none(question: Callable[[], Any]) -> Any:
    # A description is never worth a failed run, whatever an odd machine or library answers.
    try:
        return question()
    except Exception:
        return None


def _output_of(command: list[str], environ: Mapping[str, str] | None = None) -> str | None:
    """Standard output of a command, stripped; None if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            env=environ,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def typed(argv: Sequence[str]) -> str:
    """A command line as it is typed in the suite's folder, without the paths of this machine."""
    program, *arguments = argv
    inside = f"{SUITE_ROOT}{os.sep}"
    return shlex.join([Path(program).name, *(argument.removeprefix(inside) for argument in arguments)])


def _launcher_command(environ: Mapping[str, str]) -> str | None:
    """The command line of the process that started the ranks; None where there was no launcher."""
    if not read_job(environ).run_id:
        return None
    return typed(Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0"))


def _loaded_torch() -> Any:
    return sys.modules["torch"]  # KeyError -> None in the description: nothing trained here


def _gpus() -> list[str]:
    cuda = _loaded_torch().cuda
    count = cuda.device_count() if cuda.is_available() else 0
    return [cuda.get_device_name(index) for index in range(count)]


def _gpu_memory_mib() -> list[int]:
    cuda = _loaded_torch().cuda
    count = cuda.device_count() if cuda.is_available() else 0
    return [cuda.get_device_properties(index).total_memory // 2**20 for index in range(count)]


def _nccl_version() -> str | None:
    cuda = _loaded_torch().cuda
    return ".".join(map(str, cuda.nccl.version())) if cuda.is_available() else None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _host_memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
