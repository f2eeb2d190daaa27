"""The launcher with real processes: a few lines stand in for the training script, torchrun's is real."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from suite_runs import run_processes
from worlds.launched import LAUNCH, PRELUDE, Launched, environment, free_port, is_alive, wait_until_gone

from commons.cli import flags as cli
from commons.cli import machine
from commons.cli.variables import FLAG_VARIABLES
from commons.config.schema import TrainConfig
from commons.launch import launcher, nodes
from commons.launch.console_copy import LineCleaner, LogFile
from commons.launch.launcher import JOB_VARIABLES, read_launch, root_cause
from commons.launch.nodes import Answer, Card, MeetingError, Nodes, NodesDiffer, ask, compare, open_store
from commons.launch.stop_signals import StopSignals
from commons.lifecycle.outcome import STOP_SIGNALS
from commons.planner.gpus import GPU_MODELS
from commons.reporting.run_folder import FolderInUse

RUN_NAME = r"CAI_Gemini-gpt2_tiny-2x1x1-bf16-\d{8}-\d{6}"


# ---- runs that end by themselves


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    body = (
        "leave_note(argv=sys.argv[1:], threads=os.environ['OMP_NUM_THREADS'],"
        " world=os.environ['WORLD_SIZE'])\nprint(f'out of rank {rank}\\n', end=''); print(f'err of rank"
        " {rank}\\n', end='', file=sys.stderr)"
    )
    run = Launched(tmp_path, body, "--lr=0.5", "--quiet", TRAIN_STEP="7", SEQ_LEN="", USE_SHARD_INIT="True").wait()
    assert run.code == 0, run.stderr
    assert re.fullmatch(RUN_NAME, run.run_dir().name)
    assert sorted(run.stdout.splitlines()) == ["out of rank 0", "out of rank 1"]
    warning, no_gpu, *rest = run.stderr.splitlines()
    assert "USE_SHARD_INIT has no effect any more" in warning
    assert re.match(r"No GPU seen.*\. Training gpt2_tiny on 2 CPU ranks with gloo", no_gpu)
    assert "docs/troubleshooting.md" in no_gpu
    assert sorted(rest) == ["err of rank 0", "err of rank 1"]
    kept = (run.run_dir() / "console.log").read_text().splitlines()
    assert sorted(kept) == sorted(run.stdout.splitlines() + run.stderr.splitlines())
    notes = [read_note(run, rank) for rank in (0, 1)]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for note in notes:
        expected = [
            "--train_step=7",
            "--lr=0.5",
            "--quiet=True",
            "--device=cpu",
            f"--run_name={run.run_dir().name}",
        ]
        assert note["argv"] == expected
        assert (note["world"], note["threads"]) == ("2", str(threads))
    assert list((tmp_path / "tmp").iterdir()) == []  # torchrun's engine leaves its folders behind


def read_note(run: Launched, rank: int) -> dict[str, Any]:
    return json.loads((run.folder / f"note-{rank}.json").read_text())


def test_the_first_failing_rank_s_error_is_last_on_the_screen(tmp_path: Path) -> None:
    # rank 0 fails for want of rank 1, and ends before it does
    body = """
def main():
    if rank == 1:
        import atexit
        atexit.register(time.sleep, 2)
        raise ValueError("the cause")
    while not list(Path("tmp").glob("*/*/*/1/error.json")):
        time.sleep(0.05)
    time.sleep(0.1)
    raise RuntimeError("connection closed by peer")
recorded(main)
"""
    run = Launched(tmp_path, body).wait()
    assert run.code == 1
    assert run.stderr.splitlines()[-1] == "ValueError: the cause"
    final = run.stderr.split("Rank 1 of 2 failed:")[1]
    assert "Traceback" in final
    assert "connection closed" not in final
    assert "ChildFailedError" not in run.stderr
    assert "exitcode" not in run.stderr  # the engine's own log
    assert (run.run_dir() / "console.log").read_text().splitlines()[-1] == "ValueError: the cause"


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    body = """
leave_note()
while not Path("note-0.json").exists():
    time.sleep(0.05)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    run = Launched(tmp_path, body).wait(timeout=90)
    assert run.code == 1
    # the doctor may add what it finds about this machine's memory
    assert re.search(r"^Rank 1 of 2 failed \(killed by SIGKILL, often because", run.stderr, re.MULTILINE)
    assert not is_alive(read_note(run, 0)["pid"])


def test_ranks_that_will_not_end_are_killed_and_not_blamed(tmp_path: Path) -> None:
    body = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    leave_note()
    time.sleep(60)
def main():
    while not Path("note-0.json").exists():
        time.sleep(0.05)
    leave_note()
    raise ValueError("the cause")
recorded(main)
"""
    run = Launched(tmp_path, body)
    run.note(1)
    start = time.monotonic()
    run.wait(timeout=60)
    assert time.monotonic() - start < 25  # torchrun's own patience is 30 s
    assert run.code == 1
    assert "Rank 1 of 2 failed" in run.stderr
    assert run.stderr.splitlines()[-1] == "ValueError: the cause"
    assert not is_alive(read_note(run, 0)["pid"])


@pytest.mark.parametrize("code", [2, 3])
def test_the_training_s_exit_code_is_passed_on(tmp_path: Path, code: int) -> None:
    body = f"time.sleep(rank); print('told', file=sys.stderr); sys.exit({code})"
    run = Launched(tmp_path, body).wait()
    assert run.code == code
    last = run.stderr.splitlines()[-1]
    # settings found wrong only by the ranks have been explained by rank 0: nothing to add
    assert last == ("told" if code == 2 else "Rank 0 of 2 failed (exit code 3).")


@pytest.mark.parametrize(("code", "attempts"), [(2, 1), (3, 3)])
def test_what_would_only_happen_again_is_not_tried_again(tmp_path: Path, code: int, attempts: int) -> None:
    body = f"open(f'starts-{{rank}}', 'a').write('x'); time.sleep(1); sys.exit({code})"
    run = Launched(tmp_path, body, "--max_restarts=2").wait(timeout=120)
    assert run.code == code
    assert len((tmp_path / "starts-0").read_text()) == attempts
    assert [f"Attempt {n} of 3 begins" in run.stderr for n in (2, 3)] == [attempts == 3] * 2


# ---- runs that are ended

WAIT = """
from commons.lifecycle.guard import pulse_path
from commons.lifecycle.heartbeat import Pulse
Pulse(pulse_path(Path(os.environ["GEMINI_WATCH"]), 1, rank))  # else it counts as still importing
def ended(signum, frame):
    Path(f"ended-{rank}").write_text(str(signum))
    sys.exit(0)
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, ended)
leave_note()
while True:
    time.sleep(1)
"""
STUBBORN = """
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_IGN)
leave_note()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("signum", "body"), [(signal.SIGINT, WAIT), (signal.SIGTERM, WAIT), (signal.SIGTERM, STUBBORN)]
)
def test_a_signal_ends_the_ranks_too(tmp_path: Path, signum: signal.Signals, body: str) -> None:
    run = Launched(tmp_path, body)
    pids = [run.note(rank)["pid"] for rank in (0, 1)]
    start = time.monotonic()
    run.process.send_signal(signum)
    run.wait(timeout=30)
    assert time.monotonic() - start < 10
    assert run.code == 128 + signum, run.stderr
    assert not any(map(is_alive, pids))
    assert run.stderr.splitlines()[-1] == f"Stopped by {signum.name} before the first step was done."
    assert "Traceback" not in run.stderr
    if body == WAIT:
        assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == [str(int(signum))] * 2


# SIGTERM at the worst moments, from inside of the launcher.
AT_WORST = {
    # as the ranks are looked at, where torch's ``finally`` needs what the next instruction would have set
    "in the engine's finally": """
import os, signal, sys, time
from types import SimpleNamespace
import torch.distributed.elastic.metrics.api as metrics
def strike():
    caller = sys._getframe(1)
    looks = "_monitor_workers" in str(caller.f_locals.get("key"))
    if looks and all(os.path.exists(f"note-{rank}.json") for rank in (0, 1)):
        metrics.time = time
        os.kill(os.getpid(), signal.SIGTERM)
    return time.time()
metrics.time = SimpleNamespace(time=strike)
""",
    "behind the engine": """
import os, signal
from commons.launch.watch import Watch
sweep, sweeps = Watch.sweep, []
def strike(self):
    sweeps.append(sweep(self))
    if len(sweeps) == 2:  # the first is before the ranks start
        os.kill(os.getpid(), signal.SIGTERM)
Watch.sweep = strike
""",
}


@pytest.mark.parametrize(("moment", "body"), [*zip(AT_WORST, (STUBBORN, ""), strict=True)])
def test_a_signal_at_the_worst_moment_is_a_signal(tmp_path: Path, moment: str, body: str) -> None:
    run = Launched(tmp_path, body, before=AT_WORST[moment]).wait()
    assert run.code == 128 + signal.SIGTERM, run.stderr
    assert run.stderr.splitlines()[-1] == "Stopped by SIGTERM before the first step was done."
    assert "Traceback" not in run.stderr


# Hears what it is told, says so, and does not end.
HEEDLESS = """
def heard(signum, frame):
    Path(f"heard-{rank}-{int(signum)}").touch()
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, heard)
leave_note()
while True:
    time.sleep(0.1)
"""


def test_a_second_signal_asks_for_nothing_new(tmp_path: Path) -> None:
    """It comes while the launcher waits for ranks that have heard the first."""
    run = Launched(tmp_path, HEEDLESS)
    pids = [run.note(rank)["pid"] for rank in (0, 1)]
    run.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"heard-{rank}-{int(signal.SIGINT)}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and run.process.poll() is None, "the ranks did not hear the signal"
        time.sleep(0.02)
    run.process.send_signal(signal.SIGTERM)
    run.wait(timeout=30)
    assert run.code == 128 + signal.SIGINT, run.stderr
    assert run.stderr.splitlines()[-1] == "Stopped by SIGINT before the first step was done."
    assert not any(map(is_alive, pids))


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    run = Launched(tmp_path, STUBBORN)
    pids = [run.note(rank)["pid"] for rank in (0, 1)]
    run.process.kill()
    run.wait()
    assert wait_until_gone(pids, seconds=5)


def test_an_ignored_signal_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert signal.SIGHUP not in StopSignals().handled
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in StopSignals().handled
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# ---- the console


def test_ranks_see_a_terminal_where_there_is_one(tmp_path: Path) -> None:
    body = """
if rank == 0:
    print("terminal:", sys.stdout.isatty(), sys.stderr.isatty(), os.get_terminal_size().columns)
    for step in range(3):
        print(f"\\r\\x1b[2Kstep {step}", end="", flush=True)
        time.sleep(0.05)
    print("\\n\\x1b[1mdone\\x1b[0m")
"""
    (tmp_path / "training.py").write_text(PRELUDE + body)
    master, slave = pty.openpty()
    os.set_inheritable(slave, True)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 24, 77, 0, 0))
    command = [sys.executable, "-c", LAUNCH, str(tmp_path / "training.py")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = read_all(master)
    assert process.wait(timeout=30) == 0, shown
    assert b"terminal: True True 77\r\n" in shown
    assert b"\r\x1b[2Kstep 0\r\x1b[2Kstep 1\r\x1b[2Kstep 2\r\n" in shown
    (run_dir,) = (tmp_path / "gemini_logs").iterdir()
    kept = (run_dir / "console.log").read_text().splitlines()
    assert kept[-3:] == ["terminal: True True 77", "step 2", "done"]


def read_all(terminal: int) -> bytes:
    data = b""
    while True:
        try:
            data += os.read(terminal, 65536)
        except OSError:
            return data


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_lines_are_cleaned_whatever_pieces_they_come_in(size: int) -> None:
    redrawn = b"a\n\r\x1b[2K10%\r\x1b[2K20%\r\x1b[2Kline\n"
    coloured = b"bar\x1b[?25l\r\x1b[31mred\x1b[0m\r\n\n\x1b[2K\n\x1b]0;title\x07end"
    stream = redrawn + coloured
    cleaner = LineCleaner()
    pieces = [cleaner.feed(stream[i : i + size]) for i in range(0, len(stream), size)]
    assert b"".join(pieces) + cleaner.finish() == b"a\nline\nred\n\nend\n"


def test_a_full_disk_does_not_stop_the_copying() -> None:
    log = LogFile(Path("/dev/full"))
    log.write(b"lost\n")
    log.write(b"lost too\n")
    assert log.error is not None
    log.close()


# ---- settings


def launch_from(
    monkeypatch: pytest.MonkeyPatch, *argv: str, gpus: Any = 0, **environ: str
) -> tuple[launcher.Launch, str]:
    def find_devices(wanted: str) -> tuple[str, int]:
        return ("cuda" if wanted == "cuda" or (wanted == "auto" and gpus) else "cpu"), gpus

    monkeypatch.setattr(cli, "find_devices", find_devices)
    monkeypatch.setattr(launcher, "find_devices", find_devices)
    monkeypatch.setattr("commons.planner.room.gpu_here", lambda index=0: GPU_MODELS["H100-80GB"])
    launch, found = read_launch(argv, environ)
    return launch, "\n".join(found)


def test_every_variable_is_a_flag_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "DISTPLAN": "CAI_Gemini",
        "MODEL_TYPE": "gpt2_small",
        "BATCH_SIZE": "3",
        "TRAIN_STEP": "9",
        "TPDEGREE": "1",
        "PPDEGREE": "1",
        "PLACEMENT": "static",
        "SEQ_LEN": "32",
        "PRECISION": "fp16",
    }
    assert set(values) == set(FLAG_VARIABLES)
    launch, found = launch_from(monkeypatch, **values)
    assert found == ""
    assert {v: str(getattr(launch.config, name)) for v, name in FLAG_VARIABLES.items()} == values
    for overridden in ("3", "not even a number"):
        launch, found = launch_from(monkeypatch, "--batch-size", "5", BATCH_SIZE=overridden)
        assert (launch.config.batch_size, found) == (5, "")


def test_every_variable_is_in_the_help(capsys: pytest.CaptureFixture) -> None:
    assert launcher.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(variable in text for variable in [*FLAG_VARIABLES, *JOB_VARIABLES])
    assert "\n  --doctor --json  " in text


@pytest.mark.parametrize("command", ["", "LD_LIBRARY_PATH=/usr/lib/wsl/lib bash run_gemini.sh"])
def test_the_cure_of_no_gpu_is_a_line_to_copy(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(machine, "why_no_gpu", lambda: ("a Linux driver hides the one from Windows", command))
    notice = machine.no_gpu_notice(TrainConfig(model_type="gpt2_tiny").resolve("cpu", 2), 2)
    first, *cure, last = notice.splitlines() if command else notice.partition(". ")[::2]
    assert first.startswith("No GPU seen: a Linux driver hides the one from Windows")
    assert [line.strip() for line in cure] == ([command] if command else [])
    assert last.startswith("Training gpt2_tiny on 2 CPU ranks with gloo instead; more in docs/troubleshooting.md")
    assert last.endswith("from: bash run_gemini.sh --doctor"), "a command that ends its line can be copied too"


@pytest.mark.parametrize(
    ("gpus", "environ", "device", "ranks"),
    [
        (0, {}, "cpu", 2),
        (0, {"GPUNUM": "1"}, "cpu", 1),
        (0, {"GPUNUM": "4"}, "cpu", 4),
        (1, {}, "cuda", 1),
        (4, {}, "cuda", 1),
        (4, {"GPUNUM": "4"}, "cuda", 4),
    ],
)
def test_how_many_ranks(
    monkeypatch: pytest.MonkeyPatch, gpus: int, environ: dict[str, str], device: str, ranks: int
) -> None:
    launch, found = launch_from(monkeypatch, gpus=gpus, **environ)
    assert (found, launch.config.device, launch.nodes) == ("", device, Nodes(ranks))
    assert launch.config.model_type == {"cpu": "gpt2_tiny", "cuda": "gpt2_medium"}[device]
    assert bool(launch.notices) == (device == "cpu")


def test_as_many_ranks_as_the_degrees_need() -> None:
    assert launcher.read_nodes({}, 4, "cuda") == (Nodes(4), [])
    assert launcher.read_nodes({}, 4, "cpu") == (Nodes(4), [])
    two = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "here"}
    assert launcher.read_nodes(two, 4, "cpu") == (Nodes(2, 2, 1, "here", nodes.DEFAULT_PORT), [])


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"BATCH_SIZE": "many"}, "BATCH_SIZE must be a whole number, got 'many': try BATCH_SIZE"),
        ({"BATCH_SIZE": "0"}, "got 0: try --batch_size 4 [BATCH_SIZE=0 in the environment]"),
        ({"PLACEMENT": "gpu"}, "PLACEMENT 'gpu' does not exist"),
        ({"DISTPLAN": "CAI_Gemni"}, "did you mean CAI_Gemini"),
        ({"GPUNUM": "0"}, "GPUNUM must be a whole number from 1"),
        ({"GPUNUM": "two"}, "GPUNUM must be a whole number from 1"),
        ({"GPUNUM": "3", "gpus": "2"}, "3 ranks on this machine, but 2 visible GPUs: use GPUNUM=2"),
        ({"NNODES": "-1"}, "NNODES must be"),
        ({"NNODES": "2"}, "NODE_RANK is needed with NNODES=2"),
        ({"NNODES": "2"}, "MASTER_ADDR is needed with NNODES=2"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            "NODE_RANK must be a whole number from 0 to 1",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "70000"},
            "MASTER_PORT must be",
        ),
    ],
    ids=str,
)
def test_wrong_variables_are_named(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], message: str) -> None:
    gpus = int(environ.pop("gpus", "0"))
    assert message in launch_from(monkeypatch, gpus=gpus, **environ)[1]


def test_wrong_settings_start_and_make_nothing(tmp_path: Path) -> None:
    run = Launched(tmp_path, "leave_note()", "--lr=nan", "--train_step=0", BATCH_SIZE="ten", GPUNUM="0").wait()
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr.startswith("4 problems with the settings, nothing was started:")
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tmp", "training.py"]


# ---- which rank failed first


@pytest.fixture
def failure(tmp_path: Path) -> Any:
    def make(exitcode: int, seconds: float, recorded: bool = False) -> Any:
        """A ProcessFailure seen ``seconds`` after the first one."""
        path = tmp_path / f"error-{time.monotonic_ns()}.json"
        if recorded:
            path.touch()
            os.utime(path, (1000 + seconds, 1000 + seconds))
        return SimpleNamespace(exitcode=exitcode, timestamp=int(1000 + seconds), error_file=str(path))

    return make


def test_root_cause_by_error_files_within_a_second(failure: Any) -> None:
    assert root_cause({0: failure(1, 0.5, recorded=True), 1: failure(1, 0.4, recorded=True)})[0] == 1


def test_root_cause_is_the_killed_rank_not_its_peers_errors(failure: Any) -> None:
    killed, peer = failure(-signal.SIGKILL, 0.2), failure(1, 0.1, recorded=True)
    assert root_cause({1: killed, 0: peer})[0] == 1
    assert root_cause({0: peer, 1: killed})[0] == 1
    terminated = failure(-signal.SIGTERM, 0.2)
    assert root_cause({1: terminated, 0: peer})[0] == 1


def test_root_cause_is_not_a_rank_that_the_engine_ended(failure: Any) -> None:
    cause = failure(1, 0, recorded=True)
    assert root_cause({1: cause, 0: failure(-signal.SIGTERM, 0)})[0] == 1
    assert root_cause({1: cause, 0: failure(-signal.SIGKILL, launcher.EARLY_SECONDS)})[0] == 1
    assert root_cause({1: cause, 0: failure(-signal.SIGABRT, 0)})[0] == 1


# ---- several machines, which are several launchers here


def two_nodes(
    folder: Path, body: str, *flags: str, second: dict[str, str] | None = None, **both: str
) -> list[Launched]:
    common = {"NNODES": "2", "GPUNUM": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | both
    return [
        Launched(folder / str(k), body, *flags, NODE_RANK=str(k), **(common | (second or {} if k else {})))
        for k in range(2)
    ]


def test_two_nodes_are_one_run(tmp_path: Path) -> None:
    body = "leave_note(world=os.environ['WORLD_SIZE'])\nprint('rank', rank)"
    first, second = (run.wait() for run in two_nodes(tmp_path, body))
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert first.run_dir().name == second.run_dir().name
    assert (first.run_dir() / "console.log").read_text().splitlines()[-1] == "rank 0"
    assert (second.run_dir() / "console-node1.log").read_text().splitlines()[-1] == "rank 1"
    assert (read_note(first, 0)["world"], read_note(second, 1)["world"]) == ("2", "2")


@pytest.mark.parametrize("address", ["::1", "[::1]", "localhost", "ip6-localhost"])
def test_two_nodes_meet_over_ipv6_and_by_name(tmp_path: Path, address: str) -> None:
    try:
        socket.getaddrinfo(address.strip("[]"), 1)
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip(f"{address} is not known here")
    body = (
        "import torch.distributed as dist; dist.init_process_group('gloo')\n"
        "import torch; one = torch.ones(1); dist.all_reduce(one); leave_note(sum=one.item())\n"
        "from commons.lifecycle.leaving import leave_together; leave_together(0)\n"
    )
    runs = two_nodes(tmp_path, body, second={"MASTER_ADDR": address}, MASTER_ADDR=address)
    for rank, run in enumerate(runs):
        run.wait()
        assert run.code == 0, run.stderr
        assert read_note(run, rank)["sum"] == 2


def test_nodes_that_differ_refuse_and_name_both(tmp_path: Path) -> None:
    for run in two_nodes(tmp_path, "leave_note()", second={"BATCH_SIZE": "2"}):
        run.wait()
        assert run.code == 2
        assert "--batch_size is 2 on node 1, 4 on node 0: make them the same" in run.stderr
        assert not (run.folder / "gemini_logs").exists()


@pytest.fixture
def store() -> Iterator[Any]:
    yield open_store(Nodes(1), 5)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """What it returned or raised is in the list, once the thread has ended."""
    ends: list[Any] = []

    def run() -> None:
        try:
            ends.append(work())
        except Exception as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ends


def of_another_node(store: Any) -> Any:
    """Its own connection to node 0's store: one waits at a time on each."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


def test_cards_are_compared(store: Any) -> None:
    begun: list[str] = []
    thread, ends = in_thread(
        lambda: ask(of_another_node(store), Nodes(1, 2, 1), Card({"the version of torch": "2.12"}), 10)
    )
    with pytest.raises(NodesDiffer, match=r"the version of torch is 2\.12 on node 1, 2\.13 on node 0"):
        compare(
            store, Nodes(1, 2), Card({"the version of torch": "2.13"}), 10, lambda: begun.append("") or "", Answer()
        )
    thread.join()
    assert isinstance(ends[0], NodesDiffer) and not begun


def test_a_missing_node_is_named_on_all_that_came(store: Any) -> None:
    thread, ends = in_thread(lambda: ask(of_another_node(store), Nodes(1, 4, 2), Card({}), 5))
    with pytest.raises(MeetingError, match=r"node 1, 3 did not join within 0\.5 s"):
        compare(store, Nodes(1, count=4), Card({}), 0.5, str, Answer())
    thread.join()
    assert isinstance(ends[0], MeetingError) and "node 1, 3 did not join" in str(ends[0])


def test_what_keeps_node_0_from_beginning_is_told_on_all(store: Any) -> None:
    def begin() -> str:
        raise FolderInUse(Path("logs/run"))

    thread, ends = in_thread(lambda: ask(of_another_node(store), Nodes(1, 2, 1), Card({}), 5))
    with pytest.raises(FolderInUse):
        compare(store, Nodes(1, count=2), Card({}), 5, begin, Answer())
    thread.join()
    assert "node 0 cannot start: logs/run is in use by a run that is still going" in str(ends[0])


THOUSAND = """
import sys, threading, time, torch.distributed
from commons.launch.nodes import Nodes, meet
count, port, names = int(sys.argv[1]), int(sys.argv[2]), []
threading.stack_size(256 * 1024)
def node(rank):
    met = meet(Nodes(1, count, rank, "127.0.0.1", port), {"--seed": 42}, 60, lambda: "the run")
    assert len(met.nodes.addresses) == count
    met.lifeline.stand_down()
    names.append(met.run_name)
    return met
def others(rank):
    kept.append(node(rank))
kept = []
threads = [threading.Thread(target=others, args=(rank,)) for rank in range(1, count)]
start = time.monotonic()
for thread in threads: thread.start()
first = node(0)
with first.lifeline:
    for thread in threads: thread.join()
    print(len(names), set(names), f"{time.monotonic() - start:.1f}")
    deadline = time.monotonic() + 10
    connected = lambda: sum(peer.node is not None for peer in first.lifeline._peers.values())
    while connected() < count - 1 and time.monotonic() < deadline: time.sleep(0.1)
    print(connected())
    sys.stdout.flush()
    first.lifeline.stand_down()
    import os; os._exit(0)
"""


def test_a_thousand_nodes_meet(tmp_path: Path) -> None:
    """As threads with stores of their own, in one process with two cores, where real ones have a machine each. How
    long it takes is printed, and not judged.
    """
    (tmp_path / "meet.py").write_text(THOUSAND)
    command = f"ulimit -n $(ulimit -Hn); exec '{sys.executable}' meet.py 1000 {free_port()}"
    code, console = run_processes(["bash", "-c", command], cwd=tmp_path, environment=environment(), seconds=120)
    assert code == 0, console
    count, name, seconds, connected = re.search(r"(\d+) \{'(.+)'\} (.+)\n(\d+)\n\Z", console).groups()  # pyright: ignore
    assert (count, name, connected) == ("1000", "the run", "999")
    print(f"{seconds} s")


def test_a_wrong_address_and_a_taken_port_are_told() -> None:
    port = int(free_port())
    with pytest.raises(MeetingError, match=rf"node 1 could not reach node 0 at 127\.0\.0\.1:{port} within 0\.5 s"):
        open_store(Nodes(1, 2, 1, "127.0.0.1", port), 0.5)
    with pytest.raises(MeetingError, match="is no address that node 1 can look up"):
        open_store(Nodes(1, 2, 1, "no-such-host.invalid", port), 0.5)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(MeetingError, match=f"MASTER_PORT {port} cannot be used on node 0"):
            open_store(Nodes(1, 2, 0, "127.0.0.1", port), 0.5)
