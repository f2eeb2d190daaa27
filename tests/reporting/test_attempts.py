"""What an attempt finds in its run's folder: files of attempts before it, or of another run of that name."""

from __future__ import annotations

from pathlib import Path

import pytest

from commons.reporting.run_log import begin_attempt

OTHER_RUN = ("metrics.jsonl", "summary.json", "metrics-attempt1.jsonl", "summary-attempt12.json")
KEPT = ("config.json", "env.json", "console.log", "my-attempt-notes.txt", "parity.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*OTHER_RUN, *KEPT):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_the_first_attempt_takes_no_steps_of_another_run_for_its_own(folder: Path) -> None:
    begin_attempt(folder, 1)
    begin_attempt(folder, 1)  # the launcher's call and rank 0's
    assert {path.name for path in folder.iterdir()} == set(KEPT)


def test_a_later_attempt_keeps_the_one_before_under_its_number(folder: Path) -> None:
    begin_attempt(folder, 13)
    begin_attempt(folder, 13)
    names = {path.name for path in folder.iterdir()}
    assert names == {*KEPT, *OTHER_RUN[2:], "metrics-attempt12.jsonl", "summary-attempt12.json"}
    assert (folder / "summary-attempt12.json").read_text() == "summary.json"


def test_where_nothing_is_there_nothing_is_made(tmp_path: Path) -> None:
    for attempt in (1, 2):
        begin_attempt(tmp_path, attempt)
        begin_attempt(tmp_path / "no such folder", attempt)
    assert list(tmp_path.iterdir()) == []
