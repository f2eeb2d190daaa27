"""torch's own plans: DistributedDataParallel, ZeroRedundancyOptimizer and FSDP2, with the same meaning of
precision as the others.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commons.config.resolved import ResolvedConfig
from commons.distributed.device import Device, compute_dtype
from commons.model.compile import functions_for, run_as_functions
from commons.model.initial_weights import decay_groups, seeded_init_
from commons.ops.gradient_norm import clip_, sum_of_squares
from commons.plans.trainable import Mark, Update, weighted
from model_zoo import build_model


class TorchTrainable:
    """fp32 parameters computing in ``precision``; for fp16 with a dynamic loss scale."""

    replayed_bytes = 0
    shared_bytes: int | None = None

    def __init__(
        self, model: nn.Module, optimizer: Any, config: ResolvedConfig, device: Device, autocast: bool
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._clip_grad_norm = config.clip_grad_norm
        self._autocast_dtype = compute_dtype(config.base_precision) if autocast and config.precision != "fp32" else None
        self._device_type, self._device = device.type, device.torch_device
        fp16 = config.precision == "fp16"
        self.loss_scaler = torch.amp.GradScaler(device.type, init_scale=config.initial_loss_scale, enabled=fp16)

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def micro_batch(self, last: bool) -> AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel):
            return nullcontext() if last else self.model.no_sync()
        self.model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]  (FSDP2 adds it)
        return nullcontext()

    def forward_backward(self, tokens: torch.Tensor, weight: float, mark: Mark) -> torch.Tensor | None:
        mark("forward")
        loss = weighted(self.forward(tokens), weight)
        mark("backward")
        self.backward(loss)
        return loss

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch, a scalar. ``tokens``: int64 [batch, sequence]."""
        with torch.autocast(self._device_type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of ``loss``, times the loss scale; on the last micro-batch averaged over the ranks
        (collective).
        """
        self.loss_scaler.scale(loss).backward()

    def step(self) -> Update:
        norm = None
        if self._clip_grad_norm > 0:
            self.loss_scaler.unscale_(self.optimizer)
            norm = float(self._clip())
        scale = self.loss_scaler.get_scale()
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        skipped = self.loss_scaler.get_scale() < scale
        return Update(None if skipped else norm, skipped)

    def _clip(self) -> torch.Tensor:
        """Clip the gradients, whole or sharded (collective); the norm before, an fp64 scalar on the device."""
        gradients: list[Any] = [p.grad for p in self.model.parameters() if p.grad is not None]
        sharded = not isinstance(self.model, DistributedDataParallel)
        parts = [gradient.to_local() for gradient in gradients] if sharded else gradients
        squares = sum_of_squares(parts, self._device)
        if sharded:
            dist.all_reduce(squares)
        norm = squares.sqrt()
        clip_(parts, norm, self._clip_grad_norm)
        return norm


def build(kind: str, config: ResolvedConfig, device: Device) -> TorchTrainable:
    """Wrap the model (collective). ``kind``: "ddp", "zero" or "fsdp"."""
    with torch.device(device.torch_device):
        model = build_model(
            config.shape(),
            attention=config.attention,
            dropout=config.dropout,
            activation_checkpointing=config.activation_checkpointing,
        )
    seeded_init_(model, config.seed, device.torch_device, compute_dtype(config.base_precision))
    if config.runs_as_functions:
        run_as_functions(model, functions_for(config, device.type))
    if kind == "fsdp":
        return _fully_sharded(model, config, device)
    ddp = DistributedDataParallel(
        model, device_ids=[device.local_rank] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    return TorchTrainable(ddp, _adamw(ddp, config, sharded=kind == "zero"), config, device, autocast=True)


def _fully_sharded(model: nn.Module, config: ResolvedConfig, device: Device) -> TorchTrainable:
    """Shard every block on its own and the rest together; parameters are cast to the compute dtype when they
    are gathered.
    """
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:  # torch 2.5 has it under its older address
        from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (device.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if config.precision == "fp32" else compute_dtype(config.base_precision)
    )
    for block in model.transformer.h:  # pyright: ignore
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return TorchTrainable(model, _adamw(model, config, sharded=False), config, device, autocast=False)


def _adamw(model: nn.Module, config: ResolvedConfig, sharded: bool) -> torch.optim.Optimizer:
    """Fused AdamW, its states spread over the data-parallel ranks if ``sharded``."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    arguments: dict = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_eps,
        "fused": True,
    }
    groups = decay_groups(model, config.weight_decay)
    if sharded:
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **arguments)
    return torch.optim.AdamW(groups, **arguments)
