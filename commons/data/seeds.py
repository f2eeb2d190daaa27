"""Seeds for torch's generator of the host, which reads the lower 32 bits only."""

from __future__ import annotations

import hashlib

READ_BITS = 32


def folded(seed: int) -> int:
    """A seed below 2**63 whose lower bits depend on all of ``seed``'s, as seeds 2**32 apart would else draw the same
    numbers. One that fits into 32 bits is left as it is.
    """
    if seed < 2**READ_BITS:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
