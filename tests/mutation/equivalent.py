"""Mutants that no test can notice, each with the reason: (module, line before, line after) -> why."""

from __future__ import annotations

SCHEDULE = "commons/training/schedule.py"
PROGRESS = "progress = (step - config.lr_warmup_step) / max({}, config.train_step - config.lr_warmup_step)"

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (SCHEDULE, "if step <= config.lr_warmup_step:", "if step < config.lr_warmup_step:"): (
        "in the last step of the warm-up both branches give the whole rate: lr x step / step, and the cosine's first"
    ),
    (SCHEDULE, PROGRESS.format(1), PROGRESS.format(" 0")): (
        "without a step behind the warm-up nobody comes here: the 1 only keeps other callers from dividing by 0"
    ),
}
