"""Checks of the way to the GPU: WSL, container, driver, device nodes, CUDA_VISIBLE_DEVICES, MIG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import WSL_LIBRARIES, Machine
from commons.doctor.smi import Gpu, Smi, mig_devices, smi

NVIDIA_PCI_VENDOR = "0x10de"
DISPLAY_PCI_CLASS = "0x03"
RESTART_WSL = "wsl.exe --shutdown   # in PowerShell on Windows; then open WSL again"
UPDATE_WSL = f"wsl.exe --update   # in PowerShell on Windows\n{RESTART_WSL}"
CONTAINER_WITH_GPUS = {
    "docker": "docker run --gpus all --ipc=host ...   # needs the NVIDIA Container Toolkit on the host",
    "podman": "podman run --device nvidia.com/gpu=all ...   # needs nvidia-ctk cdi generate on the host",
    "apptainer": "apptainer exec --nv ...",
    "kubernetes": "kubectl set resources deployment NAME --limits=nvidia.com/gpu=1   # or so in the file of a lone pod",
}
# by the host; {name} is what the engine calls the container, unless it was told otherwise
RESTART_CONTAINER = {
    "docker": "docker restart {name}   # on the host; docker ps lists the names",
    "podman": "podman restart {name}   # on the host; podman ps lists the names",
    "kubernetes": "kubectl delete pod {name}   # its deployment or job starts another",
}
# what every CUDA that torch is built for runs on, and the last branch for GPUs before Turing
DRIVER_BRANCH = 580
NVIDIA_REPOSITORY = f"from NVIDIA's repository; for GPUs before Turing: cuda-drivers of branch {DRIVER_BRANCH}"
# distribution -> (command, where its package comes from); https://docs.nvidia.com/datacenter/tesla/
# driver-installation-guide names the packages
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


def with_gpus(machine: Machine) -> str:
    return CONTAINER_WITH_GPUS.get(machine.container, CONTAINER_WITH_GPUS["docker"])


def restart_container(machine: Machine) -> str:
    command = RESTART_CONTAINER.get(machine.container)
    return command.format(name=machine.hostname_answer.get("hostname", "NAME")) if command else with_gpus(machine)


def install_driver(machine: Machine) -> str:
    """One line: the command that puts a driver in, or a newer one in the old one's place."""
    if machine.wsl == 2:
        return (
            f"explorer.exe https://www.nvidia.com/drivers   # driver {DRIVER_BRANCH} or newer, installed on Windows,"
            " never inside WSL; then in PowerShell: wsl.exe --shutdown"
        )
    if machine.container:  # its own distribution says nothing of the host's
        command, note = INSTALL_DRIVER["ubuntu"][0], "on the host; if that is no Ubuntu, its own driver package"
    else:
        known = [INSTALL_DRIVER[name] for name in machine.distribution_ids if name in INSTALL_DRIVER]
        command, note = known[0] if known else DRIVER_FILE
    return f"{command} && sudo reboot" + (f"   # {note}" if note else "")


# --- where this runs


def system(machine: Machine) -> Iterator[Finding]:
    seen = f"kernel {machine.kernel}, {machine.processor}"
    if machine.system != "Linux":
        yield error(
            "unsupported",
            f"{machine.system} is not supported",
            seen=seen,
            why="Colossal-AI and NCCL run on Linux only; on Windows, WSL 2 is a Linux with access to the GPU.",
            cure="wsl.exe --install   # on Windows, in PowerShell; elsewhere use a Linux machine",
        )
    else:
        yield ok(machine.distribution, seen)


def wsl(machine: Machine) -> Iterator[Finding]:
    if machine.wsl == 0:
        yield ok("not WSL")
    elif machine.wsl == 1:
        name = machine.environment.get("WSL_DISTRO_NAME", "<distribution>")
        yield error(
            "version-1",
            "this is WSL 1, which has no access to a GPU",
            seen=f"kernel {machine.kernel}",
            why="WSL 1 translates system calls; only WSL 2 runs a Linux kernel with the GPU's device node.",
            cure=f"wsl.exe --set-version {name} 2   # in PowerShell on Windows",
        )
    else:
        yield ok("WSL 2", f"kernel {machine.kernel}")


def container(machine: Machine) -> Iterator[Finding]:
    yield ok(f"in a container ({machine.container})" if machine.container else "not in a container")


# --- the driver

# nvidia-smi's words -> (cause, title, why, cure)
SMI_PROBLEMS: Sequence[tuple[str, str, str, str, str]] = (
    (
        r"Driver/library version mismatch",
        "version-mismatch",
        "the NVIDIA driver was updated and the old kernel module is still loaded",
        "The libraries on disk and the module in the kernel must be of one version; until then CUDA sees no GPU.",
        "sudo reboot",
    ),
    (
        r"couldn't communicate with the NVIDIA driver|NVML: Driver Not Loaded",
        "not-loaded",
        "the NVIDIA kernel module is not loaded",
        "Usually a kernel update for which the module was not built, or Secure Boot refusing an unsigned module.",
        'sudo modprobe nvidia || sudo dmesg | grep -iE "nvidia|nouveau|secure boot|lockdown"\n'
        "sudo apt-get install --reinstall linux-headers-$(uname -r) && sudo dkms autoinstall && sudo reboot",
    ),
    (
        r"GPU is lost|Unable to determine the device handle|fallen off the bus",
        "gpu-lost",
        "a GPU stopped answering",
        "After a hardware fault, overheating or a power problem the driver gives a GPU up until it is reset.",
        "sudo dmesg | grep -i xid   # the reason\nsudo reboot",
    ),
    (
        r"GPU access blocked by the operating system",
        "blocked",
        "Windows does not let WSL use the GPU",
        "The Windows driver and WSL do not fit together: one of them is too old.",
        UPDATE_WSL,
    ),
    (
        r"Insufficient Permissions|permission denied",
        "permission",
        "this user may not use the GPU",
        "The device nodes under /dev belong to a group that this user is not in.",
        "sudo usermod -aG video,render $USER   # then log in again",
    ),
    (
        r"No devices were found",
        "no-devices",
        "the NVIDIA driver runs and finds no GPU that it can use",
        "The driver does not know this GPU, the GPU failed to start, or it was handed to a virtual machine.",
        'sudo dmesg | grep -iE "nvrm|xid"   # the reason',
    ),
    (
        r"Failed to initialize NVML: Unknown Error",
        "nvml-unknown",
        "the driver's management library does not start",
        "In a container: the host reloaded its control groups and took the GPU's device nodes away.",
        'sudo dmesg | grep -iE "nvrm|xid"   # the reason\nsudo reboot',
    ),
)


def driver(machine: Machine) -> Iterator[Finding]:
    answer = smi(machine)
    for gpu in answer.gpus[:1]:  # all have one driver
        names = "; ".join(f"{each.index}: {each.name}, {memory_text(each)}" for each in answer.gpus)
        count = f"{len(answer.gpus)} GPU{'s' if len(answer.gpus) > 1 else ''}"
        yield ok(f"NVIDIA driver {gpu.driver_version}, {count}", f"{answer.path}: {names}")
    if answer.timed_out:
        yield error(
            "hangs",
            "nvidia-smi does not answer",
            seen=f"{answer.path}: {answer.problem}",
            why="A GPU or its driver is stuck; a training run would hang in the same place.",
            cure='sudo dmesg | grep -iE "nvrm|xid"   # the reason\nsudo reboot',
        )
    elif answer.path is None:
        yield without_nvidia_smi(machine)
    elif answer.problem:
        yield smi_failure(machine, answer)


def memory_text(gpu: Gpu) -> str:
    return "memory unknown" if gpu.memory_total_mib is None else f"{gpu.memory_total_mib / 1024:.0f} GiB"


UNKNOWN_SMI_PROBLEM = (
    "",
    "fails",
    "nvidia-smi fails",
    "Where nvidia-smi cannot reach the GPU, CUDA cannot either.",
    'nvidia-smi; sudo dmesg | grep -iE "nvrm|xid|nvidia"   # the reason',
)


def smi_failure(machine: Machine, answer: Smi) -> Finding:
    """Under WSL the driver is Windows' own, so that no command for a Linux driver helps."""
    seen = f"{answer.path}: {answer.problem.splitlines()[0]}"
    _, cause, title, why, cure = next(
        (known for known in SMI_PROBLEMS if re.search(known[0], answer.problem, re.IGNORECASE)),
        UNKNOWN_SMI_PROBLEM,
    )
    if answer.gpus and cause == UNKNOWN_SMI_PROBLEM[1]:
        why = "It lists the GPUs all the same; the driver may be about to give one up."
        return warning("complains", "nvidia-smi complains", seen=seen, why=why, cure=cure)
    if machine.wsl == 2:
        cure = UPDATE_WSL
    elif machine.container and cause == "nvml-unknown":
        cure = f"{restart_container(machine)}\n# where it comes back: {with_gpus(machine)}"
    elif machine.container:
        cure = f"{cure}\n# on the host, then start the container again: {with_gpus(machine)}"
    return error(cause, title, seen=seen, why=why, cure=cure)


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


# --- device nodes


def device_nodes(machine: Machine) -> Iterator[Finding]:
    if machine.wsl == 2:
        yield from wsl_node(machine)
        return
    nodes = [
        *machine.glob("/dev/nvidia[0-9]*"),
        *machine.glob("/dev/nvidiactl"),
        *machine.glob("/dev/nvidia-uvm"),
    ]
    if not nodes and not smi(machine).gpus:
        return  # the driver check has said it
    if machine.libcuda.works:
        yield ok("the GPU's device nodes can be opened", ", ".join(nodes))
        return
    problems = {node: problem for node in nodes if (problem := machine.open_problem(node))}
    if problems:
        yield forbidden(machine, problems)
    missing = [node for node in ("/dev/nvidiactl", "/dev/nvidia-uvm") if node not in nodes]
    if missing:
        yield error(
            "missing",
            f"no {' and no '.join(missing)}",
            seen=f"there are: {', '.join(nodes) or 'none'}",
            why="CUDA opens these nodes before it looks for a GPU; without them it finds none.",
            cure=with_gpus(machine) if machine.container else "sudo nvidia-modprobe -c 0 -u",
        )
    if not problems and not missing:
        yield ok("the GPU's device nodes can be opened", ", ".join(nodes))


def forbidden(machine: Machine, problems: dict[str, str]) -> Finding:
    group = machine.owning_group(next(iter(problems)))
    groups = "video,render" if group == "root" else group
    return error(
        "permission",
        "this user may not open the GPU's device nodes",
        seen="; ".join(f"{node}: {problem}" for node, problem in problems.items()) + f"; their group is {group}",
        why="CUDA then reports that there is no GPU, not that it was forbidden.",
        cure=with_gpus(machine)
        if machine.container
        else f"sudo usermod -aG {groups} $USER   # then log in again; on a cluster, ask the scheduler for a GPU",
    )


def wsl_node(machine: Machine) -> Iterator[Finding]:
    if machine.exists("/dev/dxg"):
        problem = machine.open_problem("/dev/dxg")
        if not problem:
            yield ok("/dev/dxg, WSL's way to the GPU, can be opened")
            return
        yield error(
            "permission",
            "this user may not open /dev/dxg",
            seen=f"/dev/dxg: {problem}",
            why="It is the one device node through which WSL reaches the GPU.",
            cure="sudo chmod a+rw /dev/dxg",
        )
        return
    finding = error if machine.exists(WSL_LIBRARIES) else warning
    yield finding(
        "no-dxg",
        "WSL has no /dev/dxg",
        seen=f"kernel {machine.kernel}; no /dev/dxg",
        why="It is the one device node through which WSL reaches the GPU; an old WSL kernel or Windows lacks it.",
        cure=with_gpus(machine) if machine.container else UPDATE_WSL,
    )


# --- CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class Visible:
    """What CUDA makes of CUDA_VISIBLE_DEVICES: it stops at the first entry that it cannot use."""

    entries: tuple[str, ...]
    cause: str = ""
    culprit: str = ""


HIDDEN = {
    "hidden": "hides every GPU",
    "out-of-range": "names a GPU that is not there",
    "unknown-uuid": "names a UUID that no GPU here has",
    "duplicate": "names a GPU twice",
    "malformed": "is not a list of GPU numbers or UUIDs",
}


def read_visible_devices(value: str, count: int, uuids: Sequence[str]) -> Visible:
    """https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html

    count: the GPUs of this machine; uuids: theirs and their MIG devices', empty where unknown.
    A repeated entry leaves nothing, as torch reads it (torch.cuda.device_count).
    """
    entries: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        cause = entry_problem(entry, count, uuids)
        if not cause and entry in entries:
            return Visible((), "duplicate", entry)
        if cause:
            return Visible(tuple(entries), cause, entry)
        entries.append(entry)
    return Visible(tuple(entries))


def entry_problem(entry: str, count: int, uuids: Sequence[str]) -> str:
    if not entry or entry.startswith("-") or entry == "NoDevFiles":
        return "hidden"
    if entry.startswith(("GPU-", "MIG-")):
        matches = [uuid for uuid in uuids if uuid.startswith(entry)]
        return "unknown-uuid" if uuids and len(matches) != 1 else ""
    if not entry.isdecimal():
        return "malformed"
    return "out-of-range" if int(entry) >= count else ""


def visible_devices(machine: Machine) -> Iterator[Finding]:
    value = machine.environment.get("CUDA_VISIBLE_DEVICES")
    gpus = smi(machine).gpus
    count = len(gpus) or len(machine.libcuda.devices)
    if value is None or not count:
        yield ok(
            "CUDA_VISIBLE_DEVICES is not set" if value is None else f'CUDA_VISIBLE_DEVICES="{value}", no GPU to hide'
        )
        return
    uuids = [gpu.uuid for gpu in gpus]
    if "MIG-" in value:
        uuids += mig_devices(machine)
    visible = read_visible_devices(value, count, uuids)
    if not visible.cause:
        yield ok(f"CUDA_VISIBLE_DEVICES={value}", f"{len(visible.entries)} of {count} GPUs are used")
        return
    there = ", ".join(uuids) if visible.cause == "unknown-uuid" else f"0 to {count - 1}" if count > 1 else "0"
    finding = warning if visible.entries else error
    yield finding(
        visible.cause,
        f"CUDA_VISIBLE_DEVICES {HIDDEN[visible.cause]}",
        seen=f'CUDA_VISIBLE_DEVICES="{value}"; GPUs here: {there}',
        why=f'CUDA stops reading at "{visible.culprit}"; what it then sees: {", ".join(visible.entries) or "no GPU"}.',
        cure=visible_devices_cure(machine, visible),
    )


def visible_devices_cure(machine: Machine, visible: Visible) -> str:
    if visible.cause == "hidden" and "SLURM_JOB_ID" in machine.environment:
        return "salloc --gpus-per-node=1   # Slurm sets the variable: ask it for GPUs"
    return "unset CUDA_VISIBLE_DEVICES   # every GPU; or: export CUDA_VISIBLE_DEVICES=0"


# --- MIG and compute modes


def mig(machine: Machine) -> Iterator[Finding]:
    gpus = smi(machine).gpus
    for gpu in gpus:
        if gpu.mig_mode_pending and gpu.mig_mode and gpu.mig_mode_pending != gpu.mig_mode:
            yield warning(
                "pending",
                f"GPU {gpu.index}: a change of its MIG mode waits for a reset",
                seen=f"MIG is {gpu.mig_mode}, after the reset {gpu.mig_mode_pending}",
                why="The next reset or reboot changes which devices CUDA sees.",
                cure=f"sudo nvidia-smi -i {gpu.index} --gpu-reset   # with no process on it",
            )
    split = [gpu for gpu in gpus if gpu.mig_mode == "Enabled"]
    if split:
        yield split_gpus(split, mig_devices(machine))
    elif gpus:
        yield ok("MIG is off" if any(gpu.mig_mode for gpu in gpus) else "no MIG on these GPUs")


def split_gpus(split: Sequence[Gpu], devices: Sequence[str]) -> Finding:
    numbers = ",".join(str(gpu.index) for gpu in split)
    if not devices:
        return error(
            "no-instances",
            f"GPU {numbers}: MIG is on and no instance was made",
            seen="nvidia-smi -L lists no MIG device",
            why="With MIG on, CUDA sees instances and not the GPU; without instances it sees nothing.",
            cure=f"sudo nvidia-smi -i {numbers} -mig 0   # whole GPUs; some kinds keep MIG over a reboot",
        )
    return warning(
        "enabled",
        f"GPU {numbers}: split into {len(devices)} MIG instances",
        seen=", ".join(devices),
        why="A process sees one instance only, and NCCL cannot join instances: one rank is all that works."
        " Instances last until the GPU is reset or the machine restarted.",
        cure=f"export CUDA_VISIBLE_DEVICES={devices[0]}\nsudo nvidia-smi -i {numbers} -mig 0   # or whole GPUs",
    )


def compute_mode(machine: Machine) -> Iterator[Finding]:
    gpus = smi(machine).gpus
    for gpu in gpus:
        if gpu.compute_mode == "Prohibited":
            yield error(
                "prohibited",
                f"GPU {gpu.index} refuses every program",
                seen=f"compute mode Prohibited; {how_long(gpu)}",
                why="CUDA reports that all devices are busy or unavailable.",
                cure=f"sudo nvidia-smi -i {gpu.index} -c DEFAULT",
            )
        elif gpu.compute_mode and gpu.compute_mode.startswith("Exclusive"):
            yield warning(
                "exclusive",
                f"GPU {gpu.index} takes one process only",
                seen=f"compute mode {gpu.compute_mode}; {how_long(gpu)}",
                why="Training fails with 'devices are busy or unavailable' while any other process is on this GPU.",
                cure=f"sudo nvidia-smi -i {gpu.index} -c DEFAULT",
            )
    if gpus and all(gpu.compute_mode in ("Default", None) for gpu in gpus):
        yield ok("several processes may share a GPU", "compute mode Default")


def how_long(gpu: Gpu) -> str:
    """A driver without persistence mode forgets the modes that were set when the last process leaves the GPU."""
    lasts = {"Enabled": "it stays until the next restart", "Disabled": "it goes when the last process leaves the GPU"}
    mode = gpu.persistence_mode or "unknown"
    return f"persistence mode {mode}" + (f": {lasts[mode]}" if mode in lasts else "")


def persistence(machine: Machine) -> Iterator[Finding]:
    """Not a trouble by itself: a start takes longer, and a desktop's own program keeps the driver loaded."""
    gpus = smi(machine).gpus
    off = [str(gpu.index) for gpu in gpus if gpu.persistence_mode == "Disabled"]
    if off:
        yield ok(
            "the driver sleeps between runs",
            f"persistence mode is Disabled on GPU {', '.join(off)}",
            "The first start takes seconds longer, and modes set with nvidia-smi are forgotten meanwhile;"
            " sudo nvidia-smi -pm 1 keeps it awake.",
        )
    elif gpus:
        known = any(gpu.persistence_mode for gpu in gpus)
        yield ok("the driver stays loaded between runs" if known else "these GPUs know no persistence mode")
