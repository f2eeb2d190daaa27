"""TensorBoard, Weights & Biases and MLflow, for whoever has them: ``--sinks tensorboard,wandb``.

Each is imported when it is opened and no earlier; none of them is a requirement of the suite.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from commons.reporting.record import StepRecord
from commons.reporting.sinks.sink import RunFacts, Sink
from commons.reporting.summary import MEASURED_FIELDS
from commons.reporting.writing import writing

PROJECT = "gemini"


class ServiceSink:
    """Passes a step's figures on, by the names of StepRecord; at the end the summary's medians.

    Args:
        name: what it is called in an error.
        log_figures: called with the figures of a step and its number.
        end: called once with the summary's figures, or an empty mapping where there was no summary.
    """

    def __init__(
        self,
        name: str,
        log_figures: Callable[[dict[str, float], int], object],
        end: Callable[[dict[str, float]], object],
    ) -> None:
        self._name, self._log_figures, self._end = name, log_figures, end
        self._summary: dict[str, float] = {}
        self._open = True

    def log(self, record: StepRecord) -> None:
        figures = {name: value for name in MEASURED_FIELDS if _is_finite(value := getattr(record, name))}
        with writing(self._name):
            self._log_figures(figures, record.step)

    def report(self, summary: Mapping[str, Any]) -> None:
        self._summary = dict(_medians(summary))

    def close(self) -> None:
        if self._open:
            self._open = False
            with writing(self._name):
                self._end(self._summary)


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _medians(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in summary.items():
        figure = value.get("median") if isinstance(value, Mapping) else value
        if _is_finite(figure):
            yield f"summary_{name}", float(figure)


def _facts(run: RunFacts) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(run.header).items() if name not in ("places", "notes")}


def open_tensorboard(run: RunFacts) -> Sink:
    """Event files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(run.run_dir / "tensorboard"))
    writer.add_text("run", "\n".join(f"- {name}: {value}" for name, value in _facts(run).items()))

    def log(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def end(summary: dict[str, float]) -> None:
        for name, value in summary.items():
            writer.add_scalar(name, value, run.train_step)
        writer.close()

    return ServiceSink("tensorboard", log, end)


def open_wandb(run: RunFacts) -> Sink:
    """A run of the project "gemini", or of WANDB_PROJECT; who is not logged in sets WANDB_MODE=offline."""
    import wandb  # pyright: ignore[reportMissingImports]

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    there = wandb.init(project=project, name=run.run_dir.name, dir=str(run.run_dir), config=_facts(run))

    def log(figures: dict[str, float], step: int) -> None:
        there.log(figures, step=step)

    def end(summary: dict[str, float]) -> None:
        there.summary.update(summary)
        there.finish()

    return ServiceSink("wandb", log, end)


def open_mlflow(run: RunFacts) -> Sink:
    """A run of the experiment "gemini": where MLFLOW_TRACKING_URI says, else in RUN/mlflow."""
    import mlflow  # pyright: ignore[reportMissingImports]

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri((run.run_dir / "mlflow").resolve().as_uri())
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    mlflow.start_run(run_name=run.run_dir.name)
    mlflow.log_params(_facts(run))

    def log(figures: dict[str, float], step: int) -> None:
        mlflow.log_metrics(figures, step=step)

    def end(summary: dict[str, float]) -> None:
        mlflow.log_metrics(summary)
        mlflow.end_run()

    return ServiceSink("mlflow", log, end)


class Service(NamedTuple):
    """A package, and what opens its sink."""

    package: str
    open: Callable[[RunFacts], Sink]


SERVICES = {
    "tensorboard": Service("tensorboard", open_tensorboard),
    "wandb": Service("wandb", open_wandb),
    "mlflow": Service("mlflow", open_mlflow),
}


def service_names(sinks: str) -> list[str]:
    """The names in the text of ``--sinks``, each once."""
    return list(dict.fromkeys(name.strip() for name in sinks.split(",") if name.strip()))


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(SERVICES[name].package) is not None
