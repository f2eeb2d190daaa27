"""The comparison with the reference, the loss over a split vocabulary, and the places of ranks."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from commons.config.schema import TrainConfig
from commons.distributed.layout import Place, check_mesh, place
from commons.ops.vocab_parallel_cross_entropy import vocab_parallel_loss
from commons.reporting.record import StepRecord
from commons.training import parity
from model_zoo import next_token_loss

VOCAB = 1000


def _records(values: list[tuple[float, float | None, int]]) -> list[StepRecord]:
    blank = {field.name: None for field in dataclasses.fields(StepRecord)}
    return [
        StepRecord(**{**blank, "step": step, "loss": loss, "grad_norm": norm, "skipped_steps": skipped})
        for step, (loss, norm, skipped) in enumerate(values, start=1)
    ]


def _compare(values: list[tuple[float, float | None, int]]) -> parity.Parity:
    reference = [parity.ReferenceStep(loss=2.0, grad_norm=4.0)] * len(values)
    return parity.compare(TrainConfig(precision="fp32").resolve("cpu"), _records(values), reference)


def test_the_worst_step_counts() -> None:
    found = _compare([(2.0, 4.0, 0), (2.0 + 1e-6, 4.0, 0), (2.0, 4.0 - 2e-5, 0)])
    assert (found.loss, found.grad_norm) == (pytest.approx(5e-7), pytest.approx(5e-6))
    assert found.holds


@pytest.mark.parametrize("bad", [(2.1, 4.0, 0), (2.0, 4.1, 0), (math.nan, 4.0, 0), (2.0, math.nan, 0)])
def test_one_bad_step_breaks_it_wherever_it_stands(bad: tuple) -> None:
    good = (2.0, 4.0, 0)
    for order in ([bad, good], [good, bad]):
        assert not _compare(order).holds
    assert "BROKEN" in parity.describe(_compare([good, bad]))


def test_no_known_norm_is_no_parity() -> None:
    assert not _compare([(2.0, None, 0)]).holds


def test_skipped_steps_are_found_and_their_norms_left_out() -> None:
    records = _records([(2.0, None, 1), (2.0, 4.0, 1), (2.0, None, 2)])
    assert parity.skipped_steps(records) == {1, 3}
    assert _compare([(2.0, None, 1), (2.0, 4.0, 1)]).holds


def test_parity_json_is_json_even_without_a_number(tmp_path) -> None:
    parity.write(_compare([(2.0, None, 0)]), tmp_path)
    content = json.loads((tmp_path / "parity.json").read_text(), parse_constant=pytest.fail)
    assert content["grad_norm"] is None and content["holds"] is False


def test_reference_learns_one_batch_more_per_rank() -> None:
    config = TrainConfig(model_type="gpt2_tiny", precision="fp32", train_step=2).resolve("cpu")
    alone, _ = parity.reference_steps(config, 1, torch.device("cpu"))
    two, _ = parity.reference_steps(config, 2, torch.device("cpu"))
    assert alone[0].loss != two[0].loss and len(alone) == len(two) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_of_a_whole_vocabulary_is_model_zoo_s(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 1024, dtype=dtype).mul_(3).requires_grad_()
    tokens = torch.randint(VOCAB, (2, 9))
    tokens[0, 4] = -100
    original = logits.detach().clone()
    loss = vocab_parallel_loss(logits, tokens, VOCAB)
    (gradient,) = torch.autograd.grad(loss * 3, logits)
    expected = next_token_loss(logits, tokens, vocab=VOCAB)
    (expected_gradient,) = torch.autograd.grad(expected * 3, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient[..., VOCAB:].eq(0).all()
    assert torch.equal(logits, original)  # nothing is computed in place of the logits


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tokens = torch.randn(2, 9, 1024), torch.randint(VOCAB, (2, 9))
    whole = vocab_parallel_loss(logits, tokens, VOCAB)
    monkeypatch.setattr("commons.ops.vocab_parallel_cross_entropy.PIECE_ELEMENTS", 5 * 1024)
    torch.testing.assert_close(vocab_parallel_loss(logits, tokens, VOCAB), whole)


def test_places_of_eight_ranks() -> None:
    places = [place(rank, tp_degree=2, pp_degree=2) for rank in range(8)]
    assert len(set(places)) == 8
    assert places[:3] == [Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0)]
    assert places[4] == Place(data=1, pipeline=0, tensor=0)


def test_a_mesh_in_another_order_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"layout\.py"):
        check_mesh(1, tp_degree=2, pp_degree=1, mesh_place=Place(1, 0, 0))
