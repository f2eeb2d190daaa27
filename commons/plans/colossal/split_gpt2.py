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
- names CUDA directly.

``GPT2PipelineForwards``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/modeling/gpt2.py
``dist_cross_entropy``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/layer/loss.py
``INPALCE_MAPPING``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/tensor/colo_tensor.py

The one below has none of this to get wrong: HuggingFace's blocks without any mask, which is causal, and the
suite's loss. It does what a training step needs and nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from colossalai.shardformer.layer._operation import gather_sp_output, split_forward_gather_backward
from colossalai.shardformer.layer.utils import Randomizer, SeqParallelUtils
from colossalai.shardformer.policies import gpt2 as gpt2_policies
from colossalai.shardformer.policies.gpt2 import GPT2LMHeadModelPolicy
from transformers import GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from commons.ops.vocab_parallel_cross_entropy import vocab_parallel_loss


class SplitGPT2Policy(GPT2LMHeadModelPolicy):
    """Shardformer's policy with :func:`split_forward` as the model's forward pass."""

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
        return policy

    def set_pipeline_forward(self, model_cls: Any, new_forward: Any, policy: dict) -> None:
        super().set_pipeline_forward(model_cls, split_forward, policy)

    def postprocess(self) -> Any:
        shard_config: Any = self.shard_config
        if shard_config.enable_sequence_parallelism:
            self._mark_partial_biases()
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
    gpt2_policies.GPT2LMHeadModelPolicy = SplitGPT2Policy  # pyright: ignore[reportPrivateImportUsage]
