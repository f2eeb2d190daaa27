"""How Colossal-AI's shardformer splits a GPT-2 over tensor- and pipeline-parallel ranks, with a forward pass
of the suite's own.

Shardformer's policy for GPT-2 says which layer becomes which parallel layer, and that part is used as it is.
Its forward pass is not: in Colossal-AI 0.5.0 it

- is not causal: it hands scaled_dot_product_attention a mask of the padding alone (``_get_attention_mask``);
- crashes without an attention mask (``None.size``) and without labels (``loss`` unbound);
- computes the loss through ``DistCrossEntropy.backward``, whose in-place ``mul_`` Gemini's ColoTensor turns
  into a ``mul`` without effect, so that gradients under Gemini with tensor parallelism lack the division by
  the number of tokens and the loss scale;
- reduces over the sequence-parallel group, which under Gemini is None, that is the whole world
  (``dist_cross_entropy``);
- predicts padding tokens;
- names CUDA directly;
- drops other elements on every tensor-parallel rank of activations that all of them hold whole
  (``DropoutForParallelInput`` for ``drop``, ``attn.resid_dropout`` and ``mlp.dropout``), so that parameters which they
  hold whole drift apart, and other elements again where a checkpointed block is computed again (``Randomizer``).

``GPT2PipelineForwards``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/modeling/gpt2.py
``dist_cross_entropy``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/layer/loss.py
``INPALCE_MAPPING``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/tensor/colo_tensor.py
``DropoutForParallelInput``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/layer/dropout.py

The one below has none of this to get wrong: HuggingFace's blocks without any mask, which is causal, and the
suite's loss. It does what a training step needs and nothing else.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from colossalai.shardformer.layer import DropoutForParallelInput
from colossalai.shardformer.layer._operation import gather_sp_output, split_forward_gather_backward
from colossalai.shardformer.layer.utils import Randomizer, SeqParallelUtils
from colossalai.shardformer.policies import gpt2 as gpt2_policies
from colossalai.shardformer.policies.gpt2 import GPT2LMHeadModelPolicy
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import AttentionInterface
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model

from commons.distributed.seeding import own_part
from commons.ops.vocab_parallel_cross_entropy import vocab_parallel_loss

# transformers' name for attention over the heads of one tensor-parallel rank, with dropout of its own
OWN_HEADS = "sdpa_over_own_heads"


class PartDropout(nn.Dropout):
    """Dropout of an activation of which every tensor-parallel rank holds another part: its own heads, or its own
    piece of the sequence.

    Args:
        group: the tensor-parallel ranks.
    """

    def __init__(self, p: float, group: dist.ProcessGroup) -> None:
        super().__init__(p)
        self._part, self._parts = dist.get_rank(group), dist.get_world_size(group)

    @classmethod
    def from_native_module(cls, module: nn.Dropout, process_group: dist.ProcessGroup) -> PartDropout:
        """What shardformer calls for each ``SubModuleReplacementDescription``."""
        return cls(module.p, process_group)

    def own_part(self, activation: torch.Tensor) -> AbstractContextManager:
        """Around whatever drops elements of ``activation``."""
        return own_part(self._part, self._parts, activation.device)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return input
        with self.own_part(input):
            return super().forward(input)


def attend_over_own_heads(
    module: Any, query: torch.Tensor, *arguments: Any, dropout: float = 0.0, **options: Any
) -> Any:
    """transformers' ``sdpa_attention_forward`` on this rank's heads, [batch, heads, sequence, head width]."""
    if dropout == 0:
        return sdpa_attention_forward(module, query, *arguments, **options)
    with module.attn_dropout.own_part(query):
        return sdpa_attention_forward(module, query, *arguments, dropout=dropout, **options)


class SplitGPT2Policy(GPT2LMHeadModelPolicy):
    """Shardformer's policy with :func:`split_forward` as the model's forward pass, and dropout that matches what is
    split.
    """

    def preprocess(self) -> Any:
        # dropout layers count themselves in a process-wide counter that must agree between tensor-parallel
        # ranks; pipeline stages of an earlier model in this process have left it anywhere
        Randomizer.reset_index()
        return super().preprocess()

    def module_policy(self) -> dict:
        policy = super().module_policy()
        if self.pipeline_stage_manager is None:
            forward = partial(split_forward, shard_config=self.shard_config)
            policy[GPT2LMHeadModel].method_replacement = {"forward": forward}
        shard_config: Any = self.shard_config
        if shard_config.enable_tensor_parallelism:
            self._match_dropout(policy, sequence_parallel=shard_config.enable_sequence_parallelism)
        return policy

    def _match_dropout(self, policy: dict, *, sequence_parallel: bool) -> None:
        """Leave dropout of whole activations as it is, whose generator all tensor-parallel ranks share, and take
        :class:`PartDropout` where each holds a part.
        """
        split = {"attn.attn_dropout"}
        if sequence_parallel:
            split |= {"attn.resid_dropout", "mlp.dropout"}
        for layer in (GPT2Model, GPT2Block):
            kept = []
            for description in policy[layer].sub_module_replacement:
                if description.suffix in split:
                    description.target_module = PartDropout
                elif description.target_module is DropoutForParallelInput:
                    continue
                kept.append(description)
            policy[layer].sub_module_replacement = kept

    def set_pipeline_forward(self, model_cls: Any, new_forward: Any, policy: dict) -> None:
        super().set_pipeline_forward(model_cls, split_forward, policy)

    def postprocess(self) -> Any:
        shard_config: Any = self.shard_config
        if shard_config.enable_sequence_parallelism:
            self._mark_partial_biases()
        model: Any = self.model
        if shard_config.enable_tensor_parallelism and model.config._attn_implementation == "sdpa":
            model.config._attn_implementation = OWN_HEADS
        return super().postprocess()

    def _mark_partial_biases(self) -> None:
        """Have the gradients of the row-parallel biases summed over the tensor-parallel ranks too.

        Under sequence parallelism these biases are added to a part of the sequence, like the layer norms,
        which upstream marks. It leaves the biases out, so that each rank trains its own.
        https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/layer/qkv_fused_linear.py
        (``GPT2FusedLinearConv1D_Row``)
        """
        model: Any = self.model
        for block in model.transformer.h:
            for bias in (block.attn.c_proj.bias, block.mlp.c_proj.bias):
                if bias is not None:  # of a block on this pipeline stage
                    SeqParallelUtils.marked_as_sp_partial_derived_param(bias)


def split_forward(
    self: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    hidden_states: torch.Tensor | None = None,
    stage_manager: Any = None,
    stage_index: tuple[int, int] | None = None,
    shard_config: Any = None,
    **_: Any,
) -> Any:
    """The forward pass of this rank's part of a ``GPT2LMHeadModel``, which is ``self``.

    Args:
        input_ids: int64 [batch, sequence].
        labels: the same, or None for logits alone.
        hidden_states: what the stage before gave, [batch, sequence (a part of it under sequence parallelism),
            width].
        stage_manager: of the pipeline, or None.
        stage_index: first and one past the last of the stage's blocks.

    Returns:
        On the last stage loss (fp32 scalar) and logits (this rank's columns), elsewhere ``{"hidden_states":
        ...}``.
    """
    body = self.transformer
    sequence_parallel = shard_config.enable_sequence_parallelism
    if stage_manager is None or stage_manager.is_first_stage():
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = body.drop(body.wte(input_ids) + body.wpe(positions))
        if sequence_parallel:
            group = shard_config.tensor_parallel_process_group
            hidden = split_forward_gather_backward(hidden, dim=1, process_group=group)
    else:
        hidden = hidden_states
    start, end = stage_index or (0, len(body.h))
    for index in range(start, end):
        hidden = _run_block(body, index, hidden)
    if stage_manager is not None and not stage_manager.is_last_stage():
        return {"hidden_states": hidden}
    if sequence_parallel:
        hidden = gather_sp_output(hidden, shard_config)
    logits = self.lm_head(body.ln_f(hidden))
    loss: Any = None if labels is None else _loss(self, logits, labels, shard_config)
    return CausalLMOutput(loss=loss, logits=logits)


def _run_block(body: Any, index: int, hidden: Any) -> torch.Tensor:
    block = body.h[index]
    if body.gradient_checkpointing and body.training:
        return body._gradient_checkpointing_func(block.__call__, hidden)[0]
    return block(hidden)[0]


def _loss(model: Any, logits: torch.Tensor, labels: torch.Tensor, shard_config: Any) -> torch.Tensor:
    group = shard_config.tensor_parallel_process_group if shard_config.enable_tensor_parallelism else None
    # Gemini's tensor class has nothing to add from here on, and would replace in-place operations
    with torch._C.DisableTorchFunctionSubclass():
        return vocab_parallel_loss(
            logits.as_subclass(torch.Tensor), labels, model.loss_function.keywords["vocab"], group
        )


def register() -> None:
    """Make shardformer find :class:`SplitGPT2Policy`: it looks policies up by module and class name."""
    AttentionInterface.register(OWN_HEADS, attend_over_own_heads)
    gpt2_policies.GPT2LMHeadModelPolicy = SplitGPT2Policy  # pyright: ignore[reportPrivateImportUsage]
