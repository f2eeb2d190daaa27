"""A run's own account: its records, and a summary however it ends.

Rank 0 writes it while it lives (RunLog). Where it died without a word, the launcher writes summary.json from
metrics.jsonl (write_summary). A restarted run keeps the files of the attempts before (begin_attempt).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from commons.config.resolved import ResolvedConfig
from commons.lifecycle.guard import TRACEBACK_FILE, Guard
from commons.lifecycle.job import read_job
from commons.lifecycle.outcome import OUT_OF_MEMORY, Ended
from commons.reporting.header import RunHeader
from commons.reporting.record import StepRecord
from commons.reporting.sinks.registry import open_sinks
from commons.reporting.sinks.sink import Sink
from commons.reporting.summary import summarize
from commons.reporting.writing import write_json

PER_ATTEMPT = ("metrics.jsonl", "summary.json", TRACEBACK_FILE)


class RunLog:
    """The records of a run, on every rank; on rank 0 they go to the sinks too."""

    def __init__(self, config: ResolvedConfig, sinks: Sequence[Sink], is_rank_0: bool = True) -> None:
        self.records: list[StepRecord] = []
        self._config, self._sinks, self._is_rank_0 = config, sinks, is_rank_0
        self._reporting = threading.Lock()

    def add(self, record: StepRecord) -> None:
        self.records.append(record)
        for sink in self._sinks:
            sink.log(record)

    def settle(self, config: ResolvedConfig) -> None:
        """The settings turned out to be these: config.json says so. Raises SinkError."""
        if self._sinks and config != self._config:
            write_json(config.run_dir / "config.json", config)
        self._config = config

    def finish(self, ended: Ended) -> None:
        """Report to every sink."""
        if self._reporting.acquire(blocking=False):
            summary = summary_of(self.records, self._config, ended, read_job().attempt)
            for sink in self._sinks:
                sink.report(summary)

    def break_off(self, ended: Ended) -> None:
        """Write summary.json and nothing else, unless it is being written already; from any thread.

        On rank 0, but for a rank that is out of memory, the first of which tells itself: the others lose it and know
        less.
        """
        tells = self._is_rank_0 or ended.how == OUT_OF_MEMORY
        if (
            tells
            and not _tells_of_memory(self._config.run_dir / "summary.json")
            and self._reporting.acquire(blocking=False)
        ):
            write_summary(self._config.run_dir, list(self.records), self._config, ended, read_job().attempt)


def _tells_of_memory(path: Path) -> bool:
    """Whether another rank has written there that it is out of memory."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))["ended"] == OUT_OF_MEMORY
    return False


@contextlib.contextmanager
def summary_in_any_case(config: ResolvedConfig, guard: Guard) -> Iterator[None]:
    """Around the building of the model (collective): a run that ends there has a summary too, of no steps."""
    import torch.distributed as dist

    if not guard.watched:  # else the launcher has begun it
        if guard.rank == 0:
            begin_attempt(config.run_dir, read_job().attempt, resumes=bool(config.resume))
        dist.barrier()  # what another rank writes of its end stays
    log = RunLog(config, (), guard.rank == 0)
    guard.folder, guard.last_words = config.run_dir, log.break_off
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            log.break_off(guard.why_failed(error))
        raise


@contextlib.contextmanager
def open_log(config: ResolvedConfig, header: RunHeader, guard: Guard) -> Iterator[RunLog]:
    """The log of a run on the guard's rank, whose summary is written whatever happens inside: an exception, or a signal
    that cannot wait for the step to end.
    """
    with open_sinks(config, header, guard.rank) as sinks:
        log = RunLog(config, sinks, guard.rank == 0)
        guard.last_words = log.break_off
        try:
            yield log
        except BaseException as error:
            with contextlib.suppress(OSError):
                log.break_off(guard.why_failed(error))
            raise


def begin_attempt(run_dir: Path, attempt: int, *, resumes: bool = False) -> None:
    """Leave no file that this attempt would overwrite or be mistaken for (harmless when called again).

    Of a run that is started again the last attempt's files get its number. Where a run ``resumes`` a training in the
    same folder, the files of the run before get the number of a part of it. Those of another run that had the same name
    go, as they would when the first step is logged.
    """
    with contextlib.suppress(OSError):
        if attempt == 1 and resumes:
            _keep_as_part(run_dir)
        elif attempt == 1:
            earlier = (path for kind in ("json*", "txt") for path in run_dir.glob(f"*-attempt[0-9]*.{kind}"))
            for path in (*(run_dir / name for name in PER_ATTEMPT), *earlier):
                path.unlink(missing_ok=True)
        for path in (run_dir / name for name in PER_ATTEMPT if attempt > 1):
            if path.exists():
                path.replace(path.with_stem(f"{path.stem}-attempt{attempt - 1}"))


def _keep_as_part(run_dir: Path) -> None:
    """Number the files of the run that went before, which are this one's training too."""
    parts = itertools.count(1)
    part = next(number for number in parts if not any(run_dir.glob(f"*-part{number}.json*")))
    for path in (run_dir / name for name in PER_ATTEMPT):
        if path.exists():
            path.replace(path.with_stem(f"{path.stem}-part{part}"))


def read_records(path: Path) -> list[StepRecord]:
    """The records in a metrics.jsonl; none where there is no file. A last line that is not whole is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    return [_read_record(line) for line in lines if line.endswith("\n")]


def _read_record(line: str) -> StepRecord:
    values = json.loads(line)
    for name, text in values.pop("non_finite", {}).items():
        values[name] = float(text)
    return StepRecord(**values)


def summary_of(records: Sequence[StepRecord], config: ResolvedConfig, ended: Ended, attempt: int) -> dict[str, Any]:
    """What summary.json holds: the statistics, and how the run ended.

    Adds to commons.reporting.summary.summarize(): ``ended``, how (see commons.lifecycle.outcome);
    ``ended_because``, a sentence,
    None where all steps are done; ``train_step``, the steps that were to be done; ``attempt``, from 1; and of a run
    that ended out of memory ``out_of_memory`` (see commons.lifecycle.memory_shortage).
    """
    before = records[0].step - 1 if records else 0  # steps that another run has done
    end = {"ended": ended.how, "ended_because": ended.why or None, **ended.details, "train_step": config.train_step}
    return {**end, "attempt": attempt, **summarize(records, before + config.warmup_step)}


def write_summary(
    run_dir: Path, records: Sequence[StepRecord], config: ResolvedConfig, ended: Ended, attempt: int
) -> None:
    """Raises SinkError where that cannot be written."""
    write_json(run_dir / "summary.json", summary_of(records, config, ended, attempt))


def conclude(run_dir: Path, config: ResolvedConfig, ended: Ended, attempt: int, *, replace: bool) -> int:
    """For the launcher, when all ranks have ended: summary.json from metrics.jsonl. Returns the last step done.

    Args:
        replace: rank 0 can have known less about the end than the launcher does; False: only if it left none.
    """
    records = read_records(run_dir / "metrics.jsonl")
    if replace or not (run_dir / "summary.json").exists():
        with contextlib.suppress(OSError):  # the disk that is full may be what the run ended for
            write_summary(run_dir, records, config, ended, attempt)
    return records[-1].step if records else 0
