"""Where Colossal-AI's plans keep their training states: a holder for each kind of optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelNaiveOptimizer
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from colossalai.zero.low_level import LowLevelZeroOptimizer

from commons.distributed.layout import Place
from commons.plans.states import HEAD, Held, StateHolder

MOMENTS = ("exp_avg", "exp_avg_sq")


class _HybridAdamHolder:
    """What the holders share: HybridAdam's states, an entry a parameter.

    Args:
        model, optimizer: as the plugin has wrapped them.
        place: of this rank.
        copies: data-parallel ranks in all.
    """

    def __init__(self, model: Any, optimizer: Any, place: Place, copies: int) -> None:
        self._model, self._optimizer = model, optimizer
        self._place, self._copies = place, copies
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    @property
    def _states(self) -> Any:
        return self._optimizer.optim.state

    def _moments(self, key: Any) -> dict[str, torch.Tensor]:
        """Of one parameter, made as HybridAdam's first step would make them."""
        state = self._states[key]
        if not state:
            state["step"] = 0
            for name in MOMENTS:
                state[name] = torch.zeros_like(key, requires_grad=False)
        return {name: state[name] for name in MOMENTS}

    def _writes(self, name: str) -> bool:
        """A pipeline's last stage has a token table of its own, tied to the first stage's, which writes it."""
        return not (name.endswith(HEAD) and self._place.pipeline > 0)

    def updates(self) -> int:
        return next((int(state["step"]) for state in self._states.values() if state), 0)

    def set_updates(self, updates: int) -> None:
        for state in self._states.values():
            state["step"] = updates


class WholeHolder(_HybridAdamHolder):
    """Hybrid without ZeRO: all copies of the model hold the same; masters beside the parameters, or the parameters
    themselves in fp32.
    """

    def held(self) -> Iterator[Held]:
        masters: Any = getattr(self._optimizer, "working_to_master_map", {})
        for index, (name, parameter) in enumerate(self._model.named_parameters()):
            master = masters.get(parameter, parameter)
            tensors = {"master": master.detach(), **self._moments(master)}
            writes = self._writes(name) and index % self._copies == self._place.data
            yield Held(name, tuple(parameter.shape), 0, tensors, writes)

    def refresh(self) -> None:
        with torch.no_grad():
            for parameter, master in getattr(self._optimizer, "working_to_master_map", {}).items():
                parameter.copy_(master)


class ZeroHolder(_HybridAdamHolder):
    """ZeRO-1 and ZeRO-2: a flat shard of every parameter, the last ones padded."""

    def held(self) -> Iterator[Held]:
        for parameter, master in self._pairs():
            name, size = self._names[id(parameter)], master.numel()
            begin = min(self._place.data * size, parameter.numel())
            kept = min(size, parameter.numel() - begin)
            tensors = {"master": master.detach(), **self._moments(master)}
            flat = {kind: tensor.view(-1)[:kept] for kind, tensor in tensors.items()}
            yield Held(name, tuple(parameter.shape), begin, flat, self._writes(name))

    def refresh(self) -> None:
        """Gather the shards as the optimizer's step does (collective)."""
        optimizer = self._optimizer
        with torch.no_grad():
            for parameter, master in self._pairs():
                padded = optimizer._working_param_to_padded_working_param[parameter]
                shard = master.to(padded.device).to(padded.dtype)
                dist.all_gather_into_tensor(padded, shard, group=optimizer.param_to_pg[parameter])
                parameter.copy_(padded[: parameter.numel()].view(parameter.shape))

    def _pairs(self) -> Iterator[tuple[Any, Any]]:
        """Parameters and this rank's shards of their masters."""
        for index, parameters in self._optimizer._working_param_groups.items():
            yield from zip(parameters, self._optimizer._master_param_groups_of_current_rank[index], strict=True)


class GeminiHolder(_HybridAdamHolder):
    """Gemini: the masters are ranges of fp32 chunks, the moments lie in runs of the same order."""

    def held(self) -> Iterator[Held]:
        optimizer = self._optimizer
        real = {id(fake): optimizer.id_to_real_params[i] for i, fake in optimizer.id_to_fake_params.items()}
        offsets = {id(fake): optimizer.get_offsets(i)[1] for i, fake in optimizer.id_to_fake_params.items()}
        for run in optimizer.chunk_adam.runs:
            sizes = [size for _, size in run.stand_ins]
            columns = zip(*(flat.split(sizes) for flat in (run.masters(), *run.moments(self._states))), strict=True)
            for (stand_in, _), (master, *moments) in zip(run.stand_ins, columns, strict=True):
                parameter = real[id(stand_in)]
                tensors = {"master": master, **dict(zip(MOMENTS, moments, strict=True))}
                yield Held(
                    self._names[id(parameter)],
                    _plain_shape(parameter),
                    offsets[id(stand_in)],
                    tensors,
                    writes=not run.chunk.keep_gathered or run.chunk.pg_rank == 0,
                )

    def refresh(self) -> None:
        for run in self._optimizer.chunk_adam.runs:
            run.write_weights()


def _plain_shape(parameter: Any) -> tuple[int, ...]:
    with torch._C.DisableTorchFunctionSubclass():
        return tuple(parameter.shape)


# in this order: Hybrid's optimizers are of these kinds too
KINDS: tuple[tuple[type, Callable[..., StateHolder]], ...] = (
    (GeminiOptimizer, GeminiHolder),
    (LowLevelZeroOptimizer, ZeroHolder),
    (MixedPrecisionOptimizer, WholeHolder),
    (HybridParallelNaiveOptimizer, WholeHolder),
)


def holder_of(model: Any, optimizer: Any, place: Place, copies: int) -> StateHolder:
    """The holder of a plugin's optimizer."""
    return next(holder for kind, holder in KINDS if isinstance(optimizer, kind))(model, optimizer, place, copies)
