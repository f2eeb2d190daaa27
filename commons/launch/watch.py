"""The launcher's watch over the ranks of its machine: which one hangs, where, and what it left behind.

The ranks beat (commons.lifecycle.heartbeat). When none has moved for --timeout, the rank to blame is the one that is
stopped,
else the one that is behind, else the one that is not waiting for the others, else the one that waits earlier in
the program: its peers only wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import json
import linecache
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from commons.launch.nodes import Nodes, in_time
from commons.lifecycle.guard import WATCH_VARIABLE, pulse_path, stack_path
from commons.lifecycle.heartbeat import Beat, patience_seconds, read_pulse
from commons.lifecycle.outcome import Ended
from commons.lifecycle.suite_root import SUITE_ROOT

if TYPE_CHECKING:
    from torch.distributed import TCPStore

Answer = TypeVar("Answer")

LOOK_SECONDS = 0.5
STACK_SECONDS = 2.0  # for a rank to write its stack
OTHER_NODES_SECONDS = 2.0  # for the other machines' launchers to tell of their ranks
STORE_SECONDS = 5.0  # for the store of node 0, which says nothing at all where the network swallows packets
MOST_FRAMES = 25
# of /proc/PID/status, with what the user is told
NOT_RUNNING = {
    "T": "its process is stopped: by SIGSTOP, Ctrl-Z or `scontrol suspend`; `kill -CONT {pid}` lets it go on",
    "t": "its process is stopped by a debugger",
    "D": "its process waits in the kernel and cannot be interrupted: a disk, network or GPU driver does not answer",
    "Z": "its process has ended",
}
# in the innermost line of a rank that waits for other ranks, or for the device, which waits for them
WAITING_MODULE = find_spec("commons.distributed.peer_memory")  # found, not imported: torch would come with it
assert WAITING_MODULE and WAITING_MODULE.origin
# without the suite's own folder, which another machine may have elsewhere
WAITING_PATH = re.escape(str(Path(WAITING_MODULE.origin).relative_to(SUITE_ROOT)))
WAITING_FILE = re.compile(rf'File "[^"]*/(torch/(distributed|cuda|nn/parallel)/|{WAITING_PATH})')
WAITING_CODE = re.compile(
    r"\.(wait|item|tolist|synchronize)\(|barrier|broadcast|all_gather|all_reduce|reduce_scatter|recv|run_backward"
)


@dataclass(frozen=True)
class Sighting:
    """What a launcher can see of a rank that does not move.

    Attributes:
        beats, where: of its pulse; 0 before the first beat.
        state: the process's, a letter of /proc/PID/status.
        stack: its threads, innermost line first; "" where it gave none.
    """

    rank: int
    node: int
    pid: int
    beats: int
    where: str
    state: str
    stack: str

    @property
    def waits(self) -> bool:
        """Its main thread is in a collective, or in a wait for the device."""
        lines = main_thread(self.stack)
        return bool(lines) and bool(WAITING_FILE.search(lines[0]) or WAITING_CODE.search(_source(lines[0])))


def suspects(sightings: Sequence[Sighting]) -> list[Sighting]:
    """Those of ranks that do not move that the others wait for; all, if that cannot be told."""
    if stopped := [seen for seen in sightings if seen.state in NOT_RUNNING]:
        return stopped
    fewest = min(seen.beats for seen in sightings)
    behind = [seen for seen in sightings if seen.beats == fewest]
    if len(behind) < len(sightings):
        return behind
    return [seen for seen in behind if seen.stack and not seen.waits] or at_the_earliest_line(behind)


def at_the_earliest_line(sightings: list[Sighting]) -> list[Sighting]:
    """Those of ranks that all wait which are behind in the program, that of all: the others wait at a later line
    of the function where their stacks part. All, where that cannot be told.
    """
    calls = [[_place(frame) for frame in reversed(main_thread(seen.stack))] for seen in sightings]
    for level in zip(*calls, strict=False):
        if len({(file, function) for file, _, function in level}) > 1:
            return sightings
        first = min(line for _, line, _ in level)
        behind = [seen for seen, (_, line, _) in zip(sightings, level, strict=True) if line == first]
        if len(behind) < len(sightings):
            return behind
    return sightings


class Watch:
    """Looks after the ranks that this launcher started.

    Args:
        folder: where the ranks keep their pulses and stacks.
        timeout_seconds: --timeout.
        store: the job's, over which the launchers of several machines compare what they see.

    Attributes:
        attempt: the ranks' number of starts.
        verdict: lines about the rank that hung, once one did.
        elsewhere: how the run ended on another machine, once it has run out of memory there.
    """

    def __init__(self, folder: Path, nodes: Nodes, timeout_seconds: float, store: TCPStore) -> None:
        self.folder, self.attempt, self.verdict = folder, 1, []
        self.elsewhere: Ended | None = None
        self._resident: dict[int, int] = {}
        self._nodes, self._timeout, self._store = nodes, timeout_seconds, store
        self._pids: dict[int, int] = {}
        self._store_is_lost = False
        self._began = self._last_look = self._awake_since = time.monotonic()

    def begin(self, attempt: int) -> None:
        """Ranks are about to start."""
        self.attempt, self.verdict, self._pids, self._resident = attempt, [], {}, {}
        self._began = self._last_look = self._awake_since = time.monotonic()

    def started(self, pids: Mapping[int, int]) -> None:
        """``pids`` by rank."""
        self._pids = dict(pids)

    def look(self) -> None:
        """To be called often. If the ranks hang, gives the verdict and kills those of this machine to blame."""
        now = time.monotonic()
        if self.verdict or not self._pids or now - self._last_look < LOOK_SECONDS:
            return
        if now - self._last_look > 10 * LOOK_SECONDS:
            self._awake_since = now  # this process was stopped, so the ranks may have been too
        self._last_look = now
        self._resident |= {rank: size for rank, pid in self._pids.items() if (size := resident_bytes(pid))}
        if self._ended_elsewhere():
            return
        beats = [self.beat(rank) for rank in self._pids]
        latest = max(beats, key=lambda beat: beat.seconds)
        quiet = now - max(latest.seconds, self._awake_since)
        patience = max(patience_seconds(self._timeout, beat) for beat in beats)
        if quiet >= patience or self._asked_by_another_node():
            self._judge(self._sightings(), quiet)

    def resident_bytes(self, rank: int) -> int | None:
        """Of a rank of this machine when it was looked at last."""
        return self._resident.get(rank)

    def unheard(self) -> list[int]:
        """Processes of ranks that do not listen yet: they are still importing."""
        return [pid for rank, pid in self._pids.items() if read_pulse(self._pulse(rank)) is None]

    def sweep(self) -> None:
        """Kill what the ranks started and left behind: it has their environment."""
        mark = f"{WATCH_VARIABLE}={self.folder}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)

    # ---- what is to be seen

    def _pulse(self, rank: int) -> Path:
        return pulse_path(self.folder, self.attempt, rank)

    def beat(self, rank: int) -> Beat:
        """The last of a rank of this machine, which may have ended."""
        return read_pulse(self._pulse(rank)) or Beat(0, 0, "start", self._began)

    def _sightings(self) -> list[Sighting]:
        states = {rank: process_state(pid) for rank, pid in self._pids.items()}
        beats = {rank: self.beat(rank) for rank in self._pids}
        stacks = self._stacks(states)
        mine = []
        for rank, pid in self._pids.items():
            beat, stack = beats[rank], stacks.get(rank, "")
            mine.append(Sighting(rank, self._nodes.rank, pid, beat.count, beat.where(), states[rank], stack))
        return mine if self._nodes.count == 1 else self._compare(mine)

    def _stacks(self, states: Mapping[int, str]) -> dict[int, str]:
        """Ask the ranks that listen for their stacks: those that run together, then each that is stopped."""
        listening = {rank: pid for rank, pid in self._pids.items() if read_pulse(self._pulse(rank)) is not None}
        running = {rank: pid for rank, pid in listening.items() if states[rank] not in NOT_RUNNING}
        for pid in running.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGUSR2)
        self._wait_for_stacks(running, pause=0.2)
        for rank in (rank for rank in listening if states[rank] == "T"):
            self._wake_for_its_stack(rank)
        return {rank: self._stack(rank).read_text(errors="replace") for rank in listening}

    def _stack(self, rank: int) -> Path:
        return stack_path(self.folder, self.attempt, rank)

    def _wait_for_stacks(self, ranks: Iterable[int], pause: float) -> None:
        """Until all have written something and none writes any more."""
        deadline, sizes = time.monotonic() + STACK_SECONDS, {}
        while time.monotonic() < deadline:
            time.sleep(pause)
            before, sizes = sizes, {rank: self._stack(rank).stat().st_size for rank in ranks}
            if sizes == before and all(sizes.values()):
                return

    def _wake_for_its_stack(self, rank: int) -> None:
        """A stopped rank, which is to be killed, may run for the milliseconds in which it writes its stack."""
        with contextlib.suppress(OSError):
            _signal_main_thread(self._pids[rank], signal.SIGUSR2)
            os.kill(self._pids[rank], signal.SIGCONT)
            self._wait_for_stacks([rank], pause=0.002)
            os.kill(self._pids[rank], signal.SIGSTOP)

    # ---- several machines

    @property
    def _key(self) -> str:
        return f"suite/watch/{self.attempt}"

    def _ask_store(self, ask: Callable[[], Answer], otherwise: Answer, seconds: float = STORE_SECONDS) -> Answer:
        """``ask()``, or ``otherwise`` from when on the store did not answer: node 0 or the network has gone."""
        if self._nodes.count == 1 or self._store_is_lost:
            return otherwise
        try:
            return in_time(ask, seconds)
        except (RuntimeError, TimeoutError):
            self._store_is_lost = True
            return otherwise

    def _asked_by_another_node(self) -> bool:
        return self._ask_store(lambda: self._store.check([f"{self._key}/asked"]), False)

    def tell_others(self, ended: Ended) -> None:
        """The run is over here: the other machines need not find out by themselves."""
        self._ask_store(lambda: self._store.set(f"{self._key}/ended", json.dumps(dataclasses.asdict(ended))), None)

    def look_elsewhere(self, *, wait: bool = False) -> Ended | None:
        """How the run ended on another machine, if that has told so; ``wait``: or tells within OTHER_NODES_SECONDS."""
        key, deadline = f"{self._key}/ended", time.monotonic() + wait * OTHER_NODES_SECONDS
        while self.elsewhere is None:
            if self._ask_store(lambda: self._store.check([key]), False):
                told = self._ask_store(lambda: self._store.get(key), b"")
                self.elsewhere = Ended(**json.loads(told)) if told else None
            if time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        return self.elsewhere

    def _ended_elsewhere(self) -> bool:
        """Whether the run is over on another machine; then this one's ranks are asked to end."""
        if self.elsewhere is None and self.look_elsewhere() is not None:
            for pid in self._pids.values():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGTERM)
        return self.elsewhere is not None

    def _compare(self, mine: list[Sighting]) -> list[Sighting]:
        """What all launchers see, of those that answer in time."""
        own = json.dumps([dataclasses.asdict(seen) for seen in mine])
        return self._ask_store(lambda: [*mine, *self._exchange(own)], mine, OTHER_NODES_SECONDS + STORE_SECONDS)

    def _exchange(self, own: str) -> list[Sighting]:
        """One request a node: node 0 gathers what came in time, and answers all."""
        self._store.set(f"{self._key}/{self._nodes.rank}", own)
        self._store.set(f"{self._key}/asked", "")
        if self._nodes.rank == 0:
            self._gather()
        limit = datetime.timedelta(seconds=OTHER_NODES_SECONDS + STORE_SECONDS)
        self._store.wait([f"{self._key}/all"], limit)
        found = [Sighting(**seen) for seen in json.loads(self._store.get(f"{self._key}/all"))]
        return [seen for seen in found if seen.node != self._nodes.rank]

    def _gather(self) -> None:
        keys = [f"{self._key}/{node}" for node in range(self._nodes.count)]
        deadline = time.monotonic() + OTHER_NODES_SECONDS
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.1)
        texts = [self._store.get(key) for key in keys if self._store.check([key])]
        self._store.set(f"{self._key}/all", json.dumps([seen for text in texts for seen in json.loads(text)]))

    # ---- the verdict

    def _judge(self, sightings: list[Sighting], quiet: float) -> None:
        blamed = suspects(sightings)
        self.verdict = verdict_lines(sightings, blamed, self._nodes, quiet, self._timeout)
        for seen in blamed:
            if seen.node == self._nodes.rank:
                with contextlib.suppress(OSError):
                    os.kill(seen.pid, signal.SIGKILL)


def verdict_lines(
    sightings: Sequence[Sighting], blamed: Sequence[Sighting], nodes: Nodes, quiet: float, timeout: float
) -> list[str]:
    """Who hangs and where, its stack, and what one of the others waits in."""
    names = ", ".join(str(seen.rank) for seen in blamed)
    first = blamed[0]
    on_node = f" on node {first.node}" if nodes.count > 1 else ""
    head = f"Rank{'s' * (len(blamed) > 1)} {names} of {nodes.world_size}{on_node} hung in {first.where}"
    lines = [f"{head}: no rank made progress for {quiet:.0f} s (--timeout {timeout:g})."]
    if first.state in NOT_RUNNING:
        lines.append(f"Rank {first.rank}: {NOT_RUNNING[first.state].format(pid=first.pid)}.")
    waiting = [seen for seen in sightings if seen not in blamed]
    shown = [(seen, "its stack") for seen in blamed] if first.stack else []
    shown += [(seen, f"was waiting for it in {seen.where}") for seen in waiting if seen.stack][:1]
    for seen, what in shown[:4]:
        lines += [f"Rank {seen.rank}, {what}, innermost line first:", *_shortened(seen.stack)]
    if first.state not in NOT_RUNNING:
        lines.append(f"If rank {first.rank} was at work, allow more time with --timeout.")
    return lines


def _signal_main_thread(pid: int, signum: int) -> None:
    """It answers before it goes on. Of a stopped process's threads any would take a signal to the process, while the
    main one went on. tgkill(2): glibc has it since 2.30.
    """
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None:
        os.kill(pid, signum)
    else:
        tgkill(pid, pid, signum)


def resident_bytes(pid: int) -> int:
    """A process's resident set; 0 for one that is not there."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def process_state(pid: int) -> str:
    """The letter of /proc/PID/status; "Z" for a process that is not there."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "Z"
    found = re.search(r"^State:\s*(\S)", status, re.MULTILINE)
    return found[1] if found else "?"


def threads_of(stack: str) -> list[list[str]]:
    """The threads in what faulthandler wrote, each its frames, without the guard's own."""
    parts = [part.strip().splitlines()[1:] for part in re.split(r"(?m)^(?=(?:Current thread|Thread) 0x)", stack)]
    without_imports = [[line for line in frames if "<frozen importlib" not in line] for frames in parts]
    return [frames for frames in without_imports if frames and not any("guard.py" in line for line in frames)]


def main_thread(stack: str) -> list[str]:
    """faulthandler writes the main thread last."""
    threads = threads_of(stack)
    return threads[-1] if threads else []


def _shortened(stack: str) -> list[str]:
    """The threads that do something, the main one first, without what a screen has no room for."""
    lines: list[str] = []
    for frames in reversed(threads_of(stack)):
        more = len(frames) - MOST_FRAMES
        lines += [*frames[:MOST_FRAMES], *([f"  ... {more} more"] if more > 0 else []), ""]
    return lines[:-1][: 3 * MOST_FRAMES]


def _place(frame: str) -> tuple[str, int, str]:
    """File, line number and function of a frame as faulthandler writes it."""
    found = re.search(r'File "([^"]+)", line (\d+) in (.+)', frame)
    return (found[1], int(found[2]), found[3]) if found else (frame, 0, "")


def _source(frame: str) -> str:
    """The line of code there."""
    file, line, _ = _place(frame)
    return linecache.getline(file, line)
