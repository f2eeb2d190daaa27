"""Faults of Colossal-AI 0.5.0 that the suite's plans would meet and that can be mended from outside, one
class a fault.

Each names the upstream function, says what went wrong, and asks upstream whether it still does
(:meth:`is_needed`): a Colossal-AI that has mended it is left alone. Faults that are avoided by construction
are told where that happens: the forward pass, the loss and the sequence-parallel biases of a split GPT-2 in
split_gpt2.py; small models and blocks across chunk boundaries in chunks.py; clipping with offloaded gradients
and accumulation after an overflow in chunk_adam.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import FP16MixedPrecisionMixin
from colossalai.booster.plugin import hybrid_parallel_plugin
from colossalai.checkpoint_io.utils import gather_distributed_param
from colossalai.tensor.d_tensor import api, is_customized_distributed_tensor, is_distributed_tensor
from colossalai.zero.gemini import gemini_optimizer
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from colossalai.zero.gemini.placement_policy import StaticPlacementPolicy

from commons.ops.gradient_norm import sum_of_squares

UPSTREAM = "https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/"


@dataclass(frozen=True)
class Fix:
    """A fault of upstream and its cure.

    Attributes:
        file: below ``UPSTREAM``.
        function: there.
        symptom: what a user would see.
        is_needed: whether the installed Colossal-AI still has the fault.
        apply: mends it.
    """

    file: str
    function: str
    symptom: str
    is_needed: Callable[[], bool]
    apply: Callable[[], None]


def is_split(param: torch.Tensor) -> bool:
    """Whether tensor-parallel ranks hold different parts of ``param``, not copies. Fused query, key and value
    count.
    """
    return is_distributed_tensor(param) or is_customized_distributed_tensor(param)


# --- Static placement: a fraction is one of bytes -----------------------------------------------------------


class _ProbeChunk:
    chunk_mem, keep_gathered = 100, False

    def __init__(self, params: list[str]) -> None:
        self._params = params

    def get_tensors(self) -> list[str]:
        return self._params


def _static_fractions_are_wrong() -> bool:
    """Ask for half of two equal chunks with two parameters each. Upstream puts the gradients of both on the host, and
    after their use neither's parameters.
    """
    chunks = [_ProbeChunk(["a", "b"]), _ProbeChunk(["c", "d"])]
    owner = {param: chunk for chunk in chunks for param in chunk.get_tensors()}
    moved: list[Any] = []
    manager: Any = SimpleNamespace(
        get_chunk=owner.__getitem__,
        release_chunk=lambda chunk: None,
        move_chunk=lambda chunk, device: moved.append(chunk),
    )
    devices: dict[Any, Any] = {}
    policy: Any = StaticPlacementPolicy(manager, offload_optim_frac=0.5)
    policy.setup_grads_device(list(owner), devices)
    policy = StaticPlacementPolicy(manager, offload_optim_frac=1.0, offload_param_frac=0.5)
    policy.setup_grads_device(list(owner), {})
    for chunk in chunks:
        policy.evict_tensors([chunk])
    # the device is no torch.device under the host backend, whose type says "cuda"
    return [device.type for device in devices.values()].count("cpu") != 2 or len(moved) != 1


def _first_that_fit(chunks: list, fraction: float) -> list:
    """Chunks while they fit into ``fraction`` of the bytes of all: never more than that, and 1 takes all."""
    room = sum(chunk.chunk_mem for chunk in chunks) * fraction
    fitting = []
    for chunk in chunks:
        if not chunk.keep_gathered and chunk.chunk_mem <= room + 0.5:
            fitting.append(chunk)
            room -= chunk.chunk_mem
    return fitting


def _setup_grads_device(self: Any, params: list, grads_device_map: dict) -> None:
    """Decide where each chunk's gradients, master weights and optimizer states live, which parameters wait for their
    next use on the host, and how much may stay gathered.

    Blocks come first, in their order; a rank takes the same ones as every other.
    """
    from colossalai.accelerator import get_accelerator

    chunks = list(dict.fromkeys(self.chunk_manager.get_chunk(param) for param in params))  # a set has no order
    offloaded = set(_first_that_fit(chunks, self.offload_optim_frac))
    for chunk in chunks:
        device = torch.device("cpu") if chunk in offloaded else get_accelerator().get_current_device()
        for param in chunk.get_tensors():
            grads_device_map[param] = device
    self.waiting_on_host = set(_first_that_fit(chunks, self.offload_param_frac))
    self.keep_gathered_chunk_mem = sum(chunk.chunk_mem for chunk in chunks) * (1 - self.shard_param_frac)


def _evict_tensors(self: Any, can_evict_chunks: list, **_: Any) -> tuple[int, float]:
    """Release what is more than may stay gathered, and take to the host what waits there.

    Upstream compares the bytes in use at the moment, a chunk or two, with a share of the whole model's.
    """
    in_use = sum(chunk.chunk_mem for chunk in can_evict_chunks)
    for chunk in can_evict_chunks:
        if in_use <= self.keep_gathered_chunk_mem:
            break
        self.chunk_manager.release_chunk(chunk)
        in_use -= chunk.chunk_mem
    for chunk in can_evict_chunks:
        if chunk in self.waiting_on_host:
            self.chunk_manager.move_chunk(chunk, torch.device("cpu"))
    return 0, 0.0


def _mend_static_fractions() -> None:
    StaticPlacementPolicy.setup_grads_device = _setup_grads_device
    StaticPlacementPolicy.evict_tensors = _evict_tensors


# --- Gemini's gradient norm under tensor parallelism --------------------------------------------------------


def _gemini_norm_is_wrong() -> bool:
    return "tp_" not in inspect.getsource(GeminiOptimizer._calc_global_norm)


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


def _mend_gemini_norm() -> None:
    upstream = GeminiOptimizer._calc_global_norm

    def calc_global_norm(self: Any) -> float:
        return _calc_global_norm(self) if self.tp_size > 1 else upstream(self)

    GeminiOptimizer._calc_global_norm = calc_global_norm


# --- HybridParallelPlugin's gradient norm under tensor parallelism ------------------------------------------


def _hybrid_norm_is_wrong() -> bool:
    """Show a tensor that is split by a function of its own to what tells copies from parts."""
    split = torch.empty(0)
    api.init_tensor_as_customization_distributed(split, shard_fn=torch.clone, gather_fn=torch.clone)
    told_apart = "is_customized_distributed_tensor" in inspect.getsource(hybrid_parallel_plugin)
    return not told_apart and not hybrid_parallel_plugin.is_distributed_tensor(split)


def _mend_hybrid_norm() -> None:
    hybrid_parallel_plugin.is_distributed_tensor = is_split


# --- Saving Gemini's optimizer under tensor parallelism -----------------------------------------------------


def _saving_is_wrong() -> bool:
    return "step" not in inspect.getsource(GeminiOptimizer.collect_states).split("Reshape tensors")[-1]


def _mend_saving() -> None:
    upstream = GeminiOptimizer.collect_states

    def collect_states(self: Any, param_id: int, only_rank_0: bool = True) -> dict:
        with _nothing_is_split():
            states = upstream(self, param_id, only_rank_0)
        param = self.id_to_real_params[param_id]
        if not is_split(param):
            return states
        return {name: state if name == "step" else _gather_like(param, state) for name, state in states.items()}

    GeminiOptimizer.collect_states = collect_states


@contextmanager
def _nothing_is_split() -> Iterator[None]:
    """Have the optimizer's code see every parameter as whole: it then returns this tensor-parallel rank's
    part.
    """
    names = ("is_distributed_tensor", "is_customized_distributed_tensor")
    originals = {name: getattr(gemini_optimizer, name) for name in names}
    for name in names:
        setattr(gemini_optimizer, name, lambda tensor: False)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gemini_optimizer, name, original)


def _gather_like(param: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The whole of an optimizer state, on the host, from the parts that lie like those of ``param``
    (collective over tensor ranks).
    """
    from colossalai.accelerator import get_accelerator

    part = state.reshape(param.shape).to(get_accelerator().get_current_device())
    if is_distributed_tensor(param):
        mesh, spec = api.get_device_mesh(param), api.get_sharding_spec(param)
        part = api.init_as_dtensor(part, device_mesh=mesh, sharding_spec=spec, global_shape=api.get_global_shape(param))
    else:
        api.init_tensor_as_customization_distributed(part, shard_fn=param.shard_fn, gather_fn=param.gather_fn)  # pyright: ignore
    return gather_distributed_param(part, keep_vars=False).cpu()


# --- The loss scale that gradients carry --------------------------------------------------------------------


class _ProbeMixin(FP16MixedPrecisionMixin):
    def check_local_overflow(self) -> bool:
        return False

    def check_overflow(self) -> bool:  # without asking other ranks
        return False


def _unscaling_is_wrong() -> bool:
    """Scale by 2 and double the scale after this step: upstream divides this step's gradients by 4."""
    mixin = _ProbeMixin(initial_scale=2, growth_interval=1)
    mixin.pre_backward(torch.ones(()))
    mixin.should_skip_step()
    return mixin.get_grad_div_scale() != 2


def _mend_unscaling() -> None:
    should_skip_step, get_grad_div_scale = (
        FP16MixedPrecisionMixin.should_skip_step,
        FP16MixedPrecisionMixin.get_grad_div_scale,
    )

    def remember_and_decide(self: Any) -> bool:
        self._scale_of_gradients = self.loss_scale
        return should_skip_step(self)

    def remembered(self: Any) -> float:
        get_grad_div_scale(self)  # for what else it does
        return self._scale_of_gradients

    FP16MixedPrecisionMixin.should_skip_step = remember_and_decide
    FP16MixedPrecisionMixin.get_grad_div_scale = remembered


# --- Inference between the passes of training ---------------------------------------------------------------


def _inference_counts_as_training() -> bool:
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


def _mend_order() -> None:
    inference_forward = GeminiDDP._inference_forward

    def leave_no_trace(self: Any, *arguments: Any, **options: Any) -> Any:
        manager = self.gemini_manager
        index, length = manager._compute_idx, len(manager._compute_list)
        manager._compute_idx = -1
        try:
            return inference_forward(self, *arguments, **options)
        finally:
            manager._compute_idx = index
            del manager._compute_list[length:]

    GeminiDDP._inference_forward = leave_no_trace


# --- Inference with chunks gathered ahead -------------------------------------------------------------------


def _gathered_ahead_is_forgotten() -> bool:
    """End an inference while a chunk is still on its way: upstream does not wait for it."""
    arrived: list[bool] = []
    manager = SimpleNamespace(async_works={"chunk": SimpleNamespace(wait=lambda: arrived.append(True))})
    manager.wait_chunks = lambda chunks: [manager.async_works.pop(chunk).wait() for chunk in chunks]
    chunks = SimpleNamespace(accessed_chunks=set(), accessed_mem=0)
    GeminiDDP._post_forward(SimpleNamespace(chunk_manager=chunks, gemini_manager=manager))  # pyright: ignore
    return not arrived


def _mend_inference() -> None:
    post_forward = GeminiDDP._post_forward

    def await_and_scatter(self: Any) -> None:
        self.gemini_manager.wait_chunks(list(self.gemini_manager.async_works))
        post_forward(self)

    GeminiDDP._post_forward = await_and_scatter


FIXES = (
    Fix(
        "zero/gemini/placement_policy.py",
        "StaticPlacementPolicy.setup_grads_device and evict_tensors",
        "memory is counted once a parameter instead of once a chunk: offload_optim_frac 0.5 moves all chunks;"
        " which chunks are moved depends on the addresses of objects; and offload_param_frac below 1 moves nothing",
        _static_fractions_are_wrong,
        _mend_static_fractions,
    ),
    Fix(
        "zero/gemini/gemini_optimizer.py",
        "GeminiOptimizer._calc_global_norm",
        "with tp_size > 1 every tensor-parallel rank clips by the norm of its own part of the gradient",
        _gemini_norm_is_wrong,
        _mend_gemini_norm,
    ),
    Fix(
        "booster/plugin/hybrid_parallel_plugin.py",
        "_compute_grad_norm of its three optimizers",
        "with tp_size > 1 the fused query-key-value and first feed-forward layers, which are split by a"
        " function of their own, count as copies: the norm is too small and clipping too weak",
        _hybrid_norm_is_wrong,
        _mend_hybrid_norm,
    ),
    Fix(
        "zero/gemini/gemini_optimizer.py",
        "GeminiOptimizer.collect_states",
        "with tp_size > 1 save_optimizer fails with an assertion, as the step number is taken for a split tensor;"
        " behind it the gathered states are dropped and each file would hold one rank's part",
        _saving_is_wrong,
        _mend_saving,
    ),
    Fix(
        "amp/naive_amp/mixed_precision_mixin/fp16.py",
        "FP16MixedPrecisionMixin.should_skip_step",
        "the loss scale grows (every 1000 good steps) before the gradients are divided by it: in all plans this"
        " step's gradients are half of what they should be",
        _unscaling_is_wrong,
        _mend_unscaling,
    ),
    Fix(
        "zero/gemini/gemini_ddp.py",
        "GeminiDDP._post_forward",
        "with max_prefetch a second inference fails with an assertion: what the first one had gathered ahead and not"
        " used still counts as on its way",
        _gathered_ahead_is_forgotten,
        _mend_inference,
    ),
    Fix(
        "zero/gemini/gemini_ddp.py",
        "GeminiDDP._inference_forward",
        "with max_prefetch an inference before the first step, or between the two passes of one, ends the backward pass"
        ' with "the synchronization of gradients doesn\'t exit properly": chunks are gathered ahead that are through',
        _inference_counts_as_training,
        _mend_order,
    ),
)


def apply() -> None:
    """Mend what the installed Colossal-AI still has wrong. Called once, by ``runtime.prepare``."""
    for fix in FIXES:
        if fix.is_needed():
            fix.apply()
