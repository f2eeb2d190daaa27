"""What a transformer block keeps for its backward pass, and what it computes again: ``--activation_checkpointing``.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", keep every block's input alone ("on"). Korthikanti et
al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5, keep what is dear to compute and
recompute what is cheap. Here "selective" keeps the results of matrix products with weights and of fused attention, nine
tensors of the size of the hidden states a block beside its input; norms, GELU and what a residual needs are computed
again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

MODES = ("off", "selective", "on")


def checkpoint_arguments(mode: str, *, compiled: bool = False) -> dict[str, Any]:
    """Keyword arguments of ``torch.utils.checkpoint.checkpoint`` for "selective" or "on".

    Args:
        compiled: it is called inside of what torch.compile is given. torch 2.11's compiler keeps what an
            autograd.Function saves unless every operation is told to be computed again (2.13's does not): eleven
            tensors of the size of the hidden states a block instead of one.
    """
    # the reentrant kind refuses what has no gradient at its inputs and runs outside of saved-tensor hooks
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective" or compiled:
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        kept = dear_operations() if mode == "selective" else set()
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _keep(kept))
    return arguments


def _keep(operations: set[Any]) -> Callable:
    """A policy: the results of ``operations`` are kept, and all else is computed again."""
    from torch.utils.checkpoint import CheckpointPolicy

    def policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in operations else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def dear_operations() -> set[Any]:
    """Whose results "selective" keeps: matrix products with weights and fused attention."""
    import torch

    aten = torch.ops.aten
    return {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
