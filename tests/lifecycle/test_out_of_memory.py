"""Out of memory: what counts as it, what is said of it, and how runs end of it, with real ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from suite_runs import REPOSITORY, clean_environment, heed_all_signals, run_processes
from workers.out_of_memory_worker import ALLOCATORS, BARE
from worlds.launched import STARTS, free_port

from commons.cli.flags import judge, read_flags
from commons.cli.less_memory import Start, with_advice
from commons.config.schema import TrainConfig
from commons.lifecycle.heartbeat import Beat
from commons.lifecycle.host_memory import oom_kills
from commons.lifecycle.memory_shortage import GPU, HOST, PINNED, Shortage, memory_of, shortage
from commons.lifecycle.outcome import OUT_OF_MEMORY, OUT_OF_MEMORY_CODE, Ended

GIB = 1 << 30
BEAT = Beat(9, 3, "backward", 0.0)

# ---- what counts


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError(ALLOCATORS), GPU),
        (RuntimeError(BARE), GPU),
        (RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), GPU),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), GPU),
        (RuntimeError("NCCL error: unhandled cuda error\nFailed to CUDA calloc async 4194304 bytes"), GPU),
        (RuntimeError("ncclUnhandledCudaError\nCuda failure 2 'out of memory'"), GPU),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            HOST,
        ),
        (MemoryError(), HOST),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), HOST),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), ""),
        (RuntimeError("out of resource: shared memory, Required: 278544, Hardware limit: 232448"), ""),
        (OSError(errno.ENOSPC, "No space left on device"), ""),
        (ValueError("CUDA out of memory is what this text is about"), ""),
        (RuntimeError("Connection closed by peer"), ""),
    ],
)
def test_which_errors_are_about_memory(error: BaseException, memory: str) -> None:
    assert memory_of(error) == memory
    assert (shortage(error, 0, BEAT) is not None) == bool(memory)


def test_what_a_compiler_wraps_is_found() -> None:
    try:
        try:
            raise torch.OutOfMemoryError(ALLOCATORS)
        except RuntimeError as inner:
            raise ValueError("backend='inductor' raised") from inner
    except ValueError as error:
        found = shortage(error, 1, BEAT)
    assert found is not None and (found.memory, found.asked_bytes) == (GPU, 2 * GIB)


def test_the_allocators_own_numbers() -> None:
    found = shortage(torch.OutOfMemoryError(ALLOCATORS), 1, BEAT)
    assert found is not None
    numbers = (found.asked_bytes, found.used_bytes, found.kept_bytes, found.free_bytes, found.total_bytes)
    assert numbers == tuple(int(gib * GIB) for gib in (2.0, 70.5, 6.2, 1.25, 79.11))
    assert found.sentence(8) == (
        "Rank 1 of 8 ran out of GPU memory in step 3, the backward pass: 2.00 GiB were asked for; the rank holds 70.50"
        " GiB and 6.20 GiB that its allocator keeps; 1.25 GiB of 79.11 GiB are free (the GPU)."
    )


@pytest.mark.parametrize("code", ["torch_like.empty(9, pin_memory=True)", "cudaHostRegister(torch_like)"])
def test_pinned_memory_is_told_from_the_gpus(code: str, tmp_path: Path) -> None:
    """CUDA says the same of both; the statement that failed does not. A real file, as the code is read from it."""
    script = tmp_path / "pins.py"
    lines = (
        "class torch_like:",
        "    @staticmethod",
        f"    def empty(size, pin_memory): raise RuntimeError({BARE!r})",
        f"def cudaHostRegister(memory): raise RuntimeError({BARE!r})",
        f"def pin(): {code}",
    )
    script.write_text("\n".join(lines))
    names: dict = {}
    exec(compile(script.read_text(), str(script), "exec"), names)
    with pytest.raises(RuntimeError) as caught:
        names["pin"]()
    found = shortage(caught.value, 0, BEAT)
    assert found is not None and found.memory == PINNED
    assert found.used_bytes and found.total_bytes and found.free_bytes, "of the host"


def test_the_tightest_limit_of_the_host_is_named() -> None:
    """A real limit of this shell, a real MemoryError."""
    program = (
        "import json, resource, dataclasses\n"
        "from commons.lifecycle.memory_shortage import shortage\n"
        "from commons.lifecycle.heartbeat import Beat\n"
        "resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "try: kept = bytearray(1 << 30)\n"
        "except MemoryError as error: found = shortage(error, 0, Beat(1, 0, 'build', 0))\n"
        "print(json.dumps(dataclasses.asdict(found)))\n"
    )
    code, console = run_processes([sys.executable, "-c", program])
    assert code == 0, console
    found = json.loads(console)
    assert (found["memory"], found["limit"], found["total_bytes"]) == (HOST, "ulimit -v", 400 << 20)
    assert 0 < found["free_bytes"] < found["total_bytes"] and 0 < found["used_bytes"] < found["total_bytes"]


# ---- the kernel's counters

COUNTERS = {
    "version 1": (
        {
            "/proc/self/cgroup": "4:memory:/a\n",
            "/sys/fs/cgroup/memory/a/memory.oom_control": "under_oom 0\noom_kill 2\n",
        },
        2,
    ),
    "version 2": (
        {
            "/proc/self/cgroup": "0::/a/b\n",
            "/sys/fs/cgroup/cgroup.controllers": "memory\n",
            "/sys/fs/cgroup/a/b/memory.events": "oom 5\noom_kill 3\noom_group_kill 0\n",
            "/proc/vmstat": "oom_kill 9\n",
        },
        3,
    ),
    "a group that counts nothing": ({"/proc/self/cgroup": "0::/\n", "/proc/vmstat": "pgfree 1\noom_kill 9\n"}, 9),
    "an old kernel": ({}, 0),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_kills_are_counted(name: str) -> None:
    files, kills = COUNTERS[name]
    assert oom_kills(files.get) == kills


# ---- the advice

ON_GPU = Shortage(
    GPU, 0, "backward", 2, "step 2, the backward pass", free_bytes=0, total_bytes=80 * GIB, limit="the GPU"
)
ON_HOST = Shortage(HOST, 0, "forward", 2, "step 2", free_bytes=0, total_bytes=1 << 40, limit="this machine")
IN_BUILD = dataclasses.replace(ON_GPU, phase="build")
PIPELINE = {"distplan": "CAI_Hybrid", "pp_degree": 2, "batch_size": 4}
ADVISED = {
    "activations": ({}, ON_GPU, ["--batch_size 2 --grad_accum 2", "--activation_checkpointing on", "--batch_size 1"]),
    "states": ({"distplan": "Pytorch_DDP"}, IN_BUILD, ["--distplan CAI_Gemini", "--placement cpu"]),
    "the smallest": ({"batch_size": 1, "activation_checkpointing": "on", "placement": "cpu"}, ON_GPU, []),
    "blocks of one's own": ({"num_layers": 8}, IN_BUILD, ["--placement cpu", "--num_layers 4"]),
    "an odd batch": ({"batch_size": 3}, ON_GPU, ["--activation_checkpointing on", "--batch_size 1 --grad_accum 3"]),
    "a pipeline": (PIPELINE, ON_GPU, ["--batch_size 2 --grad_accum 2"]),
    "CPU ranks": ({"precision": "fp16"}, ON_HOST, ["--precision fp16 --batch_size 2", "--activation_checkpointing on"]),
}


@pytest.mark.parametrize("name", ADVISED)
def test_every_advised_command_would_start(name: str) -> None:
    """Read again as if it had been typed: nothing is wrong with it, and it is another run than the one that failed."""
    settings, lack, words = ADVISED[name]
    config = TrainConfig(device="cpu", run_name="mine", **settings).resolve("cpu", 2)
    ended, lines = with_advice(config, lack.ended(2), Start("GPUNUM=2 bash run_gemini.sh", 2, 2))
    commands = ended.details["out_of_memory"]["commands"]
    assert len(commands) <= 3 and len(set(commands)) == len(commands)
    for command, expected in zip(commands, words, strict=False):
        assert all(f"--{flag.strip()} " in f"{command} " for flag in expected.split("--")[1:]), command
    assert len(commands) >= len(words), lines
    for command in commands:
        line = read_flags(shlex.split(command)[3:])
        again, problems = judge(line, 2, 2)
        assert not problems and "run_name" not in line.given, command
        assert again.as_dict() | {"run_name": ""} != config.as_dict() | {"run_name": ""}
        assert any(command in line for line in lines)


def test_pinned_memory_and_other_processes_have_advice_of_their_own() -> None:
    config = TrainConfig(device="cuda", placement="cpu").resolve("cuda", 2)
    lack = Shortage(PINNED, 0, "build", 0, "building the model", total_bytes=1 << 20, free_bytes=0, limit="ulimit -l")
    _, lines = with_advice(config, lack.ended(2), Start("bash run_gemini.sh", 2, 2))
    assert lines[-1] == "ulimit -l sets the limit: `ulimit -l unlimited` takes it away."
    others = dataclasses.replace(ON_GPU, others_bytes=12 * GIB)
    _, lines = with_advice(config, others.ended(2), Start("bash run_gemini.sh", 2, 2))
    assert lines[-1] == "12.00 GiB of this GPU are held by other processes: nvidia-smi lists them."
    assert with_advice(config, Ended("failed", "x")) == (Ended("failed", "x"), [])


# ---- real runs

WORKER = str(REPOSITORY / "tests" / "workers" / "out_of_memory_worker.py")
FLAGS = ("--device", "cpu", "--distplan", "Pytorch_DDP", "--quiet", "true", "--train_step", "5", "--max_bad_steps", "2")
CGROUPS = Path("/sys/fs/cgroup/memory")
LIMIT_MIB = 2048
AT_ONCE = 2


@dataclass
class Remains:
    """What is left of a run; seconds: from the shortage to the end of all processes."""

    code: int
    seconds: float
    console: str
    run_dir: Path
    processes: list[int]

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    def check(self, code: int, memory: str, rank: int, phase: str, step: int) -> None:
        """What holds of every run that is out of memory."""
        assert self.code == code, self.console
        found = self.summary["out_of_memory"]
        assert self.summary["ended"] == OUT_OF_MEMORY
        assert (found["memory"], found["rank"], found["phase"], found["step"]) == (memory, rank, phase, step)
        assert self.summary["steps"] == max(0, step - 1)
        why = self.summary["ended_because"]
        assert self.console.count(why) == 1 or code != OUT_OF_MEMORY_CODE, self.console
        assert self.console.index(why) < (self.console + "Traceback").index("Traceback"), "no raw traceback first"
        assert found["commands"] and all(f"  {command}   #" in self.console for command in found["commands"])
        assert self.seconds < 10 and not self.processes, f"{self.seconds:.1f} s, {self.processes}"


def started(
    folder: Path, start: str, kind: str, flags: Sequence[str] = (), prefix: Sequence[str] = (), **variables: str
) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [*prefix, *STARTS[start], WORKER, "--log_dir", str(folder / "logs"), "--run_name", "run", *FLAGS, *flags]
    marks = {"REACHED": str(folder / "reached"), "SHORTAGE": kind, "SHORT_RUN": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / f"console{variables.get('NODE_RANK', '')}", "w") as console:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=clean_environment(**{"GPUNUM": "2", **marks, **variables}),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=heed_all_signals,
        )


def ended(process: subprocess.Popen, folder: Path, name: str = "console") -> Remains:
    deadline = time.monotonic() + 200
    while not (folder / "reached").exists():
        assert process.poll() is None and time.monotonic() < deadline, (folder / name).read_text()
        time.sleep(0.05)
    code = process.wait(200)
    seconds = time.time() - (folder / "reached").stat().st_mtime
    return Remains(code, seconds, (folder / name).read_text(), folder / "logs" / "run", processes_of(folder))


def processes_of(folder: Path) -> list[int]:
    mark, found = f"SHORT_RUN={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def plain(start: str, kind: str, *flags: str) -> Callable[[Path], Remains]:
    return lambda folder: ended(started(folder, start, kind, flags), folder)


def killed(folder: Path) -> Remains:
    """In a control group of its own, with a limit that the kernel enforces."""
    group = CGROUPS / f"suite-{os.getpid()}-{folder.name}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(f"{LIMIT_MIB}M")
        inside = ("bash", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group))
        return ended(started(folder, "launcher", "eat:1:forward:2", ("--max_restarts", "1"), inside), folder)
    finally:
        deadline = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def on_another_node(folder: Path) -> Remains:
    """Two launchers; the rank that runs out is the second's, the summary the first's."""
    job = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GPUNUM": "1"}
    nodes = [started(folder, "launcher", "gpu:1:backward:2", **job, NODE_RANK=str(node)) for node in range(2)]
    remains = ended(nodes[0], folder, "console0")
    assert nodes[1].wait(60) == OUT_OF_MEMORY_CODE
    assert remains.summary["ended_because"] in (folder / "console1").read_text()
    return dataclasses.replace(remains, processes=processes_of(folder))


RUNS: dict[str, Callable[[Path], Remains]] = {
    "launcher, build": plain("launcher", "gpu:1:build:0"),
    "launcher, forward": plain("launcher", "bare:0:forward:2"),
    "torchrun, backward": plain("torchrun", "gpu:1:backward:2"),
    "python, optimizer": plain("python", "tensor:0:optimizer:2"),
    "launcher, record": plain("launcher", "memory_error:1:record:3", "--max_restarts", "1"),
    "killed": killed,
    "another node": on_another_node,
}


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """All runs that selected tests ask for, side by side."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["run"] for item in items if "run" in item.callspec.params]  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("memory")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(play, name, folder / re.sub(r"\W+", "-", name)) for name in dict.fromkeys(names)}


def play(name: str, folder: Path) -> Remains:
    try:
        return RUNS[name](folder)
    finally:
        for pid in processes_of(folder):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def can_limit() -> bool:
    probe = CGROUPS / f"suite-probe-{os.getpid()}"
    with contextlib.suppress(OSError):
        probe.mkdir()
        try:
            (probe / "memory.limit_in_bytes").write_text("64M")
            return "oom_kill " in (probe / "memory.oom_control").read_text()
        finally:
            probe.rmdir()
    return False


@pytest.mark.parametrize(
    ("run", "code", "memory", "rank", "phase", "step"),
    [
        ("launcher, build", OUT_OF_MEMORY_CODE, GPU, 1, "build", 0),
        ("launcher, forward", OUT_OF_MEMORY_CODE, GPU, 0, "forward", 2),
        ("torchrun, backward", 1, GPU, 1, "backward", 2),  # torchrun's own code
        ("python, optimizer", OUT_OF_MEMORY_CODE, HOST, 0, "optimizer", 2),
        ("launcher, record", OUT_OF_MEMORY_CODE, HOST, 1, "record", 3),
        ("another node", OUT_OF_MEMORY_CODE, GPU, 1, "backward", 2),
    ],
)
def test_a_rank_that_runs_out_ends_the_run(
    stage: dict[str, Future], run: str, code: int, memory: str, rank: int, phase: str, step: int
) -> None:
    remains = stage[run].result()
    remains.check(code, memory, rank, phase, step)
    assert "Traceback" in (remains.run_dir / "traceback.txt").read_text(), "kept, not shown"
    assert f"The traceback is in {remains.run_dir / 'traceback.txt'}." in remains.console or run == "another node"
    assert "begins: all ranks start again" not in remains.console, "it would only run out again"


@pytest.mark.skipif(not can_limit(), reason="needs control groups of version 1 that can be written to")
@pytest.mark.parametrize("run", ["killed"])
def test_a_rank_that_the_kernel_kills_for_memory(stage: dict[str, Future], run: str) -> None:
    """A real limit and a real kill. It is told from the kernel's own counter, with what the rank was last seen with."""
    remains = stage[run].result()
    remains.seconds = 0.0  # from the beginning of the eating
    remains.check(OUT_OF_MEMORY_CODE, HOST, 1, "forward", 2)
    found = remains.summary["out_of_memory"]
    assert found["killed"] and found["limit"] == "the control group"
    assert found["total_bytes"] == LIMIT_MIB << 20
    assert LIMIT_MIB << 17 < found["used_bytes"] <= LIMIT_MIB << 20, "seen at most half a second before"
    raised = re.search(r"Or more memory for it: .*?(\d+)(?:G|g|Gi)\b", remains.console)
    assert raised and int(raised[1]) * GIB > found["total_bytes"], remains.console
