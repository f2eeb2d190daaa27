"""What of a training may change when it goes on, and what may not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from commons.checkpoint.store import Checkpoint
from commons.config.resolved import SHAPE_FLAGS, ResolvedConfig
from commons.data.batch_source import RANDOM, DataRequest
from commons.data.sources import open_source

# Settings that say nothing of the training itself: they may differ from run to run without a word.
OF_THE_RUN = (
    "log_dir", "run_name", "save_dir", "save_every", "keep", "resume", "quiet", "trace_step", "warmup_step", "timeout",
    "max_restarts", "measure_peak", "check_parity", "device",
    "log_every", "eval_every", "init_from", "sinks",
    "dry_run", "no_preflight", "json", "auto", "auto_minutes", "plan_for", "calibrate",
)  # fmt: skip
# ... and those that fixed() looks at.
FIXED = (
    "model_type", "num_layers", "hidden_size", "num_heads", "seq_len", "seed", "batch_size", "grad_accum",
    "num_positions", "vocab_size", "data", "tokenizer", "eval_fraction",
)  # fmt: skip


def data_fingerprint(config: ResolvedConfig) -> dict[str, Any]:
    """What the samples are: which of them comes when depends on nothing else."""
    if config.data == RANDOM:
        return {"source": "random tokens", "vocab": config.shape().vocab}
    return {"source": "text", "fingerprint": _text_fingerprint(config.data_request())}


@functools.cache
def _text_fingerprint(request: DataRequest) -> str:
    return open_source(request).fingerprint


def sequences_per_step(config: ResolvedConfig, world_size: int) -> int:
    return config.batch_size * config.grad_accum * config.data_parallel_size(world_size)


def fixed(config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    """What has to be the same whenever a training goes on, as state.json holds it."""
    return {
        "model": dataclasses.asdict(config.shape()),
        "seq_len": config.seq_len,
        "seed": config.seed,
        "sequences_per_step": sequences_per_step(config, world_size),
        "data": data_fingerprint(config),
    }


def contradictions(checkpoint: Checkpoint, config: ResolvedConfig, world_size: int) -> list[str]:
    """Why the training of ``checkpoint`` cannot go on with these settings, a line each, all of them; the last line
    names what differs too and may.
    """
    state = checkpoint.state
    found = [*_of_the_model(state, config), *_of_the_data(state, config, world_size)]
    if config.train_step <= checkpoint.step:
        found.append(
            f"--train_step {config.train_step} counts from the first step of the training, of which"
            f" {checkpoint.step} are done: use --train_step {checkpoint.step + config.train_step}, or another --resume"
        )
    if not found:
        return []
    may = ", ".join(changes(checkpoint, config))
    return [f"--resume {checkpoint.folder}: {text}" for text in found] + (
        [f"what differs besides and may: {may}"] if may else []
    )


def _of_the_model(state: Mapping[str, Any], config: ResolvedConfig) -> Iterator[str]:
    was, now = state["model"], dataclasses.asdict(config.shape())
    for field, value in was.items():
        if now[field] != value:
            flag = SHAPE_FLAGS.get(field)
            size = state["settings"]["model_type"]
            cure = f"--{flag} {value}" if flag and config.model_type == size else f"--model_type {size}"
            yield f"its model has {value} {field}, not {now[field]}: use {cure}"


def _of_the_data(state: Mapping[str, Any], config: ResolvedConfig, world_size: int) -> Iterator[str]:
    if state["data"] != data_fingerprint(config) and state["model"]["vocab"] == config.shape().vocab:
        yield f"it was trained on other data ({_words(state['data'])}), not on {_words(data_fingerprint(config))}"
    for name in ("seq_len", "seed"):
        if state[name] != getattr(config, name):
            yield f"--{name} was {state[name]}, not {getattr(config, name)}: use --{name} {state[name]}"
    was, now = state["sequences_per_step"], sequences_per_step(config, world_size)
    if was != now:
        yield f"a step took {was} sequences over all ranks, not {now}: {_batch_cure(was, config, world_size)}"


def _batch_cure(sequences: int, config: ResolvedConfig, world_size: int) -> str:
    """Settings that give a step as many sequences as it had."""
    copies = config.data_parallel_size(world_size)
    if sequences % (copies * config.grad_accum) == 0:
        return f"use --batch_size {sequences // (copies * config.grad_accum)}"
    if sequences % copies == 0:
        return f"use --batch_size {sequences // copies} --grad_accum 1"
    return f"{copies} data-parallel ranks cannot share them: use another number of ranks"


def _words(fingerprint: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fingerprint.items())


def changes(checkpoint: Checkpoint, config: ResolvedConfig) -> list[str]:
    """Settings that differ from those of the checkpoint's run and may, in words; not what was chosen for the user."""
    was, now = checkpoint.state["settings"], config.as_dict()
    return [
        f"--{name} {now[name]} (was {was[name]})"
        for name in now
        if name not in (*OF_THE_RUN, *FIXED) and config.asked(name) and name in was and was[name] != now[name]
    ]
