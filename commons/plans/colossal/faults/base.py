"""What every fault of upstream has, and what its probes share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from colossalai.tensor.d_tensor import api, is_customized_distributed_tensor, is_distributed_tensor

UPSTREAM = "https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/"


class UpstreamFault(ABC):
    """A fault of upstream and its cure.

    Attributes:
        file: where it is, below ``UPSTREAM``.
        function: there.
        symptom: what a user would see.
    """

    file: ClassVar[str]
    function: ClassVar[str]
    symptom: ClassVar[str]

    @property
    def address(self) -> str:
        return UPSTREAM + self.file

    @abstractmethod
    def seen(self) -> bool:
        """Whether the installed Colossal-AI behaves so: calls it with something small and looks at what comes out. No
        process group is needed, and nothing stays changed.
        """

    @abstractmethod
    def mend(self) -> None:
        """Put what is right in its place, for the rest of this process."""


def is_split(param: torch.Tensor) -> bool:
    """Whether tensor-parallel ranks hold different parts of ``param``, not copies. Fused query, key and value
    count.
    """
    return is_distributed_tensor(param) or is_customized_distributed_tensor(param)


# --- for probes: one of two tensor-parallel ranks whose parts are equal, without another data-parallel rank

TENSOR_GROUP: Any = "the tensor-parallel ranks"
DATA_GROUP: Any = "the data-parallel ranks"
TENSOR_RANKS = 2

# gradients on this rank, of a split parameter and of one that both tensor-parallel ranks have, and their global norm
SPLIT_GRADIENT, WHOLE_GRADIENT = (3.0, 4.0), (12.0,)
WHOLE_NORM = math.hypot(*SPLIT_GRADIENT * TENSOR_RANKS, *WHOLE_GRADIENT)


def split_tensor(values: tuple[float, ...]) -> torch.Tensor:
    """This rank's part of a tensor whose other part is equal, as shardformer splits fused query, key and value."""
    part = torch.tensor(values)
    api.init_tensor_as_customization_distributed(
        part, shard_fn=lambda whole: whole.chunk(TENSOR_RANKS)[0], gather_fn=lambda own: torch.cat([own] * TENSOR_RANKS)
    )
    return part


@contextmanager
def two_tensor_ranks() -> Iterator[None]:
    """Collectives of such a rank, in place of torch's."""

    def world_size(group: Any = None) -> int:
        return TENSOR_RANKS if group is TENSOR_GROUP else 1

    def all_reduce(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> None:
        if op == dist.ReduceOp.SUM:
            tensor.mul_(world_size(group))

    def all_gather_object(objects: list, own: Any, group: Any = None) -> None:
        objects[:] = [own] * world_size(group)

    stand_ins = {
        "get_rank": lambda group=None: 0,
        "get_world_size": world_size,
        "barrier": lambda group=None: None,
        "all_reduce": all_reduce,
        "all_gather_object": all_gather_object,
    }
    originals = {name: getattr(dist, name) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(dist, name, stand_in)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
