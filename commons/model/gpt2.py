"""GPT-2 as three pure functions of tensors: embedding, block, and final norm with head and loss.

The same arithmetic as HuggingFace's ``GPT2LMHeadModel``, without its modules: a function of parameters can be
compiled once and called for every block, under any plan, whatever that plan does to the parameters between
calls. The names of the parameters are HuggingFace's, so that a plan finds them in the model.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3; the tanh form of GELU
is that of Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from commons.ops.activation_checkpointing import checkpoint_arguments
from commons.ops.cross_entropy import next_token_loss, softmax_gradient, softmax_gradient_kernel
from commons.ops.fp8 import fp8_linear
from model_zoo import ModelShape

EMBEDDING_PARAMETERS = ("transformer.wte.weight", "transformer.wpe.weight")
# relative to transformer.h.<index>, in the order of the block function's arguments
BLOCK_PARAMETERS = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)
HEAD_PARAMETERS = ("transformer.ln_f.weight", "transformer.ln_f.bias", "transformer.wte.weight")

LAYER_NORM_EPS = 1e-5  # as in OpenAI's code and GPT2Config


@dataclass(frozen=True)
class GPT2Functions:
    """The three parts of the model. Hidden states are [batch, sequence, width], tokens int64 [batch,
    sequence].

    Attributes:
        embed: (tokens, *EMBEDDING_PARAMETERS) -> hidden states.
        block: (hidden states, *BLOCK_PARAMETERS) -> hidden states.
        loss: (hidden states, tokens, *HEAD_PARAMETERS) -> fp32 scalar, the mean cross-entropy of the next
            token.
        without_dropout: the same to evaluate with; None where nothing is dropped anyway.
    """

    embed: Callable[..., torch.Tensor]
    block: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor]
    without_dropout: GPT2Functions | None = None


def attention_backend(attention: str) -> AbstractContextManager:
    """For "flash", torch's scaled_dot_product_attention restricted to its flash kernel; else nothing.

    The kernel is chosen when the function runs, or, compiled, when it is compiled.
    """
    if attention != "flash":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def _unchanged(function: Callable) -> Callable:
    return function


def gpt2_functions(
    shape: ModelShape,
    *,
    attention: str = "sdpa",
    dropout: float = 0.0,
    recompute: str = "off",
    fp8: bool = False,
    fused_gelu: bool = False,
    kernels: bool = False,
    transform: Callable[[Callable], Callable] = _unchanged,
) -> GPT2Functions:
    """The functions of one model size, in training mode.

    Args:
        attention: "sdpa", "flash" (the same; the caller restricts torch to its flash kernel) or "eager".
        dropout: probability, the same for embeddings, attention weights and residuals.
        recompute: what a block computes again in the backward pass: "off", "selective" or "on", see
            commons.ops.activation_checkpointing.
        fp8: compute the blocks' linear layers in fp8; parameters and all else as they are.
        fused_gelu: apply GELU inside of matrix products, see commons.ops.feed_forward; not with fp8.
        kernels: take the loss, the norms and the casts to fp8 from commons.ops.triton_kernels.
        transform: applied to what should be compiled: embedding, block, and the pointwise part of the loss,
            whose matrix products gain nothing.
    """
    vocab = shape.vocab
    attend = _attend_eagerly if attention == "eager" else _attend
    linear: Callable = partial(fp8_linear, kernel=kernels) if fp8 else _linear
    feed: Callable = partial(_feed_forward, dropout=dropout, linear=linear)
    if fused_gelu:
        from commons.ops.feed_forward import feed_forward  # registers operators

        feed = partial(feed_forward, dropout=dropout)

    def embed(tokens: torch.Tensor, token_table: torch.Tensor, position_table: torch.Tensor) -> torch.Tensor:
        hidden = functional.embedding(tokens, token_table) + position_table[: tokens.shape[1]]
        return functional.dropout(hidden, dropout) if dropout else hidden

    norm: Callable = _norm_and_residual
    if kernels:
        from commons.ops.layer_norm import norm_and_residual  # registers an operator

        norm = partial(norm_and_residual, eps=LAYER_NORM_EPS)

    in_norm = kernels and not dropout  # dropout is between the biases and the residual
    parts = _BlockParts(shape.heads, dropout, attend, linear, feed, norm, bias_gradients_in_norm=in_norm)

    def block(hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return _block(hidden, _BlockParameters(*parameters), parts)

    def recomputed_block(hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        # inside of what is compiled: the compiler leaves out what the backward pass does not need, such as the
        # last matrix product
        return checkpoint(block, hidden, *parameters, preserve_rng_state=dropout > 0, **checkpointing)

    checkpointing = checkpoint_arguments(recompute, compiled=transform is not _unchanged)
    kernel = softmax_gradient_kernel if kernels else transform(softmax_gradient)

    def loss(
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        token_table: torch.Tensor,
    ) -> torch.Tensor:
        return next_token_loss(_layer_norm(hidden, norm_weight, norm_bias), token_table, tokens, vocab, kernel)

    return GPT2Functions(transform(embed), transform(block if recompute == "off" else recomputed_block), loss)


def _layer_norm(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(hidden, weight.shape, weight, bias, LAYER_NORM_EPS)


def _norm_and_residual(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden if added is None else added + hidden
    return _layer_norm(hidden, weight, bias), hidden


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """HuggingFace's Conv1D: ``weight`` is [in, out]."""
    return torch.addmm(bias, hidden.flatten(0, -2), weight).unflatten(0, hidden.shape[:-1])


class _BlockParameters(NamedTuple):
    """One block's, in the order of ``BLOCK_PARAMETERS``."""

    norm_1_weight: torch.Tensor
    norm_1_bias: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor
    attention_out_weight: torch.Tensor
    attention_out_bias: torch.Tensor
    norm_2_weight: torch.Tensor
    norm_2_bias: torch.Tensor
    up_weight: torch.Tensor
    up_bias: torch.Tensor
    down_weight: torch.Tensor
    down_bias: torch.Tensor


class _BlockParts(NamedTuple):
    """What a block is made of.

    Attributes:
        attend: (query, key, value, dropout) -> what is attended to, each [batch, heads, sequence, head width].
        linear: (hidden states, weight, bias) -> hidden states.
        feed: (normed, up weight, up bias, down weight, down bias, residual) -> hidden states.
        norm: (hidden states, what is added to them or None, weight, bias, *biases) -> normed, sum.
        bias_gradients_in_norm: the second norm is given the biases of both products around it, attention's last and
            the feed-forward layer's, and gives their gradients.
    """

    heads: int
    dropout: float
    attend: Callable
    linear: Callable
    feed: Callable
    norm: Callable
    bias_gradients_in_norm: bool


def _block(hidden: torch.Tensor, given: _BlockParameters, parts: _BlockParts) -> torch.Tensor:
    """One transformer block with the layer norms before attention and feed-forward layer."""
    normed, hidden = parts.norm(hidden, None, given.norm_1_weight, given.norm_1_bias)
    qkv = parts.linear(normed, given.qkv_weight, given.qkv_bias)
    # views [batch, heads, sequence, head width] of one tensor: in the backward pass their gradients are put side
    # by side as they lie
    query, key, value = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, parts.heads, -1)).unbind(2))
    attended = parts.attend(query, key, value, parts.dropout).transpose(1, 2).flatten(2)
    biases = ()
    attention_out_bias, down_bias = given.attention_out_bias, given.down_bias
    if parts.bias_gradients_in_norm:
        biases = attention_out_bias, down_bias
        attention_out_bias, down_bias = (bias.detach() for bias in biases)
    attended = _dropped(parts.linear(attended, given.attention_out_weight, attention_out_bias), parts.dropout)
    normed, hidden = parts.norm(hidden, attended, given.norm_2_weight, given.norm_2_bias, *biases)
    return parts.feed(normed, given.up_weight, given.up_bias, given.down_weight, down_bias, hidden)


def _feed_forward(
    hidden: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    residual: torch.Tensor,
    *,
    dropout: float,
    linear: Callable,
) -> torch.Tensor:
    inner = functional.gelu(linear(hidden, up_weight, up_bias), approximate="tanh")
    return residual + _dropped(linear(inner, down_weight, down_bias), dropout)


def _dropped(hidden: torch.Tensor, dropout: float) -> torch.Tensor:
    return functional.dropout(hidden, dropout) if dropout else hidden


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)


def _attend_eagerly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, torch.finfo(scores.dtype).min).softmax(-1).to(value.dtype)
    return (functional.dropout(weights, dropout) if dropout else weights) @ value
