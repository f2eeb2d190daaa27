"""A region of the model that Gemini handles as a whole: its chunks are gathered before and released after it.

Gemini has to know when a parameter is needed and when no longer. Colossal-AI finds out through
``__torch_function__`` of every operation that a parameter takes part in: some twenty interruptions per block in
the forward pass and as many in the backward pass, which keep a GPU waiting and which ``torch.compile`` cannot see
through. A region calls Gemini before and after each pass, and in between runs a pure function of plain tensors. Its
gradients go to commons.plans.colossal.chunk_gradients; what a model's regions are says
commons.plans.colossal.model_regions.

``ColoParamOpHookManager``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/tensor/param_op_hook.py
``GeminiZeROHook``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/gemini_hook.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import TensorState
from colossalai.zero.gemini.gemini_ddp import GeminiDDP

from commons.plans.colossal.chunk_gradients import ChunkGradients
from commons.plans.colossal.suite_chunk import SuiteChunk

# ColoParameter answers every operation, even a look at its .grad, in Python; nothing here needs to hear of it
plain_tensors = torch._C.DisableTorchFunctionSubclass


def _accelerator() -> Any:
    """Colossal-AI's, whose annotations promise less than it has."""
    return get_accelerator()


class Region:
    """A part of the model whose chunks are gathered and released once per pass.

    Attributes:
        parameters: in the order of the function's arguments.
        chunks: those that hold the parameters, and how many of them each.
        evaluated: the function of passes without gradients, the same if none is given.
    """

    def __init__(
        self,
        gemini: GeminiDDP,
        function: Callable[..., torch.Tensor],
        parameters: list[torch.Tensor],
        evaluated: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.function, self.parameters = function, parameters
        self.evaluated = evaluated or function
        self._gemini_manager = gemini.gemini_manager
        self._chunk_manager = gemini.chunk_manager
        self._infos: dict[SuiteChunk, list[Any]] = {}
        for parameter in parameters:
            chunk: Any = self._chunk_manager.get_chunk(parameter)
            self._infos.setdefault(chunk, []).append(chunk.tensors_info[parameter])
        self.chunks = {chunk: len(infos) for chunk, infos in self._infos.items()}
        self._ordered = tuple(self._infos)

    def rehearse(self, arguments: tuple[torch.Tensor, ...]) -> None:
        """Call the function on ``arguments`` and parameters of zeros, forward and backward."""
        leaves = [item.requires_grad_() for item in arguments if item.is_floating_point()]
        leaves += [torch.zeros_like(parameter, requires_grad=True) for parameter in self.parameters]
        out = self.function(*arguments, *leaves[-len(self.parameters) :])
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    def gather(self) -> None:
        """Make the parameters usable: ``GeminiZeROHook.pre_op``, with the states of all parameters set
        together.
        """
        gemini, chunks = self._gemini_manager, self._chunk_manager
        missing = gemini.wait_chunks(self._ordered)
        self._set_states(TensorState.COMPUTE)
        gemini.sample_overall_data()
        gemini.adjust_layout(self._ordered, record_anyway=gemini.placement_policy.max_prefetch > 0)
        for chunk in missing:
            chunks.access_chunk(chunk)
        self._prefetch()
        gemini.record_model_data_volume()

    def _prefetch(self) -> None:
        """Start to gather the chunks of the regions to come."""
        gemini, chunks = self._gemini_manager, self._chunk_manager
        stream = chunks._prefetch_stream
        if stream is None:
            return
        upcoming = gemini.placement_policy.get_prefetch_chunks(
            is_warmup=gemini.is_warmup(),
            compute_list=gemini.compute_list,  # pyright: ignore[reportArgumentType]
            compute_idx=gemini.compute_idx,
            async_works=gemini.async_works,
        )
        if not upcoming:
            return
        # what is gathered may still be written by the optimizer
        stream.wait_stream(_accelerator().current_stream())
        with _accelerator().stream(stream):
            for chunk in upcoming:
                work = chunks.access_chunk(chunk, async_access=True)
                if work is not None:
                    gemini.add_work(chunk, work)

    def release(self, backward: bool) -> None:
        """The parameters are not needed for now: ``GeminiZeROHook.post_op``."""
        self._set_states(TensorState.HOLD_AFTER_BWD if backward else TensorState.HOLD)

    def _set_states(self, state: TensorState) -> None:
        for chunk, infos in self._infos.items():
            chunk.set_states(state, infos)


class RegionCall(torch.autograd.Function):
    """Runs a region's function with a graph of its own inside, so that hooks and gradients are handled once per
    region.

    ``hidden`` is what comes from the region before, or for the first region a scalar that only asks for a
    gradient; ``arguments`` are the function's first arguments, with None as the first to stand for
    ``hidden``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, arguments: tuple, region: Region, gradients: ChunkGradients
    ) -> torch.Tensor:
        with plain_tensors():
            region.gather()
            leaves = [parameter.detach().requires_grad_() for parameter in region.parameters]
            inner = hidden.detach().requires_grad_()
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                head = (inner, *arguments[1:]) if arguments[0] is None else arguments
                function = region.function if ctx.needs_input_grad[0] else region.evaluated
                out = function(*head, *leaves)
            region.release(backward=False)
        ctx.region, ctx.gradients, ctx.out = region, gradients, out
        ctx.inputs = [inner, *leaves] if arguments[0] is None else leaves
        return out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        region: Region = ctx.region
        with plain_tensors():
            region.gather()
            inner = torch.autograd.grad(ctx.out, ctx.inputs, out_gradient)
            region.release(backward=True)
            parameter_gradients = inner[-len(region.parameters) :]
            hidden_gradient = inner[0] if len(inner) > len(parameter_gradients) else None
            ctx.out = ctx.inputs = None  # the outer graph may live on, its activations must not
            ctx.gradients.add(region.parameters, parameter_gradients, region.chunks)
        return hidden_gradient, None, None, None
