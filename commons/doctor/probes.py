"""What the doctor runs in child processes, since it may hang, crash or take memory and GPUs.

Run as a script by machine.py, with the interpreter that would train; prints one line of JSON last:

    probes.py libcuda       load the driver's library and initialise it
    probes.py torch         import torch and ask what it was built for and what it sees
    probes.py hostname      this machine's name as an address
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

# CUdevice_attribute of the driver API
COMPUTE_CAPABILITY_MAJOR = 75
COMPUTE_CAPABILITY_MINOR = 76


def mapped_libraries(name: str) -> list[str]:
    """Files mapped into this process whose path holds `name`: what the loader really took, links resolved."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text(errors="replace").splitlines() if name in line}
    return sorted(paths)


def libcuda() -> dict[str, Any]:
    import ctypes

    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as problem:
        return {"loaded": False, "error": str(problem)}
    answer: dict[str, Any] = {"loaded": True, "paths": mapped_libraries("libcuda.so")}
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
        answer["version"] = [version.value // 1000, version.value % 1000 // 10]
    answer["init_code"] = library.cuInit(0)
    answer["paths"] = mapped_libraries("libcuda.so")
    if answer["init_code"] == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0:
        answer["devices"] = [describe_device(library, index) for index in range(count.value)]
    return answer


def describe_device(library: Any, index: int) -> dict[str, Any]:
    import ctypes

    device, value, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(128)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR):
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return {"name": name.value.decode(errors="replace"), "capability": capability}


def torch_build() -> dict[str, Any]:
    started = time.perf_counter()
    try:
        import torch
    except Exception as problem:  # a broken build raises anything: ImportError, OSError, RuntimeError
        return {"imported": False, "error": f"{type(problem).__name__}: {problem}"}
    answer: dict[str, Any] = {
        "imported": True,
        "import_seconds": time.perf_counter() - started,
        "version": torch.__version__,
        "path": str(Path(torch.__file__).parent),
        "cuda": torch.version.cuda,
    }
    if torch.version.cuda:
        answer.update(cuda_answers(torch))
    return answer


def cuda_answers(torch: Any) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    # torch.cuda.get_arch_list() is empty where no GPU is seen; the build's own list is not
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    answer["arch_list"] = (flags or "").split()
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
        answer["devices"] = [
            {"name": torch.cuda.get_device_name(i), "capability": list(torch.cuda.get_device_capability(i))}
            for i in range(count)
        ]
        answer["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    except Exception as problem:  # the text is the finding
        answer["error"] = f"{type(problem).__name__}: {problem}"
    return answer


def hostname() -> dict[str, Any]:
    name = socket.gethostname()
    try:
        return {"hostname": name, "address": socket.gethostbyname(name)}
    except OSError as problem:
        return {"hostname": name, "error": str(problem)}


PROBES = {"libcuda": libcuda, "torch": torch_build, "hostname": hostname}


def main(arguments: list[str]) -> None:
    # this file's folder comes first on the path; no file in it may hide an installed module
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]
    print(json.dumps(PROBES[arguments[0]]()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
