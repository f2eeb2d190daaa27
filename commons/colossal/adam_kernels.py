"""Adam for Colossal-AI's optimizers on torch's own fused kernels: no CUDA toolkit, no compiler, nothing built
at run time.

Gemini's optimizer takes exactly Colossal-AI's own Adam classes, and these get their kernels from loaders that
can be given other ones. torch's ``_fused_adamw_`` runs on CPU and CUDA and divides by the loss scale itself,
but wants gradients of the parameters' dtype. Gemini's are bf16 or fp16 beside fp32 masters, so they are
converted a few megabytes at a time: the copy stays in a GPU's second-level cache and costs no extra pass over
device memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader
from colossalai.nn.optimizer import HybridAdam
from colossalai.zero.gemini import gemini_optimizer

# 8 Mi fp32 elements are 32 MiB: half of an H200's L2, and large enough for a handful of launches a gigabyte.
CONVERSION_ELEMENTS = 8 * 1024 * 1024

TensorQuad = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _batches(quads: Iterator[TensorQuad], limit: int) -> Iterator[list[TensorQuad]]:
    """Group quads of flat tensors into batches of at most ``limit`` elements; only a larger tensor is cut.

    Whole tensors are passed on as they are: at hundreds of parameters, making views would take longer than
        the GPU's work.
    """
    batch: list[TensorQuad] = []
    room = limit
    for quad in quads:
        size = quad[0].numel()
        if size > room and batch:
            yield batch
            batch, room = [], limit
        if size > limit:
            for pieces in zip(*(tensor.view(-1).split(limit) for tensor in quad), strict=True):
                yield [pieces]  # pyright: ignore[reportReturnType]
            continue
        batch.append(quad)
        room -= size
    if batch:
        yield batch


def fused_adam(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    div_scale: float,
) -> None:
    """One Adam (or AdamW) update in place, with bias correction.

    Args:
        params: contiguous fp32 tensors on one device, as many as each of the following.
        grads: their gradients, fp32, bf16 or fp16; fp32 ones are overwritten by the unscaled gradient.
        exp_avgs: first moments, fp32.
        exp_avg_sqs: second moments, fp32.
        step: number of this update, from 1.
        div_scale: gradients are divided by it (loss scale times clip factor); not positive: no division.
    """
    if not params:
        return
    # filled on the device: a tensor made from a number would be a copy that waits for the device
    step_tensor = torch.full((), float(step), device=params[0].device)
    options = {
        "lr": lr,
        "beta1": beta1,
        "beta2": beta2,
        "weight_decay": weight_decay,
        "eps": eps,
        "amsgrad": False,
        "maximize": False,
        "grad_scale": torch.full((), float(div_scale), device=params[0].device) if div_scale > 0 else None,
        "found_inf": None,
    }
    kernel = torch._fused_adamw_ if decoupled_weight_decay else torch._fused_adam_
    if grads[0].dtype == params[0].dtype:
        steps = [step_tensor] * len(params)
        kernel(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], steps, **options)
        return
    sizes = [param.numel() for param in params]
    buffer = params[0].new_empty(min(CONVERSION_ELEMENTS, sum(sizes)))
    for batch in _batches(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True), CONVERSION_ELEMENTS):
        flat_params, flat_grads, flat_avgs, flat_sqs = map(list, zip(*batch, strict=True))
        sizes = [grad.numel() for grad in flat_grads]
        converted = buffer.narrow(0, 0, sum(sizes)).split(sizes)
        torch._foreach_copy_(converted, flat_grads)
        kernel(flat_params, converted, flat_avgs, flat_sqs, [], [step_tensor] * len(sizes), **options)


class _FusedOptimizerKernel:
    """The one function of Colossal-AI's ``fused_optim`` extension that its Adam classes call, with its
    signature.
    """

    @staticmethod
    def multi_tensor_adam(
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
        fused_adam(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=bool(adamw_mode),
            div_scale=div_scale,
        )


class _CpuAdamKernel:
    """Colossal-AI's ``cpu_adam`` extension: an object made once, then called once a parameter."""

    class CPUAdamOptimizer:
        def __init__(
            self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw_mode: bool
        ) -> None:
            self._decoupled_weight_decay = adamw_mode

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
            fused_adam(
                [param],
                [grad],
                [exp_avg],
                [exp_avg_sq],
                step=step,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                decoupled_weight_decay=self._decoupled_weight_decay,
                div_scale=div_scale,
            )


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

    build_jit = build_aot

    def load(self) -> type:
        return self.kernel


class _FusedOptimizerExtension(_TorchKernelExtension):
    kernel = _FusedOptimizerKernel


class _CpuAdamExtension(_TorchKernelExtension):
    kernel = _CpuAdamKernel


class SuiteAdam(HybridAdam):
    """Colossal-AI's HybridAdam that divides bf16 gradients on the host by the loss scale and clip factor too.

    Upstream hands those to ``torch_adam_update``, which has no such argument, so that ``max_norm`` is ignored
    wherever bf16
    gradients lie on the host: on a CPU, and on a GPU with the optimizer offloaded.
    ``HybridAdam.step``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/nn/optimizer/hybrid_adam.py

    Attributes:
        updates: how often parameters were updated; it stands still when a plan skips a step for an fp16
            overflow.
    """

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.updates = 0
        self._div_scale = -1.0
        self._param_step = 0

    def step(self, closure: Any = None, div_scale: float = -1) -> Any:
        self.updates += 1
        self._div_scale = div_scale
        return super().step(closure, div_scale=div_scale)

    def _pre_update(self, param: torch.Tensor, *state_keys: str) -> None:
        # upstream calls this with the parameter right before torch_adam_update, which is told no step number
        self._param_step = self.state[param]["step"]
        super()._pre_update(param, *state_keys)

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
        fused_adam(
            [data],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            step=self._param_step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=use_adamw,
            div_scale=self._div_scale,
        )


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
        loader.register_extension(extension)
    gemini_optimizer._AVAIL_OPTIM_LIST.add(SuiteAdam)
