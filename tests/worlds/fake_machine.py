"""A faked computer for tests/doctor: files; the answers of nvidia-smi, libcuda, torch and the system."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from commons.doctor import Machine, versions
from commons.doctor.machine import Disk, Distribution, TorchFiles, TorchImport
from commons.doctor.processes import Completed

GIB = 1 << 30
# A driver's library as far as the doctor asks it; INIT is what cuInit answers
LIBCUDA_SOURCE = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA Fake 1", length); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : 9; return 0; }
"""


def compile_libcuda(library: Path, init: int) -> None:
    source = ["-x", "c", "-"]
    command = ["cc", "-shared", "-fPIC", f"-DINIT={init}", "-Wl,-soname,libcuda.so.1", "-o", str(library), *source]
    subprocess.run(command, input=LIBCUDA_SOURCE, text=True, check=True, timeout=60)


class FakeSmi:
    """nvidia-smi: answers queries field by field, refuses fields it does not know, or fails as a whole."""

    def __init__(
        self,
        *gpus: Mapping[str, str],
        cuda: str = "12.4",
        unknown: Sequence[str] = (),
        processes: Sequence[str] = (),
        failure: Completed | None = None,
    ):
        self.gpus, self.cuda, self.unknown = gpus, cuda, unknown
        self.processes, self.failure = processes, failure
        self.queries = 0

    def __call__(self, arguments: Sequence[str]) -> Completed:
        if self.failure:
            return self.failure
        if not arguments:
            return Completed(0, f"| NVIDIA-SMI 550.65    Driver Version: x    CUDA Version: {self.cuda}     |")
        kind, _, fields = arguments[0].partition("=")
        if kind == "--query-compute-apps":
            return Completed(0, "\n".join(self.processes))
        assert kind == "--query-gpu"
        assert arguments[1] == "--format=csv,noheader,nounits"
        self.queries += 1
        wrong = next((field for field in fields.split(",") if field in self.unknown), None)
        if wrong:
            return Completed(2, f'Field "{wrong}" is not a valid field to query.\n')
        return Completed(0, "\n".join(", ".join(gpu[field] for field in fields.split(",")) for gpu in self.gpus))


def gpu(index: int = 0, **changes: str) -> dict[str, str]:
    """What an idle H100 answers; changes with __ for the dots."""
    answers = {
        "index": str(index),
        "uuid": f"GPU-{index}1111111-2222-3333-4444-555555555555",
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "550.54.15",
        "memory.total": "81559",
        "memory.used": "4",
        "compute_cap": "9.0",
        "compute_mode": "Default",
    }
    return answers | {name.replace("__", "."): value for name, value in changes.items()}


def rtx_4070(**changes: str) -> dict[str, str]:
    """What the card of README's case 1 answers under WSL."""
    return gpu(
        name="NVIDIA GeForce RTX 4070",
        driver_version="551.78",
        memory__total="12282",
        memory__used="1021",
        compute_cap="8.9",
    ) | {name.replace("__", "."): value for name, value in changes.items()}


class FakeMachine(Machine):
    """A machine without troubles; `change` gives it some."""

    programs: dict[str, Callable[[Sequence[str]], Completed]]
    disks: dict[str, Disk | None]
    locked: dict[str, str]

    def __init__(self, root: Path):
        super().__init__(root, {"PATH": "/usr/bin", "HOME": "/home/ada"})
        self.programs, self.locked = {}, {}
        self.disks = {"/dev/shm": Disk(30 * GIB, 30 * GIB)}
        self.processor, self.python, self.python_path = "x86_64", (3, 11, 7), "python"
        self.interfaces = ["lo", "eth0"]
        self.hostname_answer = {"hostname": "box", "address": "10.0.0.5"}
        self.distributions = tuple(
            Distribution(name, version, "/venv/site-packages")
            for name, version in {
                **dict.fromkeys(versions.ANY_VERSION, "1.0"),
                "torch": "2.6.0",
                "transformers": "4.51.3",
                "colossalai": "0.5.0",
                "numpy": "2.2.6",
            }.items()
        )
        self.write("/proc/sys/kernel/osrelease", "6.8.0-45-generic")
        release = 'PRETTY_NAME="Ubuntu 22.04.5 LTS"\nNAME="Ubuntu"\nVERSION_ID="22.04"\nID=ubuntu\nID_LIKE=debian\n'
        self.write("/etc/os-release", release)
        self.write("/proc/meminfo", "MemTotal: 65000000 kB\nMemAvailable: 60000000 kB\nSwapFree: 0 kB\n")
        lan = "eth1\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        route = lan + "eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        self.write("/proc/net/route", "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n" + route)

    def write(self, path: str, text: str = "", executable: bool = False) -> None:
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_text(text)
        self.at(path).chmod(0o755 if executable else 0o644)
        self.forget()

    def forget(self) -> None:
        """A test goes on with a changed machine."""
        self.memory.clear()
        for name in ("kernel", "wsl", "container", "distribution", "distribution_ids"):
            self.__dict__.pop(name, None)

    def install(self, path: str, program: Callable[[Sequence[str]], Completed]) -> None:
        self.write(path, executable=True)
        self.programs[path] = program
        self.forget()

    def change(self, **values: Any) -> FakeMachine:
        for name, value in values.items():
            setattr(self, name, value)
        return self

    def with_environment(self, **values: str) -> FakeMachine:
        self.environment = {**self.environment, **values}
        return self

    def with_torch(self, version: str, cuda: str | None, arch_list: str = "sm_80 sm_86 sm_90") -> FakeMachine:
        path = "/venv/site-packages/torch"
        devices = self.libcuda.devices if cuda and self.libcuda.works else ()
        self.torch_files = TorchFiles(version, cuda, path)
        self.torch = TorchImport(True, version, path, cuda, tuple(arch_list.split()), devices, "2.21.5", 1.0)
        self.distributions = tuple(
            replace(each, version=version) if each.name == "torch" else each for each in self.distributions
        )
        return self

    # what only a running system answers

    def run(self, command: Sequence[str], timeout_seconds: float = 20.0) -> Completed:
        found = self.which(command[0])
        return self.programs[found](command[1:]) if found else Completed(None, missing=True)

    def disk(self, path: str) -> Disk | None:
        return self.disks[path]

    def open_problem(self, path: str) -> str:
        return self.locked.get(path, "" if self.exists(path) else os.strerror(errno.ENOENT))

    def owning_group(self, path: str) -> str:
        return "video"
