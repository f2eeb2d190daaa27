"""A GPT-2 under Gemini run as regions: embedding, each block, and final norm with head and loss.

Each is a pure function of plain tensors (commons.model.gpt2) that can be compiled, between one gather and one release
of its chunks (commons.plans.colossal.regions). commons.plans.colossal.gemini says when a model is run so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from torch import nn

from commons.config.resolved import ResolvedConfig
from commons.lifecycle.notices import say
from commons.model.compile import CompiledFunction, announced, functions_for
from commons.model.gpt2 import (
    BLOCK_PARAMETERS,
    EMBEDDING_PARAMETERS,
    HEAD_PARAMETERS,
    GPT2Functions,
    attention_backend,
)
from commons.plans.colossal.chunk_gradients import ChunkGradients
from commons.plans.colossal.regions import Region, RegionCall, plain_tensors
from commons.plans.colossal.suite_chunk import SuiteChunk


class ModelRegions:
    """The regions of one wrapped GPT-2, run in order. Not for tensor parallelism, whose layers communicate inside.

    Args:
        gemini: the model as ``Booster.boost`` returns it.
        functions: from ``gpt2_functions``, compiled or not.
    """

    def __init__(self, gemini: GeminiDDP, functions: GPT2Functions) -> None:
        model: Any = gemini.module

        evaluated = functions.without_dropout or functions

        def region(part: str, module: nn.Module, names: Iterable[str]) -> Region:
            parameters: list[Any] = [module.get_parameter(name) for name in names]
            return Region(gemini, getattr(functions, part), parameters, getattr(evaluated, part))

        self.embedding = region("embed", model, EMBEDDING_PARAMETERS)
        self.blocks = [region("block", block, BLOCK_PARAMETERS) for block in model.transformer.h]
        self.head = region("loss", model, HEAD_PARAMETERS)
        uses: dict[SuiteChunk, int] = {}
        for each in (self.embedding, *self.blocks, self.head):
            for chunk, count in each.chunks.items():
                uses[chunk] = uses.get(chunk, 0) + count
        self.gradients = ChunkGradients(gemini, uses)

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token, fp32 scalar. ``tokens``, ``labels``: int64 [batch, sequence]."""
        start = torch.zeros((), device=tokens.device, requires_grad=torch.is_grad_enabled())
        self.gradients.begin(tokens.numel())
        hidden = RegionCall.apply(start, (tokens,), self.embedding, self.gradients)
        for block in self.blocks:
            hidden = RegionCall.apply(hidden, (None,), block, self.gradients)
        return RegionCall.apply(hidden, (None, labels), self.head, self.gradients)

    def warm_up(self, batch_size: int, seq_len: int) -> None:
        """Call every function once, forward and backward, on zeros of the shapes to come, so that compiling
        is done with.

        The regions themselves stay untouched, and no parameter is gathered.
        """
        accelerator: Any = get_accelerator()
        with plain_tensors():
            some = self.embedding.parameters[0]
            tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device=accelerator.get_current_device())
            hidden = torch.zeros(batch_size, seq_len, some.shape[1], dtype=some.dtype, device=tokens.device)
            cases = (self.embedding, (tokens,)), (self.blocks[0], (hidden,)), (self.head, (hidden, tokens))
            for region, arguments in cases:
                try:
                    region.rehearse(arguments)
                except Exception as error:  # of the backward pass; the forward pass falls back by itself
                    if not isinstance(region.function, CompiledFunction):
                        raise
                    region.function.fall_back(error)


def regions_for(gemini: GeminiDDP, config: ResolvedConfig, device_type: str) -> ModelRegions | None:
    """The model's regions, compiled or not, as ``config`` asks; says so where that cannot be.

    Returns:
        The regions; None where Gemini keeps its hook per operation.
    """
    if config.gemini_hooks == "operation":
        return None
    if config.tp_degree > 1:
        say("tensor parallelism communicates inside of blocks: Gemini runs with a hook per operation, uncompiled")
        return None
    regions = ModelRegions(gemini, functions_for(config, device_type))
    if config.compile == "on":
        with announced("the model's blocks, embedding and loss"), attention_backend(config.attention):
            regions.warm_up(config.batch_size, config.seq_len)
    return regions
