"""The console and the files of a run: real files and pipes, a real terminal, kill and full disk."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commons.reporting import environment, noise
from commons.reporting.console_layout import (
    COLUMNS,
    HEADS_EVERY_ROWS,
    SUMMARY_ROWS,
    StepLines,
    header_lines,
    number,
    summary_lines,
)
from commons.reporting.header import RunHeader
from commons.reporting.record import StepRecord
from commons.reporting.sinks import registry
from commons.reporting.sinks.metrics_file import JsonlSink
from commons.reporting.sinks.patient_stream import DRAIN_SECONDS, MOST_PENDING_BYTES, PatientStream
from commons.reporting.sinks.registry import SINKS, open_sinks, start_run_folder
from commons.reporting.sinks.sink import RunFacts
from commons.reporting.sinks.summary_file import SummarySink
from commons.reporting.summary import MEASURED_FIELDS, summarize
from commons.reporting.writing import SinkError, to_json

REPOSITORY = Path(__file__).resolve().parents[2]
CONTROL_CHARACTER = re.compile(r"[^\n\x20-\x7e\x80-\U0010ffff]")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

GPU_RECORD = StepRecord(
    step=1,
    loss=10.8251,
    lr=3e-4,
    grad_norm=1.25,
    step_seconds=0.1253,
    forward_seconds=0.0352,
    backward_seconds=0.0711,
    optimizer_seconds=0.0190,
    tokens_per_second=261_234.5,
    model_tflops_per_device=331.4,
    hardware_tflops_per_device=340.1,
    mfu=0.335,
    skipped_steps=0,
    device_memory_allocated_mib=20_000.0,
    device_memory_reserved_mib=43_210.0,
    device_memory_peak_mib=43_001.0,
    device_memory_peak_rank=1,
    host_memory_mib=5_123.0,
    host_memory_peak_rank=0,
)
CPU_RECORD = dataclasses.replace(
    GPU_RECORD,
    grad_norm=None,
    mfu=None,
    device_memory_allocated_mib=None,
    device_memory_reserved_mib=None,
    device_memory_peak_mib=None,
    device_memory_peak_rank=None,
    model_tflops_per_device=0.0213,
)
HEADER = RunHeader(
    model="gpt2_medium",
    layers=24,
    hidden=1024,
    heads=16,
    parameters=354_823_168,
    padded_parameters=354_871_296,
    plan="CAI_Gemini",
    placement="static",
    dp=2,
    tp=1,
    pp=1,
    world_size=2,
    micro_batch_size=16,
    grad_accum=1,
    global_batch_size=32,
    seq_len=1024,
    precision="bf16",
    attention="sdpa",
    activation_checkpointing="off",
    cuda_graph=False,
    peer_copies=False,
    device="cuda",
    device_name="NVIDIA H200",
    peak_tflops_per_device=989.4,
)


@dataclasses.dataclass
class Config:
    train_step: int = 3
    warmup_step: int = 1
    quiet: bool = False
    log_every: int = 1
    sinks: str = ""
    log_dir: str = "logs"
    run_name: str = "run"

    @property
    def run_dir(self) -> Path:
        return Path(self.log_dir) / self.run_name

    @classmethod
    def at(cls, run_dir: str | Path, **settings: Any) -> Config:
        return cls(log_dir=str(Path(run_dir).parent), run_name=Path(run_dir).name, **settings)


def strict_json(text: str) -> Any:
    """Parse what any JSON reader takes: Python's own would also take NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


# --- Real processes -------------------------------------------------------------------------------

# A run without a model: three steps, as slow as argv[2] says.
RUN = """
    import dataclasses, sys, time
    from test_sinks import GPU_RECORD, HEADER, Config
    from commons.reporting.sinks.registry import open_sinks
    with open_sinks(Config.at(sys.argv[1]), HEADER, 0) as sinks:
        for step in (1, 2, 3):
            for sink in sinks:
                sink.log(dataclasses.replace(GPU_RECORD, step=step))
            time.sleep(float(sys.argv[2]))
        for sink in sinks:
            sink.report({})
"""


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


def surroundings(**changes: str) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), *filter(None, sys.path)])
    return {**inherited, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8", "TERM": "xterm-256color", **changes}


def in_pipe(script: str, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python(script, *arguments), env=surroundings(**changes), capture_output=True, text=True, timeout=120
    )


def on_terminal(script: str, *arguments: object, columns: int = 80, **changes: str) -> str:
    """What a process writes to a terminal of that width."""
    terminal, process_side = pty.openpty()
    fcntl.ioctl(process_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        python(script, *arguments),
        env=surroundings(**changes),
        stdin=process_side,
        stdout=process_side,
        stderr=process_side,
    )
    os.close(process_side)
    output = b""
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                output += os.read(terminal, 65536)
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(terminal)
        process.kill()
        process.wait()
    return output.decode()


def test_a_pipe_gets_plain_unwrapped_lines_and_no_bar(tmp_path: Path) -> None:
    run_dir = tmp_path / ("long" * 50)
    done = in_pipe(RUN, run_dir, 0, FORCE_COLOR="1", COLUMNS="40", TTY_COMPATIBLE="1", TTY_INTERACTIVE="1")
    assert done.returncode == 0, done.stderr
    assert not CONTROL_CHARACTER.search(done.stdout)
    assert "training" not in done.stdout and "ETA" not in done.stdout
    assert f"run      {run_dir}" in done.stdout.splitlines()
    assert re.findall(r"^ *(\d/3) ", done.stdout, re.M) == ["1/3", "2/3", "3/3"]
    assert (run_dir / "console.log").read_text() == done.stdout


def test_a_line_in_a_pipe_is_there_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        python(RUN, tmp_path / "run", 30), env=surroundings(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            deadline = time.monotonic() + 25
            for line in process.stdout:
                if " 1/3" in line:
                    break
            # The process now sleeps 30 s in its first step: a buffered line would only come after that.
            assert time.monotonic() < deadline
            assert " 1/3" in (tmp_path / "run/console.log").read_text()
        finally:
            process.kill()


def test_a_terminal_gets_a_bar_that_goes_away(tmp_path: Path) -> None:
    output = on_terminal(RUN, tmp_path / "run", 0.05)
    assert "training" in output and "ETA" in output and "3/3" in output
    assert "\x1b[36m" in output  # colours
    assert "\x1b[?25l" not in output  # a run that is killed must not leave a terminal without a cursor
    last_bar = output.rindex("training")
    assert "\x1b[2K" in output[last_bar:], "the bar stays on the screen"
    assert "median" in output[last_bar:]
    # No line ends as a bar: the launcher's console.log keeps of each line what stood there last.
    assert not [line for line in output.split("\n") if "training" in line.split("\x1b[2K")[-1]]
    copy = (tmp_path / "run/console.log").read_text()
    assert not CONTROL_CHARACTER.search(copy) and "training" not in copy


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a short name for the run's folder, which is never cut
    output = on_terminal(RUN, "run", 0, columns=columns)
    lines = [piece for line in ESCAPE.sub("", output).splitlines() for piece in line.split("\r")]
    step_lines = [line for line in lines if re.match(r" *\d/3 ", line)]
    assert len(step_lines) == 3
    assert max(map(len, step_lines)) <= columns
    assert max(map(len, lines)) <= max(columns, 80)
    assert all("10.8251" in line and "331.4" in line for line in step_lines)


def test_no_color_and_dumb_terminals(tmp_path: Path) -> None:
    colour = re.compile(r"\x1b\[(?:\d+;)*[34][0-8](?:;[\d;]+)?m")
    assert colour.search(on_terminal(RUN, tmp_path / "colour", 0))
    assert not colour.search(on_terminal(RUN, tmp_path / "plain", 0, NO_COLOR="1"))
    assert "ETA" not in on_terminal(RUN, tmp_path / "dumb", 0, TERM="dumb")


def test_an_ascii_console_gets_ascii(tmp_path: Path) -> None:
    for folder in ("ä", b"\xff".decode("utf-8", "surrogateescape")):
        assert in_pipe(RUN, tmp_path / folder, 0).returncode == 0
    done = in_pipe(RUN, tmp_path / "ä", 0, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="POSIX")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "dp 2 x tp 1 x pp 1" in done.stdout


def test_the_launcher_keeps_console_log_itself(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_text("the launcher's\n")
    done = in_pipe(RUN, tmp_path, 0)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "console.log").read_text() == "the launcher's\n"


def test_a_reader_that_leaves_is_one_error(tmp_path: Path) -> None:
    script = """
        import sys
        from commons.reporting.sinks.registry import open_sinks
        from commons.reporting.writing import SinkError
        from test_sinks import HEADER, Config
        try:
            with open_sinks(Config.at(sys.argv[1]), HEADER, 0):
                pass
        except SinkError as error:
            sys.exit(str(error))
    """
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        python(script, tmp_path / "run"),
        env=surroundings(),
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write_end)
    assert done.returncode == 1  # 120 where the interpreter failed once more at its exit
    assert re.fullmatch(r"cannot write the console .*: Broken pipe; .+\n", done.stderr)


def test_a_reader_that_does_not_read_stops_nothing(tmp_path: Path) -> None:
    """More lines than the pipe holds, and nobody takes one before the run is over."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    script = RUN.replace("(1, 2, 3)", "range(1, 401)")
    with subprocess.Popen(
        python(script, tmp_path / "run", 0), env=surroundings(), stdout=write_end, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(write_end)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    with open(read_end) as pipe:
        shown = pipe.read()
    log = (tmp_path / "run/console.log").read_text()
    assert len(re.findall(r"^ *\d+/3 ", log, re.M)) == 400 and "median" in log
    assert 0 < len(shown) <= 4096 and log.startswith(shown)


def test_a_reader_that_comes_late_gets_every_line(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    script = RUN.replace("(1, 2, 3)", "range(1, 401)")
    environment = surroundings()
    with subprocess.Popen(python(script, tmp_path / "run", 0), env=environment, stdout=write_end) as process:
        os.close(write_end)
        log = tmp_path / "run/console.log"
        deadline = time.monotonic() + 60
        while not (log.exists() and "median" in log.read_text()):  # all is said, and the pipe full
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with open(read_end) as pipe:
            shown = pipe.read()
    assert process.returncode == 0
    assert shown == log.read_text()


@pytest.fixture
def full_pipe() -> Iterator[tuple[PatientStream, int]]:
    """A stream into a pipe that has room for one page, and the end to read it at."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    with open(write_end, "w") as file:
        yield PatientStream(file), read_end
    os.close(read_end)


def test_what_is_kept_for_a_reader_has_an_end(full_pipe: tuple[PatientStream, int]) -> None:
    stream, read_end = full_pipe
    line = "x" * 1023 + "\n"
    for index in range(3 * MOST_PENDING_BYTES // 1024):
        stream.write(f"{index:04d}{line[4:]}")
        stream.flush()
        assert stream.pending_bytes <= MOST_PENDING_BYTES
    shown = b""
    while stream.pending_bytes:
        shown += os.read(read_end, 65536)
        stream.flush()
    stream.close()
    os.set_blocking(read_end, False)
    lines = (shown + os.read(read_end, 65536)).decode().splitlines()
    (notice,) = [line for line in lines if "missing" in line]
    numbers = [int(line[:4]) for line in lines if line != notice]
    missing = int(re.findall(r"\((\d+) lines are missing here: console.log has them\)", notice)[0])
    assert len(numbers) + missing == 3 * MOST_PENDING_BYTES // 1024 and missing > 0
    assert numbers == sorted(numbers) and numbers[-1] == 3 * MOST_PENDING_BYTES // 1024 - 1
    assert numbers[lines.index(notice)] - numbers[lines.index(notice) - 1] == missing + 1


def test_a_stream_stays_as_its_other_writers_have_it(full_pipe: tuple[PatientStream, int]) -> None:
    """Not to block is a property of what is open, which other processes share."""
    stream, _ = full_pipe
    assert os.get_blocking(stream.fileno())


def test_the_end_does_not_wait_long_for_a_reader(full_pipe: tuple[PatientStream, int]) -> None:
    stream, _ = full_pipe
    stream.write("x" * 10_000)
    stream.flush()
    start = time.monotonic()
    stream.close()
    stream.close()
    assert DRAIN_SECONDS - 0.1 < time.monotonic() - start < DRAIN_SECONDS + 5


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr", "all"])
def test_a_process_without_standard_streams(tmp_path: Path, closed: str) -> None:
    script = """
        import json, os, subprocess, sys
        from commons.lifecycle.standard_streams import open_missing_streams
        from commons.reporting.sinks.registry import open_sinks
        from test_sinks import GPU_RECORD, HEADER, Config
        open_missing_streams()
        fds = [os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev for fd in (0, 1, 2)]
        inherited = subprocess.run(["sh", "-c", "echo word; echo word >&2"]).returncode
        print("words", flush=True)
        print("words", file=sys.stderr, flush=True)
        with open_sinks(Config.at(sys.argv[1]), HEADER, 0) as sinks:
            for sink in sinks:
                sink.log(GPU_RECORD)
        with open(os.path.join(sys.argv[1], "seen"), "w") as file:
            json.dump([fds, inherited, sys.stdin.read()], file)
    """
    closing = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}[closed]
    command = ["sh", "-c", f'"$@" {closing}', "sh", *python(script, tmp_path / "run")]
    with subprocess.Popen(
        command, env=surroundings(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    fds, inherited, typed = json.loads((tmp_path / "run/seen").read_text())
    assert (inherited, typed) == (0, "")
    assert fds == [closed in (name, "all") for name in ("stdin", "stdout", "stderr")]
    assert "10.8251" in (tmp_path / "run/console.log").read_text()


def test_a_sink_where_there_is_no_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with open_sinks(Config.at(tmp_path / "run"), HEADER, 0) as sinks:
        assert len(sinks) == len(SINKS) - 1


# --- Every sink of the table ----------------------------------------------------------------------


def written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out if name == "console" else (tmp_path / name).read_text()


@pytest.mark.parametrize("name", SINKS)
def test_every_sink_takes_a_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one without a step, and it may be closed twice."""
    for records in ([], [CPU_RECORD, dataclasses.replace(CPU_RECORD, step=2, loss=float("nan"))]):
        (tmp_path / "console.log").unlink(missing_ok=True)
        sink = SINKS[name](RunFacts(tmp_path, 2, 1, False, HEADER))
        assert sink is not None
        for record in records:
            sink.log(record)
        sink.report(summarize(records, warmup_step=1))
        sink.close()
        sink.close()
        text = written(name, tmp_path, capsys)
        assert bool(records) <= bool(text), "nothing was written"
        if name.endswith(("json", "jsonl")):
            assert all(strict_json(part) for part in ([text] if name.endswith("json") else text.splitlines()))


@pytest.mark.parametrize("name", SINKS)
def test_every_sink_fails_in_one_line(name: str, tmp_path: Path) -> None:
    """On a disk that takes no more bytes: a limit on the size of files fails in the same way."""
    script = """
        import resource, sys
        from pathlib import Path
        from commons.reporting.sinks.registry import SINKS, RunFacts
        from commons.reporting.writing import SinkError
        from test_sinks import GPU_RECORD, HEADER
        sink = SINKS[sys.argv[2]](RunFacts(Path(sys.argv[1]), 3, 1, False, HEADER))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
        try:
            sink.log(GPU_RECORD)
            sink.report({"steps": 1})
        except SinkError as error:
            print(error, file=sys.stderr)
        sink.close()
    """
    with open(tmp_path / "screen", "w") as screen:
        done = subprocess.run(
            python(script, tmp_path, name), env=surroundings(), stdout=screen, stderr=subprocess.PIPE, timeout=60
        )
    place = "the console (standard output)" if name == "console" else str(tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"cannot write {re.escape(place)}: File too large; .+\n", done.stderr.decode())


class ClosingSink(SummarySink):
    """Remembers that it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True


def test_no_sink_is_left_open_when_another_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ClosingSink(tmp_path / "summary.json")
    monkeypatch.setattr(registry, "SINKS", {"first": lambda run: first, "console.log": SINKS["console.log"]})
    (tmp_path / "console.log").symlink_to(tmp_path / "nowhere" / "console.log")
    with pytest.raises(SinkError, match=r"console\.log"), open_sinks(Config.at(tmp_path), HEADER, 0):
        pass
    assert first.closed


def test_a_killed_run_keeps_every_step(tmp_path: Path) -> None:
    script = """
        import dataclasses, os, signal, sys
        from pathlib import Path
        from commons.reporting.sinks.metrics_file import JsonlSink
        from test_sinks import GPU_RECORD
        sink = JsonlSink(Path(sys.argv[1]))
        for step in range(1, 6):
            sink.log(dataclasses.replace(GPU_RECORD, step=step))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = tmp_path / "metrics.jsonl"
    assert in_pipe(script, path).returncode == -signal.SIGKILL
    assert [strict_json(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]


# --- Failing to write -----------------------------------------------------------------------------


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    sink = JsonlSink(path)
    with pytest.raises(SinkError) as caught:
        sink.log(GPU_RECORD)
    sink.close()
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == (
        f"cannot write {path}: No space left on device; free some space there, or choose another disk with --log_dir"
    )


def test_a_disk_that_fills_up_leaves_whole_lines_and_the_old_summary(tmp_path: Path) -> None:
    # A limit on the size of a file fails like a disk that fills up: the write that reaches it is cut short.
    script = """
        import dataclasses, resource, sys
        from pathlib import Path
        from commons.reporting.sinks.metrics_file import JsonlSink
        from commons.reporting.sinks.summary_file import SummarySink
        from commons.reporting.writing import SinkError
        from test_sinks import GPU_RECORD
        run_dir = Path(sys.argv[1])
        sink, summary = JsonlSink(run_dir / "metrics.jsonl"), SummarySink(run_dir / "summary.json")
        summary.report({"steps": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        for written in range(100):
            try:
                sink.log(dataclasses.replace(GPU_RECORD, step=written + 1))
            except SinkError as error:
                print(error)
                break
        print(written)
        try:
            summary.report({"long": "x" * 2000})
        except SinkError as error:
            print(error)
    """
    done = in_pipe(script, tmp_path)
    assert done.returncode == 0, done.stderr
    failure, written, summary_failure = done.stdout.splitlines()
    assert failure.startswith(f"cannot write {tmp_path}/metrics.jsonl: File too large; ")
    assert summary_failure.startswith(f"cannot write {tmp_path}/summary.json: File too large; ")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict_json(line)["step"] for line in lines] == list(range(1, int(written) + 1))
    assert strict_json((tmp_path / "summary.json").read_text()) == {"steps": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_a_real_small_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        sink = JsonlSink(disk / "metrics.jsonl")
        with pytest.raises(SinkError, match=r"^cannot write .*metrics\.jsonl: No space left on device;"):
            for step in range(1, 200):
                sink.log(dataclasses.replace(GPU_RECORD, step=step))
        sink.close()
        lines = (disk / "metrics.jsonl").read_text().splitlines()
        assert lines and [strict_json(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
        with pytest.raises(SinkError, match=r"summary\.json"):
            SummarySink(disk / "summary.json").report({"long": "x" * 40_000})
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(SinkError, match=r"^cannot write .*file/run: Not a directory; .*--log_dir")
    with refused, open_sinks(Config.at(tmp_path / "file/run"), HEADER, 0):
        pass


# --- Files ----------------------------------------------------------------------------------------


def test_the_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(log_dir=str(tmp_path))
    with open_sinks(config, HEADER, 0) as sinks:
        for sink in sinks:
            sink.log(GPU_RECORD)
        for sink in sinks:
            sink.report({"steps": 1})
    run_dir = tmp_path / "run"
    assert strict_json((run_dir / "config.json").read_text()) == dataclasses.asdict(config)
    assert strict_json((run_dir / "env.json").read_text())["device_name"] == "NVIDIA H200"
    assert strict_json((run_dir / "metrics.jsonl").read_text()) == dataclasses.asdict(GPU_RECORD)
    assert strict_json((run_dir / "summary.json").read_text()) == {"steps": 1}
    assert (run_dir / "console.log").read_text() == capsys.readouterr().out
    assert (run_dir / "summary.json").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_reader_of_the_summary_sees_the_old_or_the_new(tmp_path: Path) -> None:
    sink = SummarySink(tmp_path / "summary.json")
    sink.report({"steps": 1})
    with open(sink.path) as reader:
        sink.report({"steps": 2})
        assert strict_json(reader.read()) == {"steps": 1}
    assert strict_json(sink.path.read_text()) == {"steps": 2}


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(log_dir=str(tmp_path))
    with open_sinks(config, HEADER, 1) as sinks:
        assert sinks == []
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_numbers_that_json_has_no_word_for(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(dataclasses.replace(GPU_RECORD, loss=float("nan"), grad_norm=float("inf")))
    sink.close()
    line = strict_json((tmp_path / "metrics.jsonl").read_text())
    assert line.pop("non_finite") == {"loss": "nan", "grad_norm": "inf"}
    assert line == {**dataclasses.asdict(GPU_RECORD), "loss": None, "grad_norm": None}
    nested = strict_json(to_json({"a": [1.0, float("-inf")], "b": {"c": float("nan")}, "path": Path("x")}))
    assert nested == {
        "a": [1.0, None],
        "b": {"c": None},
        "path": "x",
        "non_finite": {"a.1": "-inf", "b.c": "nan"},
    }


def test_quiet_leaves_header_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_sinks(Config.at(tmp_path / "run", quiet=True), HEADER, 0) as sinks:
        for sink in sinks:
            sink.log(GPU_RECORD)
        for sink in sinks:
            sink.report({})
    text = capsys.readouterr().out
    assert "gpt2_medium" in text and "median" in text and "10.8251" not in text


# --- Layout ---------------------------------------------------------------------------------------


def layout(records: list[StepRecord], width: int = 200, ranks: int = 2) -> list[str]:
    step_lines = StepLines(total_steps=len(records), warmup_step=0, ranks=ranks)
    return [line.plain for record in records for line in step_lines.lines(record, width)]


def test_the_header_tells_all() -> None:
    def header_text(**more: Any) -> str:
        return "\n".join(line.plain for line in header_lines(dataclasses.replace(HEADER, **more), "logs/run"))

    text = header_text(places=("rank 0: dp 0",))
    for fact in (
        "354,823,168", "354,871,296", "CAI_Gemini", "static", "dp 2 × tp 1 × pp 1", "16 per rank", "32 in all",
        "1,024", "32,768", "bf16", "sdpa", "checkpointing off", "2 × NVIDIA H200", "989.4", "logs/run",
        "rank 0: dp 0",
    ):  # fmt: skip
        assert fact in text, fact
    assert max(map(len, text.splitlines())) <= 80
    assert "placement" not in header_text(placement=None) and "peak" not in header_text(peak_tflops_per_device=None)
    assert "attempt 2 of 3" in header_text(notes=("attempt 2 of 3",))


def test_every_figure_stands_under_its_head() -> None:
    heads, row = layout([GPU_RECORD])
    ends = {column.title: heads.index(column.title) + len(column.title) for column in COLUMNS}
    shown = {title: row[:end].split()[-1] for title, end in ends.items()}
    assert shown == {
        "loss": "10.8251",
        "step ms": "125.3",
        "fwd/bwd/opt": "35/71/19",
        "tokens/s": "261,234",
        "TFLOPS": "331.4",
        "hw TFLOPS": "340.1",
        "MFU": "33.5%",
        "peak MiB": "43,001@1",
        "host MiB": "5,123@0",
        "lr": "3.00e-04",
        "grad norm": "1.250",
    }
    assert "@" not in "".join(layout([GPU_RECORD], ranks=1))


def test_the_heads_of_a_short_run_stand_once_though_its_end_is_foreseen() -> None:
    layout = StepLines(total_steps=10)
    assert len(layout.lines(GPU_RECORD, 120, None)) == 2
    assert len(layout.lines(GPU_RECORD, 120, 3.0)) == 1


def test_80_columns_have_what_is_asked_for_on_every_device() -> None:
    slow = dataclasses.replace(GPU_RECORD, step_seconds=12.3456, tokens_per_second=1_234_567.0)
    gpu = [line.plain for line in StepLines(total_steps=9_999, ranks=2).lines(slow, 80)]
    assert max(map(len, gpu)) <= 80
    assert " ".join(gpu[0].split()) == "step loss step ms fwd/bwd/opt tokens/s TFLOPS MFU peak MiB grad norm"
    cpu = layout([CPU_RECORD], 80)
    assert max(map(len, cpu)) <= 80
    assert "host MiB" in cpu[0] and "-" not in cpu[1].split()
    assert "peak MiB" not in cpu[0] and "MFU" not in cpu[0]
    # In a narrow window the host's memory goes first where the device's is shown too, late where it is all.
    assert "host MiB" not in layout([GPU_RECORD], 60)[0] and "host MiB" in layout([CPU_RECORD], 45)[0]


def test_a_skipped_step_is_marked_and_only_that_one() -> None:
    fine = dataclasses.replace(GPU_RECORD, grad_norm=None)
    skipped = dataclasses.replace(fine, skipped_steps=1)
    lines = layout([fine, skipped, skipped, dataclasses.replace(fine, skipped_steps=2)], 80)
    assert ["overflow" in line for line in lines if "/4" in line] == [False, True, False, True]
    heads = [line for line in lines if "step" in line]
    assert ["grad norm" in line for line in heads] == [False, True]  # the column comes when it is needed
    assert max(map(len, lines)) <= 80


def test_heads_come_again() -> None:
    lines = layout([GPU_RECORD] * (HEADS_EVERY_ROWS + 1))
    assert [index for index, line in enumerate(lines) if "loss" in line] == [0, HEADS_EVERY_ROWS + 1]


def test_a_window_that_is_made_smaller() -> None:
    steps = StepLines(total_steps=3, ranks=2)
    assert max(len(line.plain) for line in steps.lines(GPU_RECORD, 200)) > 80
    assert max(len(line.plain) for line in steps.lines(GPU_RECORD, 80)) <= 80
    assert max(len(line.plain) for line in steps.lines(GPU_RECORD, 5)) <= 20  # the loss at least, no crash


def summary_text(records: list[StepRecord], warmup_step: int = 0) -> str:
    return "\n".join(line.plain for line in summary_lines(summarize(records, warmup_step)))


def test_the_table_at_the_end() -> None:
    records = [dataclasses.replace(GPU_RECORD, step=step, step_seconds=step / 10) for step in range(1, 6)]
    records[-1] = dataclasses.replace(records[-1], loss=9.5, skipped_steps=2, device_memory_peak_mib=43_500.0)
    text = summary_text(records, warmup_step=2)
    assert max(map(len, text.splitlines())) <= 80
    cells = {line[:26].strip(): line[26:].split() for line in text.splitlines()}
    assert cells["steps 3 to 5"] == ["median", "p10", "p90"]
    assert cells["step ms"] == ["400.0", "320.0", "480.0"]
    assert cells["MFU"] == ["33.5%"] * 3
    assert cells["loss"] == ["10.8251", "->", "9.5000"]
    assert cells["peak device memory"] == ["43,500", "MiB", "on", "rank", "1"]
    assert cells["skipped for overflow"] == ["2", "steps"]
    assert "loss not finite" not in cells
    titles = {"step_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "tokens_per_second"}
    assert titles < {row.key for row in SUMMARY_ROWS} <= set(MEASURED_FIELDS)


def test_the_table_leaves_out_what_nobody_measured() -> None:
    text = summary_text([CPU_RECORD])
    assert "MFU" not in text and "device memory" not in text and "skipped" not in text and "nan" not in text
    assert "step 1 " in text
    assert "no step after 2 warm-up" in summary_text([CPU_RECORD], warmup_step=2)
    assert "loss not finite" in summary_text([dataclasses.replace(CPU_RECORD, loss=float("nan"))])
    assert summary_lines({})  # a run cut short before its first step


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0"), (float("nan"), "nan"), (331.44, "331.4"), (1460.4, "1,460"), (9.8765, "9.877"),
     (0.02131, "0.0213"), (0.5, "0.5000"), (0.00412, "0.0041"), (0.00053, "0.0005"), (0.00002, "2e-05"),
     (-3.0, "-3.000")],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


# --- env.json -------------------------------------------------------------------------------------


def test_env_json_has_what_repeats_a_run_and_no_secret(tmp_path: Path) -> None:
    kept = {
        "CUDA_VISIBLE_DEVICES": "0",
        "DISTPLAN": "CAI_Gemini",
        "NCCL_DEBUG": "INFO",
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    }
    environ = {**kept, "HF_TOKEN": "secret", "HOME": "/x"}
    described = environment.describe_environment("cpu", ["python", "a b.py"], environ)
    start_run_folder(tmp_path, Config(), described)
    env = strict_json((tmp_path / "env.json").read_text())
    assert env["command"] == "python 'a b.py'"
    assert env["environment"] == kept
    assert "secret" not in (tmp_path / "env.json").read_text()
    assert env["versions"]["torch"] and env["python"]
    assert env["cpu_cores"] >= 1 and env["host_memory_mib"] > 100
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", env["started_at"])


def test_the_command_is_the_one_that_was_typed(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import json, os, sys\n"
        "from commons.reporting.environment import describe_environment\n"
        "if 'TORCHELASTIC_RUN_ID' in os.environ or sys.argv[1] == 'alone':\n"
        "    print(json.dumps(describe_environment()))\n"
        "else:\n"
        "    import subprocess\n"
        "    os.environ['TORCHELASTIC_RUN_ID'] = 'none'\n"
        "    subprocess.run([sys.executable, '-u', sys.argv[0], 'the rank'], check=True)\n"
    )
    name, suite_file = Path(sys.executable).name, str(REPOSITORY / "train_gpt_demo.py")

    def described(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, str(rank), *arguments]
        done = subprocess.run(command, env=surroundings(), capture_output=True, text=True, check=True)
        return strict_json(done.stdout)

    alone = described("alone", suite_file)
    assert alone["command"] == f"{name} {rank} alone train_gpt_demo.py"  # no path of this machine
    assert alone["launcher"] is None
    launched = described("--distplan", "CAI Gemini")
    assert launched["command"] == f"{name} -u {rank} 'the rank'"
    assert launched["launcher"] == f"{name} {rank} --distplan 'CAI Gemini'"


def test_env_json_on_a_bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object, **named: object) -> Any:
        raise OSError("broken")

    monkeypatch.setenv("PATH", str(tmp_path))  # no git, no nvidia-smi
    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(os, "sysconf", fail)
    described = environment.describe_environment()
    assert {described[name] for name in ("commit", "nvidia_driver", "host_memory_mib")} == {None}


def test_the_commit_is_the_suites_own(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    assert environment.git_state(tmp_path) == (None, None)
    subprocess.run([*git, "init", "-q"], check=True)
    assert environment.git_state(tmp_path) == (None, None)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "--no-verify", "-m", "one"], check=True)
    commit, changed = environment.git_state(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", commit or "") and changed is False
    (tmp_path / "file").write_text("2")
    assert environment.git_state(tmp_path) == (commit, True)
    (tmp_path / "copy").mkdir()  # a copy of the suite inside somebody's repository
    assert environment.git_state(tmp_path / "copy") == (None, None)
    stated = {"SUITE_COMMIT": "0123abc"}
    assert environment.describe_environment(environ=stated, repository=tmp_path)["commit"] == commit
    assert environment.describe_environment(environ=stated, repository=tmp_path / "copy")["commit"] == "0123abc"
    for nonsense in ("", "main", "0123"):
        assert environment.stated_commit({"SUITE_COMMIT": nonsense}) is None


def new_checkout(folder: Path) -> str:
    """A repository of one commit, whose name is returned."""
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    (folder / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "--no-verify", "-m", "one"], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_the_commit_of_another_user_s_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # whose settings of git may allow every folder
    (tmp_path / "suite").mkdir()
    commit = new_checkout(tmp_path / "suite")
    for path in [tmp_path / "suite", *(tmp_path / "suite").rglob("*")]:
        os.chown(path, 12345, 12345)
    refused = subprocess.run(["git", "-C", str(tmp_path / "suite"), "status"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert environment.git_state(tmp_path / "suite") == (commit, False)
    (tmp_path / "suite" / "file").write_text("2")
    assert environment.git_state(tmp_path / "suite") == (commit, True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "suite")
    assert environment.git_state(link) == (commit, True)
    (tmp_path / "suite" / "copy").mkdir()
    assert environment.git_state(tmp_path / "suite" / "copy") == (None, None)


def test_the_commit_is_not_of_the_repository_that_git_is_busy_with(tmp_path: Path, monkeypatch) -> None:
    """A hook of git has GIT_DIR and its like set for all that it starts."""
    for name in ("suite", "other"):
        (tmp_path / name).mkdir()
    commit = new_checkout(tmp_path / "suite")
    new_checkout(tmp_path / "other")
    (tmp_path / "other" / "file").write_text("2")
    subprocess.run(["git", "-C", tmp_path / "other", "-c", "user.name=x", "-c", "user.email=x@example.org",
                    "commit", "-q", "-a", "-m", "two"], check=True)  # fmt: skip
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert environment.git_state(tmp_path / "suite") == (commit, False)


def test_the_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    commit = new_checkout(suite)
    subprocess.run(["git", "-C", suite, "worktree", "add", "-q", "-b", "branch", tmp_path / "linked"], check=True)
    folders = {"loose": suite, "linked worktree": tmp_path / "linked"}

    def without_git() -> dict[str, tuple[str | None, bool | None]]:
        with monkeypatch.context() as bare:
            bare.setenv("PATH", str(tmp_path))
            return {name: environment.git_state(folder) for name, folder in folders.items()}

    assert without_git() == dict.fromkeys(folders, (commit, None))
    subprocess.run(["git", "-C", suite, "pack-refs", "--all"], check=True)
    assert without_git() == dict.fromkeys(folders, (commit, None))
    subprocess.run(["git", "-C", suite, "checkout", "-q", "--detach"], check=True)
    assert without_git() == dict.fromkeys(folders, (commit, None))
    (tmp_path / "no checkout").mkdir()
    folders["none"] = tmp_path / "no checkout"
    assert without_git()["none"] == (None, None)


def test_the_version_of_a_package_that_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = types.ModuleType("a_checkout")
    checkout.__dict__["__version__"] = "7.1"
    monkeypatch.setitem(sys.modules, "a_checkout", checkout)
    monkeypatch.setattr(environment, "PACKAGES", ("a_checkout", "neither_here_nor_there"))
    assert environment.package_versions() == {"a_checkout": "7.1", "neither_here_nor_there": None}


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12.2.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC 12.2.0",
    ],
)
def test_driver_version(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_text(text)
    assert environment.nvidia_driver(tmp_path / "version") == "550.54.15"


# --- Noise ----------------------------------------------------------------------------------------


def test_importing_colossalai_says_nothing() -> None:
    script = """
        from commons.reporting.noise import quiet_libraries
        quiet_libraries()
        from commons.plans.colossal.imports import import_colossalai
        import_colossalai()
        from colossalai.logging import get_dist_logger
        get_dist_logger().info("chatter")
        get_dist_logger().warning("what matters")
    """
    done = in_pipe(script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "chatter" not in done.stdout and "what matters" in done.stdout


def test_only_known_noise_goes() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        noise.quiet_libraries()
        warnings.warn("Please install the latest tensornvme to use async save", UserWarning, stacklevel=1)
        warnings.warn("loss is not finite", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["loss is not finite"]


def test_quieting_twice_filters_once() -> None:
    noise.quiet_libraries()
    before = list(logging.getLogger("colossalai").filters)
    noise.quiet_libraries()
    assert logging.getLogger("colossalai").filters == before


@pytest.mark.parametrize("entry", [*noise.KNOWN_WARNINGS, *noise.KNOWN_LOG_LINES], ids=lambda e: e.pattern[:30])
def test_every_silenced_line_has_a_reason(entry: Any) -> None:
    assert len(entry.why) > 20
    re.compile(entry.pattern)
