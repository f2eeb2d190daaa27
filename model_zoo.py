"""The sizes of GPT-2 that the suite trains, their exact parameter counts, and how a model is built from a
size.

``python model_zoo.py`` prints the table. A new size is one entry in :data:`MODEL_SIZES`.

torch and transformers are imported where they are used: reading the table takes no time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from commons.ops.activation_checkpointing import MODES, checkpoint_arguments

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel

VOCAB_MULTIPLE = 128  # matmul dimensions that are multiples of 128 fill the tiles of every tensor core
TABLE_WIDTH = 110  # columns of the printed table
# name here -> transformers' attn_implementation
ATTENTIONS = {"sdpa": "sdpa", "eager": "eager", "flash": "sdpa"}


@dataclass(frozen=True)
class ModelShape:
    """The shape of a GPT-2: what fixes its parameter count and its FLOPs.

    Attributes:
        layers: transformer blocks.
        hidden: width of the residual stream; the feed-forward layer is four times as wide.
        heads: attention heads a block.
        positions: rows of the position table, the longest sequence that the model takes.
        vocab: token ids that the model reads and predicts, before any padding.

    Whether ``heads`` divides ``hidden`` is asked when a model is built, so that a configuration with that and
    other faults can name them all.

    Raises:
        ValueError: a number is not a positive integer.
    """

    layers: int
    hidden: int
    heads: int
    positions: int = 1024
    vocab: int = 50257

    def __post_init__(self) -> None:
        wrong = [f"{name} {value!r}" for name, value in vars(self).items() if type(value) is not int or value < 1]
        if wrong:
            raise ValueError(f"a model's shape takes positive integers, got {', '.join(wrong)}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding as computed: ``vocab`` rounded up to a multiple of 128."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


# small to xl: OpenAI's published GPT-2 models. 2b to 40b: hidden size and layers of Colossal-AI's GPT
# example, with heads of 128 instead of up to 512, which flash attention takes. gpt3_175b: Brown et al. 2020,
# table 2.1.
MODEL_SIZES: dict[str, ModelShape] = {
    "gpt2_tiny": ModelShape(layers=4, hidden=64, heads=4, positions=128, vocab=1000),
    "gpt2_small": ModelShape(layers=12, hidden=768, heads=12),
    "gpt2_medium": ModelShape(layers=24, hidden=1024, heads=16),
    "gpt2_large": ModelShape(layers=36, hidden=1280, heads=20),
    "gpt2_xl": ModelShape(layers=48, hidden=1600, heads=25),
    "gpt2_2b": ModelShape(layers=40, hidden=2048, heads=16),
    "gpt2_4b": ModelShape(layers=64, hidden=2304, heads=18),
    "gpt2_6b": ModelShape(layers=30, hidden=4096, heads=32),
    "gpt2_10b": ModelShape(layers=50, hidden=4096, heads=32),
    "gpt2_14b": ModelShape(layers=70, hidden=4096, heads=32),
    "gpt2_20b": ModelShape(layers=25, hidden=8192, heads=64),
    "gpt2_24b": ModelShape(layers=30, hidden=8192, heads=64),
    "gpt2_30b": ModelShape(layers=37, hidden=8192, heads=64),
    "gpt2_40b": ModelShape(layers=50, hidden=8192, heads=64),
    "gpt3_175b": ModelShape(layers=96, hidden=12288, heads=96, positions=2048),
}


# --- Counting -----------------------------------------------------------------------------------------------


def _block_parameter_count(hidden: int) -> int:
    """One block: qkv 3h²+3h, attention output h²+h, feed-forward 8h²+5h, two layer norms 4h."""
    return 12 * hidden**2 + 13 * hidden


def _without_embeddings(shape: ModelShape) -> int:
    final_norm = 2 * shape.hidden
    return shape.layers * _block_parameter_count(shape.hidden) + final_norm


def parameter_count(shape: ModelShape) -> int:
    """The model's size: every parameter once, the embedding tied to the head once, no padding rows."""
    return flops_parameter_count(shape) + shape.positions * shape.hidden


def padded_parameter_count(shape: ModelShape) -> int:
    """Parameters as they lie in memory: :func:`parameter_count` plus the embedding's padding rows."""
    return parameter_count(shape) + (shape.padded_vocab - shape.vocab) * shape.hidden


def flops_parameter_count(shape: ModelShape) -> int:
    """N of the 6N model FLOPs: no position embeddings, which are only looked up, and no padding rows.

    The token embedding counts, once: it is the matmul of the head.
    """
    return _without_embeddings(shape) + shape.vocab * shape.hidden


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every parameter by HuggingFace's name, in HuggingFace's order, with its dimensions; the vocabulary unpadded.

    The matrices of the blocks lie as (inputs, outputs). The head is the token embedding and has no entry of its own.
    """
    wide = shape.hidden
    norm = {"weight": (wide,), "bias": (wide,)}
    block = {
        "ln_1": norm,
        "attn.c_attn": {"weight": (wide, 3 * wide), "bias": (3 * wide,)},
        "attn.c_proj": {"weight": (wide, wide), "bias": (wide,)},
        "ln_2": norm,
        "mlp.c_fc": {"weight": (wide, 4 * wide), "bias": (4 * wide,)},
        "mlp.c_proj": {"weight": (4 * wide, wide), "bias": (wide,)},
    }
    layers = {f"h.{index}.{name}": part for index in range(shape.layers) for name, part in block.items()}
    tables = {"wte": {"weight": (shape.vocab, wide)}, "wpe": {"weight": (shape.positions, wide)}}
    parts = {**tables, **layers, "ln_f": norm}
    return {f"transformer.{part}.{kind}": size for part, kinds in parts.items() for kind, size in kinds.items()}


# --- Building -----------------------------------------------------------------------------------------------


def build_model(
    shape: ModelShape,
    *,
    attention: str = "sdpa",
    dropout: float = 0.0,
    activation_checkpointing: str = "off",
) -> GPT2LMHeadModel:
    """Build a GPT-2 with transformers' own initial weights, on torch's current default device and dtype.

    The model is transformers' class itself and not a wrapper: Colossal-AI's shardformer looks its policy up
    by class name. ``model(input_ids=tokens, labels=tokens)`` with tokens int64 [batch, sequence] gives
    ``loss``, an fp32 scalar (:func:`next_token_loss`), and ``logits`` [batch, sequence, padded_vocab], of
    which the columns from ``shape.vocab`` on belong to padding and mean nothing.

    Args:
        attention: "sdpa" (torch's scaled_dot_product_attention), "flash" (the same; whoever runs the model
            restricts it to its flash kernel) or "eager" (matmul, softmax, matmul).
        dropout: probability, the same for embeddings, attention weights and residuals.
        activation_checkpointing: "off", "selective" or "on", see commons.ops.activation_checkpointing.

    Raises:
        ValueError: an unknown attention or activation_checkpointing, a dropout outside [0, 1), or heads that do not
            divide the hidden size.
    """
    from transformers import GPT2LMHeadModel

    if activation_checkpointing not in MODES:
        known = ", ".join(MODES)
        raise ValueError(f"unknown activation_checkpointing {activation_checkpointing!r}; take one of {known}")
    model = GPT2LMHeadModel(_transformers_config(shape, attention, dropout))
    model.loss_function = partial(next_token_loss, vocab=shape.vocab)
    if activation_checkpointing != "off":
        model.gradient_checkpointing_enable(checkpoint_arguments(activation_checkpointing))
    return model.train()


def _transformers_config(shape: ModelShape, attention: str, dropout: float):
    from transformers import GPT2Config

    if attention not in ATTENTIONS:
        raise ValueError(f"unknown attention {attention!r}; take one of {', '.join(ATTENTIONS)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if shape.hidden % shape.heads:
        nearest = min(divisors(shape.hidden), key=lambda heads: abs(heads - shape.heads))
        raise ValueError(f"{shape.heads} heads do not divide the hidden size {shape.hidden}; {nearest} heads would")
    # 50256 in GPT-2's own vocabulary, which is transformers' default and out of a smaller one
    end_of_text = shape.vocab - 1
    return GPT2Config(
        vocab_size=shape.padded_vocab,
        n_positions=shape.positions,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",  # gelu_new's function, in one kernel
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        use_cache=False,  # training keeps no keys and values
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        attn_implementation=ATTENTIONS[attention],
    )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int | None = None, *, vocab: int
) -> torch.Tensor:
    """Mean cross-entropy, in nats a token, of every position's prediction of the next token.

    Padding columns are added -inf, so that their probability and their gradient are exactly zero: the loss is
    that of a model without padding.

    Args:
        logits: [batch, sequence, padded vocabulary], any floating dtype; computed with in fp32.
        labels: int64 [batch, sequence], the input tokens themselves, shifted in here; -100 is left out.
        vocab_size: what transformers passes, the padded vocabulary; the logits say it already.
        vocab: columns that are token ids; the rest is padding.

    Returns:
        An fp32 scalar; the mean over all predicted positions of the batch.

    Raises:
        ValueError: the sequence has fewer than two tokens, so that there is nothing to predict.
    """
    import torch
    from torch.nn import functional

    from commons.ops.cross_entropy import IGNORED_LABEL

    if labels.shape[-1] < 2:
        raise ValueError("a sequence of one token has no next token to predict; seq_len must be at least 2")
    # labels move, not logits: a slice of the logits would copy the largest tensor of the step
    targets = functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)
    padding = torch.zeros(logits.shape[-1], dtype=torch.float32, device=logits.device)
    padding[vocab:] = float("-inf")
    # an addition of mixed dtypes converts to fp32 on its way, so that masking costs no pass of its own
    masked = logits + padding
    return functional.cross_entropy(masked.flatten(0, -2), targets.flatten(), ignore_index=IGNORED_LABEL)


# --- The table ----------------------------------------------------------------------------------------------


def _print_sizes() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("size", title="GPT-2 sizes; padded: with the vocabulary as it is computed", box=box.SIMPLE)
    for heading in ("layers", "hidden", "heads", "head_dim", "positions", "vocab", "parameters", "padded"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, shape in MODEL_SIZES.items():
        numbers = (shape.layers, shape.hidden, shape.heads, shape.head_dim, shape.positions, shape.vocab)
        counts = (f"{parameter_count(shape):,}", f"{padded_parameter_count(shape):,}")
        table.add_row(name, *map(str, numbers), *counts)
    console = Console()
    # rich takes 80 columns for a pipe and would cut the numbers
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


if __name__ == "__main__":
    _print_sizes()
