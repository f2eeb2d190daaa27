"""A run that is out of memory: which errors say so, of which memory, and what was asked, used and free.

torch is asked only where it is loaded already; on what a machine does not tell, nothing is said.
"""

from __future__ import annotations

import dataclasses
import errno
import linecache
import re
import resource
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from commons.lifecycle.heartbeat import Beat
from commons.lifecycle.host_memory import GIB, control_group, memory_sizes, read_file
from commons.lifecycle.outcome import OUT_OF_MEMORY, OUT_OF_MEMORY_CODE, Ended

SUMMARY_KEY = "out_of_memory"
GPU, PINNED, HOST = "GPU memory", "pinned host memory", "host memory"
MIB = 1 << 20

# Words of errors of torch, CUDA's libraries, NCCL, the C library and Python.
GPU_WORDS = re.compile(
    r"CUDA (error: )?out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|Cuda failure \d* *'?out of memory"
    r"|Failed to CUDA [cm]alloc|(CUBLAS|CUDNN|CUSPARSE)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED",
    re.IGNORECASE,
)
HOST_WORDS = re.compile(
    r"can(no|')t allocate memory|not enough memory: you tried|Unable to allocate .* for an array|std::bad_alloc",
    re.IGNORECASE,
)
PINNING_WORDS = re.compile(r"pin_memory|cudaHost(Alloc|Register)")
INNERMOST_FRAMES = 3
ROOM_LEFT = 0.1  # of a GPU: with more than that free, CUDA's bare "out of memory" is about pinned memory

UNITS = {"": 1, "bytes": 1, "KiB": 1 << 10, "MiB": MIB, "GiB": GIB, "TiB": GIB << 10, "PiB": GIB << 20}
AMOUNT = r"([\d.]+) (bytes|[KMGTP]iB)"
ASKED = re.compile(rf"(?:tried to allocate|Unable to allocate|CUDA calloc async|CUDA malloc) {AMOUNT}", re.IGNORECASE)
# of torch's message, where its allocator cannot be asked
TOTAL = re.compile(rf"total capacity of {AMOUNT}")
FREE = re.compile(rf"of which {AMOUNT} is free")
USED = re.compile(rf"{AMOUNT} is allocated by PyTorch")
KEPT = re.compile(rf"{AMOUNT} is reserved by PyTorch but unallocated")


@dataclass(frozen=True)
class Shortage:
    """One rank's, in bytes; None is unknown.

    Attributes:
        memory: GPU, PINNED or HOST.
        phase, step: of heartbeat.RUN_PHASES, and the step, 0 before the first.
        where: both in words.
        asked_bytes: what could not be had.
        used_bytes: by this rank: its tensors on the GPU, its resident set on the host.
        kept_bytes: on the GPU, what torch's allocator holds beyond its tensors.
        others_bytes: on the GPU, what other processes hold.
        free_bytes, total_bytes: of the GPU, or of what ``limit`` allows on the host.
        limit: what sets the total: "the GPU", "this machine", "the control group", "ulimit -v".
        killed: the kernel ended the rank; nothing is known of what it asked for.
    """

    memory: str
    rank: int
    phase: str
    step: int
    where: str
    asked_bytes: int | None = None
    used_bytes: int | None = None
    kept_bytes: int | None = None
    others_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    limit: str = ""
    killed: bool = False

    def sentence(self, world_size: int) -> str:
        """For the screen and summary.json."""
        what = "was killed by the kernel for lack of" if self.killed else "ran out of"
        head = f"Rank {self.rank} of {world_size} {what} {self.memory} in {self.where}"
        facts = "; ".join(self._facts())
        return f"{head}: {facts}." if facts else f"{head}."

    def _facts(self) -> Iterator[str]:
        if self.asked_bytes is not None:
            yield f"{in_words(self.asked_bytes)} were asked for"
        if self.used_bytes is not None:
            kept = f" and {in_words(self.kept_bytes)} that its allocator keeps" if self.kept_bytes else ""
            last = "was last seen with" if self.killed else "holds"
            yield f"the rank {last} {in_words(self.used_bytes)}{kept}"
        if self.others_bytes:
            yield f"other processes hold {in_words(self.others_bytes)}"
        if self.total_bytes is not None and self.killed:
            yield f"{self.limit} allows {in_words(self.total_bytes)}"
        elif self.total_bytes is not None and self.free_bytes is not None:
            yield f"{in_words(self.free_bytes)} of {in_words(self.total_bytes)} are free ({self.limit})"

    def ended(self, world_size: int) -> Ended:
        """summary.json has the attributes under SUMMARY_KEY."""
        details = {SUMMARY_KEY: dataclasses.asdict(self)}
        return Ended(OUT_OF_MEMORY, self.sentence(world_size), OUT_OF_MEMORY_CODE, details)


def shortage_of(ended: Ended) -> Shortage | None:
    """What a run that ended out of memory was short of; None of another end."""
    found = ended.details.get(SUMMARY_KEY)
    names = {field.name for field in dataclasses.fields(Shortage)}
    return Shortage(**{name: value for name, value in found.items() if name in names}) if found else None


def in_words(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 2 else f"{size / MIB:.1f} MiB"


def shortage(error: BaseException, rank: int, beat: Beat) -> Shortage | None:
    """What ``error`` says about memory, with what this process sees of it now; None if it is about something else.

    Args:
        beat: what the rank was doing.
    """
    found = next((each for each in _with_causes(error) if memory_of(each)), None)
    if found is None:
        return None
    memory, text = memory_of(found), str(found)
    place = {"rank": rank, "phase": beat.phase, "step": beat.step, "where": beat.where()}
    facts = _gpu_facts(text) if memory == GPU else {}
    if memory == GPU and is_about_pinning(found, facts):
        memory = PINNED
    if memory != GPU:
        facts = host_facts(of_pinned=memory == PINNED)
    return Shortage(memory, **place, asked_bytes=_amount(ASKED, text), **facts)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from: compilers wrap what the allocator says."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__


def memory_of(error: BaseException) -> str:
    """GPU (where it may be PINNED) or HOST by the error's kind and words; "" for an error about something else."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or GPU_WORDS.search(text):  # torch's own class, without its import
        return GPU if isinstance(error, RuntimeError) else ""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return HOST
    return HOST if isinstance(error, RuntimeError) and HOST_WORDS.search(text) else ""


def is_about_pinning(error: BaseException, facts: dict[str, Any]) -> bool:
    """Whether CUDA's "out of memory" was the answer to a request for pinned host memory: the code says so, or the GPU
    has room. torch's own allocator of GPU memory says how much it asked for.
    """
    if any(PINNING_WORDS.search(code) for code in _innermost_code(error)):
        return True
    free, total = facts.get("free_bytes"), facts.get("total_bytes")
    return not ASKED.search(str(error)) and bool(total) and free is not None and free > ROOM_LEFT * total


def _innermost_code(error: BaseException) -> Iterator[str]:
    """The statements that the error passed last, with all their lines where Python knows them (since 3.11)."""
    for frame in traceback.extract_tb(error.__traceback__)[-INNERMOST_FRAMES:]:
        first = frame.lineno or 0
        last = getattr(frame, "end_lineno", None) or first
        yield "".join(linecache.getline(frame.filename, line) for line in range(first, last + 1))


def _amount(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return int(float(found[1]) * UNITS[found[2]]) if found else None


def _gpu_facts(text: str) -> dict[str, Any]:
    """From torch, which knows to the byte, else from the message."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            raise RuntimeError
        free, total = torch.cuda.mem_get_info()
        used, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    except Exception:  # no CUDA here, or it answers no more: an error of memory is what has to be told
        free, total, used, kept = (_amount(pattern, text) for pattern in (FREE, TOTAL, USED, KEPT))
        return {"free_bytes": free, "total_bytes": total, "used_bytes": used, "kept_bytes": kept, "limit": "the GPU"}
    mine = _own_gpu_bytes(text) or reserved
    return {
        "free_bytes": free,
        "total_bytes": total,
        "used_bytes": used,
        "kept_bytes": reserved - used,
        "others_bytes": max(0, total - free - mine) if mine > reserved else None,
        "limit": "the GPU",
    }


OWN = re.compile(rf"this process has {AMOUNT} memory in use")


def _own_gpu_bytes(text: str) -> int | None:
    """All that this process holds, CUDA's context and NCCL included, as torch's message has it."""
    return _amount(OWN, text)


def host_facts(*, of_pinned: bool = False) -> dict[str, Any]:
    """This process's resident set, and the tightest limit: of the machine, its control group, or ulimit."""
    status = read_file("/proc/self/status") or ""

    def kib(name: str) -> int | None:
        found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) << 10 if found else None

    limits = list(_host_limits(kib("VmSize"), kib("VmLck") if of_pinned else None))
    facts: dict[str, Any] = {"used_bytes": kib("VmRSS")}
    if limits:
        free, total, limit = min(limits)
        facts |= {"free_bytes": free, "total_bytes": total, "limit": limit}
    return facts


def _host_limits(virtual_bytes: int | None, locked_bytes: int | None) -> Iterator[tuple[int, int, str]]:
    """Free and total bytes, and whose."""
    sizes, group = memory_sizes(), control_group()
    if "MemTotal" in sizes:
        yield sizes.get("MemAvailable", sizes["MemTotal"]), sizes["MemTotal"], "this machine"
    if group is not None and group.limit_bytes is not None:
        yield max(0, group.limit_bytes - group.used_bytes), group.limit_bytes, "the control group"
    for kind, used, name in (
        (resource.RLIMIT_AS, virtual_bytes, "ulimit -v"),
        (resource.RLIMIT_MEMLOCK, locked_bytes, "ulimit -l"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and used is not None:
            yield max(0, limit - used), limit, name


def killed_shortage(rank: int, beat: Beat, resident_bytes: int | None) -> Shortage:
    """Of a rank of this machine that the kernel has killed for lack of memory.

    Args:
        beat: its last.
        resident_bytes: when it was last seen.
    """
    facts: dict[str, Any] = {**host_facts(), "used_bytes": resident_bytes, "free_bytes": None}  # free is what it had
    return Shortage(HOST, rank, beat.phase, beat.step, beat.where(), **facts, killed=True)
