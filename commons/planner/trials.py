"""--auto: the best few layouts, tried for some steps each on the machine at hand.

Each trial is a training of its own, started through the launcher, with processes that end before the next begins. What
it came to is read from the files that it leaves, never from what it prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commons.config.schema import BatchFlags, MachineFlags, ModelFlags, OptimizerFlags, PlanFlags
from commons.lifecycle.suite_root import SUITE_ROOT
from commons.planner.choose import Candidate
from commons.planner.machines import Machine

LAUNCHER = SUITE_ROOT / "commons" / "launch"
MOST_TRIALS = 6
# Steps until a layout is at its speed: compiled, captured (DDP measures itself in the first ten), caches filled.
SETTLING_STEPS, DDP_SETTLING_STEPS = 4, 13
MEASURED_STEPS, LEAST_MEASURED_STEPS = 8, 2
STOP_SECONDS = 15.0  # in which a trial's launcher ends its ranks
POLL_SECONDS = 0.1
# A layout whose forecast, corrected by what was measured so far, is slower than the best by so much is not tried.
HOPELESS = 0.15
LATE = "its time was over before a step counted"
NO_TIME = "not tried: --auto_minutes were over"
# Settings of a trial: what is computed, not how long, where it is logged or what is kept of it.
TRIAL_GROUPS = (ModelFlags, PlanFlags, BatchFlags, OptimizerFlags, MachineFlags)
ALSO_TRIED = ("no_preflight",)
NOT_TRIED = ("train_step", "warmup_step", "lr_warmup_step", "lr_schedule", "max_restarts", "max_bad_steps")


@dataclass(frozen=True)
class Trial:
    """A layout, and what came of it.

    Attributes:
        tokens_per_second: of all ranks, from the median step; None where it did not come to a step that counts.
        step_seconds, peak_device_mib: likewise.
        why: why there is no speed, "" where there is.
        seconds: what the trial took in all.
    """

    candidate: Candidate
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    peak_device_mib: float | None = None
    why: str = ""
    seconds: float = 0.0

    @property
    def ran_out_of_time(self) -> bool:
        """It may be as fast as the model says: nothing is known against it."""
        return self.why in (LATE, NO_TIME)


def try_layouts(
    given: Mapping[str, Any],
    layouts: Sequence[Candidate],
    machine: Machine,
    minutes: float,
    on_trial: Callable[[Trial], object],
) -> list[Trial]:
    """Train each of ``layouts``, the fastest by the model first, until the time is over; in the order of ``layouts``.

    Args:
        given: the settings that the user gave.
        minutes: for all of them.
        on_trial: called with each trial as it ends.
    """
    end = time.monotonic() + 60 * minutes
    trials: list[Trial] = []
    for number, layout in enumerate(layouts):
        left = end - time.monotonic()
        why_not = _why_not(layout, trials, left, number)
        if why_not:
            trial = Trial(layout, why=why_not)
        else:
            # what one leaves of its share, those after it have
            share = left if number == 0 else left / max(1, min(MOST_TRIALS, len(layouts)) - number) * 1.5
            trial = run_trial(given, layout, machine, min(left, share))
        trials.append(trial)
        on_trial(trial)
    return trials


def _why_not(layout: Candidate, trials: Sequence[Trial], left: float, number: int) -> str:
    """Why a layout is not tried, "" where it is."""
    done = [trial for trial in trials if trial.tokens_per_second]
    if done:
        best = max(done, key=lambda trial: trial.tokens_per_second or 0.0)
        assert best.tokens_per_second is not None
        expected = layout.time.tokens_per_second * best.tokens_per_second / best.candidate.time.tokens_per_second
        slower = 1 - expected / best.tokens_per_second
        if slower > HOPELESS:
            return f"not tried: {100 * slower:.0f} % slower than the best so far by the model"
    if number >= MOST_TRIALS:
        return f"not tried: {MOST_TRIALS} were"
    if left <= 0:
        return NO_TIME
    return ""


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The fastest that trained; None where none did."""
    done = [trial for trial in trials if trial.tokens_per_second]
    return max(done, key=lambda trial: trial.tokens_per_second or 0.0, default=None)


def trial_steps(layout: Candidate, seconds: float) -> tuple[int, int]:
    """Steps in all, and those left out of the median, for a trial of ``seconds``."""
    captured = layout.config.cuda_graph == "on" and layout.config.distplan in ("Pytorch_DDP", "Pytorch_ZeRO")
    settling = DDP_SETTLING_STEPS if captured else SETTLING_STEPS
    affordable = int(seconds / 2 / layout.time.seconds)  # the other half starts processes and compiles
    if affordable >= settling + LEAST_MEASURED_STEPS:
        return min(affordable, settling + MEASURED_STEPS), settling
    return 2 + LEAST_MEASURED_STEPS, 2


def trial_flags(given: Mapping[str, Any], layout: Candidate, seconds: float, log_dir: Path) -> list[str]:
    """The launcher's flags for a trial."""
    names = {name for group in TRIAL_GROUPS for name in group.__dataclass_fields__}
    names = names - set(NOT_TRIED) | set(ALSO_TRIED)
    steps, settling = trial_steps(layout, seconds)
    settings = {
        **{name: value for name, value in given.items() if name in names},
        **layout.settings,
        "device": layout.config.device,
        "train_step": steps,
        "warmup_step": settling,
        "log_dir": log_dir,
        "run_name": "trial",
        "quiet": True,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def run_trial(given: Mapping[str, Any], layout: Candidate, machine: Machine, seconds: float) -> Trial:
    """Train a layout for some steps in processes of its own, ended after ``seconds``; no process of it is left."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="run_gemini_trial_") as folder:
        command = [sys.executable, str(LAUNCHER), *trial_flags(given, layout, seconds, Path(folder))]
        environment = {**os.environ, "GPUNUM": str(machine.gpus_per_node)}
        with open(Path(folder) / "console", "wb") as console:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
            )
            in_time = _wait(process, start + seconds)
        run_dir = Path(folder) / "trial"
        trial = read_trial(layout, run_dir, process.returncode, in_time)
    return Trial(**{**vars(trial), "seconds": time.monotonic() - start})


def _wait(process: subprocess.Popen[bytes], end: float) -> bool:
    """Until it has ended, at ``end`` by us; whether it did so by itself. It is ended when this process is, too."""
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return process.poll() is not None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def read_trial(layout: Candidate, run_dir: Path, returncode: int, in_time: bool) -> Trial:
    """What a trial's summary.json says, which its launcher writes however it ended."""
    summary: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    median = (summary.get("step_seconds") or {}).get("median")
    if (in_time and returncode) or median is None:
        late = "" if in_time else LATE
        because = summary.get("ended_because") or f"exit code {returncode}"
        return Trial(layout, why=late or f"{summary.get('ended', 'failed')}: {_first_line(because)}")
    tokens = (summary.get("tokens_per_second") or {}).get("median")
    return Trial(layout, tokens, median, summary.get("peak_device_memory_mib"))


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""
