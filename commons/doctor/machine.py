"""Machine: every question that a check may ask of the computer, so that a test can fake a whole computer.

Files are read below `root`; programs are found in PATH below `root`; what only a running system can answer
(limits, disks, addresses, the probes) is a method or a cached property of its own, which a fake overrides.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from commons.doctor.processes import Completed, probe_answer, probe_command, run_process

Answer = TypeVar("Answer")

WSL_LIBRARIES = "/usr/lib/wsl/lib"
# nvidia-smi is there and not always on PATH
EXTRA_PROGRAM_FOLDERS = (
    WSL_LIBRARIES,
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
)


@dataclass(frozen=True)
class CudaDevice:
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Libcuda:
    """The driver's library as a new process loads it, CUDA_VISIBLE_DEVICES put aside."""

    loaded: bool = False
    paths: tuple[str, ...] = ()
    version: tuple[int, int] | None = None
    init_code: int | None = None
    devices: tuple[CudaDevice, ...] = ()
    error: str = ""
    timed_out: bool = False

    @property
    def works(self) -> bool:
        return self.init_code == 0 and bool(self.devices)


@dataclass(frozen=True)
class TorchFiles:
    """What torch's files say without importing it; version is None where there is no torch."""

    version: str | None = None
    cuda: str | None = None
    path: str = ""


@dataclass(frozen=True)
class TorchImport:
    """What a child process got from `import torch`. arch_list as in "sm_90", "compute_120"."""

    imported: bool = False
    version: str = ""
    path: str = ""
    cuda: str | None = None
    arch_list: tuple[str, ...] = ()
    devices: tuple[CudaDevice, ...] = ()
    nccl: str = ""
    import_seconds: float = 0.0
    error: str = ""
    timed_out: bool = False


@dataclass(frozen=True)
class Distribution:
    """An installed package: one dist-info folder on the path."""

    name: str
    version: str
    folder: str


@dataclass(frozen=True)
class Disk:
    total_bytes: int
    free_bytes: int


@dataclass
class Machine:
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    memory: dict[str, Any] = field(default_factory=dict, repr=False)

    def remember(self, name: str, ask: Callable[[Machine], Answer]) -> Answer:
        """ask(self), asked once."""
        if name not in self.memory:
            self.memory[name] = ask(self)
        return self.memory[name]

    # --- files

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """A file's text, or None where it is not there or not readable."""
        try:
            return self.at(path).read_text(errors="replace")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.at(path))

    def glob(self, pattern: str) -> list[str]:
        """Paths below the root that match, as the machine itself would name them."""
        return sorted("/" + str(path.relative_to(self.root)) for path in self.root.glob(pattern.lstrip("/")))

    def open_problem(self, path: str) -> str:
        """Why a device node cannot be opened for reading and writing; empty where it can."""
        try:
            os.close(os.open(self.at(path), os.O_RDWR | getattr(os, "O_CLOEXEC", 0)))
        except OSError as problem:
            return problem.strerror or str(problem)
        return ""

    def owning_group(self, path: str) -> str:
        import grp

        return grp.getgrgid(self.at(path).stat().st_gid).gr_name

    # --- programs

    def which(self, program: str) -> str | None:
        folders = [*self.environment.get("PATH", "").split(os.pathsep), *EXTRA_PROGRAM_FOLDERS]
        if self.wsl == 2:  # a Linux driver's nvidia-smi, which cannot work there, may come first in PATH
            folders.insert(0, WSL_LIBRARIES)
        for folder in filter(None, folders):
            path = f"{folder.rstrip('/')}/{program}"
            if self.at(path).is_file() and os.access(self.at(path), os.X_OK):
                return path
        return None

    def run(self, command: Sequence[str], timeout_seconds: float = 20.0) -> Completed:
        program = self.which(command[0])
        if program is None:
            return Completed(None, missing=True)
        environment = {**self.environment, "LC_ALL": "C"}
        return run_process([str(self.at(program)), *command[1:]], environment, timeout_seconds)

    def probe(
        self,
        *arguments: str,
        timeout_seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Runs probes.py; its answer, or {"error": ..., "timed_out": ...} where it gave none."""
        done = run_process(
            probe_command(*arguments),
            self.environment if environment is None else environment,
            timeout_seconds,
        )
        return probe_answer(done, timeout_seconds)

    # --- the system

    @cached_property
    def processor(self) -> str:
        return platform.machine()

    @cached_property
    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    @cached_property
    def python_path(self) -> str:
        return sys.executable

    @cached_property
    def kernel(self) -> str:
        return (self.read("/proc/sys/kernel/osrelease") or "").strip() or platform.release()

    @cached_property
    def distribution(self) -> str:
        match = re.search(r'^PRETTY_NAME="?([^"\n]*)', self.read("/etc/os-release") or "", re.MULTILINE)
        return match[1] if match else platform.system()

    @cached_property
    def distribution_ids(self) -> list[str]:
        """This distribution and those that it descends from, nearest first: ["rocky", "rhel", "centos", "fedora"]."""
        fields = dict(re.findall(r'^(ID|ID_LIKE)="?([^"\n]*)', self.read("/etc/os-release") or "", re.MULTILINE))
        return [name for field in ("ID", "ID_LIKE") for name in fields.get(field, "").split()]

    @cached_property
    def wsl(self) -> int:
        """0 outside WSL, else 1 or 2. WSL 1 translates system calls and calls itself 4.4.0-...-Microsoft."""
        kernel = self.kernel.lower()
        if "wsl2" in kernel or "microsoft-standard" in kernel:
            return 2
        if "microsoft" in kernel:
            return 1
        # a kernel of the user's own does not say it
        return 2 if "WSL_DISTRO_NAME" in self.environment and self.exists("/dev/dxg") else 0

    @cached_property
    def container(self) -> str:
        """The container engine's name, or an empty string."""
        marks = {"/.dockerenv": "docker", "/run/.containerenv": "podman", "/.singularity.d": "apptainer"}
        for path, engine in marks.items():
            if self.exists(path):
                return engine
        if "KUBERNETES_SERVICE_HOST" in self.environment:
            return "kubernetes"
        cgroup = self.read("/proc/1/cgroup") or ""
        match = re.search(r"docker|kubepods|containerd|libpod|lxc", cgroup)
        named = match[0] if match else self.environment.get("container", "")
        return {"kubepods": "kubernetes", "libpod": "podman"}.get(named, named)

    @property
    def engine(self) -> str:
        """The program with which this container is run: docker, where it does not say; empty where there is none."""
        known = {"": "", "podman": "podman", "apptainer": "", "kubernetes": "", "containerd": "nerdctl"}
        return known.get(self.container, "docker")

    def disk(self, path: str) -> Disk | None:
        try:
            usage = shutil.disk_usage(self.at(path))
        except OSError:
            return None
        return Disk(usage.total, usage.free)

    @cached_property
    def interfaces(self) -> list[str]:
        """Names of the network interfaces."""
        return [name for _, name in socket.if_nameindex()]

    @cached_property
    def hostname_answer(self) -> dict[str, Any]:
        """{"hostname", "address"} or {"error"}: in a child, since a name server may leave one waiting."""
        return self.probe("hostname", timeout_seconds=5)

    # --- CUDA and torch

    @cached_property
    def libcuda(self) -> Libcuda:
        environment = {name: value for name, value in self.environment.items() if name != "CUDA_VISIBLE_DEVICES"}
        return read_answer(Libcuda, self.probe("libcuda", timeout_seconds=30, environment=environment))

    @cached_property
    def torch_files(self) -> TorchFiles:
        import importlib.util

        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            return TorchFiles()
        folder = Path(next(iter(spec.submodule_search_locations)))
        return read_torch_version(folder)

    @cached_property
    def torch(self) -> TorchImport:
        if self.torch_files.version is None:
            return TorchImport(False, error="torch is not installed")
        return read_answer(TorchImport, self.probe("torch", timeout_seconds=120))

    @cached_property
    def distributions(self) -> tuple[Distribution, ...]:
        """Installed packages in the order in which Python would find them; names as pip normalises them."""
        from importlib.metadata import distributions

        found = []
        for package in distributions():
            name = package.metadata["Name"] if package.metadata else None
            if name:
                folder = str(package.locate_file(""))
                found.append(Distribution(re.sub(r"[-_.]+", "-", name).lower(), package.version, folder))
        return tuple(dict.fromkeys(found))


def read_answer(kind: type[Answer], answer: Mapping[str, Any]) -> Answer:
    """A probe's JSON as a record: lists as tuples, devices as CudaDevice."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in answer.items()}
    if devices := answer.get("devices"):
        values["devices"] = tuple(CudaDevice(each["name"], tuple(each["capability"])) for each in devices)
    return kind(**values)


def read_torch_version(folder: Path) -> TorchFiles:
    """Reads torch/version.py as text; a folder without it is something else called torch."""
    try:
        text = (folder / "version.py").read_text(errors="replace")
    except OSError:
        return TorchFiles(version="unknown", path=str(folder))

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*= *['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return match[1] if match else None

    return TorchFiles(value("__version__") or "unknown", value("cuda"), str(folder))
