"""The check of libcuda: the driver's library that a process really loads, and what cuInit answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from commons.doctor.driver import RESTART_WSL, with_gpus
from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import WSL_LIBRARIES, Machine
from commons.doctor.smi import smi

LIBRARY_FOLDERS = (
    "/usr/lib/*",
    "/usr/lib64",
    "/lib64",
    "/usr/lib",
    "/usr/local/cuda*/compat",
    "/usr/local/nvidia/lib*",
)
NO_DEVICE = 100
STUB_LIBRARY = 34

# CUresult of cuInit -> (its name, cause, title, why, cure); numbers from cuda.h
INIT_PROBLEMS: dict[int, tuple[str, str, str, str, str]] = {
    2: (
        "CUDA_ERROR_OUT_OF_MEMORY",
        "out-of-memory",
        "the CUDA driver could not get memory to start",
        "Host memory, an address-space limit (ulimit -v), or under WSL a GPU that cannot be shared.",
        "ulimit -v unlimited; nvidia-smi",
    ),
    46: (
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "unavailable",
        "the GPU is taken",
        "Another process holds it in an exclusive compute mode.",
        "nvidia-smi   # lists the processes\nsudo nvidia-smi -c DEFAULT",
    ),
    NO_DEVICE: (
        "CUDA_ERROR_NO_DEVICE",
        "no-device",
        "the CUDA driver starts and sees no GPU",
        "This library does not reach the GPU: its device nodes are missing, or it belongs to another driver.",
        "ldconfig -p | grep libcuda.so   # which libcuda there are\nls -l /dev/nvidia* /dev/dxg",
    ),
    304: (
        "CUDA_ERROR_OPERATING_SYSTEM",
        "system-call",
        "a system call of the CUDA driver was refused",
        "A sandbox, a seccomp profile or missing device nodes stand between the process and the driver.",
        "ls -l /dev/nvidia*; sudo nvidia-modprobe -c 0 -u",
    ),
    802: (
        "CUDA_ERROR_SYSTEM_NOT_READY",
        "fabric-manager",
        "the NVLink switches are not ready",
        "On machines with NVSwitch, CUDA waits for NVIDIA's Fabric Manager, of the driver's exact version.",
        "sudo systemctl restart nvidia-fabricmanager && systemctl status nvidia-fabricmanager",
    ),
    803: (
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "version-mismatch",
        "libcuda and the kernel's NVIDIA module are of different versions",
        "The driver was updated while the old module stays loaded, or a container brought its own libcuda.",
        "sudo reboot",
    ),
    804: (
        "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        "compat",
        "a forward-compatibility libcuda was loaded, which this kind of GPU does not take",
        "NVIDIA's compat package lets data-centre GPUs run newer CUDA on an old driver; GeForce cards refuse it.",
        'export LD_LIBRARY_PATH=$(echo "$LD_LIBRARY_PATH" | tr ":" "\\n" | grep -v compat | paste -sd:)\n'
        "sudo apt-get purge 'cuda-compat-*'",
    ),
    999: (
        "CUDA_ERROR_UNKNOWN",
        "unknown",
        "the CUDA driver does not start",
        "Mostly the nvidia_uvm module: not loaded, or left broken by a suspend.",
        "sudo rmmod nvidia_uvm; sudo modprobe nvidia_uvm\nsudo nvidia-modprobe -c 0 -u",
    ),
}


def libcuda(machine: Machine) -> Iterator[Finding]:
    facts = machine.libcuda
    if facts.timed_out:
        yield error(
            "hangs",
            "the CUDA driver hangs while it starts",
            seen=f"cuInit: {facts.error}",
            why="A stuck GPU or driver; a training run would hang in the same place.",
            cure='sudo dmesg | grep -iE "nvrm|xid"   # the reason\nsudo reboot',
        )
    elif not facts.loaded:
        yield from not_loaded(machine)
    elif facts.works:
        version = ".".join(map(str, facts.version or ()))
        yield ok(
            f"libcuda works and runs CUDA up to {version}",
            f"{', '.join(facts.paths)}: {device_names(machine)}",
        )
        yield from linux_driver_in_wsl(machine)
    elif facts.init_code == STUB_LIBRARY or any("/stubs/" in path for path in facts.paths):
        yield error(
            "stub",
            "the toolkit's stub of libcuda is loaded in place of the driver's",
            seen=", ".join(facts.paths),
            why="The stub exists for linking on machines without a driver; it answers no call.",
            cure='export LD_LIBRARY_PATH=$(echo "$LD_LIBRARY_PATH" | tr ":" "\\n" | grep -v stubs | paste -sd:)',
        )
    elif is_shadowed(machine):
        yield shadowed(machine)
    else:
        yield from init_failure(machine)


def device_names(machine: Machine) -> str:
    return ", ".join(f"{device.name} (compute capability {device.capability[0]}.{device.capability[1]})"
                     for device in machine.libcuda.devices)  # fmt: skip


# --- WSL: Windows brings libcuda along; a Linux driver's one must not stand before it


def is_shadowed(machine: Machine) -> bool:
    """The loaded libcuda is not the one that Windows put into WSL. Containers have theirs elsewhere."""
    in_wsl = machine.wsl == 2 and not machine.container
    return in_wsl and not any(path.startswith("/usr/lib/wsl/") for path in machine.libcuda.paths)


def linux_libcudas(machine: Machine) -> list[str]:
    """Files of a Linux driver's libcuda, which has its version in its name; links left out."""
    found = [path for folder in LIBRARY_FOLDERS for path in machine.glob(f"{folder}/libcuda.so.*.*")]
    return list(dict.fromkeys(path for path in found if not machine.is_link(path)))


def owning_package(machine: Machine, path: str) -> tuple[str, str]:
    """(remove command, package) by dpkg or rpm; empty strings where neither knows the file."""
    for name in (path, path.removeprefix("/usr")):
        answer = machine.run(["dpkg", "-S", name])
        if answer.returncode == 0 and ": " in answer.stdout:
            return "sudo apt-get purge", answer.stdout.split(": ")[0].split(",")[0].removesuffix(":amd64").strip()
    answer = machine.run(["rpm", "-qf", "--queryformat", "%{NAME}", path])
    return ("sudo dnf remove", answer.stdout.strip()) if answer.returncode == 0 else ("", "")


def removal(machine: Machine, path: str) -> str:
    """The command that takes a Linux driver's libcuda out of WSL."""
    command, package = owning_package(machine, path)
    if package:
        return f"{command} {package} && sudo ldconfig   # its dependents go too: nothing here needs them"
    if machine.which("nvidia-uninstall"):
        return "sudo nvidia-uninstall && sudo ldconfig"
    folder = PurePosixPath(path).parent
    aside = "/root/linux-driver"
    return f"sudo mkdir -p {aside} && sudo mv {folder}/libcuda.so* {aside}/ && sudo ldconfig"


def shadowed(machine: Machine) -> Finding:
    facts = machine.libcuda
    path = facts.paths[0] if facts.paths else "libcuda.so.1"
    name = INIT_PROBLEMS.get(facts.init_code or 0, ("",))[0]
    package = owning_package(machine, path)[1]
    origin = f", of the package {package}" if package else ""
    gpus = smi(machine).gpus
    smi_text = f"; nvidia-smi sees {gpus[0].name} (driver {gpus[0].driver_version})" if gpus else ""
    return error(
        "shadowed",
        "a Linux NVIDIA driver inside WSL hides the one from Windows",
        seen=f"a process loads {path}{origin}; cuInit answers {facts.init_code} {name}{smi_text}",
        why=f"In WSL the GPU is reached through {WSL_LIBRARIES}/libcuda.so.1, which Windows' driver brings."
        " A Linux driver's libcuda looks for /dev/nvidia*, which WSL does not have: torch says 'No CUDA GPUs"
        " are available', while nvidia-smi, which needs no libcuda, works. A distribution's CUDA packages"
        " (nvidia-cuda-toolkit) often bring it in.",
        cure=f"LD_LIBRARY_PATH={WSL_LIBRARIES} bash run_gemini.sh   # at once, without removing anything\n"
        f"{removal(machine, path)}",
    )


def linux_driver_in_wsl(machine: Machine) -> Iterator[Finding]:
    others = linux_libcudas(machine) if machine.wsl == 2 and not machine.container else []
    if others:
        yield warning(
            "linux-driver-in-wsl",
            "a Linux NVIDIA driver is installed inside WSL",
            seen=f"{', '.join(others)}; loaded today: {', '.join(machine.libcuda.paths)}",
            why="The next package update may put its libcuda before the one from Windows, and the GPU is gone.",
            cure=removal(machine, others[0]),
        )


# --- elsewhere


def not_loaded(machine: Machine) -> Iterator[Finding]:
    problem = machine.libcuda.error
    if machine.wsl == 2 and machine.exists(f"{WSL_LIBRARIES}/libcuda.so.1"):
        yield error(
            "not-found",
            "the loader does not find WSL's libcuda",
            seen=f"{WSL_LIBRARIES}/libcuda.so.1 is there; {problem}",
            why="The folder is missing from the loader's cache, so that no program finds the GPU.",
            cure=f"echo {WSL_LIBRARIES} | sudo tee /etc/ld.so.conf.d/ld.wsl.conf && sudo ldconfig",
        )
    elif smi(machine).gpus:
        branch = smi(machine).gpus[0].driver_version.split(".")[0]
        yield error(
            "missing",
            "the driver's libcuda is not there",
            seen=f"nvidia-smi works; {problem}",
            why="nvidia-smi only manages the GPU; computing on it goes through libcuda.so.1.",
            cure=f"{with_gpus(machine)}   # with -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            if machine.container
            else f"sudo apt-get install libnvidia-compute-{branch}   # or this driver's package of your distribution",
        )


def init_failure(machine: Machine) -> Iterator[Finding]:
    facts = machine.libcuda
    code = NO_DEVICE if facts.init_code == 0 else facts.init_code
    if code == NO_DEVICE and not smi(machine).gpus:
        return  # nvidia-smi does not see one either: the driver check has said why
    seen = f"{', '.join(facts.paths) or 'libcuda.so.1'}: cuInit answers {facts.init_code}"
    if code is None:
        seen = f"{', '.join(facts.paths) or 'libcuda.so.1'}: {facts.error or 'no answer'}"
    module = (machine.read("/proc/driver/nvidia/version") or "").splitlines()
    if module:
        seen += f"; the kernel's module: {module[0].removeprefix('NVRM version:').strip()}"
    name, cause, title, why, cure = INIT_PROBLEMS.get(code or 0, (
        "", "init-failed", "the CUDA driver does not start", "No program on this machine can use the GPU.",
        'nvidia-smi; sudo dmesg | grep -iE "nvrm|xid"   # the reason'))  # fmt: skip
    if machine.wsl == 2:
        cure = f"{RESTART_WSL}\n{cure}"
    yield error(cause, title, seen=f"{seen} {name}".strip(), why=why, cure=cure)
