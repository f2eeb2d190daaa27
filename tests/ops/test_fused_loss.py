"""The loss without the logits: the same numbers as the written-out loss, no tensor of tokens x vocabulary,
less memory.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model_zoo
from commons.ops import cross_entropy as fused_loss

VOCAB, PADDED, WIDTH = 1000, 1024, 64
# relative to the largest: rounding of the dtype, some times over
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class AllocationTracker(TorchDispatchMode):
    """Sums the bytes of live results of operations, and remembers the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.largest_elements = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.largest_elements = max(self.largest_elements, tensor.numel())
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.live_bytes -= size


def inputs(
    dtype: torch.dtype, batch: int = 4, sequence: int = 96, padded: int = PADDED, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, sequence, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.1 * torch.randn(padded, WIDTH, generator=generator)).to(device, dtype).requires_grad_()
    tokens = torch.randint(min(padded, VOCAB), (batch, sequence), generator=generator).to(device)
    return hidden, weight, tokens


def written_out(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor, vocab: int = VOCAB) -> torch.Tensor:
    return model_zoo.next_token_loss(functional.linear(hidden, weight), tokens, vocab=vocab)


def assert_near(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    scale = reference.float().abs().max()
    assert (ours.float() - reference.float()).abs().max() <= tolerance * scale


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_loss_and_gradients_are_those_of_the_written_out_loss(monkeypatch, dtype, pieces):
    hidden, weight, tokens = inputs(dtype)
    monkeypatch.setattr(fused_loss, "PIECE_ELEMENTS", tokens.numel() * PADDED // pieces)
    tokens[0, 10:20] = fused_loss.IGNORED_LABEL
    reference = written_out(hidden, weight, tokens)
    wanted = torch.autograd.grad(7 * reference, (hidden, weight))
    loss = fused_loss.next_token_loss(hidden, weight, tokens, VOCAB)
    got = torch.autograd.grad(7 * loss, (hidden, weight))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - reference.item()) < 2e-4
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, theirs, TOLERANCES[dtype])


def test_padding_gets_no_probability_and_no_gradient():
    hidden, weight, tokens = inputs(torch.float32)
    with torch.no_grad():
        weight[VOCAB:] = 100.0 * hidden[0, 0]  # would win every prediction
    loss = fused_loss.next_token_loss(hidden, weight, tokens, VOCAB)
    loss.backward()
    assert weight.grad is not None and torch.count_nonzero(weight.grad[VOCAB:]) == 0
    unpadded = model_zoo.next_token_loss(functional.linear(hidden, weight[:VOCAB]), tokens, vocab=VOCAB)
    assert loss.item() == pytest.approx(unpadded.item(), abs=1e-5)


def test_fp16_gradients_under_a_loss_scale_neither_overflow_nor_vanish():
    hidden, weight, tokens = inputs(torch.float16, batch=16)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    scale = 2.0**12
    got = torch.autograd.grad(scale * fused_loss.next_token_loss(hidden, weight, tokens, VOCAB), (hidden, weight))
    wanted = torch.autograd.grad(scale * written_out(wide[0], wide[1], tokens), wide)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.isfinite(ours).all()
        assert_near(ours, theirs, TOLERANCES[torch.float16])


def test_under_autocast_gradients_are_those_of_the_wide_parameters():
    hidden, weight, tokens = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused_loss.next_token_loss(hidden, weight, tokens, VOCAB)
    got = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(written_out(hidden, weight, tokens), (hidden, weight))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert_near(ours, theirs, TOLERANCES[torch.bfloat16])


def test_without_gradients_only_the_loss_is_computed():
    hidden, weight, tokens = inputs(torch.float32)
    with torch.no_grad():
        loss = fused_loss.next_token_loss(hidden, weight, tokens, VOCAB)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(written_out(hidden, weight, tokens).item(), abs=1e-5)


def test_no_tensor_of_all_logits_and_less_memory(monkeypatch):
    hidden, weight, tokens = inputs(torch.bfloat16, batch=8, sequence=128)
    count = tokens.numel()
    monkeypatch.setattr(fused_loss, "PIECE_ELEMENTS", count * PADDED // 8)

    def track(loss_of) -> AllocationTracker:
        with AllocationTracker() as tracker:
            torch.autograd.grad(loss_of(hidden, weight, tokens), (hidden, weight))
        return tracker

    ours = track(lambda hidden, weight, tokens: fused_loss.next_token_loss(hidden, weight, tokens, VOCAB))
    whole = track(written_out)
    print(f"peak: {ours.peak_bytes / count / PADDED:.1f} against {whole.peak_bytes / count / PADDED:.1f} bytes a logit")
    assert whole.largest_elements == count * PADDED
    assert ours.largest_elements <= count * PADDED // 8
    # the pieces' 1/8 of about 9 bytes a logit, and the weight's gradient in fp32 and bf16
    assert ours.peak_bytes < count * PADDED * 10 // 8 + 6 * PADDED * WIDTH + 8 * count * WIDTH
    assert whole.peak_bytes > 4 * ours.peak_bytes


@pytest.mark.parametrize("tokens", [1, 100, 4096, 16 * 1024, 100_000])
def test_pieces_are_bounded_and_cover_the_batch(tokens):
    size = fused_loss.piece_tokens(tokens, 50304)
    assert 0 < size <= tokens
    assert size * 50304 <= fused_loss.PIECE_ELEMENTS + fused_loss.PIECE_TOKENS_MULTIPLE * 50304
    assert size == tokens or size % fused_loss.PIECE_TOKENS_MULTIPLE == 0


@pytest.mark.gpu
@pytest.mark.parametrize("vocab, padded", [(VOCAB, PADDED), (50257, 50304), (40000, 50304), (61, 61)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_on_a_gpu_one_kernel_does_it_in_the_logits_place(monkeypatch, dtype, vocab, padded):
    hidden, weight, tokens = inputs(dtype, padded=padded, device="cuda")
    tokens = torch.where(tokens < vocab, tokens, 0)
    tokens[1, 10:20] = fused_loss.IGNORED_LABEL
    monkeypatch.setattr(fused_loss, "PIECE_ELEMENTS", tokens.numel() * padded // 3)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = written_out(*wide, tokens, vocab)  # pyright: ignore
    wanted = torch.autograd.grad(exact, wide)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fused_loss.next_token_loss(hidden, weight, tokens, vocab, fused_loss.softmax_gradient_kernel)
    peak = torch.cuda.max_memory_allocated() - before
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=3e-4)
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, theirs, TOLERANCES[dtype])
    if padded > PADDED:  # one piece of logits and the weight's gradient in fp32, and not two pieces
        piece = fused_loss.piece_tokens(tokens.numel(), padded) * padded * dtype.itemsize
        assert peak < 1.5 * piece + 4 * weight.numel() + (1 << 20)


@pytest.mark.gpu
def test_on_a_gpu_an_infinite_logit_spoils_its_own_row_alone():
    from commons.ops.triton_kernels import softmax_gradient_

    logits = torch.zeros(3, 100, device="cuda")
    logits[1, 7] = float("inf")
    losses = softmax_gradient_(logits, torch.tensor([1, 2, 3], device="cuda"), 90, ignored=-100, factor=1.0)
    assert torch.isfinite(losses[[0, 2]]).all() and not torch.isfinite(losses[1])
    assert torch.isfinite(logits[[0, 2]]).all() and not torch.isfinite(logits[1]).all()
