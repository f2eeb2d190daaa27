"""Life and death of a run, with real trainings on CPU ranks: signals, killed and hanging ranks, NaNs, a full
disk, restarts.

Every scenario is one run. They are started side by side (a hanging rank is waited for, not worked on) when the
first test of this file asks for its own, and only those that a selected test needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, clean_environment, heed_all_signals
from worlds.launched import STARTS

from commons.launch.watch import Sighting, process_state, suspects
from commons.lifecycle.heartbeat import Beat, Pulse, group_timeout_seconds, patience_seconds, read_pulse
from commons.reporting.record import StepRecord
from commons.reporting.run_log import read_records
from commons.reporting.sinks.metrics_file import JsonlSink

pytestmark = pytest.mark.timeout(900)

AT_ONCE = 3
RUN_SECONDS = 300
TRAIN = str(REPOSITORY / "train_gpt_demo.py")
WORKER = str(REPOSITORY / "tests" / "workers" / "troubled_worker.py")
SUMMARY_KEYS = {"ended", "ended_because", "steps", "train_step", "attempt"}


class Run:
    """A training at work: its processes, what it prints and its folder."""

    def __init__(self, folder: Path, start: str, *flags: str, trouble: str = "", prefix: tuple[str, ...] = ()) -> None:
        self.folder, self.run_dir = folder, folder / "logs" / "run"
        self.ranks: set[int] = set()
        folder.mkdir()
        (folder / "tmp").mkdir()
        script = WORKER if trouble else TRAIN
        arguments = ["--log_dir", str(folder / "logs"), "--run_name", "run", "--device", "cpu", *flags]
        variables = {"TROUBLE": trouble, "REACHED": str(folder / "reached"), "CHILD": str(folder / "child")}
        with open(folder / "console", "w") as console:
            self.process = subprocess.Popen(
                [*prefix, *STARTS[start], script, *arguments],
                cwd=folder,
                env=clean_environment(
                    GPUNUM="2",
                    TMPDIR=str(folder / "tmp"),
                    GEMINI_LIFE=str(folder),
                    CUDA_VISIBLE_DEVICES="",
                    **variables,
                ),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_all_signals,
            )

    def processes(self) -> list[int]:
        """Whatever the run started and is still there, zombies too."""
        return processes_of(self.folder)

    def note_ranks(self) -> list[int]:
        """The processes that train, those with a rank in their environment; noted, to look for zombies later."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        self.ranks |= set(found)
        return found

    @property
    def console(self) -> str:
        return (self.folder / "console").read_text()

    def wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + RUN_SECONDS
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.console}"
            assert time.monotonic() < deadline, f"not yet {what}:\n{self.console}"
            time.sleep(0.1)

    def wait_for_steps(self, count: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.wait_until(f"step {count}", lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count)
        self.note_ranks()

    def end(self, seconds: float = RUN_SECONDS) -> Remains:
        """Wait for the end, at most so long."""
        began = time.monotonic()
        code = self.process.wait(seconds)
        return Remains(code, time.monotonic() - began, self.console, self.run_dir, self._left())

    def _left(self) -> list[str]:
        """Command lines of what outlives the run by more than a second or two."""
        deadline = time.monotonic() + 3
        while (left := self.processes() + self._zombies()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [_command_line(pid) for pid in left]

    def _zombies(self) -> list[int]:
        return [pid for pid in self.ranks if process_state(pid) == "Z" and Path(f"/proc/{pid}").exists()]


@dataclass
class Remains:
    """What is left of a run.

    Attributes:
        seconds: from the end being asked for (or Run.end() being called) to the end.
        left: processes that outlived it.
        notes: what else a scenario saw.
    """

    code: int
    seconds: float
    console: str
    run_dir: Path
    left: list[str]
    notes: dict = field(default_factory=dict)

    @property
    def last_line(self) -> str:
        return self.console.rstrip().splitlines()[-1]

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    def steps_logged(self, name: str = "metrics.jsonl") -> list[int]:
        """The steps in metrics.jsonl, all lines of which must be whole."""
        text = (self.run_dir / name).read_text()
        assert text == "" or text.endswith("\n")
        return [json.loads(line)["step"] for line in text.splitlines()]

    def check_code(self, code: int) -> None:
        assert self.code == code and not self.left, f"{self.left}\n{self.console}"
        assert "Traceback" not in self.console, self.console

    def check(self, code: int, ended: str, seconds: float | None = None) -> None:
        """What holds of every end: the exit code, no process left, no traceback, and a summary of the steps done
        that says how it ended.
        """
        self.check_code(code)
        assert (self.summary["ended"], self.summary["steps"]) == (ended, len(self.steps_logged())), self.console
        assert self.steps_logged() == list(range(1, len(self.steps_logged()) + 1))
        assert set(self.summary) >= SUMMARY_KEYS
        assert seconds is None or self.seconds < seconds, f"took {self.seconds:.1f} s:\n{self.console}"


def processes_of(folder: Path) -> list[int]:
    """Of the run in ``folder``: they have inherited its name."""
    mark, found = f"GEMINI_LIFE={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode()}"
    return f"{pid}"


# ---- the scenarios

LONG = ("--train_step", "100000", "--distplan", "Pytorch_DDP", "--quiet", "true")
SHORT = ("--train_step", "5", "--distplan", "Pytorch_DDP", "--quiet", "true")
HANG = (*LONG, "--timeout", "20")

Scenario = Callable[[Path], Remains]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def signalled(start: str, signum: signal.Signals, *, trouble: str = "") -> Scenario:
    """A run that is sent a signal after two steps; with a trouble when that has been reached."""

    def play(folder: Path) -> Remains:
        run = Run(folder, start, *LONG, trouble=trouble)
        run.wait_for_steps(2)
        if trouble:
            run.wait_until("the trouble", (folder / "reached").exists)
        run.process.send_signal(signum)
        return run.end()

    return play


SCENARIOS |= {
    "launcher_sigterm": signalled("launcher", signal.SIGTERM),
    "launcher_sigusr1": signalled("launcher", signal.SIGUSR1),
    "launcher_sighup": signalled("launcher", signal.SIGHUP),
    "launcher_sigquit": signalled("launcher", signal.SIGQUIT),
    "launcher_long_step": signalled("launcher", signal.SIGTERM, trouble="long:1:4"),
    "torchrun_sigterm": signalled("torchrun", signal.SIGTERM),
    "python_long_step": signalled("python", signal.SIGTERM, trouble="long:0:4"),
    "python_sigint": signalled("python", signal.SIGINT),
    "python_sigusr1": signalled("python", signal.SIGUSR1),
}


@scenario
def launcher_ctrl_c_on_a_terminal(folder: Path) -> Remains:
    """Ctrl-C on a terminal: the interrupt goes to all of the foreground process group, here bash's and below."""
    program = (
        "import os, pty, subprocess, sys\n"
        "pid, terminal = pty.fork()\n"
        "if pid == 0: os.execvp(sys.argv[2], sys.argv[2:])\n"
        "fifo = open(sys.argv[1])\n"  # a word in it is the key
        "import threading\n"
        "def press():\n"
        "    fifo.read(1); os.write(terminal, b'\\x03')\n"
        "threading.Thread(target=press, daemon=True).start()\n"
        "while True:\n"
        "    try: data = os.read(terminal, 65536)\n"
        "    except OSError: break\n"
        "    if not data: break\n"
        "    os.write(1, data)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    key = folder.with_name(f"{folder.name}-key")
    os.mkfifo(key)
    keyboard = os.open(key, os.O_RDWR)
    run = Run(folder, "launcher", *LONG, prefix=(sys.executable, "-c", program, str(key)))
    run.wait_for_steps(2)
    os.write(keyboard, b"C")
    try:
        return run.end()
    finally:
        os.close(keyboard)


@scenario
def rank_alone_is_signalled(folder: Path) -> Remains:
    """Only one rank hears it: all end after the same step."""
    run = Run(folder, "launcher", *LONG)
    run.wait_for_steps(2)
    began = time.monotonic()
    os.kill(run.note_ranks()[1], signal.SIGTERM)
    remains = run.end()
    remains.seconds = time.monotonic() - began
    return remains


@scenario
def before_the_first_step(folder: Path) -> Remains:
    run = Run(folder, "launcher", *LONG)
    run.wait_until("the ranks' start", lambda: len(run.note_ranks()) == 2)
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    return run.end()


def killed(rank: int, step: int = 4, *flags: str) -> Scenario:
    def play(folder: Path) -> Remains:
        run = Run(folder, "launcher", *LONG, *flags, trouble=f"kill:{rank}:{step}")
        run.wait_until("the kill", (folder / "reached").exists)
        remains = run.end()
        child = int((folder / "child").read_text())
        remains.notes["child"] = process_state(child)
        return remains

    return play


SCENARIOS |= {
    "killed_rank_0": killed(0),
    "killed_rank_1": killed(1),
    "killed_in_the_first_step": killed(1, step=1),
    "killed_under_gemini": killed(0, 4, "--distplan", "CAI_Gemini"),
    "killed_in_the_last_step": killed(1, 5, "--train_step", "5"),
}


@scenario
def killed_while_importing(folder: Path) -> Remains:
    run = Run(folder, "launcher", *LONG)
    run.wait_until("the ranks' start", lambda: len(run.note_ranks()) == 2)
    rank_1 = next(pid for pid in run.note_ranks() if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(rank_1, signal.SIGKILL)
    return run.end()


def troubled(start: str, trouble: str, *flags: str) -> Scenario:
    """A run with a trouble; timed from the moment that it comes."""

    def play(folder: Path) -> Remains:
        run = Run(folder, start, *flags, trouble=trouble)
        run.wait_until("the trouble", (folder / "reached").exists)
        began = time.monotonic()
        named = None
        while run.process.poll() is None and time.monotonic() - began < RUN_SECONDS:
            if named is None and "hung in" in run.console:
                named = time.monotonic() - began
            time.sleep(0.1)
        remains = run.end(1)
        remains.notes["named_after"] = named
        return remains

    return play


SCENARIOS |= {
    "stopped": troubled("launcher", "stop:1:4", *HANG),
    "endless_loop": troubled("launcher", "loop:1:4", *HANG),
    "endless_loop_gemini": troubled("launcher", "loop:0:4", *HANG, "--distplan", "CAI_Gemini"),
    "stuck_collective": troubled("launcher", "recv:1:4", *HANG),
    "torchrun_endless_loop": troubled("torchrun", "loop:1:4", *HANG),
    "nan": troubled("launcher", "nan:1:3", *LONG, "--max_bad_steps", "4"),
    "nan_python": troubled("python", "nan:0:3", *LONG),
    "inf": troubled("launcher", "inf:1:3", *LONG, "--max_bad_steps", "4"),
    "nan_never_stops": troubled("launcher", "nan:0:1", *SHORT, "--max_bad_steps", "0"),
    "restart": troubled("launcher", "kill:1:4:1", *SHORT, "--max_restarts", "2"),
    "restart_in_vain": troubled("launcher", "error:1:2", *SHORT, "--max_restarts", "1"),
    "restart_of_a_hang": troubled("launcher", "loop:1:4:1", *SHORT, "--max_restarts", "1", "--timeout", "20"),
}


@scenario
def full_disk(folder: Path) -> Remains:
    script = (
        'logs="$1" kept="$2"; shift 2; mkdir "$logs"; mount -t tmpfs -o size=32k none "$logs"; code=0;'
        ' "$@" || code=$?; cp -r "$logs/run" "$kept"; exit $code'  # the file system goes with the namespace
    )
    inside = ("unshare", "-m", "bash", "-c", script, "bash", str(folder / "logs"), str(folder / "kept"))
    return Run(folder, "launcher", *LONG, prefix=inside).end()


def can_mount() -> bool:
    tried = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, stdin=subprocess.DEVNULL
    )
    return tried.returncode == 0


# ---- playing them


def play(name: str, folder: Path) -> Remains:
    """One scenario; nothing of it is left afterwards, whatever happens."""
    try:
        return SCENARIOS[name](folder)
    finally:
        for pid in processes_of(folder):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """All scenarios that selected tests of this file ask for, being played."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["name"] for item in items if "name" in item.callspec.params]  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("life")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        playing = {name: pool.submit(play, name, folder / name) for name in dict.fromkeys(names)}
        yield playing
        for future in playing.values():
            future.cancel()


@pytest.fixture
def remains(stage: dict[str, Future], name: str) -> Remains:
    return stage[name].result()


def plays(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


# ---- signals

SIGNALS = {
    "launcher_sigterm": signal.SIGTERM,
    "launcher_sigusr1": signal.SIGUSR1,
    "launcher_sighup": signal.SIGHUP,
    "launcher_sigquit": signal.SIGQUIT,
    "launcher_ctrl_c_on_a_terminal": signal.SIGINT,
    "python_sigint": signal.SIGINT,
    "python_sigusr1": signal.SIGUSR1,
    "rank_alone_is_signalled": signal.SIGTERM,
}


@plays(*SIGNALS)
def test_a_signal_ends_the_run_after_the_step(name: str, remains: Remains) -> None:
    signum = SIGNALS[name]
    remains.check(128 + signum, signum.name, seconds=10)
    steps = remains.summary["steps"]
    assert 2 <= steps < 100000
    assert remains.last_line == f"Stopped by {signum.name} after step {steps} of 100000."
    assert remains.console.count("Stopped by") == 1
    assert "step ms" in remains.console  # the table at the end: rank 0 ended in order


@plays("torchrun_sigterm")
def test_a_signal_to_plain_torchrun(remains: Remains) -> None:
    """The ranks end as ever; torchrun itself has its own exit code and traceback."""
    assert remains.code != 0 and not remains.left and remains.seconds < 10
    steps = len(remains.steps_logged())
    assert (remains.summary["ended"], remains.summary["steps"]) == ("SIGTERM", steps)
    assert f"Stopped by SIGTERM after step {steps} of 100000.\n" in remains.console


@plays("launcher_long_step", "python_long_step")
def test_a_step_that_is_too_long_is_not_waited_for(remains: Remains) -> None:
    remains.check(128 + signal.SIGTERM, "SIGTERM", seconds=10)
    assert remains.last_line == "Stopped by SIGTERM after step 3 of 100000."


@plays("before_the_first_step")
def test_a_signal_before_the_first_step(remains: Remains) -> None:
    remains.check_code(128 + signal.SIGINT)
    assert remains.seconds < 10
    assert (remains.summary["ended"], remains.summary["steps"]) == ("SIGINT", 0)
    assert remains.last_line == "Stopped by SIGINT before the first step was done."


# ---- ranks that die or hang


# the rank, and the steps that are done
KILLED = {
    "killed_rank_0": (0, 3),
    "killed_rank_1": (1, 3),
    "killed_in_the_first_step": (1, 0),
    "killed_under_gemini": (0, 3),
    "killed_in_the_last_step": (1, 4),
    "killed_while_importing": (1, 0),
}


@plays(*KILLED)
def test_a_killed_rank(name: str, remains: Remains) -> None:
    rank, steps = KILLED[name]
    remains.check_code(1)
    assert remains.seconds < 30 and remains.last_line.startswith(f"Rank {rank} of 2 failed (killed by SIGKILL, often")
    assert remains.summary["ended_because"] == remains.last_line and remains.summary["ended"] == "failed"
    assert remains.summary["steps"] == steps
    if name == "killed_while_importing":
        return
    # gone, or dead and for process 1 to bury
    assert remains.notes["child"] == "Z", "what the killed rank had started is still there"


HANGS = {
    "stopped": (1, "its process is stopped"),
    "endless_loop": (1, "in endless_loop"),
    "endless_loop_gemini": (0, "in endless_loop"),
    "stuck_collective": (1, "in message_that_never_comes"),
}


@plays(*HANGS)
def test_a_hanging_rank(name: str, remains: Remains) -> None:
    rank, evidence = HANGS[name]
    remains.check(1, "hung")
    # --timeout 20 from the hang on, then the launcher has to end the others
    assert remains.notes["named_after"] < 20, remains.console
    verdict = remains.console[remains.console.index("hung in") - len(f"Rank {rank} of 2 ") :]
    head = rf"Rank {rank} of 2 hung in step 4, the forward pass: no rank made progress for 1\d s \(--timeout 20\)\."
    assert re.match(head, verdict), verdict
    blamed, _, waiting = verdict.partition("was waiting for it in step 4")
    assert evidence in blamed and f"Rank {rank}, its stack" in blamed and "in mark" in blamed, verdict
    assert re.search(r'File ".*torch.*", line \d+ in \w+', waiting), verdict
    assert remains.summary["steps"] == 3
    assert remains.summary["ended_because"] == verdict.splitlines()[0]


@plays("torchrun_endless_loop")
def test_a_hang_under_plain_torchrun(remains: Remains) -> None:
    """Nobody compares the ranks; each says where it is, and the run ends."""
    assert remains.code != 0 and not remains.left
    assert re.search(r"Rank 1 made no progress for 1\d s, in step 4, the forward pass:", remains.console)
    assert "in endless_loop" in remains.console
    assert remains.summary["ended"] in ("hung", "failed", "SIGTERM") and remains.summary["steps"] == 3


# ---- losses that are not finite


@plays("nan", "nan_python", "inf")
def test_bad_steps_end_the_run(name: str, remains: Remains) -> None:
    remains.check(1, "bad steps")
    rank, last = (0, 5) if name == "nan_python" else (1, 6)
    loss = name.removesuffix("_python")
    start = f"The loss is not finite in steps 3 to {last}: it began as {loss} in step 3 on rank {rank}. Stopped by"
    assert remains.last_line.startswith(f"{start} --max_bad_steps {last - 2}: lower --lr"), remains.console
    assert remains.steps_logged() == list(range(1, last + 1))
    assert remains.summary["nonfinite_loss_steps"] == last - 2
    assert remains.summary["ended_because"] == remains.last_line


@plays("nan_never_stops")
def test_max_bad_steps_0_goes_on(remains: Remains) -> None:
    remains.check(0, "finished")
    assert remains.summary["nonfinite_loss_steps"] == remains.summary["steps"] == 5


# ---- the disk


@pytest.fixture
def own_file_system() -> None:
    """Skipped where there can be none; not in CI."""
    if not can_mount():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("a full disk needs unshare -m and mount")


@plays("full_disk")
def test_the_disk_fills_up(own_file_system: None, remains: Remains) -> None:
    assert remains.code == 1 and not remains.left, remains.console
    assert "Traceback" not in remains.console, remains.console
    expected = r"cannot write .*/metrics\.jsonl: No space left on device; free some space there, or .*--log_dir"
    assert re.fullmatch(expected, remains.last_line), remains.console
    kept = remains.run_dir.parent.parent / "kept" / "metrics.jsonl"
    lines = kept.read_text()
    assert lines.endswith("\n") and [json.loads(line)["step"] for line in lines.splitlines()]


# ---- restarts


@plays("restart", "restart_of_a_hang")
def test_a_restart(name: str, remains: Remains) -> None:
    remains.check(0, "finished")
    attempts = 3 if name == "restart" else 2
    assert f"Attempt 2 of {attempts} begins" in remains.console
    what = "Rank 1 of 2 failed (killed by SIGKILL" if name == "restart" else "Rank 1 of 2 hung in step 4"
    assert what in remains.console.partition("Attempt 2")[0]
    assert (remains.summary["attempt"], remains.steps_logged()) == (2, [1, 2, 3, 4, 5])
    assert remains.steps_logged("metrics-attempt1.jsonl") == [1, 2, 3]
    first = json.loads((remains.run_dir / "summary-attempt1.json").read_text())
    assert (first["steps"], first["attempt"]) == (3, 1)
    assert first["ended"] == ("failed" if name == "restart" else "hung")


@plays("restart_in_vain")
def test_restarts_are_counted(remains: Remains) -> None:
    assert remains.code == 1 and not remains.left
    assert remains.console.count("Attempt 2 of 2 begins") == 1
    assert remains.last_line == "ValueError: the fault of rank 1"
    assert (remains.summary["ended"], remains.summary["attempt"], remains.summary["steps"]) == ("failed", 2, 1)
    assert remains.summary["ended_because"] == "Rank 1 of 2 failed: ValueError: the fault of rank 1"


# ---- whose fault a hang is, and what can be read back, without processes


def seen(rank: int, beats: int, frames: list[str] | None = None, state: str = "S") -> Sighting:
    """A rank that does not move; ``frames`` as "file:line function", innermost first."""
    lines = [f'  File "{file}", line {line} in {function}' for file, line, function in map(_split, frames or [])]
    stack = "\n".join(["Current thread 0x0 (most recent call first):", *lines, ""]) if lines else ""
    return Sighting(rank, 0, 100 + rank, beats, "step 2, the forward pass", state, stack)


def _split(frame: str) -> list[str]:
    return re.split("[: ]", frame)


COLLECTIVE = "/lib/torch/distributed/distributed_c10d.py:10 all_reduce"
TRAINING = ["engine.py:50 step", "train.py:5 main"]


@pytest.mark.parametrize(
    ("sightings", "blamed"),
    [
        ([seen(0, 7, state="T"), seen(1, 5), seen(2, 5)], [0]),
        ([seen(0, 7), seen(1, 5), seen(2, 7)], [1]),
        ([seen(0, 7, [COLLECTIVE, *TRAINING]), seen(1, 7, ["my.py:3 loop", *TRAINING])], [1]),
        (
            [
                seen(0, 7, ["/suite/commons/distributed/peer_memory.py:9 await_told", *TRAINING]),
                seen(1, 7, ["my.py:3 loop", *TRAINING]),
            ],
            [1],
        ),
        # one waits where the others have been
        ([seen(0, 7, [COLLECTIVE, *TRAINING]), seen(1, 7, [COLLECTIVE, "engine.py:48 step", TRAINING[1]])], [1]),
        # in one collective together, or in different branches: nobody is to be singled out
        ([seen(0, 7, [COLLECTIVE, *TRAINING]), seen(1, 7, [COLLECTIVE, *TRAINING])], [0, 1]),
        ([seen(0, 7, [COLLECTIVE, "a.py:1 f", *TRAINING]), seen(1, 7, [COLLECTIVE, "b.py:1 g", *TRAINING])], [0, 1]),
        ([seen(0, 7), seen(1, 7)], [0, 1]),
    ],
)
def test_who_is_to_blame(sightings: list[Sighting], blamed: list[int]) -> None:
    assert [each.rank for each in suspects(sightings)] == blamed


def test_the_limit_is_a_little_below_that_of_collectives() -> None:
    for timeout in (1.0, 20.0, 600.0):
        assert 0.7 * timeout < patience_seconds(timeout, Beat(9, 2, "forward", 0)) < timeout
        for beat in (Beat(1, 0, "build", 0), Beat(5, 1, "forward", 0)):
            assert 120 <= patience_seconds(timeout, beat) < group_timeout_seconds(timeout)


def test_a_pulse_is_read_by_another(tmp_path: Path) -> None:
    assert read_pulse(tmp_path / "none") is None
    pulse = Pulse(tmp_path / "pulse")
    pulse.beat("wait", 3)
    pulse.beat("backward")
    beat = read_pulse(tmp_path / "pulse")
    assert beat == pulse.last and beat is not None
    assert (beat.count, beat.where()) == (3, "step 3, the backward pass")
    assert 0 <= time.monotonic() - beat.seconds < 60


def test_records_are_read_back(tmp_path: Path) -> None:
    blank = {f.name: 1 for f in dataclasses.fields(StepRecord)}
    records = [StepRecord(**{**blank, "step": n, "loss": loss}) for n, loss in enumerate((2.5, math.inf), 1)]
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for record in records:
        sink.log(record)
    sink.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # the writer was killed
    assert read_records(tmp_path / "metrics.jsonl") == records
    assert read_records(tmp_path / "none") == []
