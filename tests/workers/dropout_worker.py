"""Trains under dropout, and trains the same model on one rank that drops the same elements.

torchrun --nproc_per_node 2 tests/workers/dropout_worker.py results.jsonl "FLAGS" "FLAGS" ...

A line of JSON per case, written by rank 0: every step's loss and gradient norm, those of the reference, how far the
ranks' copies of one tensor are apart after training, and what each rank's generators would draw before it.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks.parity_worker import replica_difference
from commons.cli.flags import read_config
from commons.config.resolved import ResolvedConfig
from commons.data.random_tokens import random_tokens
from commons.distributed import device, process_group
from commons.distributed.layout import Place
from commons.distributed.seeding import seed_generators
from commons.lifecycle import leaving
from commons.model.initial_weights import decay_groups, seeded_init_
from commons.training.loop import train_steps
from commons.training.parity import with_known_norms
from commons.training.session import Session, build_session
from model_zoo import build_model

COMMON = "--model_type gpt2_tiny --batch_size 4 --seq_len 64 --train_step 5 --warmup_step 1 --lr 1e-2 --dropout 0.1"


# --- One rank that drops what all ranks drop ----------------------------------------------------------------


class Dice:
    """The host's generator as each copy of the model and each pipeline stage has it, in one process."""

    def __init__(self, config: ResolvedConfig, copies: int) -> None:
        self.copy = 0
        self._states: dict[tuple[int, int], torch.Tensor] = {}
        for copy in range(copies):
            for stage in range(config.pp_degree):
                seed_generators(config.seed, Place(data=copy, pipeline=stage, tensor=0))
                self._states[copy, stage] = torch.get_rng_state()

    @contextmanager
    def at(self, stage: int) -> Iterator[None]:
        torch.set_rng_state(self._states[self.copy, stage])
        yield
        self._states[self.copy, stage] = torch.get_rng_state()


class ReplayedDropout(nn.Module):
    """Dropout as ``parts`` ranks do it, each on its own slice of dimension ``dim``."""

    def __init__(self, p: float, dice: Dice, stage: int, dim: int, parts: int) -> None:
        super().__init__()
        self.p, self._dice, self._stage, self._dim, self._parts = p, dice, stage, dim, parts

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        with self._dice.at(self._stage):
            if self._parts == 1:
                return functional.dropout(whole, self.p)
            seeds = torch.randint(2**62, (self._parts,))
            after = torch.get_rng_state()
            slices = []
            for seed, part in zip(seeds, whole.chunk(self._parts, self._dim), strict=True):
                torch.manual_seed(int(seed))
                slices.append(functional.dropout(part.contiguous(), self.p))
            torch.set_rng_state(after)
            return torch.cat(slices, self._dim)


def replay(model: Any, config: ResolvedConfig, dice: Dice) -> None:
    """Take ReplayedDropout for every dropout of a ``GPT2LMHeadModel``."""
    tp = config.tp_degree
    pieces = tp if config.sequence_parallel == "on" else 1
    blocks = model.transformer.h

    def dropout(stage: int, dim: int = 0, parts: int = 1) -> ReplayedDropout:
        return ReplayedDropout(config.dropout, dice, stage, dim, parts)

    model.transformer.drop = dropout(0)
    for index, block in enumerate(blocks):
        stage = index * config.pp_degree // len(blocks)
        block.attn.attn_dropout = dropout(stage, 1, tp)  # [batch, heads, sequence, sequence]
        block.attn.resid_dropout = dropout(stage, 1, pieces)  # [batch, sequence, width]
        block.mlp.dropout = dropout(stage, 1, pieces)


def reference(config: ResolvedConfig, copies: int) -> dict[str, list[float]]:
    """Losses and gradient norms of one fp32 process."""
    model = build_model(config.shape(), attention="eager", dropout=config.dropout)
    seeded_init_(model, config.seed, torch.device("cpu"), device.compute_dtype(config.base_precision))
    dice = Dice(config, copies)
    replay(model, config, dice)
    adam = torch.optim.AdamW(
        decay_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
    )
    streams = [
        random_tokens(
            batch_size=config.batch_size,  # pyright: ignore
            seq_len=config.seq_len,  # pyright: ignore
            vocab=config.shape().vocab,
            seed=config.seed,
            data_parallel_rank=copy,
            data_parallel_size=copies,
            device=torch.device("cpu"),
        )
        for copy in range(copies)
    ]
    microbatches = config.num_microbatches if config.pp_degree > 1 else 1
    parts = copies * microbatches  # pyright: ignore
    losses, norms = [], []
    for _ in range(config.train_step):
        total = 0.0
        for dice.copy, stream in enumerate(streams):
            for tokens in next(stream).chunk(microbatches):  # pyright: ignore
                loss = model(input_ids=tokens, labels=tokens).loss / parts
                loss.backward()
                total += loss.item()
        losses.append(total)
        gradients = [param.grad.double().flatten() for param in model.parameters()]  # pyright: ignore
        norms.append(torch.cat(gradients).norm().item())
        adam.step()
        adam.zero_grad()
    return {"losses": losses, "grad_norms": norms}


# --- The ranks ----------------------------------------------------------------------------------------------


def draws(session: Session) -> list[list[float]]:
    """What every rank's generators would draw next, by rank (collective); they are left as they were."""
    host, pythons, numpys = torch.get_rng_state(), random.getstate(), np.random.get_state()
    mine = [torch.rand(()).item(), random.random(), float(np.random.rand())]
    torch.set_rng_state(host)
    random.setstate(pythons)
    np.random.set_state(numpys)
    every: list[Any] = [None] * session.device.world_size
    dist.all_gather_object(every, mine)
    return every


def run(flags: str, here: device.Device) -> dict:
    """Train one case (collective)."""
    config = with_known_norms(read_config(shlex.split(f"{COMMON} --run_name unused --device cpu {flags}")))
    session = build_session(config, here)
    drawn = draws(session)
    records = list(train_steps(session))
    found = {
        "flags": flags,
        "draws": drawn,
        "losses": [record.loss for record in records],
        "grad_norms": [record.grad_norm for record in records],
        "replica_difference": replica_difference(session),
    }
    if here.rank == 0:
        found["reference"] = reference(config, config.data_parallel_size(here.world_size))
    return found


def main(results: Path, cases: list[str]) -> None:
    here = process_group.launch("cpu", 120.0)
    for flags in cases:
        found = run(flags, here)
        if here.rank == 0:
            with results.open("a") as file:
                file.write(json.dumps(found) + "\n")
        dist.barrier()
    leaving.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
