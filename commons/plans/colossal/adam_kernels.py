"""Adam for Colossal-AI's optimizers on torch's own fused kernels: no CUDA toolkit, no compiler, nothing built
at run time.

Gemini's optimizer takes exactly Colossal-AI's own Adam classes, and these get their kernels from loaders that
can be given other ones. torch's ``_fused_adamw_`` runs on CPU and CUDA and divides by the loss scale itself,
but wants gradients of the parameters' dtype. Gemini's are bf16 or fp16 beside fp32 masters, so they are
converted piece by piece, or read as they are where the update may be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.gemini import gemini_optimizer

from commons.model.compile import CompiledFunction

# fp32 elements that are converted at once. On a GPU 80 MiB: less than the largest chunk (the embedding's, from
# gpt2_medium on), and as many as torch's kernel takes in one launch; with fewer it does not fill a large one. On a CPU
# what stays in its caches until the kernel reads it (40 ms instead of 103 for 12.6 million elements on one core).
CONVERSION_ELEMENTS = {"cuda": 320 * 65536, "cpu": 1 << 20}


class AdamSlot(NamedTuple):
    """Flat, contiguous tensors of one size on one device.

    Attributes:
        param, exp_avg, exp_avg_sq: master weights and moments, fp32.
        grad: fp32, or bf16 or fp16.
        weights: where the updated weights are written too, rounded to its dtype; ``grad`` itself is allowed. None:
            nowhere.
    """

    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class AdamSettings:
    """One update of one parameter group.

    Attributes:
        step: number of this update, from 1.
        decoupled_weight_decay: AdamW (Loshchilov and Hutter 2019) instead of an L2 term in the gradient.
        div_scale: gradients are divided by it (loss scale times clip factor); not positive: no division.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    div_scale: float


def _pieces(slots: Iterable[AdamSlot], limit: int) -> Iterator[list[AdamSlot]]:
    """Slots in lists of at most ``limit`` elements; a larger one is cut."""
    group: list[AdamSlot] = []
    room = limit
    for slot in slots:
        columns = (repeat(None) if tensor is None else tensor.split(limit) for tensor in slot)
        for piece in map(AdamSlot._make, zip(*columns, strict=False)):
            if piece.param.numel() > room:
                yield group
                group, room = [], limit
            group.append(piece)
            room -= piece.param.numel()
    if group:
        yield group


def fused_adam(slots: Sequence[AdamSlot], settings: AdamSettings) -> None:
    """One Adam update in place, with bias correction, by torch's fused kernel.

    An fp32 gradient is overwritten by the unscaled one.
    """
    if not slots:
        return
    kernel = torch._fused_adamw_ if settings.decoupled_weight_decay else torch._fused_adam_
    first = slots[0].param
    # filled on the device: a tensor made from a number would be a copy that waits for the device
    step = torch.full((), float(settings.step), device=first.device)
    scale = torch.full((), settings.div_scale, device=first.device) if settings.div_scale > 0 else None
    converts = slots[0].grad.dtype != first.dtype
    elements = sum(slot.param.numel() for slot in slots)
    limit = min(elements, CONVERSION_ELEMENTS[first.device.type]) if converts else elements
    buffer = first.new_empty(limit) if converts else None
    for group in _pieces(slots, limit):
        params, grads, exp_avgs, exp_avg_sqs, _ = (list(column) for column in zip(*group, strict=True))
        if buffer is not None:
            sizes = [grad.numel() for grad in grads]
            converted = list(buffer.narrow(0, 0, sum(sizes)).split(sizes))
            torch._foreach_copy_(converted, grads)
            grads = converted
        kernel(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [step] * len(params),
            lr=settings.lr,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=None,
        )
        written = [piece for piece in group if piece.weights is not None]
        if written:
            torch._foreach_copy_([piece.weights for piece in written], [piece.param for piece in written])  # pyright: ignore


def _adam_arithmetic(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    weights: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    """AdamW in place (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019), in one pass if compiled.

    Args:
        numbers: fp32 on the device: 1 / divisor of the gradient, step size with the first bias correction,
            factor of the weight decay, betas, square root of the second bias correction, epsilon.
    """
    unscale, step_size, decay, beta1, beta2, root_correction, eps = numbers.unbind()
    grad = grad.float() * unscale
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad * grad * (1 - beta2))
    param.mul_(decay).sub_(step_size * exp_avg / (exp_avg_sq.sqrt() / root_correction + eps))
    weights.copy_(param)


class CompiledAdam:
    """`fused_adam` as one compiled pass over the memory of each slot, whatever the gradient's dtype.

    Fused by torch.compile it moves 28 bytes per element with bf16 gradients and weights, where torch's own kernel moves
    28, a conversion of the gradients before it 6 and a copy of the weights after it 6 more. Small slots, and those that
    are not aligned, take torch's kernel.
    """

    SMALLEST_SLOT = 1 << 20  # elements; below, the call would take longer than the pass
    ALIGNMENT_BYTES = 16  # the compiler would copy what is aligned less

    def __init__(self) -> None:
        # One graph per size, of which a rank has few: where the compiler knows none, masks keep accesses narrow
        # (0.156 ms instead of 0.091 where gradient and weights are one tensor; H200, 12.6 million elements).
        self._update = CompiledFunction(_adam_arithmetic)

    def __call__(self, slots: Sequence[AdamSlot], settings: AdamSettings) -> None:
        large, rest = [], []
        for slot in slots:
            (large if self._suits(slot) and settings.decoupled_weight_decay else rest).append(slot)
        if large:
            numbers = self._numbers(settings, large[0].param.device)
            for slot in large:
                self._update(*slot, numbers)
        fused_adam(rest, settings)

    def _suits(self, slot: AdamSlot) -> bool:
        aligned = all(tensor.data_ptr() % self.ALIGNMENT_BYTES == 0 for tensor in slot if tensor is not None)
        return aligned and slot.weights is not None and slot.param.numel() >= self.SMALLEST_SLOT

    @staticmethod
    def _numbers(settings: AdamSettings, device: torch.device) -> torch.Tensor:
        root_correction = math.sqrt(1 - settings.beta2**settings.step)
        step_size = settings.lr / (1 - settings.beta1**settings.step)
        unscale = 1 / settings.div_scale if settings.div_scale > 0 else 1.0
        decay = 1 - settings.lr * settings.weight_decay
        numbers = (unscale, step_size, decay, settings.beta1, settings.beta2, root_correction, settings.eps)
        return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)


class _FusedOptimizerKernel:
    """The one function of Colossal-AI's ``fused_optim`` extension that its Adam classes call."""

    def multi_tensor_adam(
        self,
        chunk_size: int,
        noop_flag: torch.Tensor,
        tensor_lists: list[list[torch.Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
        adamw_mode: int,
        bias_correction: int,
        weight_decay: float,
        div_scale: float,
    ) -> None:
        assert bias_correction, "torch's fused Adam always corrects the bias"
        grads, params, exp_avgs, exp_avg_sqs = ([tensor.view(-1) for tensor in tensors] for tensors in tensor_lists)
        settings = AdamSettings(step, lr, beta1, beta2, eps, weight_decay, bool(adamw_mode), div_scale)
        fused_adam([AdamSlot(*slot) for slot in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)], settings)


class _CpuAdamKernel:
    """Colossal-AI's ``cpu_adam`` extension: an object made once, then called once per parameter."""

    class CPUAdamOptimizer:
        def __init__(
            self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw_mode: bool
        ) -> None:
            self._adamw_mode = adamw_mode

        def step(
            self,
            step: int,
            lr: float,
            beta1: float,
            beta2: float,
            eps: float,
            weight_decay: float,
            bias_correction: bool,
            param: torch.Tensor,
            grad: torch.Tensor,
            exp_avg: torch.Tensor,
            exp_avg_sq: torch.Tensor,
            div_scale: float,
        ) -> None:
            assert bias_correction, "torch's fused Adam always corrects the bias"
            settings = AdamSettings(step, lr, beta1, beta2, eps, weight_decay, self._adamw_mode, div_scale)
            fused_adam([AdamSlot(*(t.view(-1) for t in (param, grad, exp_avg, exp_avg_sq)))], settings)


class _TorchKernelExtension(_Extension):
    """What a kernel loader wants of an extension, for kernels that come with torch."""

    kernel: type

    def __init__(self) -> None:
        super().__init__(name=self.kernel.__name__, support_aot=False, support_jit=False)

    def is_available(self) -> bool:
        return True

    def assert_compatible(self) -> None: ...

    def build_aot(self) -> None:
        raise NotImplementedError("torch's kernels need no build")

    build_jit = build_aot  # pyright: ignore[reportAssignmentType]

    def load(self) -> Any:
        return self.kernel()


class _FusedOptimizerExtension(_TorchKernelExtension):
    kernel = _FusedOptimizerKernel


class _CpuAdamExtension(_TorchKernelExtension):
    kernel = _CpuAdamKernel


class SuiteAdam(HybridAdam):
    """Colossal-AI's HybridAdam that counts.

    Attributes:
        updates: how often parameters were updated; it stands still when a plan skips a step for an fp16
            overflow.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.updates = 0

    def step(self, closure: Any = None, div_scale: float = -1) -> Any:
        self.updates += 1
        return super().step(closure, div_scale=div_scale)


def register() -> None:
    """Make Colossal-AI's loaders hand out torch's kernels, and its Gemini optimizer accept
    :class:`SuiteAdam`.
    """
    for loader, extension in (
        (FusedOptimizerLoader, _FusedOptimizerExtension),
        (CPUAdamLoader, _CpuAdamExtension),
    ):
        # the extensions there are tried first and would look for nvcc and a compiler
        loader.REGISTRY = []
        loader.register_extension(extension)  # pyright: ignore[reportArgumentType]  (a class, as upstream's)
    gemini_optimizer._AVAIL_OPTIM_LIST.add(SuiteAdam)
