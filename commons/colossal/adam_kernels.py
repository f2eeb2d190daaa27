"""Adam for Colossal-AI's optimizers on torch's own fused kernels: no CUDA toolkit, no compiler, nothing built
at run time.

Gemini's optimizer takes exactly Colossal-AI's own Adam classes, and these get their kernels from loaders that
can be given other ones. torch's ``_fused_adamw_`` runs on CPU and CUDA and divides by the loss scale itself,
but wants gradients of the parameters' dtype. Gemini's are bf16 or fp16 beside fp32 masters, so they are
converted a piece at a time, or read as they are where the update may be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.gemini import gemini_optimizer

from commons.compiling import CompiledFunction

# fp32 elements that are converted at once: 80 MiB. That is less than the largest chunk (the embedding's, from
# gpt2_medium on), and as many as torch's kernel takes in one launch; with fewer it does not fill a large GPU.
CONVERSION_ELEMENTS = 320 * 65536

TensorQuad = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # parameter, gradient, moments


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


def merge_neighbours(quads: Iterable[TensorQuad]) -> list[TensorQuad]:
    """Join quads of flat tensors that follow one another in memory, all four of them.

    Gemini's optimizer sees hundreds of slices of a few chunks. Put together they take one launch a chunk.
    """
    merged: list[TensorQuad] = []
    ends: tuple[int, ...] = ()
    for quad in quads:
        starts = tuple(tensor.data_ptr() for tensor in quad)
        # allocations of their own can be neighbours by chance
        if starts == ends and all(map(_share_storage, quad, merged[-1])):
            size = merged[-1][0].numel() + quad[0].numel()
            merged[-1] = tuple(first.as_strided((size,), (1,)) for first in merged[-1])  # pyright: ignore
        else:
            merged.append(tuple(tensor.view(-1) for tensor in quad))  # pyright: ignore
        ends = tuple(start + tensor.nbytes for start, tensor in zip(starts, quad, strict=True))
    return merged


def _share_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _pieces(quads: Iterable[TensorQuad], limit: int) -> Iterator[list[TensorQuad]]:
    """Group quads into lists of at most ``limit`` elements; a larger quad is cut."""
    group: list[TensorQuad] = []
    room = limit
    for quad in quads:
        for piece in zip(*(tensor.split(limit) for tensor in quad), strict=True):
            if piece[0].numel() > room:
                yield group
                group, room = [], limit
            group.append(piece)  # pyright: ignore[reportArgumentType]
            room -= piece[0].numel()
    if group:
        yield group


def fused_adam(quads: Iterable[TensorQuad], settings: AdamSettings) -> None:
    """One Adam update in place, with bias correction, by torch's fused kernel.

    Args:
        quads: parameter, gradient, first and second moment; flat and contiguous, all on one device. All are
            fp32 but the gradient, which may be bf16 or fp16; an fp32 gradient is overwritten by the unscaled
            one.
    """
    merged = merge_neighbours(quads)
    if not merged:
        return
    kernel = torch._fused_adamw_ if settings.decoupled_weight_decay else torch._fused_adam_
    first = merged[0][0]
    # filled on the device: a tensor made from a number would be a copy that waits for the device
    step = torch.full((), float(settings.step), device=first.device)
    scale = torch.full((), settings.div_scale, device=first.device) if settings.div_scale > 0 else None
    converts = merged[0][1].dtype != first.dtype
    limit = CONVERSION_ELEMENTS if converts else sum(quad[0].numel() for quad in merged)
    buffer = first.new_empty(min(limit, sum(quad[0].numel() for quad in merged))) if converts else None
    for group in _pieces(merged, limit):
        params, grads, exp_avgs, exp_avg_sqs = (list(column) for column in zip(*group, strict=True))
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


def _adam_arithmetic(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
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


class CompiledAdam:
    """`fused_adam` as one compiled pass over the memory of each merged run, whatever the gradients' dtype.

    Fused by torch.compile it moves 26 bytes an element for bf16 gradients, where torch's own kernel moves 28
    and a conversion 6 more. Small runs, and those that are not aligned, take torch's kernel.
    """

    SMALLEST_RUN = 1 << 20  # below, the call would take longer than the pass
    ALIGNMENT_BYTES = 16  # the compiler would copy what is aligned less

    def __init__(self) -> None:
        self._update = CompiledFunction(_adam_arithmetic, dynamic=True)

    def __call__(self, quads: Iterable[TensorQuad], settings: AdamSettings) -> None:
        large, rest = [], []
        for quad in merge_neighbours(quads):
            (large if self._suits(quad) and settings.decoupled_weight_decay else rest).append(quad)
        fused_adam(rest, settings)
        if large:
            numbers = self._numbers(settings, large[0][0].device)
            for quad in large:
                self._update(*quad, numbers)

    def _suits(self, quad: TensorQuad) -> bool:
        aligned = all(tensor.data_ptr() % self.ALIGNMENT_BYTES == 0 for tensor in quad)
        return aligned and quad[0].numel() >= self.SMALLEST_RUN

    @staticmethod
    def _numbers(settings: AdamSettings, device: torch.device) -> torch.Tensor:
        root_correction = math.sqrt(1 - settings.beta2**settings.step)
        step_size = settings.lr / (1 - settings.beta1**settings.step)
        unscale = 1 / settings.div_scale if settings.div_scale > 0 else 1.0
        decay = 1 - settings.lr * settings.weight_decay
        numbers = (unscale, step_size, decay, settings.beta1, settings.beta2, root_correction, settings.eps)
        return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)


class FusedOptimizerKernel:
    """The one function of Colossal-AI's ``fused_optim`` extension that its Adam classes call.

    Args:
        update: what computes it, :func:`fused_adam` or a :class:`CompiledAdam`.
    """

    def __init__(self, update: Callable[[Iterable[TensorQuad], AdamSettings], None] = fused_adam) -> None:
        self._update = update

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
        grads, params, exp_avgs, exp_avg_sqs = tensor_lists
        settings = AdamSettings(step, lr, beta1, beta2, eps, weight_decay, bool(adamw_mode), div_scale)
        self._update(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True), settings)


class _CpuAdamKernel:
    """Colossal-AI's ``cpu_adam`` extension: an object made once, then called once a parameter."""

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
            fused_adam([(param, grad, exp_avg, exp_avg_sq)], settings)


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
    kernel = FusedOptimizerKernel


class _CpuAdamExtension(_TorchKernelExtension):
    kernel = _CpuAdamKernel


class SuiteAdam(HybridAdam):
    """Colossal-AI's HybridAdam that divides bf16 gradients on the host by the loss scale and clip factor too.

    Upstream hands those to ``torch_adam_update``, which has no such argument, so that ``max_norm`` is ignored
    wherever bf16
    gradients lie on the host: on a CPU, and on a GPU with the optimizer offloaded.
    ``HybridAdam.step``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/nn/optimizer/hybrid_adam.py

    Args:
        compiled: on a GPU, update by :class:`CompiledAdam`.

    Attributes:
        updates: how often parameters were updated; it stands still when a plan skips a step for an fp16
            overflow.
    """

    def __init__(self, params: Any, *, compiled: bool = False, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        if compiled and hasattr(self, "gpu_adam_op"):
            self.gpu_adam_op = FusedOptimizerKernel(CompiledAdam()).multi_tensor_adam
        self.updates = 0
        self._div_scale = -1.0
        self._param_step = 0

    def step(self, closure: Any = None, div_scale: float = -1) -> Any:
        self.updates += 1
        self._div_scale = div_scale
        return super().step(closure, div_scale=div_scale)

    def _pre_step(self, *state_keys: str) -> None:
        # upstream calls this at the start of a step and then makes the states that are missing, one by one
        for group in self.param_groups:
            new = [p for p in group["params"] if p.grad is not None and not self.state[p]]
            for device in {param.device for param in new}:
                self._make_states([param for param in new if param.device == device])
        super()._pre_step(*state_keys)

    def _make_states(self, params: list[torch.Tensor]) -> None:
        """Zero moments for ``params``, side by side in memory as their parameters are in a chunk."""
        sizes = [param.numel() for param in params]
        moments = [params[0].new_zeros(sum(sizes)).split(sizes) for _ in range(2)]
        for param, exp_avg, exp_avg_sq in zip(params, *moments, strict=True):
            shape = param.shape
            self.state[param] = {
                "step": 0,
                "exp_avg": exp_avg.view(shape),
                "exp_avg_sq": exp_avg_sq.view(shape),
            }

    def _pre_update(self, param: torch.Tensor, *state_keys: str) -> None:
        # upstream calls this with the parameter right before torch_adam_update, which is told no step number
        self._param_step = self.state[param]["step"]
        super()._pre_update(param, *state_keys)  # pyright: ignore[reportArgumentType]

    def torch_adam_update(
        self,
        data: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction1: float,
        bias_correction2: float,
        use_adamw: bool = False,
    ) -> None:
        step = self._param_step
        settings = AdamSettings(step, lr, beta1, beta2, eps, weight_decay, use_adamw, self._div_scale)
        fused_adam([(data, grad, exp_avg, exp_avg_sq)], settings)


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
