"""The comparison with the reference, the loss over a split vocabulary, and the places of ranks."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from suite_runs import launch

from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig
from commons.distributed.layout import Place, check_mesh, place
from commons.lifecycle.outcome import NOTHING_PROVED
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


def _config(precision: str, batch_size: int = 1, seq_len: int = 16, **settings) -> ResolvedConfig:
    given = TrainConfig(precision=precision, batch_size=batch_size, seq_len=seq_len, **settings)  # pyright: ignore[reportArgumentType]
    return given.resolve("cpu")


def _compare(values: list[tuple[float, float | None, int]]) -> parity.Parity:
    reference = [parity.ReferenceStep(loss=2.0, grad_norm=4.0)] * len(values)
    return parity.compare(_config("fp32"), _records(values), reference, 1)


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


PLANTED = [
    pytest.param(precision, number, tokens, id=f"{precision}, {number}, {tokens} tokens")
    for precision in parity.ROUNDING
    for number in ("loss", "grad_norm")
    for tokens in (1, 15, 252, 2032, 500_000)
]


@pytest.mark.parametrize(("precision", "number", "tokens"), PLANTED)
def test_a_difference_just_beyond_the_bound_breaks_and_one_just_inside_holds(
    precision: str, number: str, tokens: int
) -> None:
    reference = [parity.ReferenceStep(loss=2.0, grad_norm=4.0)]
    bound = getattr(parity.bound_for(precision, tokens), number)
    for share, verdict in ((0.98, "holds"), (1.02, "BROKEN")):
        planted = dataclasses.replace(reference[0], **{number: getattr(reference[0], number) * (1 + share * bound)})
        records = _records([(planted.loss, planted.grad_norm, 0)])
        found = parity.compare(_config(precision, seq_len=tokens + 1), records, reference, 1)
        assert found.verdict == verdict, found


# By hand, loss and gradient norm: one token; few, where the root of their number counts; many, where the floor does.
BOUNDS = {
    "fp32": {1: (1e-6, 1e-5), 16: (1e-6, 1e-5), 10**6: (1e-6, 1e-5)},
    "fp16": {1: (1e-3, 4e-3), 16: (2.5e-4, 4e-3), 10**6: (1e-5, 4e-3)},
    "bf16": {1: (8e-3, 5e-2), 64: (1e-3, 5e-2), 400: (4e-4, 2e-2), 10**6: (1e-4, 1e-2)},
    "fp8": {1: (1.6e-2, 4e-2), 64: (2e-3, 4e-2), 10**6: (1e-3, 4e-2)},
}


@pytest.mark.parametrize("precision", BOUNDS)
def test_bounds_by_hand(precision: str) -> None:
    """What rounding explains was measured (the table beside ROUNDING): nobody widens it unnoticed."""
    for tokens, (loss, norm) in BOUNDS[precision].items():
        bound = parity.bound_for(precision, tokens)
        assert (bound.loss, bound.grad_norm) == (pytest.approx(loss), pytest.approx(norm)), tokens
    assert set(BOUNDS) == set(parity.ROUNDING)


def test_bounds_count_the_tokens_of_all_copies_and_batches() -> None:
    records, reference = _records([(2.0, 4.0, 0)]), [parity.ReferenceStep(2.0, 4.0)]
    config = _config("bf16", batch_size=3, seq_len=9, grad_accum=2)
    assert parity.compare(config, records, reference, 4).bound == parity.bound_for("bf16", 3 * 8 * 2 * 4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_error_of_a_thousandth_is_seen_at_every_size(precision: str) -> None:
    """Of the loss under fp16, whose norms are rounded to 11 bits."""
    for tokens in (2, 15, 252, 16384):
        bound = parity.bound_for(precision, tokens)
        assert bound.loss < 1e-3 and (bound.grad_norm < 1e-3 or precision == "fp16")


def test_where_every_step_was_skipped_nothing_is_compared_and_nothing_broken() -> None:
    reference = [parity.ReferenceStep(2.0, 4.0)] * 2
    records = _records([(2.0, None, 1), (2.0, None, 2)])
    found = parity.compare(_config("fp16"), records, reference, 1)
    assert found.verdicts == {"loss": "holds", "gradient norm": "not compared"} and found.verdict == "not compared"
    assert "gradient norm not compared (every step was skipped for overflow" in parity.describe(found)
    broken = parity.compare(_config("fp16"), _records([(2.1, None, 1), (2.0, None, 2)]), reference, 1)
    assert broken.verdict == "BROKEN"  # the losses are there to be compared


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_reference_that_is_no_number_blames_nobody(lost: float) -> None:
    reference = [parity.ReferenceStep(2.0, 4.0), parity.ReferenceStep(lost, lost)]
    alike = parity.compare(_config("fp32"), _records([(2.0, 4.0, 0), (lost, lost, 0)]), reference, 1)
    assert alike.verdict == "not compared" and "not finite in 1 of 2 steps" in parity.describe(alike)
    # what could be compared differs
    wrong = parity.compare(_config("fp32"), _records([(2.1, 4.0, 0), (lost, lost, 0)]), reference, 1)
    assert wrong.verdict == "BROKEN"
    # and a run that is no number where its reference is one is wrong, whatever follows
    early = parity.compare(_config("fp32"), _records([(lost, lost, 0), (lost, lost, 0)]), reference, 1)
    assert early.verdict == "BROKEN"


def test_nothing_and_nothing_are_equal_and_something_is_not() -> None:
    reference = [parity.ReferenceStep(2.0, 0.0)]
    assert parity.compare(_config("fp32"), _records([(2.0, 0.0, 0)]), reference, 1).holds
    assert parity.compare(_config("fp32"), _records([(2.0, 1e-9, 0)]), reference, 1).verdict == "BROKEN"


def test_every_step_skipped_through_the_entry_point(tmp_path) -> None:
    """The largest loss scale: every step overflows: told as it is, with an exit code of its own."""
    flags = "--model_type gpt2_tiny --batch_size 2 --seq_len 16 --train_step 2 --warmup_step 1 --precision fp16"
    flags += " --initial_loss_scale 4294967296 --check_parity true --distplan Pytorch_DDP --device cpu"
    run = launch(tmp_path, *flags.split())
    assert run.returncode == NOTHING_PROVED == 3, run.console
    assert "not compared (every step was skipped for overflow" in run.console and "BROKEN" not in run.console
    assert run.file("parity.json")["verdict"] == "not compared" and run.file("parity.json")["holds"] is False


def test_a_single_layer_of_real_width_is_no_broken_plan(tmp_path) -> None:
    """20.203666645: the norm of this run's first step, by transformers' model in float64."""
    flags = "--distplan CAI_Hybrid --precision fp32 --model_type gpt2_small --num_layers 1 --batch_size 1 --seq_len 16"
    flags += " --train_step 2 --warmup_step 1 --check_parity true --device cpu"
    run = launch(tmp_path, *flags.split())
    assert run.returncode == 0, run.console
    assert run.records[0]["grad_norm"] == pytest.approx(20.203666645, rel=1e-6)
    assert run.file("parity.json")["grad_norm"] < 1e-6


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
