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
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from commons.config import TrainConfig

EAGER_STEPS = 2  # the first compiles and is Gemini's warm-up, the second fills the libraries' caches


def graph_problems(config: TrainConfig, device_type: str, world_size: int) -> Iterator[str]:
    """Where the passes cannot be recorded, each with a setting with which they could."""
    moves = config.placement not in ("static", "cuda") or config.offload_optim_frac or config.offload_param_frac
    rules = (
        (device_type != "cuda", "on a CPU: use --cuda_graph off"),
        (config.distplan != "CAI_Gemini", f"with {config.distplan}: use --distplan CAI_Gemini"),
        (config.gemini_hooks == "operation", "with hooks inside of blocks: use --gemini_hooks block"),
        (config.tp_degree > 1, "with collectives inside of blocks: use --tp_degree 1"),
        (world_size > config.tp_degree, "with several data-parallel ranks: use GPUNUM=1"),
        (moves, "with chunks that move: use --placement cuda"),
        (config.precision == "fp16", "in fp16, which looks for infinities: use --precision bf16"),
        (config.grad_accum > 1, "where passes differ: use --grad_accum 1"),
        (config.dropout > 0, "with random numbers: use --dropout 0"),
    )
    return (text for applies, text in rules if applies)


def wants_graph(config: TrainConfig, device_type: str, world_size: int) -> bool:
    """Whether ``--cuda_graph`` asks for it here; "auto" wherever it is possible and blocks are compiled."""
    from commons.compiling import wants_compile

    if config.cuda_graph == "auto":
        return wants_compile(config, device_type) and not any(graph_problems(config, device_type, world_size))
    return config.cuda_graph == "on"


class StepGraph:
    """One forward and one backward pass, recorded.

    Recording runs both passes on the host, and nothing on the device: replay them afterwards.

    Args:
        forward: from tokens to the loss.
        backward: from that loss on. Called on another thread's streams, autograd's own.
        join: makes the current stream wait for all streams that the passes use beside it.
        tokens: of the shape and dtype to come.

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
        join: Callable[[], None],
        tokens: torch.Tensor,
    ) -> None:
        self._tokens = tokens.clone()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # autograd goes back on the stream of the way there
        # other threads, such as NCCL's, go on looking at events of their own
        options = {"stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(self._forward, **options):
                loss = forward(self._tokens)
                join()
            with torch.cuda.graph(self._backward, pool=self._forward.pool(), **options):
                backward(loss)
                join()
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a recording that failed fails too, for no reason of its own
            raise RuntimeError(f"the passes could not be recorded, --cuda_graph off runs without: {cause}") from cause
        self._loss = loss.detach()
        self.peak_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of ``tokens``, overwritten by the next call."""
        self._tokens.copy_(tokens)
        self._forward.replay()
        return self._loss

    def backward(self) -> None:
        """The gradients of the last forward pass."""
        self._backward.replay()
