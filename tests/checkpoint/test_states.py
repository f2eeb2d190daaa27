"""What a rank holds as boxes of named tensors: every element once, wherever flat ranges and splits cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from commons.plans.states import Box, Held, StatePiece, canonical_name, flat_boxes, pieces
from model_zoo import MODEL_SIZES, ModelShape, build_model, parameter_shapes

SHAPE = ModelShape(layers=1, hidden=8, heads=2, positions=16, vocab=100)  # 128 rows of the token table
FOUR_ROWS, COLUMNS = 4, 5


def put(whole: torch.Tensor, box: Box) -> None:
    part = box.part_of(whole)
    assert part.isnan().all(), "an element comes twice"
    part.copy_(box.tensor)


@pytest.mark.parametrize(("begin", "end"), list(itertools.combinations(range(FOUR_ROWS * COLUMNS + 1), 2)))
def test_a_flat_range_is_at_most_three_boxes_which_are_views(begin: int, end: int) -> None:
    matrix = torch.arange(FOUR_ROWS * COLUMNS, dtype=torch.float32)
    boxes = list(flat_boxes((FOUR_ROWS, COLUMNS), begin, matrix[begin:end]))
    assert 1 <= len(boxes) <= 3
    whole = torch.full((FOUR_ROWS, COLUMNS), torch.nan)
    for box in boxes:
        assert box.tensor.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
        assert box.tensor.is_contiguous()
        put(whole, box)
    inside = torch.zeros(FOUR_ROWS * COLUMNS, dtype=torch.bool)
    inside[begin:end] = True
    assert torch.equal(~whole.flatten().isnan(), inside) and torch.equal(whole.flatten()[inside], matrix[begin:end])


def test_names_and_shapes_are_those_of_the_model() -> None:
    shape = MODEL_SIZES["gpt2_tiny"]
    with torch.device("meta"):
        model = build_model(shape)
    named = {canonical_name(f"module.{name}"): tuple(param.shape) for name, param in model.named_parameters()}
    named["transformer.wte.weight"] = (shape.vocab, shape.hidden)  # built with padding rows
    assert parameter_shapes(shape) == named
    assert canonical_name("lm_head.weight") == "transformer.wte.weight"


def of_tensor_rank(name: str, padded: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part, by shardformer's rules."""
    if ".c_attn." in name:
        return torch.cat([part.chunk(ranks, -1)[rank] for part in padded.chunk(3, -1)], -1)
    if ".c_fc." in name:
        return padded.chunk(ranks, -1)[rank]
    if name.endswith("c_proj.weight") or ".wte." in name:
        return padded.chunk(ranks, 0)[rank]
    return padded


def held_by(wholes: dict[str, torch.Tensor], rank: int, ranks: int, shards: int, shard: int) -> Iterator[Held]:
    """A rank's flat shards of its parts, cut at random places that all ranks agree on."""
    for name, padded in wholes.items():
        part = of_tensor_rank(name, padded, rank, ranks).contiguous()
        cuts = random.Random(name).sample(range(part.numel() + 1), shards - 1)
        edges = [0, *sorted(cuts), part.numel()]
        flat = part.view(-1)[edges[shard] : edges[shard + 1]]
        yield Held(name, tuple(part.shape), edges[shard], {"master": flat})


@pytest.mark.parametrize(("ranks", "shards"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 2)])
def test_ranks_and_shards_make_up_every_tensor_without_padding(ranks: int, shards: int) -> None:
    shapes = parameter_shapes(SHAPE)
    padded = {
        name: torch.randn((SHAPE.padded_vocab, *sizes[1:]) if ".wte." in name else sizes)
        for name, sizes in shapes.items()
    }
    wholes = {name: torch.full(sizes, torch.nan) for name, sizes in shapes.items()}
    for rank, shard in itertools.product(range(ranks), range(shards)):
        found: list[StatePiece] = list(pieces(SHAPE, held_by(padded, rank, ranks, shards, shard), rank, ranks))
        for piece in found:
            assert piece.shape == shapes[piece.name]
            for box in piece.boxes if piece.writes else ():
                put(wholes[piece.name], box)
    for name, whole in wholes.items():
        assert torch.equal(whole, padded[name][: whole.shape[0]]), name
