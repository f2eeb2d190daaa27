"""Kernels in Triton for what the compiler does in more passes than it has to, or does not see: the softmax of the loss
with its gradient, a layer norm with what is added before it, its gradient with all sums over rows that it can begin
meanwhile, and the mean of tensors that came from other ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  (a CPU build of torch comes without)
import triton.language as tl  # pyright: ignore[reportMissingImports]

from commons.ops import capability

OLDEST_CAPABILITY = capability.AMPERE  # from which on Triton knows bf16


def _on(grid: int | tuple[int, int], kernel: Any) -> Any:
    """The kernel, to be called for ``grid`` programs, or for rows and columns of them."""
    return kernel[grid if isinstance(grid, tuple) else (grid,)]


def fits() -> bool:
    """Whether the current GPU can run them."""
    return not capability.is_older(OLDEST_CAPABILITY)


# --- the loss -------------------------------------------------------------------------------------------------

LOSS_BLOCK, LOSS_WARPS = 4096, 16  # eight elements a thread: 16 bytes an access in bf16
LOWEST = -1e30  # below every logit, and finite: no difference of two infinities


@triton.jit
def _scores(pointer, at, vocab):
    return tl.load(pointer + at, mask=at < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def _softmax_gradient(
    logits,
    targets,
    losses,
    vocab,
    COLUMNS: tl.constexpr,
    IGNORED: tl.constexpr,
    FACTOR: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss, and its gradient in the logits' place.

    Maximum and sum are found in one pass (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"),
    with a maximum for every column of the block, so that no thread waits for another before the row's end. The second
    pass finds the row in the L2 cache.
    """
    row = logits + tl.program_id(0).to(tl.int64) * COLUMNS
    target = tl.load(targets + tl.program_id(0))
    predicted = target != IGNORED
    at_target = tl.load(row + tl.where(predicted, target, 0)).to(tl.float32)
    offsets = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, 4 * BLOCK):
        at = start + offsets
        a = _scores(row, at, vocab)
        b = _scores(row, at + BLOCK, vocab)
        c = _scores(row, at + 2 * BLOCK, vocab)
        d = _scores(row, at + 3 * BLOCK, vocab)
        higher = tl.maximum(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), top)
        total = total * tl.exp(top - higher)
        total += tl.exp(a - higher) + tl.exp(b - higher) + tl.exp(c - higher) + tl.exp(d - higher)
        top = higher
    highest = tl.max(top, 0)
    log_total = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(losses + tl.program_id(0), tl.where(predicted, log_total - at_target, 0.0))
    factor = tl.where(predicted, FACTOR, 0.0)
    for start in range(0, COLUMNS, BLOCK):
        at = start + offsets
        gradient = (tl.exp(_scores(row, at, vocab) - log_total) - tl.where(at == target, 1.0, 0.0)) * factor
        tl.store(row + at, gradient.to(logits.dtype.element_ty), mask=at < COLUMNS)


def softmax_gradient_(
    logits: torch.Tensor, targets: torch.Tensor, vocab: int, *, ignored: int, factor: float
) -> torch.Tensor:
    """Cross-entropy of every row and, in the place of the logits, its gradient times ``factor``.

    Args:
        logits: [tokens, columns], contiguous, any floating dtype; overwritten.
        targets: int64 [tokens]; ``ignored`` where nothing is predicted.
        vocab: columns that are token ids; the others get probability and gradient zero.

    Returns:
        fp32 [tokens], zero where nothing is predicted.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _on(len(logits), _softmax_gradient)(
        logits, targets, losses, vocab, logits.shape[1], ignored, factor, LOWEST, LOSS_BLOCK, num_warps=LOSS_WARPS
    )
    return losses


# --- layer norm -----------------------------------------------------------------------------------------------


@triton.jit
def _norm(
    hidden,
    added,
    weight,
    bias,
    normed,
    residual,
    means,
    scales,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    """One row. What is normed is the sum as it is stored, so that the backward pass sees the same."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = row * WIDTH + columns
    value = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        stored = value.to(residual.dtype.element_ty)
        tl.store(residual + at, stored, mask=inside)
        value = stored.to(tl.float32)
    mean = tl.sum(value, 0) / WIDTH
    centered = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 0) / WIDTH + EPS)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, (centered * scale * factor + offset).to(normed.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)


def norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer norm of ``hidden + added``; see commons.ops.layer_norm.

    Args:
        hidden, added: [rows, width], contiguous.
        weight, bias: [width].

    Returns:
        The norm's result and the sum, like ``hidden``, and every row's mean and one over its standard deviation, fp32
        [rows]. Without ``added`` the sum is empty.
    """
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    normed = torch.empty_like(hidden)
    residual = torch.empty_like(hidden) if added is not None else hidden.new_empty(0)
    mean, scale = (torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    _on(rows, _norm)(
        hidden,
        hidden if added is None else added,
        weight,
        bias,
        normed,
        residual,
        mean,
        scale,
        eps,
        width,
        block,
        added is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return normed, residual, mean, scale


NORM_ELEMENTS = 4096  # per turn of the loop: as many rows as fit
NORM_WARPS = 4  # twice as many for rows of which fewer than four fit into a turn


@triton.jit
def _norm_gradient(
    gradients,
    hidden,
    means,
    scales,
    weight,
    passed_gradients,
    hidden_gradients,
    sums,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """A strip of rows, and the sums over it."""
    strip = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    column = columns[None, :]
    inside = column < WIDTH
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    for_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    of_hidden = tl.zeros((ROWS, BLOCK), tl.float32)
    of_passed = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, STRIP, ROWS):
        row = (strip * STRIP + start + tl.arange(0, ROWS))[:, None]
        mask = inside & (row < rows)
        at = row.to(tl.int64) * WIDTH + column
        mean = tl.load(means + row, mask=row < rows, other=0.0).to(tl.float32)
        scale = tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)
        gradient = tl.load(gradients + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
        passed = tl.load(passed_gradients + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.where(mask, (normed - mean) * scale, 0.0)
        weighted = gradient * factor
        along = tl.sum(weighted * normed, 1)[:, None] / WIDTH
        level = tl.sum(weighted, 1)[:, None] / WIDTH
        out = tl.where(mask, (weighted - normed * along - level) * scale + passed, 0.0)
        tl.store(hidden_gradients + at, out.to(hidden_gradients.dtype.element_ty), mask=mask)
        for_weight += gradient * normed
        for_bias += gradient
        if SUMS == 4:
            of_hidden += out
            of_passed += passed
    place = sums + strip * (SUMS * WIDTH) + columns
    tl.store(place, tl.sum(for_weight, 0), mask=columns < WIDTH)
    tl.store(place + WIDTH, tl.sum(for_bias, 0), mask=columns < WIDTH)
    if SUMS == 4:
        tl.store(place + 2 * WIDTH, tl.sum(of_hidden, 0), mask=columns < WIDTH)
        tl.store(place + 3 * WIDTH, tl.sum(of_passed, 0), mask=columns < WIDTH)


def norm_gradient(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    passed: torch.Tensor,
    sums: int,
    strip: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a layer norm's input, and sums over strips of rows; see commons.ops.layer_norm.

    Args:
        gradient, hidden, passed: [rows, width], contiguous.
        mean, scale: [rows].
        weight: [width].
        sums: 2 or 4.
        strip: rows that are summed up together.
    """
    rows, width = hidden.shape
    block = triton.next_power_of_2(width)
    strips = triton.cdiv(rows, strip)
    out = torch.empty_like(hidden)
    summed = torch.empty(strips, sums, width, dtype=torch.float32, device=hidden.device)
    _on(strips, _norm_gradient)(
        gradient,
        hidden,
        mean,
        scale,
        weight,
        passed,
        out,
        summed,
        rows,
        width,
        block,
        strip,
        min(strip, max(1, NORM_ELEMENTS // block)),
        sums,
        num_warps=NORM_WARPS if block <= NORM_ELEMENTS // 4 else 2 * NORM_WARPS,
    )
    return out, summed


# --- fp8 ------------------------------------------------------------------------------------------------------

CAST_COLUMNS, CAST_WARPS = 64, 4  # of a tile, which has the rows of a strip


@triton.jit
def _cast_both_ways(
    source,
    factor,
    as_it_lies,
    transposed,
    strips,
    rows,
    columns,
    LIMIT: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile. The programs that follow one another take tiles of one strip of columns, whose transposed rows are
    neighbours in memory.
    """
    strip = tl.program_id(0)
    row = strip * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(source + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    if SUMS:
        tl.store(strips + strip.to(tl.int64) * columns + column, tl.sum(value, 0), mask=column < columns)
    scaled = tl.clamp(value * tl.load(factor), -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    cast = scaled.to(as_it_lies.dtype.element_ty)
    tl.store(as_it_lies + row.to(tl.int64)[:, None] * columns + column[None, :], cast, mask=inside)
    at = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(transposed + at, tl.trans(cast), mask=(column < columns)[:, None] & (row < rows)[None, :])


def cast_both_ways(
    tensor: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, strip: int, sums: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``tensor`` times ``factor`` in fp8, as it lies and transposed; see commons.ops.fp8.

    Args:
        tensor: [rows, columns], contiguous.
        factor: fp32 scalar on the same GPU.
        dtype: an fp8.
        strip: rows of a tile, which are summed up together, a power of two.
        sums: whether they are.

    Returns:
        [rows, columns] and [columns, rows] in ``dtype``, and fp32 [strips, columns], empty without sums.
    """
    rows, columns = tensor.shape
    strips = triton.cdiv(rows, strip)
    as_it_lies = torch.empty(rows, columns, dtype=dtype, device=tensor.device)
    transposed = torch.empty(columns, rows, dtype=dtype, device=tensor.device)
    summed = torch.empty((strips, columns) if sums else 0, dtype=torch.float32, device=tensor.device)
    _on((strips, triton.cdiv(columns, CAST_COLUMNS)), _cast_both_ways)(
        tensor,
        factor,
        as_it_lies,
        transposed,
        summed,
        rows,
        columns,
        torch.finfo(dtype).max,
        sums,
        strip,
        CAST_COLUMNS,
        num_warps=CAST_WARPS,
    )
    return as_it_lies, transposed, summed


# --- what came from other ranks -------------------------------------------------------------------------------

MEAN_BLOCK, MEAN_WARPS = 2048, 8  # eight elements a thread


@triton.jit
def _mean(own, others, out, elements, stride, OTHERS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    total = tl.load(own + at, mask=mask).to(tl.float32)
    for _ in tl.static_range(OTHERS):
        total += tl.load(others + at, mask=mask).to(tl.float32)
        others += stride
    tl.store(out + at, (total / (OTHERS + 1)).to(out.dtype.element_ty), mask=mask)


def mean_(own: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """Put the mean of ``own`` [elements] and of the rows of ``others`` [rows, elements] into ``out``, summed up in
    fp32. All of one dtype, with elements side by side.
    """
    elements = len(out)
    _on(triton.cdiv(elements, MEAN_BLOCK), _mean)(
        own, others, out, elements, others.stride(0), len(others), MEAN_BLOCK, num_warps=MEAN_WARPS
    )
