"""Initial weights that do not depend on the plan, the number of ranks or the order in which a plan builds its
parameters.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn

from commons.data.seeds import folded

INIT_STD = 0.02


def seeded_init_(model: nn.Module, seed: int, device: torch.device, round_to: torch.dtype | None = None) -> None:
    """Draw GPT-2's initial weights in place, each parameter from a generator of its own, seeded by ``seed``
    and its name.

    Linear and embedding weights are normal with a standard deviation of 0.02, those of the projections back
    into the residual stream of 0.02 / sqrt(2 x layers); biases are 0 and normalisation weights 1 (Radford et
    al. 2019, section 2.3, and OpenAI's code). Works on real parameters and on Colossal-AI's lazy ones, where
    the draws happen later.

    Args:
        model: a ``GPT2LMHeadModel``; the tied head follows its embedding.
        seed: the same on every rank.
        device: where the parameters are, or will be once they are no longer lazy. GPUs draw other numbers
            than CPUs.
        round_to: round the drawn weights to what this dtype can hold. Gemini and ZeRO make their fp32 master
            weights from bf16 ones, so rounding lets every plan start from the same model.
    """
    residual_std = INIT_STD / math.sqrt(2 * model.config.num_hidden_layers)  # pyright: ignore
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                param.zero_()
            elif ".ln_" in name:
                param.fill_(1.0)
            else:
                generator = torch.Generator(device=device).manual_seed(folded(seed) ^ zlib.crc32(name.encode()))
                param.normal_(0.0, residual_std if name.endswith("c_proj.weight") else INIT_STD, generator=generator)
                if round_to is not None:
                    param.copy_(param.to(round_to))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and embeddings decay, biases and normalisation weights do not."""
    matrices = [param for param in model.parameters() if param.ndim >= 2]
    vectors = [param for param in model.parameters() if param.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
