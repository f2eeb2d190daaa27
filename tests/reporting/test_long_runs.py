"""Long trainings on the console: which steps get a line, how far it is, how long it will take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from reporting.test_sinks import CPU_RECORD, HEADER

from commons.reporting.console_layout import StepLines, duration, header_lines, short_count, summary_lines
from commons.reporting.forecast import RECENT_STEPS, Forecast
from commons.reporting.record import StepRecord
from commons.reporting.sinks.console import wants_line
from commons.reporting.sinks.sink import RunFacts
from commons.reporting.summary import summarize


def record(step: int, eval_loss: float | None = None, **changes: object) -> StepRecord:
    evaluated = {} if eval_loss is None else {"eval_loss": eval_loss, "eval_perplexity": 20.0, "eval_seconds": 1.5}
    return dataclasses.replace(CPU_RECORD, step=step, tokens_seen=step * 1_000_000, **evaluated, **changes)


def test_the_rest_takes_as_long_as_the_last_steps_did() -> None:
    times = iter([10.0, 12.0, 14.0, *(100.0 + step for step in range(RECENT_STEPS))])
    forecast = Forecast(1000, now=lambda: next(times))
    assert [forecast.seconds_left(step) for step in (1, 2, 3)] == [None, 2 * 998, 2 * 997]
    left = [forecast.seconds_left(step) for step in range(4, 4 + RECENT_STEPS)]
    assert left[-1] == pytest.approx((199 - 14) / 100 * (1000 - 103)), "the first steps, which compile, are forgotten"


def test_every_so_many_steps_get_a_line() -> None:
    run = RunFacts(Path(), 20, 0, False, HEADER, log_every=7)
    assert [step for step in range(1, 21) if wants_line(record(step), run)] == [1, 7, 14, 20]
    assert wants_line(record(5, 3.0), run) and wants_line(record(5, nonfinite_loss_ranks=[1]), run)


def test_lines_of_a_long_training_say_how_far_it_is() -> None:
    lines = [line.plain for line in StepLines(1000, progress=True).lines(record(20, 3.0), 120, seconds_left=3725)]
    heads, row, evaluation = lines
    assert heads.split()[-2:] == ["seen", "ETA"] and row.split()[-2:] == ["20.0M", "1:02:05"]
    assert evaluation.split() == ["eval", "3.0000", "perplexity", "20.00,", "held-out", "data,", "1.50", "s"]
    assert evaluation.index("3.0000") + 6 == heads.index("loss") + 4, "under the loss"
    narrow = [line.plain for line in StepLines(1000, progress=True).lines(record(20), 80, seconds_left=3725)]
    assert "ETA" in narrow[0] and max(map(len, narrow)) <= 80
    assert "ETA" not in StepLines(1000).lines(record(20), 120, seconds_left=3725)[0].plain


@pytest.mark.parametrize("progress", [True, False])
def test_heads_do_not_come_again_when_the_time_left_is_known(progress: bool) -> None:
    steps = StepLines(1000, progress=progress)
    assert [len(steps.lines(record(step), 120, left)) for step, left in ((1, None), (2, 10.0), (3, 9.0))] == [2, 1, 1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (200_000, "2d 07:33"), (None, None)]
)
def test_durations(seconds: float | None, text: str | None) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1000, "1.00k"), (338_025, "338k"), (10**10, "10.0B"), (2 * 10**12, "2.00T")]
)
def test_counts(count: int, text: str) -> None:
    assert short_count(count) == text


def test_the_header_says_what_is_trained_on() -> None:
    header = dataclasses.replace(HEADER, data="corpus.jsonl · 1,000 tokens", epochs=3.14159)
    text = "\n".join(line.plain for line in header_lines(header, "logs/run"))
    assert "data     corpus.jsonl · 1,000 tokens · 3.14 epochs planned" in text
    assert "\ndata " not in "\n".join(line.plain for line in header_lines(HEADER, "logs/run"))


def test_the_end_tells_the_last_and_the_best_evaluation() -> None:
    summary = summarize([record(1), record(2, 3.0), record(3, 3.5), record(4, float("nan")), record(5, 3.25)], 0)
    assert (summary["evaluations"], summary["last_eval_loss"], summary["best_eval_loss"]) == (4, 3.25, 3.0)
    assert (summary["best_eval_step"], summary["tokens_seen"]) == (2, 5_000_000)
    text = "\n".join(line.plain for line in summary_lines(summary))
    assert "held-out loss" in text and "3.2500, perplexity 20.00, best 3.0000 after step 2" in text
    assert "held-out" not in "\n".join(line.plain for line in summary_lines(summarize([record(1)], 0)))
