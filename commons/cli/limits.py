"""The range of every number among the settings. Adding one is an entry in LIMITS."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """The range of a number, with both ends.

    Attributes:
        works: a value to suggest.
        low, high: the least and the greatest value that is allowed.
        above, below: the values that are not allowed any more.
    """

    works: float
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        assert (self.low is None) != (self.above is None) and (self.high is None) != (self.below is None)

    def allows(self, value: float) -> bool:
        return not (
            (self.low is not None and value < self.low)
            or (self.above is not None and value <= self.above)
            or (self.high is not None and value > self.high)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        words = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {_in_full(bound)}" for word, bound in words.items() if bound is not None)


def _in_full(bound: float) -> str:
    """Whole numbers without an exponent, which nobody types."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _fraction(works: float) -> Limit:
    return Limit(works, low=0, high=1)


MANY_RANKS, MANY_STEPS = 100_000, 10**9

LIMITS: dict[str, Limit] = {
    "num_layers": Limit(4, low=1, high=10_000),
    "hidden_size": Limit(64, low=1, high=1_000_000),
    "num_heads": Limit(4, low=1, high=1_000_000),
    "num_positions": Limit(1024, low=2, high=10_000_000),
    "vocab_size": Limit(50257, low=2, high=100_000_000),
    "dropout": Limit(0.1, low=0, below=1),
    "shard_param_frac": _fraction(1),
    "offload_optim_frac": _fraction(0.5),
    "offload_param_frac": _fraction(0),
    # of the device's memory: beyond these no chunk would fit into it
    "warmup_non_model_data_ratio": Limit(0.8, low=0, below=1),
    "steady_cuda_cap_ratio": Limit(0.9, above=0, high=1),
    "max_prefetch": Limit(0, low=0, high=10_000),
    "blocks_per_chunk": Limit(1, low=1, high=10_000),
    "tp_degree": Limit(1, low=1, high=MANY_RANKS),
    "pp_degree": Limit(1, low=1, high=MANY_RANKS),
    "zero_stage": Limit(0, low=0, high=2),
    "num_microbatches": Limit(1, low=1, high=1_000_000),
    "num_model_chunks": Limit(1, low=1, high=10_000),
    "batch_size": Limit(4, low=1, high=1_000_000),
    "seq_len": Limit(64, low=2, high=10_000_000),  # the last token has no successor to predict
    "train_step": Limit(10, low=1, high=MANY_STEPS),
    "warmup_step": Limit(2, low=0, below=MANY_STEPS),
    "grad_accum": Limit(1, low=1, high=1_000_000),
    "max_bad_steps": Limit(3, low=0, high=MANY_STEPS),
    "seed": Limit(42, low=0, below=2**63),
    "eval_every": Limit(0, low=0, high=MANY_STEPS),
    "eval_fraction": Limit(0.01, low=0, below=1),
    "log_every": Limit(1, low=1, high=MANY_STEPS),
    "lr": Limit(3e-4, low=0, high=1e6),
    "lr_warmup_step": Limit(0, low=0, high=MANY_STEPS),
    "weight_decay": Limit(0.01, low=0, high=1e6),
    "beta1": Limit(0.9, low=0, below=1),
    "beta2": Limit(0.95, low=0, below=1),
    "adam_eps": Limit(1e-8, above=0, high=1),
    "clip_grad_norm": Limit(1.0, low=0, high=1e12),
    "save_every": Limit(100, low=0, high=MANY_STEPS),
    "keep": Limit(2, low=0, high=1_000_000),
    "trace_step": Limit(5, low=0, high=MANY_STEPS),
    "initial_loss_scale": Limit(2**16, low=1, high=2**32),  # Colossal-AI's scalers grow no further
    # the C++ of torch counts in nanoseconds, poll() in 32 bits of milliseconds: eleven days are far below both
    "timeout": Limit(600, above=0, high=1_000_000),
    "max_restarts": Limit(1, low=0, high=1_000),
    "auto_minutes": Limit(5, low=0, high=10_000),
}


def number_problem(name: str, value: float, limit: Limit) -> str | None:
    if not math.isfinite(value):
        return f"--{name} must be a finite number, got {value}: try --{name} {limit.works:g}"
    if not limit.allows(value):
        return f"--{name} must be {limit}, got {value:g}: try --{name} {limit.works:g}"
    return None
