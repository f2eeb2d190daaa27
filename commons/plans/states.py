"""The canonical form of a training's state, the same under every plan: fp32 master weights and Adam's two moments under
HuggingFace's names, the vocabulary without padding, as boxes of the whole tensors.

A rank of any plan holds flat ranges of matrices (Gemini's chunks, ZeRO's shards, FSDP's rows) or whole ones, under
tensor parallelism of its part of a matrix. A flat range of a matrix is at most three boxes: part of a row, whole rows,
part of a row; each is a view of the rank's memory, so nothing is gathered and nothing is copied to say where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from commons.model.gpt2 import EMBEDDING_PARAMETERS
from model_zoo import ModelShape, parameter_shapes

KINDS = ("master", "exp_avg", "exp_avg_sq")
TOKEN_TABLE = EMBEDDING_PARAMETERS[0]
HEAD = "lm_head.weight"  # tied to the token table, and saved as that


@dataclass(frozen=True)
class Box:
    """A part of a whole tensor, and where this rank has it.

    Attributes:
        offsets: of its first element in the whole tensor, one a dimension.
        tensor: an fp32 view of the rank's own memory, on the device or the host, of the box's sizes: what is written
            into it is the rank's state. Not always contiguous.
    """

    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of a whole tensor that the box covers."""
        for dimension, (begin, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dimension, begin, size)
        return whole


@dataclass(frozen=True)
class StatePiece:
    """What this rank holds of one tensor of the training's state.

    Attributes:
        name: HuggingFace's, such as transformer.h.0.attn.c_attn.weight.
        kind: one of KINDS.
        shape: of the whole tensor, vocabulary unpadded.
        boxes: do not overlap; empty where the rank holds none but padding.
        writes: it is this rank that saves them; False where another one holds the same.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    writes: bool


@dataclass(frozen=True)
class Counters:
    """The numbers that an optimizer goes by, equal on all ranks.

    Attributes:
        updates: Adam's step count; steps skipped for an overflow do not count.
        loss_scale: fp16's; None for other precisions.
        good_steps: since the scale last changed or a step was skipped; it grows after a number of them.
        overflows: that Colossal-AI has let pass without lowering the scale.
    """

    updates: int
    loss_scale: float | None = None
    good_steps: int = 0
    overflows: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Attributes:
        steps: done, of the whole training, skipped ones included.
        samples: sequences that all ranks have taken, which is where the data go on.
        skipped_steps: of the steps, those that fp16 left out.
    """

    steps: int = 0
    samples: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Held:
    """A parameter's states as a plan holds them on this rank.

    Attributes:
        name: as in the model, with or without wrappers' prefixes.
        shape: of this tensor-parallel rank's part of the parameter, whole over the data-parallel ranks.
        begin: of the flat range that the rank holds.
        tensors: by kind, fp32: flat (from ``begin``) or of ``shape``.
        writes: no other rank of the same tensor-parallel place writes them.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    tensors: Mapping[str, torch.Tensor]
    writes: bool = True


class StateHolder(Protocol):
    """Where a plan keeps its states."""

    def held(self) -> Iterator[Held]:
        """Every parameter that this rank holds something of, always in the same order; moments that are not there yet
        are made, as zeros.
        """
        ...

    def refresh(self) -> None:
        """Make the weights that are computed with from the masters (collective)."""
        ...

    def updates(self) -> int:
        """Adam's step count; 0 on a rank that updates nothing."""
        ...

    def set_updates(self, updates: int) -> None:
        """Set it, for every parameter."""
        ...


def canonical_name(name: str) -> str:
    """HuggingFace's name of a parameter, whatever it is wrapped in; the tied head is the token table."""
    start = max(name.find("transformer."), name.find("lm_head."))
    bare = name[start:]
    return TOKEN_TABLE if bare == HEAD else bare


def pieces(model: ModelShape, held: Iterable[Held], tensor_rank: int, tensor_ranks: int) -> Iterator[StatePiece]:
    """What a rank holds, in the canonical form.

    Args:
        tensor_rank: which part of the matrices that are split it has, of ``tensor_ranks``.
    """
    shapes = parameter_shapes(model)
    for each in held:
        name = canonical_name(each.name)
        whole = shapes[name]
        split = _split(name, each.shape, whole, model, tensor_ranks)
        writes = each.writes and (split is not None or tensor_rank == 0)
        for kind, tensor in each.tensors.items():
            boxes = tuple(
                cut
                for part in flat_boxes(each.shape, each.begin, tensor)
                for box in _spread(part, split, Part(tensor_rank, tensor_ranks, each.shape, fused_in(name)))
                if (cut := _within(box, whole)) is not None
            )
            yield StatePiece(name, kind, whole, boxes, writes)


def flat_boxes(shape: tuple[int, ...], begin: int, tensor: torch.Tensor) -> Iterator[Box]:
    """A flat range of a tensor of ``shape`` (one or two dimensions), which is a vector or a matrix, as boxes of it.

    Args:
        tensor: the range's elements from element ``begin`` on, flat; or the whole, of ``shape``.
    """
    if tuple(tensor.shape) == tuple(shape):
        yield Box((0,) * len(shape), tensor)
        return
    assert tensor.ndim == 1, "a range of a matrix is flat"
    if len(shape) == 1:
        yield Box((begin,), tensor)
        return
    columns, end = shape[1], begin + tensor.numel()
    at = begin
    while at < end:
        row, column = divmod(at, columns)
        rows = (end - at) // columns if column == 0 else 0
        size = rows * columns if rows else min(columns - column, end - at)
        part = tensor[at - begin : at - begin + size]
        yield Box((row, column), part.view(max(rows, 1), -1))
        at += size


def _split(
    name: str, part: tuple[int, ...], whole: tuple[int, ...], model: ModelShape, tensor_ranks: int
) -> int | None:
    """The dimension along which tensor-parallel ranks share a parameter; None where all have all of it."""
    padded = (model.padded_vocab, *whole[1:]) if name == TOKEN_TABLE else whole
    split = [i for i, (own, full) in enumerate(zip(part, padded, strict=True)) if own != full]
    assert len(split) <= 1 and all(part[i] * tensor_ranks == padded[i] for i in split), (name, part, padded)
    return split[0] if split else None


class Part(NamedTuple):
    """A tensor-parallel rank's part of a parameter.

    Attributes:
        shape: of the part.
        fused: matrices that lie side by side in the parameter and are each split over the ranks.
    """

    rank: int
    ranks: int
    shape: tuple[int, ...]
    fused: int


def fused_in(name: str) -> int:
    """Query, key and value share one parameter; all others are one matrix or vector."""
    return 3 if ".c_attn." in name else 1


def _spread(box: Box, split: int | None, part: Part) -> Iterator[Box]:
    """Where a box of a rank's part of a matrix, which is split along dimension ``split``, lies in the whole matrix: one
    box for each of the fused matrices that it touches.
    """
    if split is None:
        yield box
        return
    width = part.shape[split] // part.fused  # of one of the fused matrices, on this rank
    begin, end = box.offsets[split], box.offsets[split] + box.sizes[split]
    for index in range(part.fused):
        first, last = max(begin, index * width), min(end, (index + 1) * width)
        if first < last:
            offsets = list(box.offsets)
            offsets[split] = (index * part.ranks + part.rank) * width + first - index * width
            yield Box(tuple(offsets), box.tensor.narrow(split, first - begin, last - first))


def _within(box: Box, whole: tuple[int, ...]) -> Box | None:
    """The box without padding: rows behind the last of the vocabulary. None where nothing is left."""
    rows = min(box.sizes[0], whole[0] - box.offsets[0])
    if rows <= 0 or box.tensor.numel() == 0:
        return None
    return box if rows == box.sizes[0] else Box(box.offsets, box.tensor[:rows])
