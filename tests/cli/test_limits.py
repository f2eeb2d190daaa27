"""Both ends of every number's range, written down once more: an end that moves by one is noticed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from commons.cli.limits import LIMITS, Limit, number_problem

# name: the least and the greatest value that are allowed; a text where the end itself is not ("0" for above 0)
RANGES: dict[str, tuple[float | str, float | str]] = {
    "num_layers": (1, 10_000),
    "hidden_size": (1, 1_000_000),
    "num_heads": (1, 1_000_000),
    "dropout": (0, "1"),
    "shard_param_frac": (0, 1),
    "offload_optim_frac": (0, 1),
    "offload_param_frac": (0, 1),
    "warmup_non_model_data_ratio": (0, "1"),
    "steady_cuda_cap_ratio": ("0", 1),
    "max_prefetch": (0, 10_000),
    "blocks_per_chunk": (1, 10_000),
    "tp_degree": (1, 100_000),
    "pp_degree": (1, 100_000),
    "zero_stage": (0, 2),
    "num_microbatches": (1, 1_000_000),
    "num_model_chunks": (1, 10_000),
    "batch_size": (1, 1_000_000),
    "seq_len": (2, 10_000_000),
    "train_step": (1, 1_000_000_000),
    "warmup_step": (0, "1000000000"),
    "grad_accum": (1, 1_000_000),
    "max_bad_steps": (0, 1_000_000_000),
    "seed": (0, "9223372036854775808"),
    "lr": (0, 1e6),
    "lr_warmup_step": (0, 1_000_000_000),
    "weight_decay": (0, 1e6),
    "beta1": (0, "1"),
    "beta2": (0, "1"),
    "adam_eps": ("0", 1),
    "clip_grad_norm": (0, 1e12),
    "trace_step": (0, 1_000_000_000),
    "initial_loss_scale": (1, 4_294_967_296),
    "timeout": ("0", 1_000_000),
    "max_restarts": (0, 1_000),
    "num_positions": (2, 10_000_000),
    "vocab_size": (2, 100_000_000),
    "eval_every": (0, 1_000_000_000),
    "eval_fraction": (0, "1"),
    "log_every": (1, 1_000_000_000),
    "save_every": (0, 1_000_000_000),
    "keep": (0, 1_000_000),
    "auto_minutes": (0, 10_000),
}


# What is suggested to a user whose number is out of its range: the defaults, or what runs everywhere.
SUGGESTED = {
    "num_layers": 4, "hidden_size": 64, "num_heads": 4, "dropout": 0.1, "shard_param_frac": 1,
    "offload_optim_frac": 0.5, "offload_param_frac": 0, "warmup_non_model_data_ratio": 0.8,
    "steady_cuda_cap_ratio": 0.9, "max_prefetch": 0, "blocks_per_chunk": 1, "tp_degree": 1, "pp_degree": 1,
    "zero_stage": 0, "num_microbatches": 1, "num_model_chunks": 1, "batch_size": 4, "seq_len": 64, "train_step": 10,
    "warmup_step": 2, "grad_accum": 1, "max_bad_steps": 3, "seed": 42, "lr": 3e-4, "lr_warmup_step": 0,
    "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-8, "clip_grad_norm": 1.0, "trace_step": 5,
    "initial_loss_scale": 65536, "timeout": 600, "max_restarts": 1, "num_positions": 1024, "vocab_size": 50257,
    "eval_every": 0, "eval_fraction": 0.01, "log_every": 1, "save_every": 100, "keep": 2, "auto_minutes": 5,
}  # fmt: skip


def test_what_is_suggested() -> None:
    assert {name: limit.works for name, limit in LIMITS.items()} == SUGGESTED


def test_a_limit_stays_as_it_is() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LIMITS["lr"].high = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def step_beyond(value: float, towards: float) -> float:
    """The next number: by one where a whole one is meant, else the next that can be written."""
    if abs(value) >= 2:
        return value + (1 if towards > value else -1)
    return math.nextafter(value, towards)


@pytest.mark.parametrize("name", RANGES)
def test_both_sides_of_both_ends(name: str) -> None:
    limit = LIMITS[name]
    for end, outside in zip(RANGES[name], (-math.inf, math.inf), strict=True):
        value = int(end) if isinstance(end, str) else end
        beyond, inside = step_beyond(value, outside), step_beyond(value, -outside)
        assert limit.allows(value) == (not isinstance(end, str)), value
        assert limit.allows(inside) and not limit.allows(beyond)
        assert (
            number_problem(name, beyond, limit)
            == f"--{name} must be {limit}, got {beyond:g}: try --{name} {limit.works:g}"
        )
    assert number_problem(name, limit.works, limit) is None


def test_every_limit_is_written_down() -> None:
    assert set(RANGES) == set(LIMITS)


def test_limits_in_words() -> None:
    assert str(Limit(1, low=1, high=1_000_000)) == "at least 1 and at most 1000000"
    assert str(Limit(0.5, above=0, below=1.5)) == "above 0 and below 1.5"


@pytest.mark.parametrize(
    "ends", [{}, {"low": 0}, {"high": 1}, {"low": 0, "above": 0, "high": 1}, {"low": 0, "high": 1, "below": 1}]
)
def test_a_limit_has_two_ends(ends: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        Limit(1, **ends)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_told_so(value: float) -> None:
    assert "must be a finite number" in str(number_problem("lr", value, LIMITS["lr"]))
