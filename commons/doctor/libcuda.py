"""The check of libcuda: the driver's library that a process really loads, and what cuInit answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from commons.doctor.driver import KERNEL_LOG, RESTART_WSL, UPDATE_WSL, Problem, where_it_helps, with_gpus
from commons.doctor.findings import Finding, error, ok
from commons.doctor.machine import WSL_LIBRARIES, Machine
from commons.doctor.smi import smi

NO_DEVICE = 100
STUB_LIBRARY = 34

NO_TOOLKIT = """export LD_LIBRARY_PATH=$(echo "$LD_LIBRARY_PATH" | tr ":" "\\n" | grep -v {} | paste -sd:)"""
UNKNOWN = Problem(
    "unknown",
    "the CUDA driver does not start",
    "Mostly the nvidia_uvm module: not loaded, or left broken by a suspend.",
    "sudo rmmod nvidia_uvm; sudo modprobe nvidia_uvm\nsudo nvidia-modprobe -c 0 -u",
)
# CUresult of cuInit -> (its name, what it means); numbers from cuda.h
INIT_PROBLEMS: dict[int | None, tuple[str, Problem]] = {
    NO_DEVICE: ("CUDA_ERROR_NO_DEVICE", Problem(
        "no-device",
        "the CUDA driver starts and sees no GPU",
        "This library does not reach the GPU: its device nodes are missing, or it belongs to another driver.",
        "ldconfig -p | grep libcuda.so   # which libcuda there are\nls -l /dev/nvidia* /dev/dxg",
    )),
    STUB_LIBRARY: ("CUDA_ERROR_STUB_LIBRARY", Problem(
        "stub",
        "the toolkit's stub of libcuda is loaded in place of the driver's",
        "The stub is for linking programs on machines without a driver; it answers no call.",
        NO_TOOLKIT.format("stubs"),
    )),
    304: ("CUDA_ERROR_OPERATING_SYSTEM", UNKNOWN),
    802: ("CUDA_ERROR_SYSTEM_NOT_READY", Problem(
        "fabric-manager",
        "the NVLink switches are not ready",
        "On machines with NVSwitch, CUDA waits for NVIDIA's Fabric Manager, of the driver's exact version.",
        "sudo systemctl restart nvidia-fabricmanager && systemctl status nvidia-fabricmanager",
    )),
    803: ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", Problem(
        "version-mismatch",
        "libcuda and the kernel's NVIDIA module are of different versions",
        "The driver was updated while the old module stays loaded, or a container brought its own libcuda.",
        "sudo reboot",
    )),
    804: ("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", Problem(
        "compat",
        "a forward-compatibility libcuda was loaded, which this kind of GPU does not take",
        "NVIDIA's compat package lets data-centre GPUs run newer CUDA on an old driver; GeForce cards refuse it.",
        f"{NO_TOOLKIT.format('compat')}\nsudo apt-get purge 'cuda-compat-*'",
    )),
    999: ("CUDA_ERROR_UNKNOWN", UNKNOWN),
}  # fmt: skip
INIT_FAILED = Problem(
    "init-failed",
    "the CUDA driver does not start",
    "No program on this machine can use the GPU.",
    f"nvidia-smi; {KERNEL_LOG}",
)
LOCAL_CAUSES = ("no-device", "compat", "stub")  # cured where the process runs, the others where the driver runs


def libcuda(machine: Machine) -> Iterator[Finding]:
    facts = machine.libcuda
    if not facts.loaded and not facts.timed_out:
        yield from not_loaded(machine)
    elif facts.works:
        version = ".".join(map(str, facts.version or ()))
        yield ok(
            f"libcuda works and runs CUDA up to {version}",
            f"{', '.join(facts.paths)}: {device_names(machine)}",
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
    in_wsl = machine.wsl == 2 and not machine.container and not machine.libcuda.timed_out
    known = ("/usr/lib/wsl/", "/usr/local/cuda")  # Windows', and the toolkit's stub
    return in_wsl and not any(path.startswith(known) for path in machine.libcuda.paths)


def owning_package(machine: Machine, path: str) -> tuple[str, str]:
    """(remove command, package) by dpkg or rpm; empty strings where neither knows the file."""
    for name in (path, path.removeprefix("/usr")):
        answer = machine.run(["dpkg", "-S", name])
        if answer.returncode == 0 and ": " in answer.stdout:
            return "sudo apt-get purge", answer.stdout.split(": ")[0].split(",")[0].removesuffix(":amd64").strip()
    answer = machine.run(["rpm", "-qf", "--queryformat", "%{NAME}", path])
    return ("sudo dnf remove", answer.stdout.strip()) if answer.returncode == 0 else ("", "")


def removal(machine: Machine, path: str) -> str:
    """The command that removes a Linux driver's libcuda from WSL."""
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
    name, _ = INIT_PROBLEMS.get(facts.init_code, ("", INIT_FAILED))
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
    if any("/stubs/" in path for path in facts.paths):
        code = STUB_LIBRARY
    answer = f"cuInit answers {facts.init_code}" if code is not None else facts.error or "no answer"
    seen = f"{', '.join(facts.paths) or 'libcuda.so.1'}: {answer}"
    without_uvm = code in (304, 999) and not machine.exists("/dev/nvidia-uvm")  # a cause of its own
    nodes = node_problems(machine)
    if nodes and (machine.container or not without_uvm):
        yield closed_nodes(machine, nodes, seen)
        return
    if code == NO_DEVICE and not smi(machine).gpus:
        return  # nvidia-smi does not see one either: the driver check has said why
    module = (machine.read("/proc/driver/nvidia/version") or "").splitlines()
    if module:
        seen += f"; the kernel's module: {module[0].removeprefix('NVRM version:').strip()}"
    name, problem = INIT_PROBLEMS.get(code, ("", INIT_FAILED))
    cure = problem.cure
    if machine.wsl == 2:
        cure = f"{RESTART_WSL}\n{cure}"
    elif problem.cause not in LOCAL_CAUSES:
        cure = where_it_helps(machine, cure)
    yield error(problem.cause, problem.title, seen=f"{seen} {name}".strip(), why=problem.why, cure=cure)


def node_problems(machine: Machine) -> dict[str, str]:
    """Why the device nodes that CUDA opens first cannot be opened, by node; empty where they can."""
    needed = ("/dev/dxg",) if machine.wsl == 2 else ("/dev/nvidiactl", "/dev/nvidia-uvm")
    gpus = [] if machine.wsl == 2 else machine.glob("/dev/nvidia[0-9]*")
    if not gpus and not machine.wsl and not smi(machine).gpus:
        return {}
    return {node: problem for node in (*gpus, *needed) if (problem := machine.open_problem(node))}


def closed_nodes(machine: Machine, problems: dict[str, str], answer: str) -> Finding:
    missing = [node for node in problems if not machine.exists(node)]
    if machine.container:
        cure = with_gpus(machine)
    elif machine.wsl == 2:
        cure = UPDATE_WSL if missing else "sudo chmod a+rw /dev/dxg"
    elif missing:
        cure = "sudo nvidia-modprobe -c 0 -u"
    else:
        group = machine.owning_group(next(iter(problems)))
        groups = "video,render" if group == "root" else group
        cure = f"sudo usermod -aG {groups} $USER   # then log in again; on a cluster, ask the scheduler for a GPU"
    return error(
        "device-nodes",
        "the GPU's device nodes are missing" if missing else "this user may not open the GPU's device nodes",
        seen="; ".join([*(f"{node}: {problem}" for node, problem in problems.items()), answer]),
        why="CUDA opens them before it looks for a GPU, and then reports that there is none.",
        cure=cure,
    )
