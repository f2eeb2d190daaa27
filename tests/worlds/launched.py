"""A launcher at work on a script of a test."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite_runs import heed_all_signals

from commons.cli.variables import FLAG_VARIABLES
from commons.launch.launcher import JOB_VARIABLES
from commons.lifecycle.suite_root import python_path

LAUNCH = (
    "import sys; from pathlib import Path; from commons.launch.launcher import main;"
    " sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"
)
# How a script is started: a command line as it begins.
STARTS = {
    "launcher": [sys.executable, "-c", LAUNCH],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "python": [sys.executable],
}


# What every stand-in begins with. torch is imported only by those that need its error files: it takes
# seconds.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
def leave_note(**note):
    Path(f"note-{rank}.json.new").write_text(json.dumps({"pid": os.getpid(), **note}))
    os.rename(f"note-{rank}.json.new", f"note-{rank}.json")
def recorded(function):
    from torch.distributed.elastic.multiprocessing.errors import record
    record(function)()
"""


class Launched:
    """A launcher at work in ``folder`` on a script made of PRELUDE and ``body``.

    Args:
        before: Python that runs in the launcher's process before the launcher.
        prefix: of its command line.
    """

    def __init__(
        self,
        folder: Path,
        body: str,
        *flags: str,
        before: str = "",
        prefix: Sequence[str] = (),
        **variables: str,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tmp").mkdir()
        script = folder / "training.py"
        script.write_text(PRELUDE + body)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", f"{before}\n{LAUNCH}", str(script), *flags],
            cwd=folder,
            env=environment(TMPDIR=str(folder / "tmp"), **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_all_signals,
        )

    def wait(self, timeout: float = 60) -> Launched:
        self.stdout, self.stderr = self.process.communicate(timeout=timeout)
        self.code = self.process.returncode
        return self

    def note(self, rank: int, timeout: float = 40) -> dict[str, Any]:
        """What ``rank`` left; waits for it."""
        path, deadline = self.folder / f"note-{rank}.json", time.monotonic() + timeout
        while not path.exists():
            assert self.process.poll() is None, "the launcher ended before the rank said anything"
            assert time.monotonic() < deadline, "the rank never started"
            time.sleep(0.05)
        return json.loads(path.read_text())

    def run_dir(self) -> Path:
        (found,) = (self.folder / "gemini_logs").iterdir()
        return found


def environment(**variables: str) -> dict[str, str]:
    ours = {*FLAG_VARIABLES, *JOB_VARIABLES, "OMP_NUM_THREADS", "LOGLEVEL", "RANK", "WORLD_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONPATH": python_path(kept), "CUDA_VISIBLE_DEVICES": "", **variables}


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
