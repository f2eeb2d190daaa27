"""Colossal-AI's plans: plugins chosen from the configuration, wrapped by its Booster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from commons.config.auto import EAGER_STEPS
from commons.config.resolved import ResolvedConfig
from commons.distributed.device import Device, compute_dtype
from commons.distributed.layout import Place, check_mesh, place
from commons.distributed.peer_copies import find_peers
from commons.distributed.process_group import every_rank
from commons.lifecycle.notices import say
from commons.model.compile import functions_for, run_as_functions
from commons.model.cuda_graph import StepGraph, has_room, join
from commons.model.initial_weights import decay_groups, seeded_init_
from commons.plans.colossal.chunks import blocks_first, chunk_configuration
from commons.plans.colossal.runtime import prepare
from commons.plans.states import Counters, StateHolder, StatePiece, pieces
from commons.plans.trainable import Mark, Update, evaluating, weighted
from model_zoo import build_model


class BoostedTrainable:
    """A model and optimizer wrapped by a Booster: Gemini, ZeRO and tensor parallelism, all but pipelines.

    Attributes:
        config, device, holder: what :func:`boost` built it from, and where its states lie.
    """

    replayed_bytes = 0
    shared_bytes: int | None = None
    config: ResolvedConfig
    device: Device
    holder: StateHolder

    def __init__(self, booster: Any, model: nn.Module, optimizer: Any, adam: Any, no_sync: bool) -> None:
        self.booster, self.model, self.optimizer = booster, model, optimizer
        self.adam = adam
        self._no_sync = no_sync

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def micro_batch(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last or not self._no_sync else self.booster.no_sync(self.model, self.optimizer)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch, an fp32 scalar. ``tokens``: int64 [batch, sequence]."""
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of ``loss``, times the loss scale; on the last micro-batch averaged over the ranks
        (collective).
        """
        self.booster.backward(loss, self.optimizer)

    def forward_backward(self, tokens: torch.Tensor, weight: float, mark: Mark) -> torch.Tensor | None:
        mark("forward")
        loss = weighted(self.forward(tokens), weight)
        mark("backward")
        self.backward(loss)
        return loss

    def evaluate(self, tokens: torch.Tensor) -> torch.Tensor | None:
        with evaluating(self.model):
            return self.forward(tokens)

    def step(self) -> Update:
        updates = self.adam.updates
        loss_scale = self._loss_scale()
        self.optimizer.step()
        self.optimizer.zero_grad()
        skipped = self.adam.updates == updates
        norm = self.optimizer.get_grad_norm()
        return Update(None if norm is None or skipped else norm / loss_scale, skipped)

    def _loss_scale(self) -> float:
        """The dynamic loss scale that the gradients of this step carry; 1 but for fp16."""
        scaler = self.loss_scaler()
        return 1.0 if scaler is None else scaler.scale.item()

    def states(self) -> Iterator[StatePiece]:
        tensor_rank = self._place().tensor
        return pieces(self.config.shape(), self.holder.held(), tensor_rank, self.config.tp_degree)

    def _place(self) -> Place:
        return place(self.device.rank, tp_degree=self.config.tp_degree, pp_degree=self.config.pp_degree)

    def after_load(self) -> None:
        self.holder.refresh()

    def counters(self) -> Counters:
        scaler = self.loss_scaler()
        if scaler is None:
            return Counters(self.holder.updates())
        return Counters(self.holder.updates(), scaler.scale.item(), scaler._growth_step, scaler._hysteresis_step)

    def set_counters(self, counters: Counters) -> None:
        self.holder.set_updates(counters.updates)
        scaler = self.loss_scaler()
        if scaler is not None and counters.loss_scale is not None:
            scaler._scale.fill_(counters.loss_scale)
            scaler._growth_step, scaler._hysteresis_step = counters.good_steps, counters.overflows

    def loss_scaler(self) -> Any:
        """Colossal-AI's DynamicGradScaler, which each of its optimizers has under a name of its own; None but for
        fp16.
        """
        names = ("mix_precision_mixin", "mixed_precision_mixin", "mixed_precision")
        mixins = (getattr(self.optimizer, name, None) for name in names)
        return next((mixin.grad_scaler for mixin in mixins if mixin and hasattr(mixin, "grad_scaler")), None)


class GraphedTrainable(BoostedTrainable):
    """The same with both passes captured as CUDA graphs after the first steps; see commons.model.cuda_graph.

    A replayed backward pass is that of the last replayed forward pass, whatever loss it is called with; where ranks
    share memory it has to come before the next forward pass (commons.distributed.peer_copies).

    Attributes:
        graph: the captured passes; None before, and where there was no room for them.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._steps = 0
        self.graph: StepGraph | None = None
        self._step_bytes = 0
        self._norms: dict[Any, torch.Tensor | None] = {}

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same, in memory that the next call overwrites."""
        if not torch.is_grad_enabled():
            return super().forward(tokens)
        self._steps += 1
        if self._steps == EAGER_STEPS + 1:
            self._capture(tokens)
        return super().forward(tokens) if self.graph is None else self.graph.forward(tokens)

    def backward(self, loss: torch.Tensor) -> None:
        if self.graph is None:
            super().backward(loss)
            self._step_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            return
        self.graph.backward()
        for chunk, norm in self._norms.items():
            chunk.l2_norm = norm  # where the graph writes it; the optimizer forgets it after every step

    def _capture(self, tokens: torch.Tensor) -> None:
        if not every_rank(has_room(self._step_bytes), tokens.device):  # captured passes wait only for captured ones
            say("too little free device memory to capture CUDA graphs (--cuda_graph): falling back to eager launches")
            return
        self.graph = StepGraph(self._forward_alone, self._backward_alone, tokens)
        self.replayed_bytes = self.graph.peak_bytes
        self._norms = {chunk: chunk.l2_norm for chunk in self.optimizer.chunk16_set}
        say("captured forward and backward pass as CUDA graphs, replayed from here on (--cuda_graph)")

    def _forward_alone(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = super().forward(tokens)
        self._join_gathers()
        return loss

    def _backward_alone(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        self._join_gathers()

    def _join_gathers(self) -> None:
        """Wait for what is gathered ahead: nothing that one pass begins may end in the other, as they are captured
        apart.
        """
        manager: Any = self.model.gemini_manager
        manager.wait_chunks(list(manager.async_works))
        if manager.chunk_manager._prefetch_stream is not None:
            join(manager.chunk_manager._prefetch_stream, torch.cuda.current_stream())


def build_gemini(config: ResolvedConfig, device: Device) -> BoostedTrainable:
    """Wrap the model with :class:`commons.plans.colossal.gemini.SuiteGeminiPlugin` (collective)."""
    prepare(device.type)
    from commons.plans.colossal.model_regions import regions_for

    placement = config.gemini_placement()
    # on a GPU pinned memory makes the copies asynchronous; without offload there is nothing to pin
    offloads = placement["placement_policy"] == "auto" or placement["offload_optim_frac"] > 0
    plugin = _gemini_plugin(config, device, offloads)
    model = new_model(config, device, lazy=True)
    if placement["placement_policy"] == "static":
        plugin.gemini_config["memstats"] = blocks_first(model)
    peers = find_peers(config, device)
    graphed = config.captures_graphs(device.world_size, peers is not None)
    kind = GraphedTrainable if graphed else BoostedTrainable
    trainable = boost(plugin, model, config, device, no_sync=False, trainable=kind)
    gemini: Any = trainable.model
    if peers is not None:
        copies = gemini.share_between(peers, replicated=placement["shard_param_frac"] == 0)
        trainable.shared_bytes = copies.shared_bytes
    regions = regions_for(gemini, config, device.type)
    if regions is not None:
        gemini.run_by(regions)
    return trainable


def _gemini_plugin(config: ResolvedConfig, device: Device, offloads: bool) -> Any:
    """The plugin as ``config`` asks. ``offloads``: some of the optimizer's states are kept on the host."""
    from commons.plans.colossal.gemini import SuiteGeminiPlugin

    plugin = SuiteGeminiPlugin(
        **config.gemini_placement(),
        precision=config.base_precision,
        max_norm=config.clip_grad_norm,
        initial_scale=config.initial_loss_scale,
        # a rank alone has its chunks already
        max_prefetch=config.max_prefetch if offloads or device.world_size > config.tp_degree else 0,
        enable_gradient_accumulation=config.grad_accum > 1,
        enable_async_reduce=True,
        pin_memory=True,
        chunk_config_dict=chunk_configuration(
            config.shape(),
            zero_size=device.world_size // config.tp_degree,
            tp_degree=config.tp_degree,
            blocks=config.blocks_per_chunk,
        ),
        tp_size=config.tp_degree,
    )
    plugin.compiled_adam = config.compile == "on"
    plugin.shard_config.make_vocab_size_divisible_by = 1  # model_zoo has padded already; tp_degree divides what it made
    copy, _, part = plugin.pg_mesh.coordinate()  # pyright: ignore[reportGeneralTypeIssues]
    mesh_place = Place(data=copy, pipeline=0, tensor=part)
    check_mesh(device.rank, tp_degree=config.tp_degree, pp_degree=1, mesh_place=mesh_place)
    plugin.gemini_config["pin_memory"] = device.type == "cuda" and offloads
    return plugin


def build_zero(config: ResolvedConfig, device: Device, stage: int) -> BoostedTrainable:
    """Wrap the model with LowLevelZeroPlugin of ``stage`` 1 or 2 (collective)."""
    prepare(device.type)
    from colossalai.booster.plugin import LowLevelZeroPlugin

    plugin = LowLevelZeroPlugin(
        stage=stage,
        precision=config.base_precision,
        max_norm=config.clip_grad_norm,
        initial_scale=config.initial_loss_scale,
    )
    model = new_model(config, device, lazy=False)
    if config.runs_as_functions:
        run_as_functions(model, functions_for(config, device.type))
    return boost(plugin, model, config, device, no_sync=stage == 1)


def new_model(config: ResolvedConfig, device: Device, *, lazy: bool) -> nn.Module:
    """The bare model with its initial weights: real on the device, or lazy, to be made parameter by parameter
    into chunks.
    """
    from colossalai.accelerator import get_accelerator
    from colossalai.lazy import LazyInitContext

    with LazyInitContext(default_device=get_accelerator().get_current_device()) if lazy else device.torch_device:
        model = build_model(
            config.shape(),
            attention=config.attention,
            dropout=config.dropout,
            activation_checkpointing=config.activation_checkpointing,
        )
    seeded_init_(model, config.seed, device.torch_device, None if lazy else compute_dtype(config.base_precision))
    return model


def boost(
    plugin: Any,
    model: nn.Module,
    config: ResolvedConfig,
    device: Device,
    *,
    no_sync: bool,
    trainable: type[BoostedTrainable] = BoostedTrainable,
) -> BoostedTrainable:
    """Wrap model and optimizer by a Booster (collective). ``no_sync``: the plugin can leave gradients of a
    micro-batch unreduced.
    """
    from colossalai.booster import Booster

    from commons.plans.colossal.adam_kernels import SuiteAdam
    from commons.plans.colossal.holders import holder_of

    adam = SuiteAdam(
        decay_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        adamw_mode=True,
    )
    booster = Booster(plugin=plugin)
    boosted: Any
    boosted, optimizer, *_ = booster.boost(model, adam)
    made = trainable(booster, boosted, optimizer, adam, no_sync)
    made.config, made.device = config, device
    here = place(device.rank, tp_degree=config.tp_degree, pp_degree=config.pp_degree)
    made.holder = holder_of(boosted, optimizer, here, config.data_parallel_size(device.world_size))
    return made
