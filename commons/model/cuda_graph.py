"""The passes of a step captured once as CUDA graphs and replayed: ``--cuda_graph``.

A step of gpt2_medium is some 1200 kernels. The host launches each of them, and hooks, autograd and compiled functions
are Python in between; where a kernel takes ten microseconds, the GPU waits. Where every step does the same with the
same memory, all launches can be captured and given to the GPU at once.

What is captured has to stay as it is: no copies between host and device, nothing that the host decides by looking at a
result, and parameters that are in the same place at the end of a step as at its beginning.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What a capture needs beyond a step that was launched: workspaces of its own stream, and memory in other pieces.
SPARE_BYTES, SPARE_SHARE = 256 << 20, 0.1
# An event with timing between the passes of one graph: https://github.com/pytorch/pytorch/pull/155372 (June 2025).
TIMES_INSIDE = "external" in inspect.signature(torch.cuda.Event.__new__).parameters


def has_room(step_bytes: int) -> bool:
    """Whether a step that took so much device memory beyond what is allocated now fits in once more, captured, on this
    rank.
    """
    free, _ = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free + cached >= step_bytes * (1 + SPARE_SHARE) + SPARE_BYTES


def join(stream: Any, current: Any) -> None:
    """Let the stream ``current`` wait for another one. Where passes are captured, ``stream`` has to belong to them."""
    stream.wait_stream(current)
    current.wait_stream(stream)


class StepGraph:
    """One forward and one backward pass, captured.

    Capturing runs both passes on the host, and nothing on the device: replay them afterwards.

    Args:
        forward: from tokens to the loss.
        backward: from that loss on. All streams that it uses beside the current one have joined it at its end.
        tokens: int64 [batch, sequence] on the device, of the shape to come.

    Raises:
        RuntimeError: something in the passes cannot be captured; the model cannot be used any more.

    Attributes:
        tokens: where a replay reads its batch.
        peak_bytes: device memory that a replay uses beyond what is allocated when it begins. torch's allocator does not
            count it.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        backward: Callable[[torch.Tensor], None],
        tokens: torch.Tensor,
    ) -> None:
        self.tokens = tokens.clone()
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # one for both: autograd runs the backward pass on the stream of the forward pass
        with _captured(self._forward_graph, stream):
            loss = forward(self.tokens)
        with _captured(self._backward_graph, stream, pool=self._forward_graph.pool()):
            backward(loss)
        self._loss = loss.detach()
        self.peak_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of ``tokens``, in memory that the next call overwrites.

        Raises:
            ValueError: their shape is not the captured one's.
        """
        if tokens.shape != self.tokens.shape:
            raise ValueError(f"captured for tokens of {tuple(self.tokens.shape)}, called with {tuple(tokens.shape)}")
        self.tokens.copy_(tokens)
        self._forward_graph.replay()
        return self._loss

    def backward(self) -> None:
        """The gradients of the last forward pass."""
        self._backward_graph.replay()


class WholeStepGraph:
    """A forward and its backward pass, captured as one graph.

    For models whose backward pass waits for events of their forward pass, as FSDP2's gathers do: apart from each other
    these cannot be captured. Capturing runs both passes on the host, and nothing on the device.

    Args:
        forward: from tokens to the loss.
        backward: from that loss on.
        clear: forgets the gradients that a pass has left.
        tokens: int64 [batch, sequence] on the device, of the shape to come.
        warm_up_passes: run before, launched, until the model's wrapper arranges and measures nothing of its own.

    Raises:
        RuntimeError: something in the passes cannot be captured; the model cannot be used any more.
        TypeError: torch is too old for it, see TIMES_INSIDE.

    Attributes:
        backward_begins: where in a replay the forward pass has ended, an event with timing.
        peak_bytes: as StepGraph's.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        backward: Callable[[torch.Tensor], None],
        clear: Callable[[], None],
        tokens: torch.Tensor,
        warm_up_passes: int,
    ) -> None:
        self._tokens = tokens.clone()
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.backward_begins = torch.cuda.Event(enable_timing=True, external=True)  # pyright: ignore[reportCallIssue]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm_up_passes):
                backward(forward(self._tokens))
                clear()
        torch.cuda.synchronize()
        with _captured(self._graph, stream):
            loss = forward(self._tokens)
            self.backward_begins.record()
            backward(loss)
        self._loss = loss.detach()
        self.peak_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    def replay(self, tokens: torch.Tensor) -> torch.Tensor:
        """Both passes over ``tokens``. The loss, in memory that the next call overwrites.

        Raises:
            ValueError: the tokens' shape is not the captured one's.
        """
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"captured for tokens of {tuple(self._tokens.shape)}, called with {tuple(tokens.shape)}")
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._loss


@contextmanager
def _captured(graph: Any, stream: torch.cuda.Stream, **options: Any) -> Iterator[None]:
    """Capture what the block launches. An error of its own is raised, not that of ending a capture that failed."""
    before, cause = torch.cuda.current_stream(), None
    try:
        # other threads, such as NCCL's, go on looking at events of their own
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local", **options):
            try:
                yield
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        torch.cuda.set_stream(before)
        cause = cause or error
        raise RuntimeError(
            f"the passes could not be captured as CUDA graphs ({cause}): use --cuda_graph off"
        ) from cause
