"""Checks of torch: is it there, for what was it built, does it fit driver and GPU, does it see the GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from commons.doctor.driver import DRIVER_BRANCH, TRAIN_ON_CPU, install_driver
from commons.doctor.findings import Finding, error, ok
from commons.doctor.machine import CudaDevice, Machine
from commons.doctor.smi import driver_cuda, smi
from commons.doctor.versions import GPU_TORCH, GPU_TORCH_RESULT, release

# pip's default build of torch is for CUDA 12 up to 2.10 (12.4, 12.6, then 12.8) and for CUDA 13 from 2.11 on
NEWEST_TORCH_WITH_CUDA_12 = "2.10.0"
# the last release whose default build has code for Maxwell, Pascal and Volta (5.0 to 7.0)
NEWEST_TORCH_FOR_OLD_GPUS = "2.7.1"
OLDEST_CAPABILITY = (5, 0)
OLDEST_CURRENT_CAPABILITY = (7, 5)
# NVIDIA installs these to a folder without the CUDA version in its name, so that two versions mix there
SHARED_CUDA_LIBRARIES = re.compile(r"nvidia-(nccl|cudnn|nvshmem|cusparselt)-cu(\d+)")


def install(machine: Machine, version: str) -> str:
    """The command that replaces the present torch by this version, and the libraries that pip might keep of it."""
    pip = f"{machine.python_path} -m pip"
    libraries = {each.name for each in machine.distributions if SHARED_CUDA_LIBRARIES.fullmatch(each.name)}
    return f"{pip} uninstall -y {' '.join(['torch', *sorted(libraries)])} && {pip} install torch=={version}"


def recommended_torch(machine: Machine) -> str:
    """The torch that the GPU tests have passed with, or the newest that runs on this driver and has code for these
    GPUs.
    """
    return choose_torch(machine, GPU_TORCH)[0]


def capabilities(machine: Machine) -> dict[str, tuple[int, int]]:
    """Compute capability by the GPU's name, by nvidia-smi and libcuda."""
    known = {gpu.name: gpu.capability for gpu in smi(machine).gpus if gpu.capability}
    return {**known, **{device.name: device.capability for device in machine.libcuda.devices}}


def choose_torch(machine: Machine, pinned: str) -> tuple[str, str]:
    """The torch to install here, and why it is not the pinned one; for install.sh, before there is any torch.

    A driver for CUDA 12 runs no build for CUDA 13. Where the driver does not even run CUDA 12, or a GPU is older
    than all builds, no tested torch uses the GPU: the pinned one does for the CPU, and the reason says so.
    """
    newest = driver_cuda(machine)
    if newest is None:
        return pinned, ""
    gpus = smi(machine).gpus
    name = f"driver {gpus[0].driver_version}" if gpus else "the NVIDIA driver here"
    driver = f"{name} runs CUDA {newest[0]}.{newest[1]} at most"
    oldest, capability = min(capabilities(machine).items(), key=lambda item: item[1], default=("", (99, 0)))
    if newest < (12, 0):
        return pinned, f"{driver}, and every tested torch needs 12: update the driver to use the GPU"
    if capability < OLDEST_CAPABILITY:
        return pinned, f"no tested torch has code for {oldest}: it trains on the CPU"
    if capability < OLDEST_CURRENT_CAPABILITY:
        return NEWEST_TORCH_FOR_OLD_GPUS, f"newer ones have no code for {oldest}"
    if newest < (13, 0):
        return NEWEST_TORCH_WITH_CUDA_12, f"{driver}, and torch {pinned} is built for CUDA 13"
    return GPU_TORCH, f"the one that the GPU tests have passed with ({GPU_TORCH_RESULT})"


def torch_build(machine: Machine) -> Iterator[Finding]:
    files = machine.torch_files
    if files.version is None:
        return  # the check of packages says it
    if files.cuda is None and (smi(machine).gpus or machine.libcuda.works):
        yield error(
            "cpu-only",
            "torch is a CPU build",
            seen=f"torch {files.version}, built without CUDA, {files.path}",
            why="It has no code for a GPU, whatever the driver says: 'Torch not compiled with CUDA enabled'.",
            cure=install(machine, recommended_torch(machine)),
        )
    else:
        yield ok(
            f"torch {files.version}",
            f"built for {f'CUDA {files.cuda}' if files.cuda else 'the CPU'}, {files.path}",
        )


def torch_import(machine: Machine) -> Iterator[Finding]:
    if machine.torch_files.version is None:
        return
    facts = machine.torch
    if facts.imported:
        devices = ", ".join(device.name for device in facts.devices) or facts.error or "none"
        gpus = f"; GPUs that it sees: {devices}; NCCL {facts.nccl or 'unknown'}" if facts.cuda else ""
        yield ok(f"torch imports in {facts.import_seconds:.1f} s", f"{facts.path}{gpus}")
        return
    library_path = machine.environment.get("LD_LIBRARY_PATH", "")
    yield error(
        "fails",
        "torch is installed and cannot be imported",
        seen=facts.error + (f"; LD_LIBRARY_PATH={library_path}" if library_path else ""),
        why="Libraries of another CUDA, in LD_LIBRARY_PATH or left by another version of torch, are loaded in"
            " place of its own.",
        cure=(f"env -u LD_LIBRARY_PATH {machine.python_path} -c 'import torch'   # if this works, it was"
              " the variable\n"
              if library_path else "")
        + install(machine, recommended_torch(machine)),
    )  # fmt: skip


def torch_cuda(machine: Machine) -> Iterator[Finding]:
    """A driver runs every CUDA of its own major version (minor version compatibility), and all older ones."""
    files, newest = machine.torch_files, driver_cuda(machine)
    match = re.match(r"(\d+)\.(\d+)", files.cuda or "")
    if match is None or newest is None:
        return
    built, text = (int(match[1]), int(match[2])), f"{newest[0]}.{newest[1]}"
    if built[0] > newest[0]:
        yield driver_too_old(machine, text)
    else:
        note = "" if built <= newest else "; newer by a minor version only, which CUDA allows"
        yield ok(f"the driver runs torch's CUDA {files.cuda}", f"the driver runs CUDA up to {text}{note}")


def driver_too_old(machine: Machine, newest: str) -> Finding:
    files, gpus = machine.torch_files, smi(machine).gpus
    version = gpus[0].driver_version if gpus else "unknown"
    cures = [install(machine, recommended_torch(machine))] if int(newest.split(".")[0]) >= 12 else []
    if not version.split(".")[0].isdecimal() or int(version.split(".")[0]) < DRIVER_BRANCH:
        cures.append(install_driver(machine))
    return error(
        "newer-than-driver",
        f"torch was built for CUDA {files.cuda} and the driver runs CUDA {newest} at most",
        seen=f"torch {files.version}; driver {version}; {files.path}",
        why="A driver runs no CUDA of a newer major version: 'The NVIDIA driver on your system is too old'.",
        cure="\n# or: ".join(cures),
    )


def has_code_for(capability: tuple[int, int], arch_list: Iterable[str]) -> bool:
    """sm_XY runs on GPUs X.Y and newer of the same X; compute_XY is compiled at run time for all newer ones.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/ (binary and PTX compatibility). An "a" at the end
    (sm_90a) means that exact capability.
    """
    for kind, digits, suffix in re.findall(r"\b(sm|compute)_(\d+)([a-z]?)", " ".join(arch_list)):
        built = (int(digits[:-1]), int(digits[-1]))
        if suffix == "a":
            fits = built == capability
        else:
            fits = built <= capability and (kind == "compute" or built[0] == capability[0])
        if fits:
            return True
    return False


def torch_arch(machine: Machine) -> Iterator[Finding]:
    devices = machine.libcuda.devices if machine.libcuda.works else ()
    if not devices or not machine.torch_files.cuda or not machine.torch.arch_list:
        return
    bad = [device for device in devices if not has_code_for(device.capability, machine.torch.arch_list)]
    if bad:
        yield no_code(machine, bad[0])
        return
    yield ok("torch has code for this GPU", f"{' '.join(machine.torch.arch_list)}")


def no_code(machine: Machine, device: CudaDevice) -> Finding:
    capability = f"{device.capability[0]}.{device.capability[1]}"
    age = "older than" if device.capability < OLDEST_CURRENT_CAPABILITY else "newer than"
    return error(
        "no-code",
        f"torch has no code for {device.name}",
        seen=f"compute capability {capability}; torch {machine.torch.version} has {' '.join(machine.torch.arch_list)}",
        why=f"The GPU is {age} this build: 'no kernel image is available for execution on the device'.",
        cure=torch_with_code(machine, device),
    )


def torch_with_code(machine: Machine, device: CudaDevice) -> str:
    """The command for a torch that has code for this GPU: a newer one than there is, for an old GPU an older one."""
    if device.capability < OLDEST_CAPABILITY:
        return f"{TRAIN_ON_CPU}   # no tested torch has code for this GPU"
    version = recommended_torch(machine)
    if device.capability < OLDEST_CURRENT_CAPABILITY or release(version) > release(machine.torch.version):
        return install(machine, version)
    if version != GPU_TORCH:  # for which this driver is too old
        return f"{install_driver(machine)}\n{install(machine, GPU_TORCH)}"
    return f"{machine.python_path} -m pip install --upgrade torch   # newer than the tested versions"


def nvcc(machine: Machine) -> Iterator[Finding]:
    """Never a problem here, and told for that reason: its version misleads many."""
    newest = driver_cuda(machine)
    counts = f"; what counts is the driver's CUDA, {newest[0]}.{newest[1]}" if newest else ""
    why = f"Nothing is compiled: torch brings its own CUDA libraries{counts}."
    path = machine.which("nvcc")
    if path is None:
        yield ok("no nvcc, and none needed", why=why)
        return
    release = re.search(r"release (\d+\.\d+)", machine.run(["nvcc", "--version"]).stdout)
    yield ok(f"nvcc {release[1] if release else 'of unknown version'} does not matter here", path, why)
