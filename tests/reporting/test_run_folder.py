"""A run's folder belongs to one run, however many start in the same second."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, clean_environment, run_processes
from worlds.launched import Launched

from commons.config.schema import TrainConfig
from commons.reporting.run_folder import FolderInUse, claim_folder

# Both launchers wait for the same moment before they claim, and the clock stands still.
TOGETHER = """
import time
from pathlib import Path
import commons.launch.launcher as launcher
claim = launcher.claim_folder
def together(*arguments):
    name = Path(f"../ready-{os.getpid()}")
    name.touch()
    while len(list(Path("..").glob("ready-*"))) < 2: time.sleep(0.001)
    return claim(*arguments)
launcher.claim_folder = together
time.strftime = lambda *_: "20260101-000000"
"""
STAYS = "leave_note()\nwhile not Path('../stop').exists(): time.sleep(0.05)\n"


def at_once(folder: Path, *flags: str) -> list[Launched]:
    logs = f"--log_dir={folder / 'logs'}"
    return [Launched(folder / name, STAYS, logs, *flags, before="import os\n" + TOGETHER) for name in ("a", "b")]


def test_two_launches_in_one_second_have_a_folder_each(tmp_path: Path) -> None:
    runs = at_once(tmp_path)
    names = {next(word for word in sys_argv(run, 0) if word.startswith("--run_name=")) for run in runs}
    (tmp_path / "stop").touch()
    assert [run.wait().code for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    assert len(names) == 2
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == sorted(
        name.removeprefix("--run_name=") for name in names
    )


def sys_argv(run: Launched, rank: int) -> list[str]:
    """The rank's command line, which it has as long as it lives."""
    return Path(f"/proc/{run.note(rank)['pid']}/cmdline").read_bytes().decode().split("\0")


def test_one_name_given_to_two_runs_at_once_is_refused_to_one(tmp_path: Path) -> None:
    runs = at_once(tmp_path, "--run_name=mine")
    for run in runs:
        while run.process.poll() is None and not (run.folder / "note-0.json").exists():
            os.sched_yield()
    (tmp_path / "stop").touch()
    first, second = sorted((run.wait() for run in runs), key=lambda run: run.code)
    assert (first.code, second.code) == (0, 2), first.stderr + second.stderr
    mine = tmp_path / "logs" / "mine"
    told = f"Nothing was started: {mine} is in use by a run that is still going: choose another --run_name"
    assert told in second.stderr and "Traceback" not in second.stderr
    assert not (second.folder / "note-0.json").exists()


def test_a_name_can_be_given_again_when_its_run_is_over(tmp_path: Path) -> None:
    for attempt in range(2):
        run = Launched(
            tmp_path / str(attempt), "leave_note()", "--run_name=mine", f"--log_dir={tmp_path / 'logs'}"
        ).wait()
        assert run.code == 0, run.stderr


def test_processes_that_claim_together_share_nothing(tmp_path: Path) -> None:
    program = (
        "import sys, time; from commons.config.schema import TrainConfig;"
        "from commons.reporting.run_folder import claim_folder; time.strftime = lambda *_: 'now';"
        "config = TrainConfig(log_dir=sys.argv[1]).resolve('cpu'); sys.stdin.read(1);"
        "print(claim_folder(config).run_name, flush=True); sys.stdin.read()"
    )
    claims = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, env=clean_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(8)
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        names = list(pool.map(claimed, claims))
    for claim in claims:
        claim.communicate(timeout=30)
    assert len(set(names)) == 8 and {path.name for path in tmp_path.iterdir()} == set(names)


def claimed(claim: subprocess.Popen[str]) -> str:
    assert claim.stdin and claim.stdout
    claim.stdin.write("g")
    claim.stdin.flush()
    return claim.stdout.readline().strip()


@pytest.mark.parametrize("ranks", [0, 2], ids=["python", "torchrun"])
def test_without_the_launcher_a_live_run_s_folder_is_refused_too(tmp_path: Path, ranks: int) -> None:
    holder = Launched(tmp_path / "holder", STAYS, "--run_name=mine", f"--log_dir={tmp_path / 'logs'}")
    holder.note(0)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    flags = ["--log_dir", str(tmp_path / "logs"), "--run_name", "mine", "--device", "cpu", "--train_step", "3"]
    script = str(REPOSITORY / "train_gpt_demo.py")
    code, console = run_processes([sys.executable, *torchrun, script, *flags], cwd=tmp_path)
    (tmp_path / "stop").touch()
    assert holder.wait().code == 0
    assert code == (1 if ranks else 2), console  # torchrun's own code
    assert "mine is in use by a run that is still going: choose another --run_name" in console
    assert not (tmp_path / "logs" / "mine" / "metrics.jsonl").exists()


def test_a_claim_is_this_process_s(tmp_path: Path) -> None:
    config = TrainConfig(log_dir=str(tmp_path), run_name="mine").resolve("cpu")
    claim_folder(config)
    with pytest.raises(FolderInUse, match="is in use by a run that is still going"):
        claim_folder(config)
