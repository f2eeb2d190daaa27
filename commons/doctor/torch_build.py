"""Checks of torch: is it there, for what was it built, does it fit driver and GPU, does it see the GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from commons.doctor.driver import install_driver
from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import CudaDevice, Machine
from commons.doctor.packages import shared_cuda_libraries
from commons.doctor.smi import driver_cuda, smi
from commons.doctor.versions import GPU_TORCH, GPU_TORCH_RESULT

# pip's default build of torch is for CUDA 12 up to 2.10 (12.4, 12.6, then 12.8) and for CUDA 13 from 2.11 on
NEWEST_TORCH_WITH_CUDA_12 = "2.10.0"
# the last release whose default build has code for Pascal and Volta (6.0 to 7.0)
NEWEST_TORCH_FOR_OLD_GPUS = "2.7.1"
OLDEST_CURRENT_CAPABILITY = (7, 5)
FIRST_CAPABILITY_WITH_BF16 = (8, 0)


def gpus_are_there(machine: Machine) -> bool:
    return bool(smi(machine).gpus) or machine.libcuda.works


def install(machine: Machine, version: str) -> str:
    """Puts this version in the place of the present build, of which pip might keep the libraries."""
    pip = f"{machine.python_path} -m pip"
    libraries = sorted({package.name for package in shared_cuda_libraries(machine)})
    return f"{pip} uninstall -y {' '.join(['torch', *libraries])} && {pip} install torch=={version}"


def default_version(machine: Machine) -> str:
    """The tested torch whose default build the driver can run."""
    newest = driver_cuda(machine)
    return GPU_TORCH if newest is None or newest >= (13, 0) else NEWEST_TORCH_WITH_CUDA_12


def choose_torch(machine: Machine, pinned: str) -> tuple[str, str]:
    """The torch to install here, and why it is not the pinned one; for install.sh, before there is any torch.

    A driver for CUDA 12 runs no build for CUDA 13. Where not even CUDA 12 runs, no tested torch does: the pinned
    one is as good as any on the CPU, and the reason says what to update.
    """
    newest = driver_cuda(machine)
    if newest is None:
        return pinned, ""
    gpus = smi(machine).gpus
    name = f"driver {gpus[0].driver_version}" if gpus else "the NVIDIA driver here"
    driver = f"{name} runs CUDA {newest[0]}.{newest[1]} at most"
    old = [gpu for gpu in gpus if gpu.capability and gpu.capability < OLDEST_CURRENT_CAPABILITY]
    if newest < (12, 0):
        return pinned, f"{driver}, and every tested torch needs 12: update the driver to use the GPU"
    if old:
        return NEWEST_TORCH_FOR_OLD_GPUS, f"newer ones have no code for {old[0].name}"
    if newest < (13, 0):
        return NEWEST_TORCH_WITH_CUDA_12, f"{driver}, and torch {pinned} is built for CUDA 13"
    return GPU_TORCH, f"the one that the GPU tests have passed with ({GPU_TORCH_RESULT})"


def torch_build(machine: Machine) -> Iterator[Finding]:
    files = machine.torch_files
    if files.version is None:
        yield error(
            "missing",
            "torch is not installed",
            seen=f"{machine.python_path} finds no torch",
            why="Nothing can be trained without it.",
            cure="bash install.sh",
        )
    elif files.hip:
        yield error(
            "rocm",
            "torch is a build for AMD GPUs",
            seen=f"torch {files.version}, ROCm {files.hip}, {files.path}",
            why="This suite's CUDA plans need a CUDA build.",
            cure=install(machine, default_version(machine)),
        )
    elif files.cuda is None and gpus_are_there(machine):
        yield error(
            "cpu-only",
            "torch is a CPU build",
            seen=f"torch {files.version}, built without CUDA, {files.path}",
            why="It has no code for a GPU, whatever the driver says: 'Torch not compiled with CUDA enabled'.",
            cure=install(machine, default_version(machine)),
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
        yield ok(f"torch imports in {facts.import_seconds:.1f} s", facts.path)
        return
    library_path = machine.environment.get("LD_LIBRARY_PATH", "")
    yield error(
        "fails",
        "torch is installed and cannot be imported",
        seen=facts.error + (f"; LD_LIBRARY_PATH={library_path}" if library_path else ""),
        why="Libraries of another CUDA, in LD_LIBRARY_PATH or left by another version of torch, stand"
            " before its own.",
        cure=(f"env -u LD_LIBRARY_PATH {machine.python_path} -c 'import torch'   # if this works, it was"
              " the variable\n"
              if library_path else "")
        + install(machine, default_version(machine)),
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
    update, fits = install_driver(machine), newest.startswith("12")
    return error(
        "newer-than-driver",
        f"torch was built for CUDA {files.cuda} and the driver runs CUDA {newest} at most",
        seen=f"torch {files.version}; driver {version}; {files.path}",
        why="A driver runs no CUDA of a newer major version: 'The NVIDIA driver on your system is too old'.",
        cure=f"{install(machine, NEWEST_TORCH_WITH_CUDA_12)}\n# or: {update}" if fits else update,
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
    slow = [device for device in devices if device.capability < FIRST_CAPABILITY_WITH_BF16]
    if slow:
        yield warning(
            "no-bf16",
            f"{slow[0].name} has no bf16 arithmetic",
            seen=f"compute capability {slow[0].capability[0]}.{slow[0].capability[1]}, bf16 begins with 8.0",
            why="The default precision, bf16, is emulated and slow there.",
            cure="bash run_gemini.sh --precision fp16",
        )
    else:
        yield ok("torch has code for this GPU", f"{' '.join(machine.torch.arch_list)}")


def no_code(machine: Machine, device: CudaDevice) -> Finding:
    capability = f"{device.capability[0]}.{device.capability[1]}"
    if device.capability < OLDEST_CURRENT_CAPABILITY:
        version, age = NEWEST_TORCH_FOR_OLD_GPUS, "older than"
    else:
        version, age = default_version(machine), "newer than"
    return error(
        "no-code",
        f"torch has no code for {device.name}",
        seen=f"compute capability {capability}; torch {machine.torch.version} has {' '.join(machine.torch.arch_list)}",
        why=f"The GPU is {age} this build: 'no kernel image is available for execution on the device'.",
        cure=install(machine, version),
    )


def torch_gpu(machine: Machine) -> Iterator[Finding]:
    """Last of the GPU checks: does torch itself see what libcuda sees?"""
    if not machine.torch_files.cuda or not gpus_are_there(machine):
        return
    if not machine.libcuda.works:
        return  # said by the check of libcuda
    facts = machine.torch
    if facts.imported and facts.devices:
        nccl = f"; NCCL {facts.nccl}" if facts.nccl else ""
        yield ok(
            f"torch sees {len(facts.devices)} GPU(s)",
            ", ".join(device.name for device in facts.devices) + nccl,
        )
    elif facts.imported:
        yield error(
            "none",
            "torch sees no GPU",
            seen=(facts.error or "torch.cuda.device_count() is 0").splitlines()[0] + other_libcuda(machine),
            why="The errors above, if any, are the cause; otherwise torch and libcuda disagree in this environment.",
            cure=f'{machine.python_path} -c "import torch; torch.cuda.init()"   # the whole message',
        )


def other_libcuda(machine: Machine) -> str:
    """Which libcuda torch's process has mapped, where it is not the one that a process without torch loads."""
    paths = machine.torch.paths
    other = paths and set(paths) != set(machine.libcuda.paths)
    return f"; torch loads {', '.join(paths)}, others {', '.join(machine.libcuda.paths)}" if other else ""


def nvcc(machine: Machine) -> Iterator[Finding]:
    """Never a problem here, and for that very reason a line: its version misleads many."""
    newest = driver_cuda(machine)
    counts = f"; what counts is the driver's CUDA, {newest[0]}.{newest[1]}" if newest else ""
    why = f"Nothing is compiled: torch brings its own CUDA libraries{counts}."
    path = machine.which("nvcc")
    if path is None:
        yield ok("no nvcc, and none needed", why=why)
        return
    release = re.search(r"release (\d+\.\d+)", machine.run(["nvcc", "--version"]).stdout)
    yield ok(f"nvcc {release[1] if release else 'of unknown version'} does not matter here", path, why)


def library_path(machine: Machine) -> Iterator[Finding]:
    """A CUDA toolkit's folders in LD_LIBRARY_PATH come before the libraries that torch brings along."""
    if not machine.torch_files.cuda:
        return
    folders = machine.environment.get("LD_LIBRARY_PATH", "").split(":")
    pattern = r"/cuda[^/]*/(lib|lib64|targets/[^/]+/lib)/?$"
    toolkit = [folder for folder in folders if re.search(pattern, folder)]
    if not toolkit:
        yield ok("no CUDA toolkit in LD_LIBRARY_PATH")
        return
    yield warning(
        "toolkit",
        "a CUDA toolkit's libraries stand before torch's own",
        seen=f"LD_LIBRARY_PATH holds {', '.join(toolkit)}",
        why="torch may load cuBLAS or NCCL of another version from there: undefined symbols, or crashes.",
        cure="unset LD_LIBRARY_PATH",
    )
