"""Saving Gemini's optimizer under tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.checkpoint_io.utils import gather_distributed_param
from colossalai.tensor.d_tensor import api, is_distributed_tensor
from colossalai.zero.gemini import gemini_optimizer
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from torch import nn

from commons.plans.colossal.faults.base import (
    DATA_GROUP,
    TENSOR_RANKS,
    UpstreamFault,
    is_split,
    split_tensor,
    two_tensor_ranks,
)

STATES = ("exp_avg", "exp_avg_sq")


class SplitStatesNotSaved(UpstreamFault):
    file = "zero/gemini/gemini_optimizer.py"
    function = "GeminiOptimizer.collect_states"
    symptom = (
        "with tp_size > 1 save_optimizer fails with an assertion, as the step number is taken for a split tensor;"
        " behind it the gathered states are dropped and each file would hold one rank's part"
    )

    def seen(self) -> bool:
        """Collect the states of a split parameter: upstream fails, or would return this rank's part."""
        part, stand_in = split_tensor((0.0, 0.0, 0.0)), nn.Parameter(torch.empty(0))
        own = torch.tensor([1.0, 2.0, 3.0])
        info = SimpleNamespace(offset=0, end=len(part))
        chunk = SimpleNamespace(
            torch_pg=DATA_GROUP,
            keep_gathered=False,
            tensors_info={part: info},
            shard_begin=0,
            shard_end=len(part),
            shard_size=len(part),
            pg_rank=0,
        )
        optimizer: Any = GeminiOptimizer.__new__(GeminiOptimizer)  # without a model
        optimizer.chunk_manager = SimpleNamespace(get_chunk=lambda param: chunk)
        optimizer.optim = SimpleNamespace(state={stand_in: {"step": 1, **{name: own.clone() for name in STATES}}})
        optimizer.id_to_real_params, optimizer.id_to_fake_params = {0: part}, {0: stand_in}
        optimizer.param_to_chunk16 = {stand_in: chunk}
        optimizer.param_to_range = {stand_in: (0, len(part))}
        optimizer.params_info = {"id2shape": {0: torch.Size([len(part) * TENSOR_RANKS])}}
        with two_tensor_ranks():
            try:
                collected = optimizer.collect_states(0)
            except (AssertionError, AttributeError, RuntimeError):
                return True
        return not all(collected[name].tolist() == own.tolist() * TENSOR_RANKS for name in STATES)

    def mend(self) -> None:
        upstream = GeminiOptimizer.collect_states

        def collect_states(self: Any, param_id: int, only_rank_0: bool = True) -> dict:
            with _nothing_is_split():
                states = upstream(self, param_id, only_rank_0)
            param = self.id_to_real_params[param_id]
            if not is_split(param):
                return states
            return {name: state if name == "step" else _gather_like(param, state) for name, state in states.items()}

        GeminiOptimizer.collect_states = collect_states


@contextmanager
def _nothing_is_split() -> Iterator[None]:
    """Have the optimizer's code see every parameter as whole: it then returns this tensor-parallel rank's
    part.
    """
    names = ("is_distributed_tensor", "is_customized_distributed_tensor")
    originals = {name: getattr(gemini_optimizer, name) for name in names}
    for name in names:
        setattr(gemini_optimizer, name, lambda tensor: False)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gemini_optimizer, name, original)


def _gather_like(param: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The whole of an optimizer state, on the host, from the parts that lie like those of ``param``
    (collective over tensor ranks).
    """
    part = state.reshape(param.shape).to(get_accelerator().get_current_device())
    if is_distributed_tensor(param):
        mesh, spec = api.get_device_mesh(param), api.get_sharding_spec(param)
        part = api.init_as_dtensor(part, device_mesh=mesh, sharding_spec=spec, global_shape=api.get_global_shape(param))
    else:
        api.init_tensor_as_customization_distributed(part, shard_fn=param.shard_fn, gather_fn=param.gather_fn)  # pyright: ignore
    return gather_distributed_param(part, keep_vars=False).cpu()
