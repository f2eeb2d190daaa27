"""Inference in the middle of training, where Gemini gathers chunks ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from colossalai.zero.gemini.gemini_ddp import GeminiDDP

from commons.plans.colossal.faults.base import UpstreamFault


class GatheredAheadForgotten(UpstreamFault):
    file = "zero/gemini/gemini_ddp.py"
    function = "GeminiDDP._post_forward"
    symptom = (
        "with max_prefetch a second inference fails with an assertion: what the first one had gathered ahead and not"
        " used still counts as on its way"
    )

    def seen(self) -> bool:
        """End an inference while a chunk is still on its way: upstream does not wait for it."""
        arrived: list[bool] = []
        manager = SimpleNamespace(async_works={"chunk": SimpleNamespace(wait=lambda: arrived.append(True))})
        manager.wait_chunks = lambda chunks: [manager.async_works.pop(chunk).wait() for chunk in chunks]
        chunks = SimpleNamespace(accessed_chunks=set(), accessed_mem=0)
        GeminiDDP._post_forward(SimpleNamespace(chunk_manager=chunks, gemini_manager=manager))  # pyright: ignore
        return not arrived

    def mend(self) -> None:
        post_forward = GeminiDDP._post_forward

        def await_and_scatter(self: Any) -> None:
            self.gemini_manager.wait_chunks(list(self.gemini_manager.async_works))
            post_forward(self)

        GeminiDDP._post_forward = await_and_scatter


class InferenceCountsAsTraining(UpstreamFault):
    file = "zero/gemini/gemini_ddp.py"
    function = "GeminiDDP._inference_forward"
    symptom = (
        "with max_prefetch an inference before the first step, or between the two passes of one, ends the backward pass"
        ' with "the synchronization of gradients doesn\'t exit properly": chunks are gathered ahead that are through'
    )

    def seen(self) -> bool:
        """Run an inference of one region when training has come to its second: upstream notes it in the order by which
        chunks are gathered ahead, and begins to count anew.
        """
        manager = SimpleNamespace(_compute_idx=1, _compute_list=["first", "second"])
        manager.reset_attributes = lambda: setattr(manager, "_compute_idx", -1)
        model = SimpleNamespace(
            gemini_manager=manager,
            hooks=(),
            scatter_after_inference=True,
            module=lambda: manager._compute_list.append("inference"),
            _post_forward=lambda: None,
        )
        GeminiDDP._inference_forward(model)  # pyright: ignore[reportArgumentType]
        return (manager._compute_idx, manager._compute_list) != (1, ["first", "second"])

    def mend(self) -> None:
        inference_forward = GeminiDDP._inference_forward

        def leave_no_trace(self: Any, *arguments: Any, **options: Any) -> Any:
            with order_of_training_kept(self.gemini_manager):
                return inference_forward(self, *arguments, **options)

        GeminiDDP._inference_forward = leave_no_trace


@contextmanager
def order_of_training_kept(manager: Any) -> Iterator[None]:
    """An inference inside: what a ``GeminiManager`` knows of the order of training's chunks stays as it is."""
    index, length = manager._compute_idx, len(manager._compute_list)
    manager._compute_idx = -1
    try:
        yield
    finally:
        manager._compute_idx = index
        del manager._compute_list[length:]
