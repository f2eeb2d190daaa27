"""The plan CAI_Hybrid: tensor and pipeline parallelism with ZeRO 0, 1 or 2 over the data-parallel ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from commons.config.resolved import ResolvedConfig
from commons.distributed.device import Device
from commons.distributed.layout import Place, check_mesh
from commons.plans.colossal.boosted import BoostedTrainable, boost, new_model
from commons.plans.colossal.runtime import prepare
from commons.plans.trainable import Mark, evaluating


class PipelinedBoostedTrainable(BoostedTrainable):
    """A model in pipeline stages: forward and backward passes of microbatches alternate and have no times of
    their own.
    """

    def micro_batch(self, last: bool) -> AbstractContextManager:
        # the schedule itself accumulates over its microbatches and synchronises after the last one
        return nullcontext() if last else self.booster.no_sync(self.model, self.optimizer)

    def forward_backward(self, tokens: torch.Tensor, weight: float, mark: Mark) -> torch.Tensor | None:
        """Run the pipeline's schedule over one batch (collective over the stages), the same ``tokens`` on all; its
        passes alternate, so that all of it counts as forward.
        """
        mark("forward")
        return self._run_schedule(tokens, weight)

    def evaluate(self, tokens: torch.Tensor) -> torch.Tensor | None:
        # without gradients the schedule runs forward passes alone, and nothing may be synchronised behind them
        with evaluating(self.model), self.booster.no_sync(self.model, self.optimizer):
            return self._run_schedule(tokens, 1)

    def _run_schedule(self, tokens: torch.Tensor, weight: float) -> torch.Tensor | None:
        batch = {"input_ids": tokens, "labels": tokens}
        outcome = self.booster.execute_pipeline(
            iter([batch]),
            self.model,
            lambda output, _: output.loss * weight,
            self.optimizer,
            return_loss=True,
        )
        return outcome["loss"]


def build_hybrid(config: ResolvedConfig, device: Device) -> BoostedTrainable:
    """Wrap the model with HybridParallelPlugin (collective)."""
    prepare(device.type)
    from colossalai.booster.plugin import HybridParallelPlugin

    interleaved = config.num_model_chunks > 1
    data_parallel_size = device.world_size // (config.tp_degree * config.pp_degree)
    plugin = HybridParallelPlugin(
        tp_size=config.tp_degree,
        pp_size=config.pp_degree,
        sp_size=1,  # the sequence is split over the tensor-parallel ranks
        # with one copy of the model there is nothing to share, and ZeRO's buckets would only cost
        zero_stage=config.zero_stage if data_parallel_size > 1 else 0,
        precision=config.precision,
        max_norm=config.clip_grad_norm,
        initial_scale=config.initial_loss_scale,
        num_microbatches=config.num_microbatches if config.pp_degree > 1 else None,
        pp_style="interleaved" if interleaved else "1f1b",
        num_model_chunks=config.num_model_chunks,
        enable_sequence_parallelism=config.sequence_parallel == "on",
        sequence_parallelism_mode="split_gather" if config.sequence_parallel == "on" else None,  # pyright: ignore[reportArgumentType]
        make_vocab_size_divisible_by=1,  # model_zoo has padded already; tp_degree divides what it made
        # gloo does not match the overlapped schedule's sends and receives, and hangs
        overlap_p2p=device.type == "cuda",
        gradient_as_bucket_view=True,
    )
    _check_place(plugin, config, device)
    model = new_model(config, device, lazy=True)
    trainable = PipelinedBoostedTrainable if config.pp_degree > 1 else BoostedTrainable
    return boost(plugin, model, config, device, no_sync=plugin.zero_stage < 2, trainable=trainable)


def _check_place(plugin: Any, config: ResolvedConfig, device: Device) -> None:
    axes = (plugin.dp_axis, plugin.pp_axis, plugin.tp_axis)
    mesh_place = Place(*(plugin.pg_mesh.coordinate(axis) for axis in axes))
    check_mesh(device.rank, tp_degree=config.tp_degree, pp_degree=config.pp_degree, mesh_place=mesh_place)
