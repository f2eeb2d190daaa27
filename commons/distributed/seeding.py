"""Every generator of a process follows ``--seed`` and the rank's place: the same settings draw the same numbers.

Randomness has to match what is replicated. Tensor-parallel ranks hold the same hidden states and have to drop the same
elements of them, so their generators are equal; copies of the model see other data and pipeline stages other layers, so
theirs are not. What tensor-parallel ranks hold only parts of draws from :func:`own_part`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from commons.distributed.layout import Place


def seed_generators(seed: int, place: Place) -> None:
    """Seed the generators of Python, NumPy and torch (the host's and the GPUs'). Colossal-AI's Randomizer takes
    torch's seed when a layer is made.

    Args:
        seed: ``--seed``.
        place: of this rank; its part of the matrices makes no difference.
    """
    derived = seed_of(seed, f"copy {place.data}, stage {place.pipeline}")
    random.seed(derived)
    np.random.seed(derived % 2**32)
    torch.manual_seed(derived)


def seed_of(seed: int, purpose: str) -> int:
    """A seed below 2**63 for one purpose. All its bits are mixed: torch's generator of the host reads 32 of them, and
    neighbouring seeds would begin alike.
    """
    digest = hashlib.blake2b(f"{seed}: {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def own_part(part: int, parts: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws other numbers on every part of an activation; afterwards it goes on as if nothing had been
    drawn but one row of seeds, the same for all.

    The seeds come from the host's generator, which activation checkpointing puts back before it computes again: the
    same elements are dropped then.

    Args:
        part: which one this rank has, of ``parts``.
        device: where the activation lies.
    """
    seeds = torch.randint(2**62, (parts,), device="cpu")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(seeds[part]))
        yield
