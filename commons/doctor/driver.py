"""Checks of what stands between a process and the GPU: WSL, container, driver, device nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import WSL_LIBRARIES, Machine
from commons.doctor.smi import Gpu, Smi, smi

NVIDIA_PCI_VENDOR = "0x10de"
DISPLAY_PCI_CLASS = "0x03"
RESTART_WSL = "wsl.exe --shutdown   # in PowerShell on Windows; then open WSL again"
UPDATE_WSL = f"wsl.exe --update   # in PowerShell on Windows\n{RESTART_WSL}"
CONTAINER_WITH_GPUS = {
    "docker": "docker run --gpus all --ipc=host ...   # needs the NVIDIA Container Toolkit on the host",
    "podman": "podman run --device nvidia.com/gpu=all ...   # needs nvidia-ctk cdi generate on the host",
    "apptainer": "apptainer exec --nv ...",
    "kubernetes": "kubectl set resources deployment NAME --limits=nvidia.com/gpu={gpus}   # or in the pod's own file",
}
# runs every CUDA that the tested torch versions are built for; the last branch for GPUs older than Turing
DRIVER_BRANCH = 580
NVIDIA_REPOSITORY = f"from NVIDIA's repository; for GPUs before Turing: cuda-drivers of branch {DRIVER_BRANCH}"
# distribution -> (command, where its package comes from); the packages are those of
# https://docs.nvidia.com/datacenter/tesla/driver-installation-guide
INSTALL_DRIVER = {
    "ubuntu": (f"sudo ubuntu-drivers install nvidia:{DRIVER_BRANCH}", ""),
    "debian": ("sudo apt-get install nvidia-open", NVIDIA_REPOSITORY),
    "rhel": ("sudo dnf install nvidia-open", NVIDIA_REPOSITORY),
    "amzn": ("sudo dnf install nvidia-open", NVIDIA_REPOSITORY),
    "fedora": ("sudo dnf install akmod-nvidia", "from RPM Fusion"),
    "suse": ("sudo zypper install nvidia-open", NVIDIA_REPOSITORY),
    "arch": ("sudo pacman -Syu nvidia-open", ""),
}
DRIVER_FILE = (f"sudo sh NVIDIA-Linux-*-{DRIVER_BRANCH}.*.run", "from https://www.nvidia.com/drivers")
TRAIN_ON_CPU = "bash run_gemini.sh --device cpu"


def nvidia_hardware(machine: Machine) -> list[str]:
    """PCI addresses of NVIDIA display controllers; WSL shows none, a container its host's."""
    found = []
    for path in machine.glob("/sys/bus/pci/devices/*/vendor"):
        folder = str(PurePosixPath(path).parent)
        is_nvidia = (machine.read(path) or "").strip() == NVIDIA_PCI_VENDOR
        if is_nvidia and (machine.read(f"{folder}/class") or "").startswith(DISPLAY_PCI_CLASS):
            found.append(PurePosixPath(folder).name)
    return found


def gpus_wanted(machine: Machine) -> int:
    """The number of GPUs that the user asked for with GPUNUM; 1 where they did not."""
    value = machine.environment.get("GPUNUM", "")
    return max(1, int(value)) if value.isdecimal() else 1


def with_gpus(machine: Machine) -> str:
    command = CONTAINER_WITH_GPUS.get(machine.container, CONTAINER_WITH_GPUS["docker"])
    return command.format(gpus=gpus_wanted(machine))


def install_driver(machine: Machine) -> str:
    """One line: the command that installs a driver, or replaces the present one by a newer one."""
    if machine.wsl == 2:
        return (
            f"explorer.exe https://www.nvidia.com/drivers   # driver {DRIVER_BRANCH} or newer, installed on Windows,"
            " never inside WSL; then in PowerShell: wsl.exe --shutdown"
        )
    if machine.container:  # whose distribution says nothing about the host's
        command, note = INSTALL_DRIVER["ubuntu"][0], "on the host; where that is not Ubuntu, its own driver package"
    else:
        known = [INSTALL_DRIVER[name] for name in machine.distribution_ids if name in INSTALL_DRIVER]
        command, note = known[0] if known else DRIVER_FILE
    return f"{command} && sudo reboot" + (f"   # {note}" if note else "")


# --- where this runs


def system(machine: Machine) -> Iterator[Finding]:
    place = [f"container of {machine.container}"] if machine.container else []
    place += [f"WSL {machine.wsl}"] if machine.wsl else []
    python = f"Python {'.'.join(map(str, machine.python))} at {machine.python_path}"
    yield ok(machine.distribution, ", ".join([f"kernel {machine.kernel}", machine.processor, *place, python]))


def wsl(machine: Machine) -> Iterator[Finding]:
    if machine.wsl == 1:
        yield error(
            "version-1",
            "this is WSL 1, which has no access to a GPU",
            seen=f"kernel {machine.kernel}",
            why="WSL 1 translates system calls; only WSL 2 runs a Linux kernel, which has the GPU's device node.",
            cure=f"wsl.exe --set-version {machine.environment.get('WSL_DISTRO_NAME', 'NAME')} 2   # in PowerShell",
        )


# --- the driver


@dataclass(frozen=True)
class Problem:
    """A known answer of NVIDIA's tools that is an error; cure as on the machine that the driver belongs to."""

    cause: str
    title: str
    why: str
    cure: str


KERNEL_LOG = 'sudo dmesg | grep -iE "nvrm|xid"   # the reason'
HANGS = Problem(
    "hangs",
    "nvidia-smi does not answer",
    "A GPU or its driver is stuck; a training run would hang in the same place.",
    f"{KERNEL_LOG}\nsudo reboot",
)
# what nvidia-smi says, as a pattern -> what it means; the last one fits everything
SMI_PROBLEMS: dict[str, Problem] = {
    r"Driver/library version mismatch": Problem(
        "version-mismatch",
        "the NVIDIA driver was updated and the old kernel module is still loaded",
        "The libraries on disk and the module in the kernel must be of one version; until then CUDA sees no GPU.",
        "sudo reboot",
    ),
    r"couldn't communicate with the NVIDIA driver|NVML: Driver Not Loaded": Problem(
        "not-loaded",
        "the NVIDIA kernel module is not loaded",
        "Usually a kernel update for which the module was not built, or Secure Boot refusing an unsigned module.",
        'sudo modprobe nvidia || sudo dmesg | grep -iE "nvidia|nouveau|secure boot|lockdown"\n'
        "sudo dkms autoinstall && sudo reboot   # builds the module; needs the headers of kernel $(uname -r)",
    ),
    r"Failed to initialize NVML: Unknown Error": Problem(
        "nvml-unknown",
        "the driver's management library does not start",
        "In a container: the host reloaded its control groups and took the GPU's device nodes away.",
        f"{KERNEL_LOG}\nsudo reboot",
    ),
    r"": Problem(
        "fails",
        "nvidia-smi fails",
        "Where nvidia-smi cannot reach the GPU, CUDA cannot either.",
        f"nvidia-smi; {KERNEL_LOG}",
    ),
}


def where_it_helps(machine: Machine, cure: str) -> str:
    """A cure for the driver of a Linux machine, as it has to be in a container and in WSL."""
    if machine.wsl == 2:
        return UPDATE_WSL
    if machine.container:
        return f"{cure}\n# on the host, then start the container again: {with_gpus(machine)}"
    return cure


def driver(machine: Machine) -> Iterator[Finding]:
    answer = smi(machine)
    for gpu in answer.gpus[:1]:  # all have one driver
        names = "; ".join(f"{each.index}: {each.name}, {memory_text(each)}" for each in answer.gpus)
        count = f"{len(answer.gpus)} GPU{'s' if len(answer.gpus) > 1 else ''}"
        yield ok(f"NVIDIA driver {gpu.driver_version}, {count}", f"{answer.path}: {names}")
    if answer.path is None:
        yield without_nvidia_smi(machine)
    elif answer.problem:
        yield smi_failure(machine, answer)


def memory_text(gpu: Gpu) -> str:
    return "memory unknown" if gpu.memory_total_mib is None else f"{gpu.memory_total_mib / 1024:.0f} GiB"


def smi_failure(machine: Machine, answer: Smi) -> Finding:
    seen = f"{answer.path}: {answer.problem.splitlines()[0]}"
    known = (row for pattern, row in SMI_PROBLEMS.items() if re.search(pattern, answer.problem, re.IGNORECASE))
    problem = HANGS if answer.timed_out else next(known)
    if answer.gpus and problem.cause == "fails":
        why = "It lists the GPUs all the same; the driver may be about to give one up."
        return warning("complains", "nvidia-smi complains", seen=seen, why=why, cure=problem.cure)
    cure = where_it_helps(machine, problem.cure)
    if machine.container and problem.cause == "nvml-unknown":
        name = machine.hostname_answer.get("hostname", "NAME")  # the container's id, unless it was given another
        cure = f"{machine.engine} restart {name}   # on the host" if machine.engine else with_gpus(machine)
    return error(problem.cause, problem.title, seen=seen, why=problem.why, cure=cure)


def without_nvidia_smi(machine: Machine) -> Finding:
    """No nvidia-smi: a slim container, a container without GPUs, no driver, or no GPU at all."""
    hardware = nvidia_hardware(machine)
    traces = hardware or machine.glob("/dev/nvidia[0-9]*") or machine.glob("/proc/driver/nvidia/version")
    if machine.libcuda.works:
        return ok("no nvidia-smi, and none needed: libcuda works", "health checks of the GPUs are left out")
    if machine.container and traces:
        void = machine.environment.get("NVIDIA_VISIBLE_DEVICES", "unset")
        return error(
            "container",
            "this container was started without the GPUs",
            seen=f"the host has an NVIDIA GPU ({traces[0]}); no nvidia-smi here; NVIDIA_VISIBLE_DEVICES is {void}",
            why="A container sees a GPU only if the engine is told to pass it in, with the host's driver libraries.",
            cure=with_gpus(machine),
        )
    if hardware:
        nouveau = "nouveau " in (machine.read("/proc/modules") or "")
        return error(
            "not-installed",
            "there is an NVIDIA GPU and no NVIDIA driver",
            seen=f"PCI {', '.join(hardware)}; no nvidia-smi" + ("; the kernel uses nouveau" if nouveau else ""),
            why="CUDA needs NVIDIA's own driver; nouveau cannot run it.",
            cure=install_driver(machine),
        )
    return no_gpu(machine)


def no_gpu(machine: Machine) -> Finding:
    if machine.wsl == 2:
        return warning(
            "no-gpu",
            "Windows offers WSL no NVIDIA GPU",
            seen=f"no nvidia-smi in {WSL_LIBRARIES}",
            why="NVIDIA's Windows driver brings its Linux side along, in that folder; it is missing or too old.",
            cure="nvidia-smi.exe   # in PowerShell: if this fails too, install NVIDIA's driver on"
            f" Windows\n{UPDATE_WSL}",
        )
    return warning(
        "no-gpu",
        "this machine has no NVIDIA GPU",
        seen="no nvidia-smi, no NVIDIA device on the PCI bus",
        why="Training runs on the CPU: right for trying the suite out, too slow for the larger models.",
        cure=TRAIN_ON_CPU,
    )
