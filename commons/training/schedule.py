"""The learning rate of every step."""

from __future__ import annotations

import math

from commons.config.resolved import ResolvedConfig


def learning_rate(config: ResolvedConfig, step: int) -> float:
    """The learning rate of ``step`` (from 1): a linear warm-up over ``lr_warmup_step``, then constant or a
    cosine down to a tenth.
    """
    if step <= config.lr_warmup_step:
        return config.lr * step / config.lr_warmup_step
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.lr_warmup_step) / max(1, config.train_step - config.lr_warmup_step)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
