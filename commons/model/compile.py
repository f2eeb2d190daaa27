"""torch.compile for every plan: one graph for all blocks, a kept cache, and a way on where something cannot
be compiled.

Functions of tensors are compiled (commons.model.gpt2), not modules: a module's graph is tied to its
parameters and to the hooks that a plan hangs on it, a function's serves every block and runs between the
hooks.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from commons.lifecycle.caches import cache_home
from commons.lifecycle.notices import say

if TYPE_CHECKING:
    from torch import nn

    from commons.config.resolved import ResolvedConfig
    from commons.model.gpt2 import GPT2Functions

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# Norms, activations and losses are tried in several tile sizes on the device: some ten seconds more in the first
# compilation for 2 ms of a gpt2_xl step, whose width of 1600 the compiler's guess does not suit (benchmarks/NOTES.md)
INDUCTOR_OPTIONS: dict[str, Any] = {"max_autotune_pointwise": True}


def functions_for(config: ResolvedConfig, device_type: str, backend: str | Callable = "inductor") -> GPT2Functions:
    """The model's functions as ``config`` wants them, compiled or not, and those to evaluate with."""
    from commons.model.gpt2 import gpt2_functions

    options: dict[str, Any] = {}
    if config.compile == "on":
        keep_cache()
        options["fused_gelu"] = device_type == "cuda" and _gelu_fits(config)
        options["kernels"] = device_type == "cuda" and _kernels_fit()
        options["transform"] = lambda function: CompiledFunction(function, backend)
    functions = gpt2_functions(
        config.shape(),
        attention=config.attention,
        dropout=config.dropout,
        recompute=config.activation_checkpointing,
        fp8=config.precision == "fp8",
        **options,
    )
    if config.dropout == 0:
        return functions
    quiet = functions_for(dataclasses.replace(config, dropout=0.0), device_type, backend)
    return dataclasses.replace(functions, without_dropout=quiet)


def _gelu_fits(config: ResolvedConfig) -> bool:
    """Whether GELU goes into the matrix products beside it. "selective" recomputation would keep its result, which is
    what it is there to spare.
    """
    from commons.distributed.device import compute_dtype
    from commons.ops.feed_forward import fits

    if config.precision == "fp8" or config.activation_checkpointing == "selective":
        return False
    rows = config.batch_size * config.seq_len
    return fits(rows, config.shape().hidden, compute_dtype(config.base_precision))


def _kernels_fit() -> bool:
    from commons.ops import triton_kernels as gpu_kernels

    return gpu_kernels.fits()


def keep_cache() -> None:
    """Let compiled kernels outlive a reboot too, unless the user has chosen a place for them."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch puts its own choice, below /tmp, into the variable as soon as parts of it are imported
    if os.environ.get(CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[CACHE_VARIABLE] = str(cache_home() / "gemini-gpt2" / "inductor")


class CompiledFunction:
    """A function of tensors that compiles itself at its first call, and runs eagerly where that fails.

    Args:
        function: whole, without graph breaks; new shapes compile again.
        backend: of torch.compile.
    """

    def __init__(self, function: Callable, backend: str | Callable = "inductor") -> None:
        import torch

        self._function = function
        options = INDUCTOR_OPTIONS if backend == "inductor" else None
        self._run: Callable = torch.compile(function, backend=backend, fullgraph=True, dynamic=False, options=options)
        self._compiled = False

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled:
            return self._run(*arguments)
        try:
            result = self._run(*arguments)
        except Exception as error:
            # what the compiler cannot do fails before anything has run; an error of the function itself comes
            # again below
            self.fall_back(error)
            return self._function(*arguments)
        self._compiled = True
        return result

    def fall_back(self, error: Exception) -> None:
        """Run uncompiled from now on, and say so."""
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        say(f"torch.compile failed for {self._function.__name__} ({reason[:200]}); falling back to eager")
        self._run, self._compiled = self._function, True


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Say that a compilation is going on, and how long it took."""
    say(f"compiling {what}: up to a minute the first time, seconds from the cache")
    start = time.perf_counter()
    yield
    say(f"compiled {what} in {time.perf_counter() - start:.1f} s")


def run_as_functions(model: nn.Module, functions: GPT2Functions) -> None:
    """Make a ``GPT2LMHeadModel`` compute its loss with ``functions``, block by block, whatever wraps its
    modules.

    Call it before DistributedDataParallel, ``fully_shard`` or LowLevelZero wrap the model. Blocks are still
    called as modules, so that hooks on them run, outside of what is compiled. Without labels the model runs
    as before. In evaluation mode (``model.eval()``) nothing is dropped.
    """
    from transformers.modeling_outputs import CausalLMOutput

    from commons.model.gpt2 import BLOCK_PARAMETERS, EMBEDDING_PARAMETERS, HEAD_PARAMETERS

    gpt2: Any = model
    whole, embedding, head = gpt2.forward, _reader(gpt2, EMBEDDING_PARAMETERS), _reader(gpt2, HEAD_PARAMETERS)
    evaluated = functions.without_dropout or functions
    for block in gpt2.transformer.h:
        _run_block_as_function(block, functions.block, evaluated.block, _reader(block, BLOCK_PARAMETERS))

    def forward(self: nn.Module, input_ids: Any = None, labels: Any = None, **arguments: Any) -> Any:
        if labels is None:
            return whole(input_ids=input_ids, **arguments)
        now = functions if self.training else evaluated
        hidden = now.embed(input_ids, *embedding())
        for block in gpt2.transformer.h:
            hidden = block(hidden)
        return CausalLMOutput(loss=now.loss(hidden, labels, *head()))  # pyright: ignore[reportArgumentType]

    gpt2.forward = MethodType(forward, gpt2)


def _run_block_as_function(block: Any, function: Callable, evaluated: Callable, parameters: Callable) -> None:
    whole = block.forward

    def forward(self: nn.Module, hidden: Any, *rest: Any, **arguments: Any) -> Any:
        if rest or arguments:  # called by HuggingFace's own loop
            return whole(hidden, *rest, **arguments)
        return (function if self.training else evaluated)(hidden, *parameters())

    block.forward = MethodType(forward, block)


def _reader(module: nn.Module, names: tuple[str, ...]) -> Callable[[], list[Any]]:
    """Reads the parameters as they are at the time of the call: FSDP2 swaps sharded and whole ones."""
    owners = [(module.get_submodule(path), leaf) for path, _, leaf in (name.rpartition(".") for name in names)]
    return lambda: [getattr(owner, leaf) for owner, leaf in owners]
