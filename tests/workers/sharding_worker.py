"""What every plan keeps on each of two ranks, and what it sends per step. For torchrun.

torchrun --nproc_per_node 2 tests/workers/sharding_worker.py "FLAGS" "FLAGS" ...

Each rank writes a line ``SEEN {...}`` per case: see Seen. Nothing is judged here: tests/plans/test_sharding.py does it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from commons.cli.flags import read_config
from commons.distributed import process_group
from commons.distributed.device import Device
from commons.lifecycle import leaving
from commons.training.loop import train_steps
from commons.training.session import Session, build_session

COMMON = "--model_type gpt2_tiny --batch_size 2 --seq_len 16 --train_step 3 --warmup_step 1 --run_name unused"
SMALL = 64  # collectives of fewer elements are norms, losses and flags


@dataclass
class Seen:
    """One rank's second step, in elements; a record's own all-gather and other small collectives are left out.

    Attributes:
        parameters, gradients, states: held as the optimizer begins, the states being one of Adam's two means.
        host_parameters, host_states: of these, on the host; Gemini's only.
        all_reduced, scattered: gradients that went into all-reduces and into reduce-scatters.
        gathered, broadcast: parameters that came out of all-gathers and broadcasts.
        ahead, most_ahead: Gemini's gathers that were begun ahead of their use, and how many at most at one time.
    """

    rank: int
    flags: str
    parameters: int = 0
    gradients: int = 0
    states: int = 0
    host_parameters: int = 0
    host_states: int = 0
    all_reduced: int = 0
    scattered: int = 0
    gathered: int = 0
    broadcast: int = 0
    ahead: int = 0
    most_ahead: int = 0


def elements(tensors: Iterable[Any]) -> int:
    """On this rank, of whole tensors and of DTensors' parts; memory that two of them share counts once."""
    parts = [each.to_local() if hasattr(each, "to_local") else each for each in tensors if each is not None]
    return sum({part.data_ptr(): part.numel() for part in parts if part.numel()}.values())


def look_at_model(seen: Seen, trainable: Any) -> None:
    """torch's plans: parameters and gradients where autograd has them."""
    seen.parameters = elements(trainable.model.parameters())
    seen.gradients = elements(parameter.grad for parameter in trainable.model.parameters())


def look_at_zero(seen: Seen, trainable: Any) -> None:
    """Colossal-AI's ZeRO: gradients in its own store, those of every rank or this rank's alone."""
    look_at_model(seen, trainable)
    stores = {id(store): store for store in getattr(trainable.optimizer, "pid_to_grad_store", {}).values()}
    for store in stores.values():
        slices = [each for group in store._grads_of_params.values() for found in group.values() for each in found]
        seen.gradients += elements(slices)


def look_at_gemini(seen: Seen, trainable: Any) -> None:
    """Gemini: all in chunks, whose gradients take the place of parameters where nothing is accumulated."""
    chunks = trainable.optimizer.chunk16_set
    seen.gradients = sum((chunk.grad_chunk or chunk).payload.numel() for chunk in chunks)
    masters = [chunk.paired_chunk for chunk in chunks]
    seen.host_states = sum(chunk.payload.numel() for chunk in masters if chunk.device_type == "cpu")


def look_at_chunks(seen: Seen, trainable: Any) -> None:
    """Where Gemini keeps parameters between two steps."""
    chunks = trainable.optimizer.chunk16_set
    seen.parameters = sum(chunk.payload.numel() for chunk in chunks)
    seen.host_parameters = sum(chunk.payload.numel() for chunk in chunks if chunk.device_type == "cpu")


def states_of(trainable: Any) -> int:
    optimizer = getattr(trainable, "adam", None) or trainable.optimizer
    inner = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer keeps this rank's part in it
    return elements(state.get("exp_avg") for state in inner.state.values())


def count_ahead(seen: Seen, manager: Any) -> None:
    add_work = manager.add_work

    def counted(chunk: Any, work: Any) -> None:
        add_work(chunk, work)
        seen.ahead += 1
        seen.most_ahead = max(seen.most_ahead, len(manager.async_works))

    manager.add_work = counted


def count_traffic(seen: Seen, events: Iterable[Any]) -> None:
    """From the profiler's events, which has those of C++ too: what gloo was asked for and for how much of it."""

    def total(name: str, argument: int) -> int:
        shapes = [event.input_shapes[argument] for event in events if event.name == name]
        return sum(size for size in map(math.prod, shapes) if size > SMALL)

    events = list(events)
    seen.scattered = total("c10d::_reduce_scatter_base_", 1)
    seen.gathered = total("c10d::_allgather_base_", 0)
    seen.broadcast = total("gloo:broadcast", 0)
    seen.all_reduced = total("gloo:all_reduce", 0) - seen.scattered  # of which gloo makes all-reduces


def look(flags: str, here: Device) -> Seen:
    session = build_session(read_config([*COMMON.split(), *flags.split()]), here)
    seen, trainable = Seen(here.rank, flags), session.trainable
    is_gemini = session.plan.name == "CAI_Gemini"
    if is_gemini:
        count_ahead(seen, trainable.model.gemini_manager)
    look_at: Callable[[Seen, Any], None] = look_at_gemini if is_gemini else look_at_zero
    steps = train_steps(session)
    next(steps)  # the first one sets up buckets and the order of Gemini's chunks
    seen.ahead = seen.most_ahead = 0
    _looked_at_each_step(session, lambda: look_at(seen, trainable))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        next(steps)
    count_traffic(seen, profiler.events() or ())
    if is_gemini:
        look_at_chunks(seen, trainable)
    seen.states = states_of(trainable)
    return seen


def _looked_at_each_step(session: Session, look: Callable[[], None]) -> None:
    trainable: Any = session.trainable
    step = trainable.step

    def looked_at() -> Any:
        look()
        return step()

    trainable.step = looked_at


def main() -> None:
    here = process_group.launch("cpu", 60)
    for flags in sys.argv[1:]:
        line = f"SEEN {json.dumps(dataclasses.asdict(look(flags, here)))}\n"
        os.write(1, line.encode())  # whole, beside the other rank's
        torch.distributed.barrier()
    leaving.leave(0)


if __name__ == "__main__":
    main()
