"""The order of an epoch: a permutation that is computed index by index and never laid out.

A shuffled list of the samples of 10 B tokens would be 80 MB on every rank and seconds at every start. A Feistel
network gives the same at the cost of the indices that are asked for: each round swaps the two halves of an index's bits
and adds to one a hash of the other, which can be undone whatever the hash, so that the whole is one to one. It permutes
a power of two; an index that lands outside of the samples is sent through again until it is inside ("cycle walking").

Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", sections 4 and 5. It need not keep secrets here, only
look random.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

ROUNDS = 8  # an even number: the halves, which can differ in width by one bit, are back in their places
_KEY_BYTES = 8
# of SplitMix64 (Steele, Lea and Flood 2014): odd constants whose products spread every bit over all higher ones
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A permutation of ``[0, size)``, the same on every machine.

    Args:
        size: at least 1.
        seed, epoch: which permutation.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        assert size >= 1
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits, self._high_bits = bits // 2, bits - bits // 2
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=ROUNDS * _KEY_BYTES).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where ``indices``, int64 in ``[0, size)`` of any shape, are sent: int64 of that shape."""
        sent = self._rounds(indices.astype(np.uint64))
        # fewer than half of them each time, on the average, and a cycle leads back to where it began at the latest
        while (outside := sent >= self.size).any():
            sent[outside] = self._rounds(sent[outside])
        return sent.astype(np.int64)

    def _rounds(self, values: np.ndarray) -> np.ndarray:
        low_bits, high_bits = self._low_bits, self._high_bits
        low, high = values & _ones(low_bits), values >> np.uint64(low_bits)
        for key in self._keys:
            low, high = high ^ (_mixed(low ^ key) & _ones(high_bits)), low
            low_bits, high_bits = high_bits, low_bits
        return (high << np.uint64(low_bits)) | low


def _ones(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A hash of every value, uint64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Permutation:
    return Permutation(size, seed, epoch)


def samples_at(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The samples at ``positions`` of the endless stream that goes through all ``size`` samples once an epoch.

    Args:
        positions: int64, one-dimensional, from 0; may reach over the end of an epoch.

    Returns:
        int64 in ``[0, size)``, of the same shape.
    """
    epochs, indices = np.divmod(positions, size)
    samples = np.empty_like(indices)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        samples[now] = _permutation(size, seed, int(epoch))(indices[now])
    return samples
