"""This process's place in its job: which rank of how many, on this machine and in all, and where the ranks meet.

The only module that reads what a launcher says about it in environment variables. torchrun's names win; where they are
not (all) there, those of MPI's launchers and of Slurm's srun say the same, so that ranks that were started one by one
are one job. What one of them leaves out is derived from the rest; what cannot be, and what contradicts itself, is told
in ``problems``. Nothing here raises: a rank has to know its place to say that it is wrong.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

LOOPBACK = re.compile(r"localhost|127\.[\d.]+|\[?::1\]?")
PLAIN_PORT = 29500  # torchrun's
FIRST_JOB_PORT, JOB_PORTS = 10000, 20000  # by a job's number; below the ports that systems give away
ATTEMPT_VARIABLE = "TORCHELASTIC_RESTART_COUNT"


@dataclass(frozen=True)
class Family:
    """The names that one kind of launcher has for a rank's place, the first that is set counts."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()


TORCH = Family("torch", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
# In this order, as MPI's launchers start their helpers with srun, whose numbers then count machines.
FAMILIES = (
    Family(
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Family(
        "MVAPICH2",
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Family("PMI", ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID",), ("MPI_LOCALNRANKS",)),
    Family("Slurm", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",)),
)
PARTS = ("rank", "world_size", "local_rank", "local_world_size")


@dataclass(frozen=True)
class JobPlace:
    """Where this process stands among the ranks of its job.

    Attributes:
        rank, local_rank: among all ranks and among this machine's, from 0.
        world_size, local_world_size: how many these are. Where nothing tells how many are on this machine, it is 1,
            the same on every rank, and ``notes`` says so.
        master_addr, master_port: where the ranks meet, on the machine of rank 0. None: any free port, for a job of
            one rank.
        attempt, attempts_allowed: of torchrun's engine, from 1; more than 1 after a restart.
        run_id: torchrun's name of the job; "" where torchrun has not started it.
        problems: why the ranks could not become one job, with what to do, in one sentence; empty where they can.
        notes: what was assumed and could cost speed.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    attempt: int = 1
    attempts_allowed: int = 1
    run_id: str = ""
    problems: tuple[str, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def as_environment(self, port: int) -> dict[str, str]:
        """The place in torch's names, for libraries that look there. ``port``: where the ranks meet."""
        values = dict(zip(PARTS, (self.rank, self.world_size, self.local_rank, self.local_world_size), strict=True))
        names = {getattr(TORCH, part)[0]: str(value) for part, value in values.items()}
        return {**names, "MASTER_ADDR": self.master_addr, "MASTER_PORT": str(port)}


def read_job(environ: Mapping[str, str] = os.environ) -> JobPlace:
    """This process's place in its job, by its environment variables; a job of one rank where none tells."""
    return _Reading(environ).place()


def first_host(node_list: str) -> str:
    """The first name of Slurm's short list: node3 of ``node[3-5,9],big1``."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0]) if match else ""


class _Reading:
    """One reading of the variables, which collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._own = self._numbers(TORCH)

    def place(self) -> JobPlace:
        rank, world_size = self._rank_and_world_size()
        others = [found for found in self._families() if (found["rank"], found["world_size"]) == (rank, world_size)]
        local_world_size, is_told = self._local_world_size(others, world_size)
        local_rank = self._local_rank(others, rank, world_size, local_world_size, is_told)
        self._problems += _contradictions(rank, world_size, local_rank, local_world_size if is_told else world_size)
        # by itself it meets nobody, whatever MASTER_ADDR is there for other jobs
        alone = world_size <= 1 and "rank" not in self._own
        return JobPlace(
            rank,
            local_rank,
            world_size,
            local_world_size,
            master_addr=JobPlace.master_addr if alone else self._master_addr(world_size, local_world_size),
            master_port=None if alone else self._port(),
            attempt=self._number(ATTEMPT_VARIABLE, 0) + 1,
            attempts_allowed=self._number("TORCHELASTIC_MAX_RESTARTS", 0) + 1,
            run_id=self._environ.get("TORCHELASTIC_RUN_ID", ""),
            problems=tuple(self._problems[:1]),  # the others follow from it
            notes=tuple(self._notes),
        )

    def _number(self, variable: str, default: int) -> int:
        text = self._environ.get(variable, "").strip()
        if not text:
            return default
        if re.fullmatch(r"\d{1,9}", text):
            return int(text)
        self._problems.append(f"{variable} must be a whole number from 0, got {text!r}: correct it, or unset it")
        return default

    def _numbers(self, family: Family) -> dict[str, int]:
        """The parts of a place that are set, by their names."""
        found = {}
        for part in PARTS:
            variable = next((name for name in getattr(family, part) if self._environ.get(name)), None)
            if variable is not None:
                found[part] = self._number(variable, 1 if "size" in part else 0)
        return found

    def _families(self) -> Iterator[dict[str, int]]:
        """What launchers other than torch's say, of those that say which rank of how many this is."""
        for family in FAMILIES:
            # a batch script is no task of its job, though Slurm numbers it like one
            in_script = self._environ.get("ENVIRONMENT") == "BATCH" and not self._environ.get("SLURM_STEP_ID")
            if family.name == "Slurm" and in_script:
                continue
            names = [next((n for n in getattr(family, part) if self._environ.get(n)), None) for part in PARTS[:2]]
            if None not in names:
                yield self._numbers(family)

    def _rank_and_world_size(self) -> tuple[int, int]:
        own, other = self._own, next(self._families(), None)
        if "rank" in own and "world_size" in own:
            return own["rank"], own["world_size"]
        if other is not None:
            self._compare(own, other)
            return other["rank"], other["world_size"]
        if own.get("world_size") == 1:
            return 0, 1
        if own:
            there = ", ".join(f"{getattr(TORCH, part)[0]}={value}" for part, value in own.items())
            missing = " and ".join(getattr(TORCH, part)[0] for part in PARTS[:2] if part not in own)
            self._problems.append(f"{there} without {missing}: set {missing} too, or unset what is there")
        return own.get("rank", 0), own.get("world_size", max(1, own.get("rank", 0) + 1))

    def _compare(self, own: Mapping[str, int], other: Mapping[str, int]) -> None:
        for part, value in own.items():
            if other.get(part, value) != value:
                name = getattr(TORCH, part)[0]
                self._problems.append(
                    f"{name}={value} contradicts the job's launcher, for which it is {other[part]}: unset {name}"
                )

    def _local_world_size(self, others: list[dict[str, int]], world_size: int) -> tuple[int, bool]:
        """How many ranks are on this machine, and whether anything tells."""
        for found in (self._own, *others):
            if "local_world_size" in found:
                return found["local_world_size"], True
        if world_size == 1 or self._meets_on_loopback() or self._environ.get("SLURM_NNODES") == "1":
            return world_size, True
        tasks = self._slurm_tasks()
        if sum(tasks) == world_size:
            return tasks[self._number("SLURM_NODEID", 0) % len(tasks)], True
        self._notes.append(
            "nothing tells how many ranks this machine has: each counts as a machine of its own, without copies between"
            " GPUs (--peer_copies); set LOCAL_WORLD_SIZE"
        )
        return 1, False

    def _slurm_tasks(self) -> list[int]:
        """Tasks by node, from Slurm's short form: 2, 2 and 1 for ``2(x2),1``."""
        text = self._environ.get("SLURM_STEP_TASKS_PER_NODE") or self._environ.get("SLURM_TASKS_PER_NODE", "")
        pieces = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        return [int(tasks) for tasks, nodes in pieces for _ in range(min(int(nodes or 1), 10**6))]

    def _local_rank(
        self, others: list[dict[str, int]], rank: int, world_size: int, local_world_size: int, is_told: bool
    ) -> int:
        for found in (self._own, *others):
            if "local_rank" in found:
                return found["local_rank"]
        if is_told:
            return rank % max(1, local_world_size)
        self._problems.append(
            f"RANK={rank} of WORLD_SIZE={world_size} without LOCAL_RANK: set LOCAL_RANK, which of its machine's ranks"
            " each is, from 0"
        )
        return 0

    def _meets_on_loopback(self) -> bool:
        return bool(LOOPBACK.fullmatch(self._environ.get("MASTER_ADDR", "").strip()))

    def _master_addr(self, world_size: int, local_world_size: int) -> str:
        given = self._environ.get("MASTER_ADDR", "").strip()
        if given:
            return given
        nodes = self._environ.get("SLURM_STEP_NODELIST") or self._environ.get("SLURM_JOB_NODELIST", "")
        if world_size <= local_world_size:
            return JobPlace.master_addr
        if nodes:
            return first_host(nodes)
        self._problems.append(
            f"{world_size} ranks without MASTER_ADDR: set it to the name or address of rank 0's machine, the same for"
            " all ranks"
        )
        return JobPlace.master_addr

    def _port(self) -> int:
        if not self._environ.get("MASTER_PORT"):
            return self._default_port()
        port = self._number("MASTER_PORT", PLAIN_PORT)
        if not 1 <= port <= 65535:
            self._problems.append(f"MASTER_PORT must be a port from 1 to 65535, got {port}: correct it, or unset it")
        return port

    def _default_port(self) -> int:
        """The same on all ranks of a job, another for another job on the same machine."""
        numbers = [self._environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE")]
        if not any(numbers):
            return PLAIN_PORT
        return FIRST_JOB_PORT + zlib.crc32("/".join(numbers).encode()) % JOB_PORTS


def _contradictions(rank: int, world_size: int, local_rank: int, local_world_size: int) -> Iterator[str]:
    rules = (
        (world_size < 1, "WORLD_SIZE", world_size, "is not a number of ranks"),
        (0 < world_size <= rank, "RANK", rank, f"is out of range for WORLD_SIZE={world_size}"),
        (local_world_size < 1, "LOCAL_WORLD_SIZE", local_world_size, "is not a number of ranks"),
        (local_world_size > world_size > 0, "LOCAL_WORLD_SIZE", local_world_size, f"exceeds WORLD_SIZE={world_size}"),
        (
            0 < local_world_size <= local_rank,
            "LOCAL_RANK",
            local_rank,
            f"is not one of the {local_world_size} ranks of this machine (LOCAL_WORLD_SIZE)",
        ),
        (local_rank > rank, "LOCAL_RANK", local_rank, f"exceeds RANK={rank}"),
    )
    advice = "set RANK, WORLD_SIZE and LOCAL_RANK for each rank, or start them with torchrun or bash run_gemini.sh"
    return (f"{name}={value} {text}: {advice}" for applies, name, value, text in rules if applies)
