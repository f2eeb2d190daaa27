"""The gradient norm that clipping divides by, under tensor parallelism: each element counted once."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from colossalai.booster.plugin import hybrid_parallel_plugin
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelNaiveOptimizer
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from torch import nn

from commons.ops.gradient_norm import sum_of_squares
from commons.plans.colossal.faults.base import (
    DATA_GROUP,
    SPLIT_GRADIENT,
    TENSOR_GROUP,
    TENSOR_RANKS,
    WHOLE_GRADIENT,
    WHOLE_NORM,
    UpstreamFault,
    is_split,
    split_tensor,
    two_tensor_ranks,
)


class GeminiNormOfOnePart(UpstreamFault):
    file = "zero/gemini/gemini_optimizer.py"
    function = "GeminiOptimizer._calc_global_norm"
    symptom = "with tp_size > 1 every tensor-parallel rank clips by the norm of its own part of the gradient"

    def seen(self) -> bool:
        """Ask for the norm of a split and a whole parameter's gradients in one chunk."""
        split, whole = split_tensor(SPLIT_GRADIENT), torch.tensor(WHOLE_GRADIENT)
        stand_ins = [nn.Parameter(torch.empty(0)) for _ in range(2)]
        payload = torch.tensor([*SPLIT_GRADIENT, *WHOLE_GRADIENT])
        chunk = SimpleNamespace(
            payload=payload, is_gathered=False, torch_pg=DATA_GROUP, l2_norm=payload.square().sum().item()
        )
        manager = SimpleNamespace(reuse_fp16_chunk=True, overflow_counter=torch.zeros(1))
        optimizer: Any = GeminiOptimizer.__new__(GeminiOptimizer)  # without a model
        optimizer.optim = SimpleNamespace(param_groups=[{"params": stand_ins}])
        optimizer.module = SimpleNamespace(chunk_manager=manager, zero_group=DATA_GROUP)
        optimizer.chunk_manager = manager
        optimizer.chunk16_set = [chunk]
        optimizer.tp_size, optimizer.tp_group = TENSOR_RANKS, TENSOR_GROUP
        optimizer.id_to_real_params = dict(enumerate((split, whole)))
        optimizer.id_to_fake_params = dict(enumerate(stand_ins))
        optimizer.param_to_chunk16 = dict.fromkeys(stand_ins, chunk)
        optimizer.param_to_range = {stand_ins[0]: (0, len(split)), stand_ins[1]: (len(split), len(payload))}
        with two_tensor_ranks():
            return not math.isclose(optimizer._calc_global_norm(), WHOLE_NORM, rel_tol=1e-5)

    def mend(self) -> None:
        upstream = GeminiOptimizer._calc_global_norm

        def calc_global_norm(self: Any) -> float:
            return _calc_global_norm(self) if self.tp_size > 1 else upstream(self)

        GeminiOptimizer._calc_global_norm = calc_global_norm


def _calc_global_norm(optimizer: Any) -> float:
    """L2 norm of the whole gradient (collective), equal on all ranks: every element counted once, wherever it
    lies.
    """
    real = {id(fake): optimizer.id_to_real_params[i] for i, fake in optimizer.id_to_fake_params.items()}
    tp_size, zero_size = optimizer.tp_size, dist.get_world_size(optimizer.module.zero_group)
    norms: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
    for fake in (fake for group in optimizer.param_groups for fake in group["params"]):
        chunk = optimizer.param_to_chunk16[fake]
        grad_chunk = chunk if optimizer.chunk_manager.reuse_fp16_chunk else chunk.grad_chunk
        copies = (1 if is_split(real[id(fake)]) else tp_size) * (zero_size if grad_chunk.is_gathered else 1)
        begin, end = optimizer.param_to_range[fake]
        gradient = grad_chunk.payload[begin:end]
        norms.setdefault((gradient.device, copies), []).append(gradient)
    total = 0.0
    for (device, copies), grads in norms.items():
        total += sum_of_squares(grads, device).item() / copies
    buffer = torch.tensor(total, dtype=torch.float64, device=optimizer.module.chunk_manager.overflow_counter.device)
    dist.all_reduce(buffer, group=optimizer.module.zero_group)
    dist.all_reduce(buffer, group=optimizer.tp_group)
    optimizer._clear_global_norm()
    return math.sqrt(buffer.item())


class HybridNormCountsPartsAsCopies(UpstreamFault):
    file = "booster/plugin/hybrid_parallel_plugin.py"
    function = "_compute_grad_norm of its three optimizers"
    symptom = (
        "with tp_size > 1 the fused query-key-value and first feed-forward layers, which are split by a"
        " function of their own, count as copies: the norm is too small and clipping too weak"
    )

    def seen(self) -> bool:
        """Ask for the norm of a split and a whole parameter's gradients."""
        optimizer: Any = HybridParallelNaiveOptimizer.__new__(HybridParallelNaiveOptimizer)  # without a model
        optimizer.tp_size, optimizer.tp_pg, optimizer.pp_size = TENSOR_RANKS, TENSOR_GROUP, 1
        pairs = [
            (split_tensor(SPLIT_GRADIENT), torch.tensor(SPLIT_GRADIENT)),
            (torch.tensor(WHOLE_GRADIENT), torch.tensor(WHOLE_GRADIENT)),
        ]
        with two_tensor_ranks():
            return not math.isclose(optimizer._compute_grad_norm(pairs), WHOLE_NORM, rel_tol=1e-5)

    def mend(self) -> None:
        hybrid_parallel_plugin.is_distributed_tensor = is_split
