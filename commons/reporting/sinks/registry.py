"""SINKS: the table of all sinks, and how a run opens them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from commons.reporting.environment import describe_environment
from commons.reporting.header import RunHeader
from commons.reporting.sinks.console import open_console, open_console_log
from commons.reporting.sinks.metrics_file import open_metrics_file
from commons.reporting.sinks.services import SERVICES, service_names
from commons.reporting.sinks.sink import RunFacts, Sink
from commons.reporting.sinks.summary_file import open_summary_file
from commons.reporting.writing import write_json, writing

# In the order in which they are opened and called: a step is on the disk before it is on the screen. An entry returns
# None where its sink is not wanted.
SINKS: dict[str, Callable[[RunFacts], Sink | None]] = {
    "metrics.jsonl": open_metrics_file,
    "summary.json": open_summary_file,
    "console.log": open_console_log,
    "console": open_console,
}


class Settings(Protocol):
    """What is read of a configuration here; all of it goes to config.json."""

    @property
    def run_dir(self) -> Path: ...

    @property
    def train_step(self) -> int: ...

    @property
    def warmup_step(self) -> int: ...

    @property
    def quiet(self) -> bool: ...

    @property
    def log_every(self) -> int: ...

    @property
    def sinks(self) -> str: ...


def start_run_folder(run_dir: Path, config: object, environment: Mapping[str, Any]) -> None:
    """Make the run's folder with config.json and env.json. Raises SinkError."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config)
    write_json(run_dir / "env.json", environment)


@contextlib.contextmanager
def open_sinks(config: Settings, header: RunHeader, rank: int) -> Iterator[list[Sink]]:
    """Start the run's folder and open every sink, closed at the end of the block; none on ranks other than 0.

    Raises:
        SinkError: something could not be written; its text is one line that says what to do.
    """
    if rank != 0:
        yield []
        return
    start_run_folder(config.run_dir, config, describe_environment(header.device_name))
    run = RunFacts(config.run_dir, config.train_step, config.warmup_step, config.quiet, header, config.log_every)
    sinks: list[Sink] = []
    with contextlib.ExitStack() as closing:
        wanted = [SERVICES[name].open for name in service_names(config.sinks)]
        for open_sink in (*SINKS.values(), *wanted):
            sink = open_sink(run)
            if sink is not None:
                closing.callback(sink.close)
                sinks.append(sink)
        yield sinks
