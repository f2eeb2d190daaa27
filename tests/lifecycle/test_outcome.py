"""How runs end: words, exit codes, and the note to torchrun's engine."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from commons.lifecycle.outcome import (
    ERROR_FILE_VARIABLE,
    FAILURE,
    FINISHED,
    NOTHING_PROVED,
    STOP_SIGNALS,
    Ended,
    RunError,
    leave_note,
    read_note,
    stopped_by,
)


def test_exit_codes_are_those_of_the_documentation() -> None:
    assert (FINISHED.exit_code, FAILURE, NOTHING_PROVED, RunError.exit_code, Ended("failed").exit_code) == (
        0,
        1,
        3,
        1,
        1,
    )
    codes = {signum.name: stopped_by(signum, 1, 2).exit_code for signum in STOP_SIGNALS}
    assert codes == {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGQUIT": 131, "SIGUSR1": 138}


@pytest.mark.parametrize(
    ("steps_done", "why"),
    [
        (3, "Stopped by SIGTERM after step 3 of 10."),
        (1, "Stopped by SIGTERM after step 1 of 10."),
        (0, "Stopped by SIGTERM before the first step was done."),
        (None, "Stopped by SIGTERM."),
    ],
)
def test_a_signal_s_end_in_words(steps_done: int | None, why: str) -> None:
    assert stopped_by(signal.SIGTERM, steps_done, 10) == Ended("SIGTERM", why, 143)


@pytest.mark.parametrize("how", ["", "Finished", "SIGKILL", "crashed"])
def test_there_are_no_other_ends(how: str) -> None:
    with pytest.raises(AssertionError, match=f"^{how}$"):
        Ended(how)


def test_an_end_does_not_change_any_more() -> None:
    with pytest.raises(AttributeError):
        FINISHED.exit_code = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_note_is_read_back_by_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, path = Ended("bad steps", "The loss is not finite.", 1), tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    before = int(time.time())
    leave_note(ended)
    message = json.loads(path.read_text())["message"]
    assert read_note(message) == ended
    assert before <= int(message["extraInfo"]["timestamp"]) <= time.time()
    assert message["extraInfo"]["py_callstack"] == ended.why


def test_without_an_engine_there_is_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (None, ""):
        monkeypatch.delenv(ERROR_FILE_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(ERROR_FILE_VARIABLE, value)
        leave_note(Ended("failed"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("message", ["an exception's text", None, {}, {"message": "RuntimeError", "errorCode": 1}, []])
def test_an_exception_is_no_end_on_purpose(message: object) -> None:
    assert read_note(message) is None
