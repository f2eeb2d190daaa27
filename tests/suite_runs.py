"""Real runs of the suite for the tests: real processes under a time limit, read back from the files that they
leave.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from commons.lifecycle.outcome import STOP_SIGNALS
from commons.lifecycle.suite_root import python_path

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_SECONDS = 240


@dataclass(frozen=True)
class FinishedRun:
    """What a run left behind: exit code, console text (stdout and stderr as the user saw them) and its
    folder.
    """

    returncode: int
    console: str
    run_dir: Path

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records]

    def file(self, name: str) -> dict:
        return json.loads((self.run_dir / name).read_text())


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a torchrun above it or the user's shell may have set, one
    thread a rank.
    """
    dropped = (
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "SLURM_",
        "OMPI_",
        "PMI",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC",
        "GPUNUM",
        "DISTPLAN",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(kept), **changes}


def heed_all_signals() -> None:
    """For preexec_fn: nohup makes its children ignore SIGHUP, and a shell those in the background Ctrl-C."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


def run_processes(
    command: list[str],
    *,
    environment: dict[str, str] | None = None,
    seconds: float = RUN_SECONDS,
    cwd: Path = REPOSITORY,
) -> tuple[int, str]:
    """Run a command in a session of its own; at its end, or the time limit's, no process of it is left.

    Returns:
        The exit code and everything it printed.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=clean_environment(**environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        console, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"still running after {seconds} s: {command}\n{error.output}") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, console


def launch(log_dir: Path, *flags: str, ranks: int = 1, **environment: str) -> FinishedRun:
    """Train through the launcher, as ``run_gemini.sh`` does once the environment is ready."""
    name = "run"
    command = [
        sys.executable,
        "-m",
        "commons.launch",
        "--log_dir",
        str(log_dir),
        "--run_name",
        name,
        *flags,
    ]
    returncode, console = run_processes(command, environment={"GPUNUM": str(ranks), **environment})
    return FinishedRun(returncode, console, log_dir / name)


def torchrun(script: Path, ranks: int, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a worker script of the tests under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return run_processes([*command, str(script), *arguments], environment=environment)
