"""Gemini's optimizer step, a run of a chunk's memory at a time instead of a parameter at a time.

Colossal-AI's ``GeminiOptimizer`` gives every parameter a stand-in, points its data and gradient at slices of the
chunks in every step, hands all of them to Adam, and afterwards copies the fp32 master weights into the chunks of low
precision. That is hundreds of slices in Python, long enough to leave a GPU waiting, and a pass over the weights that
Adam has just had in its hands. What belongs together lies side by side in a chunk, so here a chunk is updated in one or
two runs (matrices decay, vectors do not), and the update itself writes the weights that the next forward pass reads.

The stand-ins stay as the keys of the optimizer's states, whose tensors are views of the runs' moments: checkpoints are
upstream's. Two faults of upstream have no place here: bf16 gradients on the host are divided by the clip factor like
all others (``HybridAdam.step`` ignores it there), and a step skipped for an fp16 overflow ends the accumulation too
(else its infinities would stay in the accumulated gradients and every later step would be skipped).

``GeminiOptimizer.step``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/gemini_optimizer.py
``HybridAdam.step``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/nn/optimizer/hybrid_adam.py
``Chunk.optim_update``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/chunk.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from colossalai.zero.gemini.chunk import Chunk

from commons.plans.colossal.adam_kernels import AdamSettings, AdamSlot, CompiledAdam, SuiteAdam, fused_adam


class Run:
    """Neighbouring parameters of one chunk and one parameter group, as far as this rank updates them.

    Attributes:
        chunk: the one of low precision; its ``paired_chunk`` has the fp32 masters.
        group: index of the parameter group.
        begin, end: elements of the chunk's payload.
        stand_ins: upstream's keys of the optimizer's states, in the order of memory, and the elements of each.
    """

    def __init__(self, chunk: Chunk, group: int, parts: list[tuple[int, int, torch.nn.Parameter]]) -> None:
        self.chunk, self.group = chunk, group
        self.begin, self.end = parts[0][0], parts[-1][1]
        self.stand_ins = [(stand_in, end - begin) for begin, end, stand_in in parts]
        self._moments: list[torch.Tensor] = []
        self._views: list[tuple[torch.Tensor, ...]] = []

    def masters(self) -> torch.Tensor:
        """The fp32 weights, flat. They stay where they are: only a gpu_margin_mem_ratio above 0, which the plan does
        not give, would move them under placement auto (``GeminiOptimizer._maybe_move_fp32_params``).
        """
        paired: Any = self.chunk.paired_chunk
        return paired.payload[self.begin : self.end]

    def moments(self, states: Any) -> list[torch.Tensor]:
        """First and second moment, flat, on the masters' device; what a checkpoint has put in their place is taken
        over.
        """
        held = [states[stand_in] for stand_in, _ in self.stand_ins]
        if not self._views or any(
            state.get("exp_avg") is not views[0] or state.get("exp_avg_sq") is not views[1]
            for state, views in zip(held, self._views, strict=True)
        ):
            self._moments = [torch.zeros_like(self.masters()) for _ in range(2)]
            sizes = [size for _, size in self.stand_ins]
            self._views = list(zip(*(moment.split(sizes) for moment in self._moments), strict=True))
            for state, views in zip(held, self._views, strict=True):
                state.setdefault("step", 0)
                for name, view in zip(("exp_avg", "exp_avg_sq"), views, strict=True):
                    if name in state:
                        view.copy_(state[name].view(-1))
                    state[name] = view
        return self._moments

    def slot(self, states: Any, reuses_chunk: bool) -> AdamSlot:
        """What an update reads and writes. ``reuses_chunk``: gradients lie where the weights are to be written."""
        weights = self.chunk.payload[self.begin : self.end]
        gradients = weights if reuses_chunk else self.chunk.grad_chunk.payload[self.begin : self.end]  # pyright: ignore
        exp_avg, exp_avg_sq = self.moments(states)
        return AdamSlot(self.masters(), gradients, exp_avg, exp_avg_sq, weights)

    def write_weights(self) -> None:
        """Make the weights of the masters, as an update does; the chunk is not gathered."""
        with torch.no_grad():
            self.chunk.payload[self.begin : self.end].copy_(self.masters())
        _weights_are_written(self.chunk)


def _weights_are_written(chunk: Chunk) -> None:
    """The shard, wherever it lies, holds the new weights: nothing is left to be copied."""
    chunk.optim_sync_flag = True
    chunk.cpu_vis_flag = chunk.device_type == "cpu"


def runs_of(optimizer: Any) -> Iterator[Run]:
    """All runs of a ``GeminiOptimizer``, chunk by chunk."""
    parts = [
        (optimizer.param_to_chunk16[stand_in], index, *optimizer.param_to_range[stand_in], stand_in)
        for index, group in enumerate(optimizer.param_groups)
        for stand_in in group["params"]
    ]
    order = {chunk: number for number, chunk in enumerate(dict.fromkeys(part[0] for part in parts))}
    parts.sort(key=lambda part: (order[part[0]], part[2]))
    for (chunk, index), neighbours in groupby(parts, key=lambda part: part[:2]):
        run: list[tuple[int, int, torch.nn.Parameter]] = []
        for _, _, begin, end, stand_in in neighbours:
            if run and run[-1][1] != begin:
                yield Run(chunk, index, run)
                run = []
            run.append((begin, end, stand_in))
        yield Run(chunk, index, run)


class ChunkAdam:
    """What takes the place of ``GeminiOptimizer.step``.

    Args:
        optimizer: a ``GeminiOptimizer``; it keeps the groups, states, loss scale and gradient norm.
        adam: the optimizer inside of it.
        compiled: update by one compiled pass where memory is a GPU's.

    Attributes:
        runs: all of this rank's, chunk by chunk.
        update_on_gpu: the update of the slots of one parameter group, where memory is a GPU's.
    """

    def __init__(self, optimizer: Any, adam: SuiteAdam, *, compiled: bool) -> None:
        self._optimizer, self._adam = optimizer, adam
        self._chunks = optimizer.module.chunk_manager
        self.runs = list(runs_of(optimizer))
        self.update_on_gpu: Callable[[Sequence[AdamSlot], AdamSettings], None]
        self.update_on_gpu = CompiledAdam() if compiled else fused_adam

    @torch.no_grad()
    def step(self) -> None:
        """Unscale, clip and update (collective), or leave the step out if an fp16 gradient overflowed."""
        optimizer = self._optimizer
        if optimizer.mix_precision_mixin.should_skip_step():
            self._leave_out()
        else:
            self._update(optimizer._get_combined_scale())
            self._adam.updates += 1
            optimizer._register_states()
        optimizer.zero_grad()
        self._chunks.accumulating_grads = False

    def _update(self, div_scale: float) -> None:
        states, groups = self._adam.state, self._optimizer.param_groups
        by_kind: dict[tuple[int, str], list[AdamSlot]] = {}
        for run in self.runs:
            slot = run.slot(states, self._chunks.reuse_fp16_chunk)
            by_kind.setdefault((run.group, slot.param.device.type), []).append(slot)
            for stand_in, _ in run.stand_ins:
                states[stand_in]["step"] += 1
        for (index, device_type), slots in by_kind.items():
            group = groups[index]
            settings = AdamSettings(
                step=states[group["params"][0]]["step"],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled_weight_decay=self._adam.adamw_mode,
                div_scale=div_scale,
            )
            (self.update_on_gpu if device_type == "cuda" else fused_adam)(slots, settings)
        for chunk in self._optimizer.chunk16_set:
            _weights_are_written(chunk)

    def _leave_out(self) -> None:
        """Forget the gradients; where they lie in the weights' place, write the weights there again."""
        self._optimizer._clear_global_norm()
        if self._chunks.reuse_fp16_chunk:
            self._optimizer._update_fp16_params()
