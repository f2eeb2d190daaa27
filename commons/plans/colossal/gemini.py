"""Gemini's model, optimizer and plugin as the suite runs them: upstream's classes with what the suite does otherwise
written into subclasses, so that all else, checkpoints included, is upstream's.

One step, from the top down:

- :meth:`SuiteGemini.forward`: the other ranks are waited for where memory is shared (peer_chunks), then the model runs
  by regions (model_regions) or with upstream's hook per operation.
- ``GeminiDDP.backward``: regions gather, compute and hand over their gradients, which are reduced on a stream of their
  own (chunk_gradients); :meth:`SuiteGemini._post_backward` ends it.
- :meth:`SuiteGeminiOptimizer.step`, by runs of chunk memory (chunk_adam).

``GeminiDDP``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/gemini_ddp.py
``GeminiPlugin.configure``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/booster/plugin/gemini_plugin.py
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.booster.plugin import GeminiPlugin
from colossalai.booster.plugin.gemini_plugin import get_param_info
from colossalai.shardformer import ShardFormer
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from commons.distributed.peer_copies import PeerCopies
from commons.distributed.peer_memory import Peers
from commons.model.cuda_graph import join
from commons.plans.colossal.chunk_adam import ChunkAdam
from commons.plans.colossal.faults.inference import order_of_training_kept
from commons.plans.colossal.model_regions import ModelRegions
from commons.plans.colossal.peer_chunks import AlonePass, PassAround, share_parts


class SuiteGemini(GeminiDDP):
    """A wrapped ``GPT2LMHeadModel``; the arguments are upstream's.

    Attributes:
        regions: what a call with labels runs; None for upstream's hook per operation, which calls without labels
            always have.
        around: what ranks that share memory do around a forward pass.
    """

    regions: ModelRegions | None = None
    around: PassAround = AlonePass()

    def share_between(self, peers: Peers, *, replicated: bool) -> PeerCopies:
        """Gather and average chunks by copies between ``peers`` from now on, see peer_chunks (collective)."""
        copies, self.around = share_parts(self, peers, replicated=replicated)
        return copies

    def run_by(self, regions: ModelRegions) -> None:
        """Run calls with labels by ``regions`` from now on.

        Where nothing is moved to the host, the host no longer waits for the reductions at the end of a backward pass,
        only the device does: the optimizer's launches then queue up behind the last gradients. An optimizer on the host
        has to wait itself.
        """
        self.regions = regions
        if all(device.type != "cpu" for device in self.grads_device.values()):
            self.enable_async_reduce = False  # read by upstream's _post_backward alone, which makes the host wait

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """One forward pass (collective where memory is shared). This is the order:

        1. what ranks that share memory do before it,
        2. the model: by regions where it is called with labels, else with upstream's hook per operation,
        3. what ranks that share memory do behind it.

        Returns:
            ``CausalLMOutput`` with ``loss``, an fp32 scalar, of ``input_ids`` and ``labels``, int64 [batch, sequence];
            with ``logits`` without ``labels``.
        """
        by_regions = self.regions is not None and options.get("labels") is not None
        self.around.begin()
        try:
            passed = self._forward_by_regions if by_regions else super().forward
            out = passed(*arguments, **options)
        finally:
            self.around.end()
        self.around.succeeded()
        return out

    def _forward_by_regions(self, input_ids: torch.Tensor, labels: torch.Tensor, use_cache: bool = False) -> Any:
        """``GeminiDDP.forward`` without what only operations need: tokens are not cast, no hook listens to
        operations, and parameters, which never get a ``.grad`` here, are not searched for one (milliseconds per step).

        ``use_cache`` is what HuggingFace's models are called with; no keys and values are kept.
        """
        regions: Any = self.regions
        if torch.is_grad_enabled():
            self.gemini_manager.pre_iter()
            return CausalLMOutput(loss=regions.loss(input_ids, labels))
        manager = self.gemini_manager
        assert not (manager.need_warmup and manager.is_warmup()), "placement auto needs a step of training first"
        with order_of_training_kept(manager):
            loss = regions.loss(input_ids, labels)
            self._post_forward()
            manager.reset_attributes()
        return CausalLMOutput(loss=loss)

    def _setup_grads_ptr(self) -> None:
        """Clear what a hook per operation leaves at the parameters; a pass by regions leaves nothing."""
        if self.regions is None:
            super()._setup_grads_ptr()

    def _post_backward(self) -> None:
        """Wait for the reductions, the host or only the device (:meth:`run_by`), then do what upstream does."""
        if self.async_reduce_stream is not None and not self.enable_async_reduce:
            accelerator: Any = get_accelerator()
            join(self.async_reduce_stream, accelerator.current_stream())
        super()._post_backward()


class SuiteGeminiOptimizer(GeminiOptimizer):
    """Upstream's groups, states, loss scale, gradient norm and checkpoints, with a step by runs of chunk memory.

    Attributes:
        chunk_adam: what a step runs; :class:`SuiteGeminiPlugin` gives it.
    """

    chunk_adam: ChunkAdam

    def step(self) -> None:
        """Unscale, clip and update (collective), or leave the step out if an fp16 gradient overflowed."""
        self.chunk_adam.step()

    def zero_grad(self) -> None:
        """Forget an overflow: no stand-in ever has a gradient to clear."""
        self.mix_precision_mixin.pre_zero_grad()


class SuiteGeminiPlugin(GeminiPlugin):
    """Upstream's plugin, which wraps into :class:`SuiteGemini` and :class:`SuiteGeminiOptimizer`.

    Attributes:
        compiled_adam: update by one compiled pass where memory is a GPU's.
    """

    compiled_adam = False

    def configure(
        self,
        model: nn.Module,
        optimizer: Any = None,
        criterion: Any = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> tuple:
        """Wrap a bare model and its ``SuiteAdam``; the rest is returned as it is."""
        params_info = get_param_info(optimizer)
        gemini_config: dict[str, Any] = self.gemini_config
        optimizer_config: dict[str, Any] = {**self.zero_optim_config, **self.optim_kwargs}
        tensor_group: Any = self.tp_group
        if self.enable_tensor_parallelism:
            model, _ = ShardFormer(self.shard_config).optimize(model)
        gemini = SuiteGemini(
            model,
            **gemini_config,
            zero_group=self.zero_group,
            extra_dp_group=self.extra_dp_group,
            verbose=self.verbose,
        )
        # upstream's own looks at the whole call stack for the one debug line of a backward pass, whether written or not
        quiet: Any = logging.getLogger("colossalai.gemini")
        gemini._logger = quiet
        suite_optimizer = SuiteGeminiOptimizer(
            optimizer,
            gemini,
            **optimizer_config,
            tp_group=tensor_group,
            params_info=params_info,
            verbose=self.verbose,
        )
        suite_optimizer.chunk_adam = ChunkAdam(suite_optimizer, optimizer, compiled=self.compiled_adam)
        return gemini, suite_optimizer, criterion, dataloader, lr_scheduler
