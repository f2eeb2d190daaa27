"""The passes of a step recorded once as CUDA graphs and replayed: ``--cuda_graph``.

A step of gpt2_medium is some 1200 kernels. The host launches each of them, and hooks, autograd and compiled functions
are Python in between; where a kernel takes ten microseconds, the GPU waits. Where every step does the same with the
same memory, all launches can be recorded and given to the GPU at once.

What is recorded has to stay as it is: no copies between host and device, nothing that the host decides by looking at a
result, and parameters that are in the same place at the end of a step as at its beginning.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from commons.distributed.peer_copies import chunk_problems

if TYPE_CHECKING:
    from commons.config.schema import TrainConfig

# The first is Gemini's warm-up and fills the libraries' caches. Few enough that the recording itself is among the
# steps that the medians leave out.
EAGER_STEPS = 1
# What a recording needs beyond a step that was launched: workspaces of its own stream, and memory in other pieces.
SPARE_BYTES, SPARE_SHARE = 256 << 20, 0.1


def graph_problems(
    config: TrainConfig, device_type: str, world_size: int, peer_copies: bool = False
) -> tuple[str, ...]:
    """Where the passes cannot be recorded, one reason each. ``peer_copies``: ranks copy from each other's memory."""
    several = config.data_parallel_size(world_size) > 1
    rules = (
        (device_type != "cuda", "on a CPU"),
        (config.distplan != "CAI_Gemini", f"under {config.distplan}"),
        (several and not peer_copies, "on several data-parallel ranks without --peer_copies"),
        # freed beside the computing stream, which a recording does only at its end; what is replicated is never freed
        (
            several and config.max_prefetch == 0 and config.shard_param_frac != 0,
            "under --max_prefetch 0 on several ranks, which would keep all chunks gathered",
        ),
        (config.precision == "fp16", "in fp16, which looks for infinities"),
        (config.grad_accum > 1, "under --grad_accum, whose passes differ"),
        (config.dropout > 0, "under --dropout"),
        (config.train_step <= EAGER_STEPS, f"in the first {EAGER_STEPS + 1} steps"),
    )
    return (*(text for applies, text in rules if applies), *chunk_problems(config))


def wants_graph(config: TrainConfig, device_type: str, world_size: int, peer_copies: bool = False) -> bool:
    """Whether ``--cuda_graph`` asks for it here; "auto" wherever it is possible and blocks are compiled."""
    from commons.model.compile import wants_compile

    if config.cuda_graph == "auto":
        problems = graph_problems(config, device_type, world_size, peer_copies)
        return wants_compile(config, device_type) and not problems
    return config.cuda_graph == "on"


def has_room(step_bytes: int) -> bool:
    """Whether a step that took so much device memory beyond what is allocated now fits in once more, recorded, on this
    rank.
    """
    free, _ = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free + cached >= step_bytes * (1 + SPARE_SHARE) + SPARE_BYTES


def join(stream: Any, current: Any) -> None:
    """Let the stream ``current`` wait for another one. Where passes are recorded, ``stream`` has to belong to them."""
    stream.wait_stream(current)
    current.wait_stream(stream)


class StepGraph:
    """One forward and one backward pass, recorded.

    Recording runs both passes on the host, and nothing on the device: replay them afterwards.

    Args:
        forward: from tokens to the loss.
        backward: from that loss on. All streams that it uses beside the current one have joined it at its end.
        tokens: int64 [batch, sequence] on the device, of the shape to come.

    Raises:
        RuntimeError: something in the passes cannot be recorded; the model cannot be used any more.

    Attributes:
        peak_bytes: device memory that a replay uses beyond what is allocated when it begins. torch's allocator does not
            count it.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        backward: Callable[[torch.Tensor], None],
        tokens: torch.Tensor,
    ) -> None:
        self._tokens = tokens.clone()
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # one for both: autograd goes back on the stream of the way there
        with _recorded(self._forward_graph, stream):
            loss = forward(self._tokens)
        with _recorded(self._backward_graph, stream, pool=self._forward_graph.pool()):
            backward(loss)
        self._loss = loss.detach()
        self.peak_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of ``tokens``, in memory that the next call overwrites.

        Raises:
            ValueError: their shape is not the recorded one's.
        """
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"recorded for tokens of {tuple(self._tokens.shape)}, called with {tuple(tokens.shape)}")
        self._tokens.copy_(tokens)
        self._forward_graph.replay()
        return self._loss

    def backward(self) -> None:
        """The gradients of the last forward pass."""
        self._backward_graph.replay()


@contextmanager
def _recorded(graph: Any, stream: torch.cuda.Stream, **options: Any) -> Iterator[None]:
    """Record what the block launches. An error of its own is told, and not that of ending a recording that failed."""
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
        raise RuntimeError(f"the passes could not be recorded ({cause}): use --cuda_graph off") from cause
