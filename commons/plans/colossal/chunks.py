"""Gemini's chunks cut at the boundaries of transformer blocks, so that one gather serves one block (or some small ones)
and one reduction follows it.

Left to itself, Gemini searches a chunk size between 32 and 64 million elements. A model smaller than that
becomes one chunk that every rank keeps whole, so that nothing is sharded (and gradient accumulation is wrong:
``rearrange_accumulated_grad_chunk`` multiplies a gathered chunk by the group's size on every rank). Larger
ones straddle blocks.
``search_chunk_configuration``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/search_utils.py
``rearrange_accumulated_grad_chunk``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/manager.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from model_zoo import ModelShape

if TYPE_CHECKING:
    from torch import nn

Item = TypeVar("Item")


class Cut(NamedTuple):
    """One chunk before it is built.

    Attributes:
        size: its elements, padding included; a multiple of the ranks that share it.
        tensors: indices of the tensors in it, in their order.
        used: elements of these.
    """

    size: int
    tensors: list[int]
    used: int


def block_elements(shape: ModelShape, tp_degree: int = 1) -> int:
    """Parameters of one transformer block on one tensor-parallel rank.

    Four matrices (12 h^2) and the biases of the two column-parallel ones (7 h) are split; the biases of the
    two row-parallel ones (2 h) and two layer norms (4 h) are whole on every rank.
    """
    hidden = shape.hidden
    return (12 * hidden * hidden + 7 * hidden) // tp_degree + 6 * hidden


def rest_elements(shape: ModelShape, tp_degree: int = 1) -> int:
    """Parameters of one tensor-parallel rank outside of the blocks: its rows of the padded embedding, the positions and
    the final norm.
    """
    return (shape.padded_vocab // tp_degree + shape.positions + 2) * shape.hidden


def chunk_configuration(
    shape: ModelShape, zero_size: int, tp_degree: int = 1, blocks: int = 1
) -> dict[int, dict[str, Any]]:
    """Gemini's ``chunk_config_dict``: chunks of ``blocks`` blocks, rounded up to a multiple of the ranks that share
    them.

    Larger tensors (the embedding of all but the widest models) get a chunk of their own from Gemini. Where all blocks
    share a chunk, so does the rest of the model: it is gathered once per step and its gradients are reduced once.
    """
    elements = block_elements(shape, tp_degree) * min(blocks, shape.layers)
    if blocks >= shape.layers:
        elements += rest_elements(shape, tp_degree)
    return {zero_size: {"chunk_size": elements + -elements % zero_size, "keep_gathered": False}}


def blocks_first(model: nn.Module) -> Any:
    """Memory statistics that give Gemini nothing but the order in which to fill its chunks: block by block, in
    each the matrices before the vectors, then the rest.

    In the order of the module, the position table would come between embedding and blocks and shift every
    block across a boundary. Matrices and vectors differ in weight decay; side by side, those of a chunk are
    one piece of memory for the optimizer. Gemini takes the order from statistics made beforehand; under static
    placement it reads nothing else of them.
    """
    from colossalai.zero.gemini.memory_tracer import MemStats

    blocks: list[Any] = [*model.transformer.h]  # pyright: ignore
    ordered = [param for block in blocks for param in sorted(block.parameters(), key=lambda p: -p.ndim)]
    in_blocks = {id(param) for param in ordered}
    ordered += [param for param in model.parameters() if id(param) not in in_blocks]
    statistics = MemStats()
    for param in ordered:
        statistics._param_runtime_order.append(param)
    return statistics


def cut_into_chunks(elements: Sequence[int], chunk_size: int, zero_size: int) -> list[Cut]:
    """The chunks that Gemini's manager makes of tensors of so many ``elements``, in their order.

    Nothing is built: this is ``ChunkManager.register_tensor`` as arithmetic, for whoever plans a run.
    https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/manager.py
    """
    cuts: list[Cut] = []
    for index, count in enumerate(elements):
        if cuts and cuts[-1].used + count <= cuts[-1].size:
            last = cuts[-1]
            cuts[-1] = Cut(last.size, [*last.tensors, index], last.used + count)
        else:
            size = count + -count % zero_size if count > chunk_size else chunk_size
            cuts.append(Cut(size, [index], count))
    return cuts


def first_that_fit(items: Sequence[Item], sizes: Sequence[int], room: float) -> list[Item]:
    """Items while they fit into what is left of ``room``, in the unit of ``sizes``; larger ones are passed over."""
    fitting, left = [], room
    for item, size in zip(items, sizes, strict=True):
        if size <= left + 0.5:
            fitting.append(item)
            left -= size
    return fitting
