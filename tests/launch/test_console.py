"""The console of a run that is closed, broken, slow or gone: the run goes on, and console.log has everything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes
from worlds.bare import TRAIN, bare_environment, trained
from worlds.launched import Launched

LINES = 40_000  # some 2 MB: a pipe holds 64 KiB
TALKS = f"""
if rank == 0:
    for number in range({LINES}):
        print(f"line {{number}} " + "." * 40)
    sys.stdout.flush()
    leave_note()
"""


def shell(line: str, folder: Path) -> tuple[int, str]:
    """Run a line of bash where $SUITE is the suite and $PYTHON the tests' Python."""
    environ = bare_environment(SUITE=str(REPOSITORY), PYTHON=sys.executable, GPUNUM="1")
    return run_processes(["bash", "-c", f"set -o pipefail; {line}"], environment=environ, cwd=folder)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("program", ["bash $SUITE/run_gemini.sh", "$PYTHON $SUITE/train_gpt_demo.py"])
def test_closed_streams(tmp_path: Path, program: str, closed: str) -> None:
    code, console = shell(f"{program} {' '.join(TRAIN)} {closed}", tmp_path)
    assert code == 0, console
    assert trained(tmp_path)
    run_dir = tmp_path / "gemini_logs" / "run"
    assert json.loads((run_dir / "summary.json").read_text())["ended"] == "finished"
    lines = (run_dir / "console.log").read_text().splitlines()
    assert sum(line.strip().startswith(("1/2", "2/2")) for line in lines) == 2, "what was shown to nobody is kept"


@pytest.mark.parametrize("program", ["bash $SUITE/run_gemini.sh --help", "$PYTHON $SUITE/train_gpt_demo.py --help"])
def test_a_reader_that_goes_ends_the_help_quietly(tmp_path: Path, program: str) -> None:
    code, console = shell(f"{program} | (exec <&-; sleep 20) ", tmp_path)
    assert (code, console) == (141, "")


def test_a_run_does_not_wait_for_who_reads(tmp_path: Path) -> None:
    """The rank ends while nothing is read; a late reader gets everything."""
    run = Launched(tmp_path, TALKS)
    run.note(0)
    run.wait()
    assert run.code == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("line ")]
    assert len(lines) == LINES and lines[-1].startswith(f"line {LINES - 1} ")
    kept = (run.run_dir() / "console.log").read_text().splitlines()
    assert sum(line.startswith("line ") for line in kept) == LINES


def test_what_a_reader_was_too_slow_for_is_told(tmp_path: Path) -> None:
    limit = "from commons.launch import console_copy; console_copy.MOST_WAITING_BYTES = 300_000"
    run = Launched(tmp_path, TALKS, before=limit)
    run.note(0)
    run.wait()
    assert run.code == 0, run.stderr
    told = [line for line in run.stdout.splitlines() if "bytes are not shown" in line]
    assert told and str(run.run_dir().relative_to(tmp_path) / "console.log") in told[-1]
    kept = (run.run_dir() / "console.log").read_text().splitlines()
    assert sum(line.startswith("line ") for line in kept) == LINES


def test_a_reader_that_never_reads_does_not_keep_the_launcher_for_ever(tmp_path: Path) -> None:
    patience = "from commons.launch import console_copy; console_copy.READER_SECONDS = 1.0"
    run = Launched(tmp_path, TALKS, before=patience)
    run.process.wait(60)
    run.wait()
    assert run.code == 0
