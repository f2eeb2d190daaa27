"""launchers/slurm.sbatch without Slurm: a fake srun and scontrol on PATH, the real script, launcher and ranks; the
two "nodes" are both here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, clean_environment
from worlds.launched import free_port

SCRIPT = REPOSITORY / "launchers" / "slurm.sbatch"
SETTINGS = ("--device=cpu", "--model_type=gpt2_tiny", "--warmup_step=1")
RUN_SECONDS = 150

# Slurm's own words about the job are in a file, where it has any.
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" != "show job 4711" ] || exec cat "$0.job"
[ "$1 $2 $3" = "show hostnames node[1-2]" ] || exit 1
printf 'localhost\\nnode2\\n'
"""
# Starts the command once a node, as slurmstepd would. SIGUSR1 stands for the time limit: every process of the tasks
# gets it, srun itself does not end. The exit code is the tasks' highest.
SRUN = """#!{python}
import json, os, signal, subprocess, sys
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")][:4]
command = words[len(options):]
json.dump({{"options": options, "command": command, "pid": os.getpid()}}, open({folder!r} + "/srun.json", "w"))
nodes = int(dict(option.split("=") for option in options)["--nodes"])
steps = [
    subprocess.Popen(
        command,
        env=os.environ | {{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}},
        start_new_session=True,
    )
    for node in range(nodes)
]
def time_limit(signum, frame):
    for folder in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.getsid(int(folder)) in [step.pid for step in steps]:
                os.kill(int(folder), signum)
        except ProcessLookupError:
            pass
signal.signal(signal.SIGUSR1, time_limit)
codes = [step.wait() for step in steps]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


class Job:
    """The batch script at work, in a copy of its own as Slurm makes one."""

    def __init__(self, folder: Path, *flags: str, **variables: str) -> None:
        self.folder = folder
        binaries = folder / "bin"
        binaries.mkdir(exist_ok=True)
        for name, text in {
            "scontrol": SCONTROL,
            "srun": SRUN.format(python=sys.executable, folder=str(folder)),
        }.items():
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        (folder / "spool").mkdir()
        (folder / "spool" / "slurm_script").write_bytes(SCRIPT.read_bytes())
        slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_GPUS_ON_NODE": "0",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "MASTER_PORT": free_port(),
            "GEMINI_USE_ACTIVE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",  # the tests' own environment
        }
        environment = clean_environment(**{**slurm, **variables})
        environment.pop("MASTER_ADDR", None)
        self.output = folder / "output.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", str(folder / "spool" / "slurm_script"), f"--log_dir={folder / 'logs'}", *SETTINGS, *flags],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def steps(self) -> int:
        return sum(len(path.read_text().splitlines()) for path in self.folder.glob("logs/*/metrics.jsonl"))

    def wait(self, seconds: float = RUN_SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None

    def left(self) -> list[str]:
        """Processes of the job that are still there: all have the log folder among their words."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.folder) in words:
                found.append(words)
        return found

    def end(self) -> None:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder).encode() in (path / "cmdline").read_bytes():
                    os.kill(int(path.name), signal.SIGKILL)
            except OSError:
                continue
        self.process.wait(10)


@pytest.mark.timeout(300)
def test_two_nodes_train_one_run(tmp_path: Path) -> None:
    job = Job(tmp_path, "--train_step=3")
    try:
        assert job.wait() == 0, job.text
        (run_dir,) = (tmp_path / "logs").iterdir()
        assert job.steps() == 3
        assert json.loads((run_dir / "config.json").read_text())["train_step"] == 3
        assert {"console.log", "console-node1.log", "summary.json"} <= set(os.listdir(run_dir))
        assert "2 = dp 2" in (run_dir / "console.log").read_text()
        srun = json.loads((tmp_path / "srun.json").read_text())
        assert srun["pid"] == job.process.pid, "srun takes the place of the batch script's shell"
        assert srun["options"][:2] == ["--nodes=2", "--ntasks-per-node=1"]
        assert job.left() == []
    finally:
        job.end()


@pytest.mark.timeout(300)
def test_the_time_limit_s_signal_reaches_the_launchers(tmp_path: Path) -> None:
    job = Job(tmp_path, "--train_step=100000")
    try:
        deadline = time.monotonic() + RUN_SECONDS
        while job.steps() < 2:
            assert job.process.poll() is None and time.monotonic() < deadline, job.text
            time.sleep(0.2)
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait(30) == 128 + signal.SIGUSR1, job.text
        (summary,) = tmp_path.glob("logs/*/summary.json")
        assert "SIGUSR1" in summary.read_text()
        assert "ended first" not in job.text, "no node is to be blamed"
        deadline = time.monotonic() + 10
        while job.left() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert job.left() == []
    finally:
        job.end()


def test_not_in_the_suite_s_folder(tmp_path: Path) -> None:
    job = Job(tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert job.wait(20) == 2
    assert job.text.startswith(
        f"slurm.sbatch: error: no run_gemini.sh in {tmp_path}: call sbatch in the suite's folder"
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("gpus", [{}, {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}], ids=["", "two of 8"])
def test_from_any_folder_the_submitted_script_s_own_code(tmp_path: Path, gpus: dict[str, str]) -> None:
    """Another copy of the suite lies where sbatch was called; Slurm knows which script it was given, a link here."""
    (tmp_path / "run_gemini.sh").write_text("echo the other suite; exit 9")
    (tmp_path / "link").symlink_to(REPOSITORY / "launchers")
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "launchers").symlink_to(REPOSITORY / "launchers")
    submitted = tmp_path / "suite" / "launchers" / "slurm.sbatch"
    words = f"JobId=4711 JobName=gemini\n   Command={submitted} --train_step 3\n   WorkDir={tmp_path}\n"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol.job").write_text(words)
    job = Job(tmp_path, "--help" if not gpus else "--train_step=3", SLURM_SUBMIT_DIR=str(tmp_path), **gpus)
    try:
        code = job.wait()
        if gpus:  # two ranks a node are two GPUs
            assert code == 0 and "ranks    4 = dp 4" in job.text, job.text
        else:
            assert code == 0 and job.text.count("usage: run_gemini.sh") == 2, job.text
    finally:
        job.end()


def test_what_slurm_is_asked_for() -> None:
    """The flags and ports that the comments of the script speak of."""
    asked = [line.split(" ", 1)[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--signal=USR1@60"} <= set(asked)
    for number in (1, 4711, 99_999_999):
        assert 10_000 <= 10_000 + number % 20_000 < 32_768
