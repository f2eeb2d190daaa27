"""Runs many configurations after each other on the ranks of one torchrun and sets each against the
single-process fp32 reference.

    torchrun --nproc_per_node 4 tests/parity_worker.py cases.json results.json [mode]

cases.json holds a list of command lines. The results, in that order: a dictionary of measured differences
each, or ``{"error": ...}``. Starting processes and importing takes longer than a case, hence many in one
process. The last argument leaves out a part of the suite to show what
they are for.
"""

from __future__ import annotations

import functools
import gc
import json
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commons import device, parity
from commons.config import TrainConfig
from commons.engine import Session, build_session, train_steps

COMMON = "--model_type gpt2_tiny --device cpu --train_step 5 --warmup_step 1 --lr 1e-3 --run_name unused"


@functools.cache
def reference(
    config: TrainConfig, ranks: int, skipped: frozenset[int]
) -> tuple[list[parity.ReferenceStep], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Steps, initial and final parameters; ``config`` with what the reference does not read left at its
    default.
    """
    steps, model = parity.reference_steps(config, ranks, torch.device("cpu"), skipped)
    start = parity.reference_steps(_replace(config, train_step=0), ranks, torch.device("cpu"))[1]
    return steps, dict(start.named_parameters()), dict(model.named_parameters())


def _replace(config: TrainConfig, **changes: Any) -> TrainConfig:
    import dataclasses

    return dataclasses.replace(config, **changes)


def _reference_key(config: TrainConfig) -> TrainConfig:
    names = (
        "precision",
        "batch_size",
        "grad_accum",
        "clip_grad_norm",
        "adam_eps",
        "lr",
        "train_step",
        "model_type",
        "seq_len",
        "num_heads",
    )
    return TrainConfig(**{name: getattr(config, name) for name in names}).resolve("cpu")


def run_case(flags: str, here: device.Device, scratch: Path) -> dict:
    """Train one configuration; on rank 0 everything measured about it."""
    config = parity.with_known_norms(TrainConfig.from_cli(shlex.split(f"{COMMON} {flags}")))
    session = build_session(config, here)
    records = list(train_steps(session))
    norms: list[Any] = [None] * here.world_size
    dist.all_gather_object(norms, [record.grad_norm for record in records])
    found: dict[str, Any] = {"norms_equal_on_ranks": all(theirs == norms[0] for theirs in norms)}
    # upstream leaves what it gathers ahead in an inference unawaited, and the next one fails
    leak = None if config.max_prefetch else _leak_from_last_token(session)
    try:
        weights = _gathered_weights(session, scratch)
    except AssertionError as error:  # of upstream's, unmended; on all ranks alike
        weights, found["saving_error"] = None, str(error)
    if here.rank != 0:
        return found
    ranks = config.data_parallel_size(here.world_size)
    steps, start, end = reference(_reference_key(config), ranks, parity.skipped_steps(records))
    measured = parity.compare(config, records, steps)
    found |= {
        "loss": measured.loss,
        "grad_norm": measured.grad_norm,
        "skipped": records[-1].skipped_steps,
        "leak": leak,
    }
    found["losses"] = [record.loss for record in records]
    if weights is not None:
        dtype = device.compute_dtype(config.precision)
        found["missing"] = sorted(set(end) - set(weights))
        found["weights"] = dict(_weight_differences(start, end, weights, dtype))
    return found


def _weight_differences(start: dict, end: dict, weights: dict, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """For every tensor, the distance from the reference's after training over the way that the reference's
    has gone.

    What rounding to ``dtype`` explains does not count: checkpoints of bf16 and fp16 plans are rounded.
    """
    half_ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name, expected in end.items():
        way = expected.detach() - start[name].detach()
        difference = (weights[name].float() - expected.detach()).abs() - half_ulp * expected.detach().abs()
        difference.clamp_min_(0)
        if name.endswith("c_attn.bias"):
            # a constant added to all keys changes no softmax: this gradient is zero, and Adam makes noise of
            # its rounding
            difference, way = (torch.cat([tensor.chunk(3)[0], tensor.chunk(3)[2]]) for tensor in (difference, way))
        yield name, (difference.norm() / way.norm()).item()


def _gathered_weights(session: Session, scratch: Path) -> dict[str, torch.Tensor] | None:
    """All parameters by their names in the bare model, gathered by the plan's own checkpoint (collective)."""
    trainable: Any = session.trainable
    if not hasattr(trainable, "booster"):
        return None
    path = scratch / "model.pt"
    trainable.booster.save_model(trainable.model, str(path), shard=False)
    trainable.booster.save_optimizer(trainable.optimizer, str(scratch / "optimizer.pt"), shard=False)
    dist.barrier()
    return torch.load(path, weights_only=False) if session.device.rank == 0 else None


@torch.no_grad()
def _leak_from_last_token(session: Session) -> float:
    """How far another last token moves any earlier logit."""
    tokens = torch.arange(4 * 64).reshape(4, 64) % session.shape.vocab
    changed = tokens.clone()
    changed[:, -1] += 1
    before, after = _logits(session, tokens), _logits(session, changed)
    moved = -1.0 if before is None or after is None else (before - after)[:, :-1].abs().max().item()
    every: list[Any] = [None] * session.device.world_size
    dist.all_gather_object(every, moved)
    return max(every)


def _logits(session: Session, tokens: torch.Tensor) -> torch.Tensor | None:
    """fp32 [batch, sequence, this rank's columns]; None but on a pipeline's last stage."""
    trainable: Any = session.trainable
    if session.config.pp_degree == 1:
        return trainable.model(input_ids=tokens).logits.float()
    batch = {"input_ids": tokens, "labels": tokens}
    with trainable.model.no_sync():  # else the schedule goes on to reduce gradients that there are none of
        output = trainable.booster.execute_pipeline(
            iter([batch]),
            trainable.model,
            lambda output, _: output.loss,
            return_loss=False,
            return_outputs=True,
        )["outputs"]
    return None if output is None else output["logits"].float()


def leave_unmended() -> None:
    """Run with Colossal-AI's own norms, fractions, savings and partial biases."""
    from commons.colossal.imports import import_colossalai

    import_colossalai()
    from commons.colossal import split_gpt2, upstream_fixes

    upstream_fixes.FIXES = ()
    split_gpt2.SplitGPT2Policy._mark_partial_biases = lambda self: None


def take_upstream_forward() -> None:
    """Run with shardformer's own forward pass and loss, given the attention mask without which it fails."""
    from commons.colossal.imports import import_colossalai

    import_colossalai()
    from commons.colossal import boosted, split_gpt2

    split_gpt2.register = lambda: None

    def forward(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens)).loss

    boosted.BoostedTrainable.forward = forward
    globals()["_logits"] = lambda session, tokens: session.trainable.model(
        input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens)
    ).logits.float()


def leave_chunks_unaligned() -> None:
    """Cut Gemini's chunks without regard to blocks, just above the largest matrix."""
    from commons.colossal.imports import import_colossalai

    import_colossalai()
    from commons.colossal import boosted

    def chunk_configuration(shape: Any, zero_size: int, tp_degree: int) -> dict:
        return {zero_size: {"chunk_size": 4 * shape.hidden**2 // tp_degree, "keep_gathered": False}}

    boosted.chunk_configuration = chunk_configuration


MODES = {
    "mended": lambda: None,
    "unmended": leave_unmended,
    "unaligned_chunks": leave_chunks_unaligned,
    "upstream_forward": take_upstream_forward,
}


def main(cases_path: str, results_path: str, mode: str = "mended") -> None:
    here = device.launch("cpu", 60)
    MODES[mode]()
    results = []
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        for flags in json.loads(Path(cases_path).read_text()):
            try:
                results.append(run_case(flags, here, Path(shared[0])))
            except (Exception, SystemExit) as error:
                if mode == "mended":
                    raise  # the other ranks may be waiting in a collective of this case: nothing can follow
                last = traceback.extract_tb(error.__traceback__)[-1].name
                results.append({"error": f"{type(error).__name__} in {last}: {error}"})  # on all ranks alike
            gc.collect()
        if here.rank == 0:
            Path(results_path).write_text(json.dumps(results))
        dist.barrier()
    device.teardown()


if __name__ == "__main__":
    main(*sys.argv[1:])
