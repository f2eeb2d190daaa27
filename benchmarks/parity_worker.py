"""Trains many configurations one after the other on the ranks of one torchrun, and sets each against the
single-process fp32 reference.

    torchrun --nproc_per_node 4 -m benchmarks.parity_worker job.json

Starting processes and importing takes longer than a case, hence many in one process. ``benchmarks/parity.py``
writes the job and reads the results, a line of JSON a case. A case that fails ends the run: ranks may be waiting
for one another, so nothing can follow.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import functools
import gc
import json
import math
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.parity_cases import POISONED_STEP, Case
from commons.cli.flags import read_config
from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig
from commons.distributed import device, process_group
from commons.lifecycle import leaving
from commons.reporting.record import StepRecord
from commons.training import parity
from commons.training.loop import train_steps
from commons.training.session import Session, build_session

COLLECTIVE_SECONDS = 120.0  # what a rank may wait for another one that compiles
OPTIMIZER_FILE = "optimizer.pt"
HANG_SECONDS = 80.0  # less than benchmarks.parity gives a case


@dataclass(frozen=True)
class Job:
    """What the ranks of one torchrun are to do.

    Attributes:
        device: "cpu" or "cuda".
        flags: for all cases, before their own.
        cases: Case's fields, each.
        results: file that a line of JSON a case is added to.
        keep: cases (by their text) whose trained weights are saved beside ``results``, as ``<number>.pt``, and what a
            plan of Colossal-AI saves of its optimizer as ``<number>.optimizer.pt``.
    """

    device: str
    flags: str
    cases: list[dict]
    results: str
    keep: list[str]

    @classmethod
    def read(cls, path: str) -> Job:
        return cls(**json.loads(Path(path).read_text()))


class Worker:
    """One rank's way through a job's cases.

    Attributes:
        session: of the case at hand, or the last one. Its end is collective too: communicators of NCCL wait for one
            another to be destroyed.
    """

    def __init__(self, job: Job, here: device.Device, scratch: Path) -> None:
        self.job, self.here, self.scratch = job, here, scratch
        self.session: Session | None = None

    def run(self, case: Case, number: int) -> dict | None:
        """Train one configuration (collective); on rank 0 everything measured about it."""
        words = f"{case.all_flags} --device {self.job.device} {self.job.flags}"
        config = parity.with_known_norms(read_config(shlex.split(words)))
        self.session = session = build_session(config, self.here)
        if case.scale_grows:
            double_the_scale_every_step(session)
        records = list(_steps(session, case.poisoned_rank))
        leak = leak_from_last_token(session)
        spread = _spread(self.here, [[record.grad_norm or 0.0 for record in records]])
        found: dict[str, Any] = {"leak": leak, "norm_spread": spread, "replica_difference": replica_difference(session)}
        if session.plan.placement:
            found |= offloaded_share(session)
        try:
            weights = gathered_weights(session, self.scratch)
        except AssertionError as error:  # of upstream's, unmended; on all ranks alike
            weights, found["saving_error"] = None, str(error)
        if self.here.rank != 0:
            return None
        found |= self._against_reference(config, records, weights)
        if weights is not None and str(case) in self.job.keep:
            self._keep(session, weights, Path(self.job.results).parent, number)
        return found

    def _keep(self, session: Session, weights: dict[str, torch.Tensor], folder: Path, number: int) -> None:
        torch.save(weights, folder / f"{number}.pt")
        if hasattr(session.trainable, "booster"):
            shutil.copy(self.scratch / OPTIMIZER_FILE, folder / f"{number}.optimizer.pt")

    def _against_reference(
        self, config: ResolvedConfig, records: list[StepRecord], weights: dict[str, torch.Tensor] | None
    ) -> dict[str, Any]:
        skipped = parity.skipped_steps(records)
        ranks = config.data_parallel_size(self.here.world_size)
        steps, start, end = reference(_reference_key(config), ranks, self.here.torch_device, skipped)
        measured = parity.compare(config, records, steps, ranks)
        found: dict[str, Any] = {
            "loss": measured.loss,
            "grad_norm": measured.grad_norm,
            "skipped": sorted(skipped),
            "losses": [record.loss for record in records],
            "grad_norms": [record.grad_norm for record in records],
        }
        if weights is not None:
            dtype = device.compute_dtype(config.base_precision)
            found["missing"] = sorted(set(end) - set(weights))
            found["weights"] = dict(_weight_differences(start, end, weights, dtype))
        return found


@functools.cache
def reference(
    config: ResolvedConfig, ranks: int, on: torch.device, skipped: frozenset[int]
) -> tuple[list[parity.ReferenceStep], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Steps, initial and final parameters; ``config`` with what the reference does not read left at its
    default.
    """
    steps, model = parity.reference_steps(config, ranks, on, skipped)
    start = parity.reference_steps(dataclasses.replace(config, train_step=0), ranks, on)[1]
    return steps, *({name: p.detach().cpu() for name, p in m.named_parameters()} for m in (start, model))  # pyright: ignore


def _reference_key(config: ResolvedConfig) -> ResolvedConfig:
    names = (
        "precision",
        "batch_size",
        "grad_accum",
        "clip_grad_norm",
        "adam_eps",
        "lr",
        "train_step",
        "model_type",
        "num_layers",
        "seq_len",
        "num_heads",
        "device",
    )
    return TrainConfig(**{name: getattr(config, name) for name in names}, run_name="reference").resolve(config.device)


def double_the_scale_every_step(session: Session) -> None:
    """Not once in a thousand steps or two."""
    trainable: Any = session.trainable
    if hasattr(trainable, "booster"):
        trainable.loss_scaler()._growth_interval = 1
    else:
        trainable.loss_scaler.set_growth_interval(1)


# --- An overflow on one rank alone --------------------------------------------------------------------------


def _steps(session: Session, poisoned_rank: int | None) -> Iterator[StepRecord]:
    """``train_steps``, with an infinity in the gradients of ``poisoned_rank`` in one step."""
    poison = Poison() if poisoned_rank == session.device.rank else None
    if poison is not None:
        poison.mix_into(session)
    for record in train_steps(session):
        yield record
        if poison is not None:
            poison.armed = record.step == POISONED_STEP - 1


class Poison:
    """Makes this rank's gradients infinite while it is armed, before they are reduced over the copies.

    Where a copy of the model has several ranks, only a tensor whose gradient nobody else sees: what a backward
    pass hands from rank to rank would spread the infinity by itself.
    """

    def __init__(self) -> None:
        self.armed = False

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if self.armed else gradient

    def mix_into(self, session: Session) -> None:
        trainable: Any = session.trainable
        if session.config.model_parallel_size == 1:
            backward = trainable.backward
            trainable.backward = lambda loss: backward(self._spoil(loss))
            return
        if session.plan.pipeline:
            matrix = next(p for name, p in trainable.model.named_parameters() if name.endswith("mlp.c_fc.weight"))
            matrix.register_hook(self._spoil)
            return
        # Gemini has hooks of its own on its parameters, but the backward pass ends behind the embedding's output
        embedding: nn.Module = trainable.model.module.transformer.wte
        embedding.register_forward_hook(self._spoil_the_way_back)

    def _spoil_the_way_back(self, module: nn.Module, arguments: tuple, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(self._spoil)


# --- What ranks hold ----------------------------------------------------------------------------------------


def _spread(here: device.Device, rows: list[list[float]]) -> float:
    """How far numbers that should be equal on all ranks are apart, relatively (collective)."""
    mine = torch.tensor(rows, dtype=torch.float64, device=here.torch_device)
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return ((highest - lowest) / highest.abs().clamp_min(1e-30)).max().item()


def replica_difference(session: Session) -> float | None:
    """The largest relative difference between what two ranks hold of the same tensor (collective); None for a
    plan in which no two ranks hold the same.
    """
    prints = {key: _fingerprint(tensor) for key, tensor in _held(session).items()}
    every: list[Any] = [None] * session.device.world_size
    dist.all_gather_object(every, prints)
    first: dict[tuple, list[float]] = {}
    differences = []
    for key, one in (item for theirs in every for item in theirs.items()):
        other = first.setdefault(key, one)
        if other is not one:
            differences.append(max(abs(a - b) / max(abs(a), 1e-30) for a, b in zip(one, other, strict=True)))
    return max(differences, default=None)


def _held(session: Session) -> dict[tuple, torch.Tensor]:
    """This rank's tensors, by name and, where ranks hold different parts, the part."""
    trainable: Any = session.trainable
    at = session.place(session.device.rank)
    if session.plan.name == "Pytorch_FSDP":
        return {}
    if session.plan.placement:  # sharded, so only what the tensor-parallel ranks have twice can differ
        whole = trainable.model.state_dict(only_rank_0=False)
        return {(name,): tensor for name, tensor in whole.items() if session.config.tp_degree > 1}
    split = _tells_parts() if session.config.tp_degree > 1 else (lambda parameter: False)
    return {
        (name, at.pipeline, at.tensor if split(parameter) else None): parameter
        for name, parameter in trainable.model.named_parameters()
    }


def offloaded_share(session: Session) -> dict[str, float]:
    """Of the bytes of Gemini's master weights, the share that is on the host, and the largest chunk's."""
    trainable: Any = session.trainable
    masters = [chunk.paired_chunk for chunk in trainable.optimizer.chunk16_set]
    total = sum(chunk.chunk_mem for chunk in masters)
    away = sum(chunk.chunk_mem for chunk in masters if chunk.device_type == "cpu")
    return {"offloaded": away / total, "largest_chunk": max(chunk.chunk_mem for chunk in masters) / total}


def _tells_parts() -> Callable[[torch.Tensor], bool]:
    from commons.plans.colossal.faults.base import is_split

    return is_split


def _fingerprint(tensor: torch.Tensor) -> list[float]:
    values = tensor.detach().double().flatten()
    ramp = torch.linspace(1, 2, values.numel(), dtype=torch.float64, device=values.device)
    return [values.norm().item(), (values * ramp).sum().item()]


def _weight_differences(start: dict, end: dict, weights: dict, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """For every tensor, the distance from the reference's after training over the way that the reference's
    has gone.

    What rounding to ``dtype`` explains does not count: checkpoints of bf16 and fp16 plans are rounded.
    """
    half_ulp = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name, expected in end.items():
        way = expected - start[name]
        difference = (weights[name].float() - expected).abs() - half_ulp * expected.abs()
        difference.clamp_min_(0)
        if name.endswith("c_attn.bias"):
            # a constant added to all keys changes no softmax: this gradient is zero, and Adam makes noise of
            # its rounding
            difference, way = (torch.cat([tensor.chunk(3)[0], tensor.chunk(3)[2]]) for tensor in (difference, way))
        yield name, (difference.norm() / way.norm()).item()


def gathered_weights(session: Session, scratch: Path) -> dict[str, torch.Tensor] | None:
    """On rank 0 all parameters by their names in the bare model (collective).

    A plan of Colossal-AI gathers them by its own checkpoint, and saves its optimizer beside it.
    """
    trainable: Any = session.trainable
    if not hasattr(trainable, "booster"):
        named = {name.removeprefix("module."): p for name, p in trainable.model.named_parameters()}
        return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu() for name, p in named.items()}
    path = scratch / "model.pt"
    trainable.booster.save_model(trainable.model, str(path), shard=False)
    trainable.booster.save_optimizer(trainable.optimizer, str(scratch / OPTIMIZER_FILE), shard=False)
    dist.barrier()
    return torch.load(path, weights_only=False, map_location="cpu") if session.device.rank == 0 else None


# --- What a later token may not touch -----------------------------------------------------------------------


@torch.no_grad()
def leak_from_last_token(session: Session) -> float:
    """How far another last token moves any earlier logit (collective)."""
    here = session.device
    tokens = torch.arange(4 * 64, device=here.torch_device).reshape(4, 64) % session.shape.vocab
    changed = tokens.clone()
    changed[:, -1] += 1
    before, after = logits(session, tokens), logits(session, changed)
    moved = -1.0 if before is None or after is None else (before - after)[:, :-1].abs().max().item()
    every: list[Any] = [None] * here.world_size
    dist.all_gather_object(every, moved)
    return max(every)


def logits(session: Session, tokens: torch.Tensor) -> torch.Tensor | None:
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


def main(job_path: str, change: Callable[[], None] = lambda: None, *, go_on: bool = False) -> None:
    """Run a job's cases.

    Args:
        change: what the tests take out of the suite first, to see a fault.
        go_on: to the next case after one that fails on all ranks alike.
    """
    job = Job.read(job_path)
    here = process_group.launch(job.device, COLLECTIVE_SECONDS)
    change()
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        worker = Worker(job, here, Path(shared[0]))
        for number, case in enumerate(Case(**fields) for fields in job.cases):
            faulthandler.dump_traceback_later(HANG_SECONDS)  # where a case hangs that the tool is about to end
            try:
                found = worker.run(case, number)
            except (Exception, SystemExit) as error:
                if not go_on:
                    raise
                last = traceback.extract_tb(error.__traceback__)[-1].name
                found = {"error": f"{type(error).__name__} in {last}: {error}"}
            if here.rank == 0:
                with Path(job.results).open("a") as results:
                    results.write(json.dumps(found) + "\n")
            faulthandler.cancel_dump_traceback_later()
            here.synchronize()
            dist.barrier()  # nobody takes its process groups down while another one still uses them
            worker.session = None
            _forget()
    leaving.leave(0)  # the interpreter's own end can abort a process that is done and well


def _forget() -> None:
    """Make room for the next model: its memory, its process groups, its compiled functions."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else one function's variants would reach the limit of recompilations


if __name__ == "__main__":
    main(sys.argv[1])
