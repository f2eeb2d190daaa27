"""FLOPs per token of a model and of its matrix products, and the rates made of them. Pure functions.

**Model FLOPs** are what the model needs, whatever the implementation does: 6N + 12·L·h·S per token for
forward and backward, with N parameters, L layers, hidden size h and sequence length S (Kaplan et al.
2020, section 2.1; Chowdhery et al. 2022, "PaLM", appendix B). N leaves out position embeddings, which are
only looked up, and the vocabulary's padding rows, which no model needs; it takes the token embedding once,
for the matmul of the tied head. 6N counts biases and layer norms as if they were matmuls: 1.3 % of N on
gpt2_tiny, 0.1 % and less from gpt2_small on.

**Hardware FLOPs** are the matmuls that really run: see :func:`hardware_flops_per_token`.

Both count 2·m·n·k for a matmul, and causal attention as if no position were masked, as the sources above do:
what a kernel skips of the upper triangle is not taken off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from commons.reporting.peak_rates import TERA
from model_zoo import flops_parameter_count

if TYPE_CHECKING:
    from model_zoo import ModelShape

FUSED_ATTENTIONS = ("sdpa", "flash")


def model_flops_per_token(shape: ModelShape, seq_len: int) -> float:
    """FLOPs per token that training needs, forward and backward: 6N + 12·L·h·S; sources in the module."""
    return 6.0 * flops_parameter_count(shape) + 12.0 * shape.layers * shape.hidden * seq_len


def hardware_flops_per_token(
    shape: ModelShape, seq_len: int, *, recompute: str, attention: str, dropout: float = 0.0
) -> float:
    """FLOPs per token of the matmuls that really run, forward and backward.

    Its terms, h being the hidden size and S the sequence length:

    - blocks: 24·h² per layer forward (12·h² weights), twice that backward;
    - head: 2·h·(padded vocabulary) forward, twice that backward: padding columns are computed in vain;
    - attention: scores and weighted values, 4·h·S per layer forward. Backward "eager" does four matmuls of that
      kind (8·h·S), a fused kernel ("sdpa", "flash") does five (10·h·S), since it computes the scores again.
      On a CPU "sdpa" with dropout is not fused, and this is 2·h·S too much there;
    - recompute: with activation checkpointing "on" each layer's forward once more. torch's non-reentrant
      checkpoint stops as soon as it has back every tensor that the backward pass needs, which without dropout
      is before the last matmul of the feed-forward layer (8·h²); with dropout that one runs too, for the
      tensor saved after it. "selective" repeats none of these, but "eager" attention's two.

    Biases, norms, softmax, activations and the optimizer are no matmuls and not counted, so that "eager"
    without recompute can come out up to 1 % below the model FLOPs, which do count biases and norms.

    Args:
        recompute: activation checkpointing, "off", "selective" or "on".
        attention: "eager", "sdpa" or "flash".
        dropout: as the model was built.

    Raises:
        ValueError: unknown attention.
    """
    if attention != "eager" and attention not in FUSED_ATTENTIONS:
        raise ValueError(f"unknown attention {attention!r}; take one of eager, {', '.join(FUSED_ATTENTIONS)}")
    hidden, layers = float(shape.hidden), shape.layers
    block, head, scores = 24 * hidden**2, 2 * hidden * shape.padded_vocab, 4 * hidden * seq_len
    scores_backward = (2.5 if attention in FUSED_ATTENTIONS else 2.0) * scores
    flops = 3 * (layers * block + head) + layers * (scores + scores_backward)
    if recompute == "on":
        last_matmul = 8 * hidden**2 if dropout == 0 else 0.0
        flops += layers * (block + scores - last_matmul)
    elif recompute == "selective" and attention == "eager":
        flops += layers * scores
    return flops


def tokens_per_second(tokens: int, seconds: float) -> float:
    """``tokens`` of all devices together in ``seconds``.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"a rate needs a positive time, got {seconds} s")
    return tokens / seconds


def tflops_per_device(flops_per_token: float, tokens: int, seconds: float, devices: int) -> float:
    """10^12 FLOPs per second and device, for ``tokens`` that ``devices`` process together in ``seconds``."""
    return flops_per_token * tokens_per_second(tokens, seconds) / devices / TERA


def mfu(model_tflops_per_device: float, peak_flops_per_second: float | None) -> float | None:
    """Model FLOPs utilisation, a fraction (PaLM, appendix B); None where the peak is not known."""
    return None if peak_flops_per_second is None else model_tflops_per_device * TERA / peak_flops_per_second
