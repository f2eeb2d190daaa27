"""--sinks: TensorBoard for real where it is installed, the others by stand-ins of their names."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
from suite_runs import launch
from test_sinks import CPU_RECORD, GPU_RECORD, HEADER, Config

from commons.cli.output import sink_problems
from commons.reporting.sinks.registry import open_sinks
from commons.reporting.sinks.services import SERVICES, ServiceSink, service_names


def train(tmp_path: Path, sinks: str) -> Path:
    config = Config(log_dir=str(tmp_path), sinks=sinks)
    with open_sinks(config, HEADER, rank=0) as opened:
        for sink in opened:
            sink.log(GPU_RECORD)
        for sink in opened:
            sink.report({"step_seconds": {"median": 0.5, "p10": 0.5, "p90": 0.5}, "mfu": {"median": None}})
    return config.run_dir


def test_names_and_what_is_wrong_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert service_names(" wandb, mlflow,,wandb") == ["wandb", "mlflow"] and not service_names("")
    assert list(sink_problems("tensorbord,mlflow")) == [
        "--sinks 'tensorbord' does not exist: did you mean tensorboard?",
        "--sinks mlflow: it is not installed: pip install mlflow",
    ]


def test_what_is_not_installed_is_refused_before_anything_starts(tmp_path: Path) -> None:
    missing = next((name for name in SERVICES if importlib.util.find_spec(SERVICES[name].package) is None), None)
    if missing is None:
        pytest.skip("all of them are installed here")
    run = launch(tmp_path, "--sinks", missing, "--device", "cpu")
    assert run.returncode == 2 and f"pip install {missing}" in run.console and not run.run_dir.exists()


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    there = types.SimpleNamespace(
        log=lambda figures, step: calls.append((step, figures)),
        summary=types.SimpleNamespace(update=lambda figures: calls.append(("summary", figures))),
        finish=lambda: calls.append(("finish",)),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **words: calls.append(("init", words)) or there  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    run_dir = train(tmp_path, "wandb")
    (_, words), (step, figures), (_, summary), last = calls
    assert words["name"] == run_dir.name and words["config"]["plan"] == "CAI_Gemini"
    assert step == 1 and figures["loss"] == GPU_RECORD.loss and figures["step_seconds"] == GPU_RECORD.step_seconds
    assert summary == {"summary_step_seconds": 0.5} and last == ("finish",)


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    module = types.ModuleType("mlflow")
    for name in ("set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run"):
        setattr(module, name, lambda *words, name=name, **more: calls.append((name, words, more)))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = train(tmp_path, "mlflow")
    assert [name for name, _, _ in calls] == [
        "set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "log_metrics", "end_run",
    ]  # fmt: skip
    assert calls[0][1] == ((run_dir / "mlflow").resolve().as_uri(),)
    assert calls[4][1][0]["loss"] == GPU_RECORD.loss and calls[4][2] == {"step": 1}


def test_unknown_figures_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict] = []
    monkeypatch.setitem(SERVICES, "wandb", SERVICES["wandb"]._replace(open=lambda run: _collecting(sent)))
    with open_sinks(Config(log_dir=str(tmp_path), sinks="wandb"), HEADER, rank=0) as opened:
        opened[-1].log(CPU_RECORD)
    assert sent and "mfu" not in sent[0] and "loss" in sent[0]


def _collecting(sent: list[dict]) -> ServiceSink:
    return ServiceSink("wandb", lambda figures, step: sent.append(figures), lambda summary: None)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="pip install tensorboard")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    run_dir = train(tmp_path, "tensorboard")
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (1, pytest.approx(GPU_RECORD.loss))
    assert events.Scalars("summary_step_seconds")[0].value == 0.5
