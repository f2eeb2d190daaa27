"""launchers/slurm.sbatch and srun under a real Slurm of two nodes, where it is installed (worlds/slurm_cluster.py).

All jobs run side by side: each test looks at its own. tests/launch/test_slurm.py has what no such cluster shows, GPUs
and another copy of the suite among it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from suite_runs import REPOSITORY
from worlds.slurm_cluster import NODES, Cluster, why_not

EXPECTED = "GEMINI_EXPECT_SLURM" in os.environ
pytestmark = [
    pytest.mark.timeout(400),
    # .ci/run installs Slurm where it can. GEMINI_EXPECT_SLURM=1: it may be neither missing nor unable to start.
    pytest.mark.skipif(bool(why_not()) and not EXPECTED, reason=why_not()),
]

SCRIPT = str(REPOSITORY / "launchers" / "slurm.sbatch")
NO_GPUS = ("--gpus-per-node=0", "--cpus-per-task=1")
COMMON = ("--device=cpu", "--model_type=gpt2_tiny", "--distplan=Pytorch_DDP", "--warmup_step=1", "--quiet=true")
LONG, SHORT = "--train_step=1000000", "--train_step=4"
RANK = "train_gpt_demo.py"


@dataclass
class Job:
    """One job of the cluster and its folder."""

    cluster: Cluster
    number: str
    folder: Path

    @property
    def text(self) -> str:
        path = self.folder / "output.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def run_dir(self) -> Path:
        (found,) = (self.folder / "logs").iterdir()
        return found

    @property
    def summary(self) -> dict:
        return json.loads((self.run_dir / "summary.json").read_text())

    def steps(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("logs/*/metrics.jsonl"))

    def wait_for_steps(self, count: int) -> None:
        def there() -> bool:
            assert self.cluster.job(self.number)["JobState"] in ("PENDING", "RUNNING"), self.text
            return self.steps() >= count

        self.cluster.wait_until(f"step {count} of job {self.number}", there, 240)

    def ends_with(self, code: int, ended: str, seconds: float = 120) -> None:
        """The exit code, a summary of all steps that says how it ended, no process left, and nobody blamed."""
        assert self.cluster.exit_code(self.number, seconds) == code, self.text
        assert (self.summary["ended"], self.summary["steps"]) == (ended, self.steps()), self.text
        self.cluster.wait_until("the end of all processes", lambda: not self.ranks(), 10)
        assert "names an interface" not in self.text, "the doctor blames the network"

    def ranks(self) -> list[int]:
        """Processes of the job that train: those of the script that have its log folder among their words."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if any(RANK.encode() in word for word in words) and str(self.folder).encode() in b" ".join(words):
                    found.append(int(process.name))
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert not why_not(), why_not()
    folder = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))  # a short path, for munge's socket
    try:
        with contextlib.ExitStack() as stack:
            try:
                cluster = stack.enter_context(Cluster(folder))
            except (AssertionError, OSError) as error:
                if EXPECTED:
                    raise
                pytest.skip(f"no cluster can be started on this machine: {error}")
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All jobs, submitted at once."""

    def submit(name: str, *flags: str) -> Job:
        folder = tmp_path_factory.mktemp(name)
        words = (f"--output={folder / 'output.txt'}", *NO_GPUS, SCRIPT, *COMMON, f"--log_dir={folder / 'logs'}")
        return Job(cluster, cluster.submit(*words, *flags, variables={"GPUNUM": "1"}), folder)

    flags = {"trains": SHORT, "time_limit": LONG, "cancelled": LONG, "killed": LONG}
    return {name: submit(name, steps) for name, steps in flags.items()}


def test_it_trains_on_two_nodes(jobs: dict[str, Job]) -> None:
    job = jobs["trains"]
    job.ends_with(0, "finished", 240)
    config = json.loads((job.run_dir / "config.json").read_text())
    assert job.steps() == 4 and config["distplan"] == "Pytorch_DDP"
    assert "ranks    2 = dp 2" in job.text, job.text
    assert job.cluster.job(job.number)["NodeList"] == ",".join(NODES)


def minutes_that_leave_a_minute(run_time: str) -> int:
    """The time limit that ends in 20 to 80 seconds, of a job that has run for so long: Slurm counts in minutes."""
    hours, minutes, seconds = map(int, run_time.split(":"))
    return (3600 * hours + 60 * minutes + seconds + 20) // 60 + 1


@pytest.mark.parametrize(
    ("run_time", "minutes"), [("00:00:39", 1), ("00:00:40", 2), ("00:01:39", 2), ("00:01:40", 3), ("01:00:00", 61)]
)
def test_limits_for_the_test_of_the_limit(run_time: str, minutes: int) -> None:
    assert minutes_that_leave_a_minute(run_time) == minutes


def test_the_time_limit_ends_it_with_138(jobs: dict[str, Job]) -> None:
    """It is set so that the minute before which the signal comes is at hand; Slurm looks at limits twice a minute."""
    job = jobs["time_limit"]
    job.wait_for_steps(2)
    minutes = minutes_that_leave_a_minute(job.cluster.job(job.number)["RunTime"])
    assert job.cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}").returncode == 0
    job.ends_with(128 + signal.SIGUSR1, "SIGUSR1")
    assert f"Stopped by SIGUSR1 after step {job.steps()} of 1000000." in job.text


def test_scancel_ends_it_with_143(jobs: dict[str, Job]) -> None:
    """Of a job that is cancelled Slurm keeps the signal; the script's exit code is srun's, the training's."""
    job = jobs["cancelled"]
    job.wait_for_steps(2)
    assert job.cluster.run("scancel", job.number).returncode == 0
    job.ends_with(128 + signal.SIGTERM, "SIGTERM")


def test_a_killed_rank_ends_both_nodes(jobs: dict[str, Job]) -> None:
    job = jobs["killed"]
    job.wait_for_steps(2)
    began = time.monotonic()
    os.kill(job.ranks()[-1], signal.SIGKILL)
    job.ends_with(1, "failed")
    assert time.monotonic() - began < 90, "srun would wait so long"
    assert "killed by SIGKILL" in job.text, job.text


def test_srun_alone_starts_the_ranks(cluster: Cluster, tmp_path: Path) -> None:
    words = ["srun", "--nodes=2", "--ntasks=2", "python", RANK, *COMMON, SHORT, f"--log_dir={tmp_path}"]
    done = cluster.run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = tmp_path.iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["ended"], summary["steps"]) == ("finished", 4)
    assert "ranks    2 = dp 2" in done.stdout
