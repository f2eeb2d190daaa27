"""The preflight: what is refused before any model is built, and the commands that are proposed instead."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
from suite_runs import launch

from commons.cli import flags, preflight
from commons.config.schema import TrainConfig
from commons.distributed.device import Device
from commons.lifecycle.guard import WATCH_VARIABLE
from commons.lifecycle.job import JobPlace
from commons.lifecycle.outcome import DOES_NOT_FIT, FINISHED
from commons.planner.gpus import GIB
from commons.planner.memory import forecast
from commons.planner.room import Room


def job(ranks: int = 1) -> JobPlace:
    return dataclasses.replace(flags.read_job(), rank=0, world_size=ranks, local_rank=0, local_world_size=ranks)


def room(host_gib: float) -> Room:
    return Room(None, None, int(host_gib * GIB), "free memory of this machine", 8 * GIB, None)


@pytest.fixture(autouse=True)
def rough_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trace of a block: messages and commands do not depend on it."""

    def rough(config: Any, place: JobPlace, where: Room, _: bool) -> Any:
        return forecast(config, place.world_size, place.local_world_size, where.gpu, rough=True)

    monkeypatch.setattr(preflight, "_forecast", rough)


def small(**settings: Any) -> Any:
    given = {"model_type": "gpt2_small", "batch_size": 16, "seq_len": 256, **settings}
    return TrainConfig(**given).resolve("cpu", 1)


def test_what_fits_is_let_through() -> None:
    assert preflight.lacks(small(), job(), room(200)) == []


def test_a_fault_of_the_planner_keeps_no_run_from_starting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a kind nobody knows")

    monkeypatch.setattr(preflight, "_forecast", broken)
    monkeypatch.setattr("commons.distributed.process_group.every_rank", lambda here, device: here)
    assert preflight.preflight(small(), Device("cpu", "a CPU", 0, 0, 1)) is FINISHED
    assert "starting without the preflight" in capsys.readouterr().err


def test_the_refusal_names_what_is_short_and_commands_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WATCH_VARIABLE, "/somewhere")
    config, place = small(), job()
    needed = forecast(config, 1, 1, None, rough=True)
    free = room((needed.device_peak * 0.7 + needed.host_bytes) / GIB)
    lacking = preflight.lacks(config, place, free)
    text = preflight.refusal(config, place, [free], lacking)
    assert "no model was built" in text and "GiB short" in text and "--no_preflight" in text
    commands = [line.strip() for line in text.splitlines() if "bash run_gemini.sh" in line]
    assert 1 <= len(commands) <= 3, text
    for command in commands:  # parsed, planned again, and found to fit
        ranks, _, script, *words = shlex.split(command)
        assert (ranks, script) == ("GPUNUM=1", "run_gemini.sh")
        read, found = flags.judge(flags.read_flags(words), 1, 1)
        assert not found and not preflight.lacks(read, place, free), command
        assert read.batch_size * read.grad_accum == 16 and read.model_type == "gpt2_small"


def test_where_nothing_fits_it_says_so() -> None:
    config, place, free = small(), job(), room(0.2)
    text = preflight.refusal(config, place, [free], preflight.lacks(config, place, free))
    assert "Nothing near it fits" in text and "smaller --model_type" in text


@pytest.mark.parametrize(
    "ranks, start", [(1, "python train_gpt_demo.py --lr"), (2, "torchrun --nproc_per_node 2 train_gpt_demo.py --lr")]
)
def test_a_command_starts_as_this_run_was_started(ranks: int, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WATCH_VARIABLE, raising=False)
    assert preflight.command({"lr": 0.001}, job(ranks)).startswith(start)


def test_given_settings_are_kept_and_those_of_one_run_are_not() -> None:
    config = small(run_name="mine", quiet=True, no_preflight=True)
    assert preflight.given_of(config) == {
        "model_type": "gpt2_small",
        "batch_size": 16,
        "seq_len": 256,
        "quiet": True,
    }


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_built(tmp_path: Path) -> None:
    run = launch(tmp_path, "--device", "cpu", "--model_type", "gpt3_175b", "--seq_len", "64", ranks=2)
    assert run.returncode == DOES_NOT_FIT, run.console
    assert "host memory, 2 rank(s)" in run.console and "GiB short" in run.console, run.console
    assert "no model was built" in run.console and "Traceback" not in run.console, run.console
    assert run.file("summary.json")["ended"] == "does not fit"
