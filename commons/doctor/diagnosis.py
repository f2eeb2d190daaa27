"""CHECKS, the table of all checks, and the ways to ask it."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from commons.doctor import driver, gpu_state, host, network, packages, torch_build, visible_devices
from commons.doctor.findings import Finding, warning
from commons.doctor.libcuda import libcuda
from commons.doctor.machine import Machine

Topic = Literal["system", "gpu", "gpu-state", "packages", "network", "host"]
TOPICS: tuple[Topic, ...] = get_args(Topic)


@dataclass(frozen=True)
class Check:
    """look yields what it found, or nothing where there is nothing to look at; name begins their ids."""

    name: str
    topic: Topic
    look: Callable[[Machine], Iterable[Finding]]


# Causes before their effects: the first error is the one to cure first.
CHECKS: tuple[Check, ...] = (
    Check("system", "system", driver.system),
    Check("wsl", "gpu", driver.wsl),
    Check("driver", "gpu", driver.driver),
    Check("visible-devices", "gpu", visible_devices.visible_devices),
    Check("compute-mode", "gpu", gpu_state.compute_mode),
    Check("libcuda", "gpu", libcuda),
    Check("torch-build", "gpu", torch_build.torch_build),
    Check("torch-cuda", "gpu", torch_build.torch_cuda),
    Check("torch-arch", "gpu", torch_build.torch_arch),
    Check("nvcc", "gpu", torch_build.nvcc),
    Check("gpu-use", "gpu-state", gpu_state.gpu_use),
    Check("packages", "packages", packages.packages),
    Check("duplicates", "packages", packages.duplicates),
    Check("torch-import", "packages", torch_build.torch_import),
    Check("interface", "network", network.interface),
    Check("hostname", "network", network.hostname),
    Check("memory", "host", host.memory),
    Check("cgroup", "host", host.cgroup),
    Check("shm", "host", host.shm),
)

NO_GPU_TOPICS: tuple[Topic, ...] = ("gpu",)


@dataclass(frozen=True)
class Symptom:
    """Words of a failed start, and what may be behind them.

    pattern: a regular expression, upper or lower case.
    look_at: topics, or single checks where others of the topic cannot be the cause.
    shows_code: the error's traceback helps; False where only the machine can be at fault.
    unless: a pattern of words that say that the cause is another one.
    """

    pattern: str
    look_at: tuple[str, ...]
    shows_code: bool = True
    unless: str = r"(?!)"

    def fits(self, message: str) -> bool:
        there, other = (re.search(pattern, message, re.IGNORECASE) for pattern in (self.pattern, self.unless))
        return bool(there) and not other


NETWORK = ("interface", "hostname")
# a rank was ended by a signal: the others lose it, by whatever interface they reached it
SIGNALS = "|".join(signum.name for signum in signal.Signals)
KILLED = rf"Killed|\b({SIGNALS})\b|signal \d|exitcode *: -\d|exit code 1(29|[3-5]\d)\b"
# the same seen from the other ranks: they had been connected, so that the interface is the right one
LOST = rf"{KILLED}|Connection (was likely )?(reset|closed)|Broken pipe|remote process exit"
SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(r"No CUDA GPUs|NVIDIA driver|CUDA driver|not compiled with CUDA|no kernel image", NO_GPU_TOPICS, False),
    Symptom(r"CUDA initialization|no CUDA-capable device|forward compatibility|libcuda", NO_GPU_TOPICS, False),
    Symptom(r"CUDA unknown error|cudaGetDeviceCount|Driver/library version mismatch|\bNVML\b", NO_GPU_TOPICS, False),
    # a checkpoint written on a GPU, read on a machine that never had one: the code may have to change
    Symptom(r"torch\.cuda\.is_available\(\) is False", NO_GPU_TOPICS),
    Symptom(r"CUDA-capable device\(s\) is/are busy|devices? (is|are) busy or unavailable",
            ("gpu", "gpu-state"), False),
    Symptom(r"CUDA (error: )?out of memory|CUDA_ERROR_OUT_OF_MEMORY", ("gpu", "gpu-state", "memory")),
    Symptom(r"\bECC\b|CUDA error|illegal memory access|not yet initialized", ("gpu-state", "gpu")),
    Symptom(r"ImportError|ModuleNotFoundError|cannot import name|undefined symbol|AttributeError|TypeError|unexpected"
            r" keyword argument", ("packages",)),
    Symptom(r"\bNCCL\b|ncclSystemError|ncclInternalError", ("shm", "compute-mode")),
    Symptom(r"\bNCCL\b|ncclSystemError|ncclInternalError|gloo|timed? ?out", NETWORK, unless=LOST),
    Symptom(r"connectFullMesh|Connection refused|No route to host|rendezvous", NETWORK, unless=KILLED),
    Symptom(r"Killed|SIGKILL|signal 9|exitcode *: -9|exit code 137|can(no|')t allocate memory", ("memory", "cgroup")),
    Symptom(r"Bus error|SIGBUS", ("shm", "memory", "cgroup")),
    Symptom(r"No space left", ("shm",)),
)  # fmt: skip


def matching_symptoms(message: str) -> list[Symptom]:
    return [symptom for symptom in SYMPTOMS if symptom.fits(message)]


def run_check(check: Check, machine: Machine) -> list[Finding]:
    """The check's findings under their full ids; a check that breaks is a finding too, never a crash."""
    try:
        found = list(check.look(machine))
    except Exception as problem:  # whatever a strange machine makes a check raise, the other checks go on
        found = [
            warning(
                "unchecked",
                f"{check.name} could not be checked",
                seen=f"{type(problem).__name__}: {problem}",
                why="The doctor met something that it does not know; the other findings hold.",
                cure="python -m commons.doctor --json   # please report this with its output",
            )
        ]
    return [
        replace(finding, id=f"{check.name}.{finding.id}" if finding.id else check.name, topic=check.topic)
        for finding in found
    ]


def diagnose(machine: Machine | None = None, topics: Iterable[str] = TOPICS) -> list[Finding]:
    """Runs the checks of these topics, in order. Takes 10 to 20 s where torch is installed, else a second."""
    machine, wanted = machine or Machine(), set(topics)
    unknown = wanted - set(TOPICS)
    if unknown:
        raise ValueError(f"no such topic: {', '.join(sorted(unknown))}; there are {', '.join(TOPICS)}")
    return [finding for check in CHECKS if check.topic in wanted for finding in run_check(check, machine)]


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, each in the order found."""
    found = [finding for finding in findings if finding.level != "ok"]
    return sorted(found, key=lambda finding: finding.level != "error")


def explain_no_gpu(machine: Machine | None = None) -> list[Finding]:
    """Why CUDA sees no GPU: errors first, empty where it sees one. Fast where there is no driver."""
    return problems(diagnose(machine, NO_GPU_TOPICS))


def explain_failure(message: str, machine: Machine | None = None) -> list[Finding]:
    """What here may have caused this error text; empty where it matches nothing known or all is well."""
    wanted = {name for symptom in matching_symptoms(message) for name in symptom.look_at}
    machine = machine or Machine()
    checks = [check for check in CHECKS if wanted & {check.topic, check.name}]
    return problems(finding for check in checks for finding in run_check(check, machine))


def hides_gpu(finding: Finding) -> bool:
    """A GPU for which torch has no code is seen all the same."""
    is_cause = finding.level == "error" and finding.id != "torch-arch.no-code"
    return is_cause or finding.id == "driver.no-gpu"


def why_no_gpu(machine: Machine | None = None) -> tuple[str, str]:
    """Why torch sees no GPU, and the command that cures it; either is empty where there is none."""
    found = explain_no_gpu(machine)
    hides = [each for each in found if hides_gpu(each)]
    if not hides:
        return "", ""
    first = hides[0]
    if first.id == "driver.no-gpu":
        return first.title, ""
    return first.title, first.cure.splitlines()[0].split("   #")[0]
