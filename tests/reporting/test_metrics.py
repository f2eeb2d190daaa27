"""FLOPs against torch's counter, peak rates against what NVIDIA prints elsewhere, summaries against numpy."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from commons.ops.activation_checkpointing import MODES
from commons.reporting.flops import (
    hardware_flops_per_token,
    mfu,
    model_flops_per_token,
    tflops_per_device,
    tokens_per_second,
)
from commons.reporting.peak_rates import GEFORCE_CARDS, PEAK_RATES, peak_flops, peak_rates
from commons.reporting.record import StepRecord
from commons.reporting.summary import MEASURED_FIELDS, bad_streak, describe_bad_steps, quantile, summarize
from commons.reporting.writing import to_json
from model_zoo import MODEL_SIZES, ModelShape, build_model

TINY, MEDIUM = MODEL_SIZES["gpt2_tiny"], MODEL_SIZES["gpt2_medium"]
ATEN = torch.ops.aten


# --- FLOPs --------------------------------------------------------------------------------------------------


def counted_flops_per_token(shape: ModelShape, seq_len: int, device: str = "meta", **options: Any) -> float:
    """What FlopCounterMode sees in a forward and a backward pass over two sequences."""
    with torch.device(device):
        model = build_model(shape, **options)
        tokens = torch.zeros(2, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.get_total_flops() / tokens.numel()


@pytest.fixture
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention on the meta device through the flash kernel's operator, as on a GPU.

    torch takes the unfused path there. Its counter knows the operator and its backward, so that the count is
    torch's.
    """

    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        assert attn_mask is None
        assert is_causal
        return ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flash)


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    shape = MODEL_SIZES[name]
    counted = counted_flops_per_token(shape, shape.positions, attention="eager")
    hardware = hardware_flops_per_token(shape, shape.positions, recompute="off", attention="eager")
    assert hardware == pytest.approx(counted, rel=1e-9)
    assert model_flops_per_token(shape, shape.positions) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("seq_len", [32, 128])
def test_flops_on_a_real_device(seq_len: int) -> None:
    counted = counted_flops_per_token(TINY, seq_len, device="cpu", attention="eager")
    assert hardware_flops_per_token(TINY, seq_len, recompute="off", attention="eager") == counted
    assert model_flops_per_token(TINY, seq_len) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("recompute", ["selective", "on"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["gpt2_tiny", "gpt2_small"])
def test_flops_with_recompute(name: str, dropout: float, recompute: str) -> None:
    shape = MODEL_SIZES[name]
    options = {"attention": "eager", "dropout": dropout}
    counted = counted_flops_per_token(shape, 128, activation_checkpointing=recompute, **options)
    hardware = hardware_flops_per_token(shape, 128, recompute=recompute, **options)  # pyright: ignore
    assert hardware == pytest.approx(counted, rel=1e-9)


@pytest.mark.usefixtures("fused_attention")
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("name", ["gpt2_tiny", "gpt2_medium"])
def test_flops_of_fused_attention(name: str, recompute: str) -> None:
    shape = MODEL_SIZES[name]
    counted = counted_flops_per_token(shape, shape.positions, activation_checkpointing=recompute)
    for attention in ("sdpa", "flash"):
        hardware = hardware_flops_per_token(shape, shape.positions, recompute=recompute, attention=attention)
        assert hardware == pytest.approx(counted, rel=1e-9)
    eager = hardware_flops_per_token(shape, shape.positions, recompute=recompute, attention="eager")
    # a fused kernel computes the scores once more on the way back; selective recomputation keeps its result, while
    # eager attention's two products run again
    more = 2 if recompute != "selective" else 2 - 4
    assert counted - eager == pytest.approx(more * shape.layers * shape.hidden * shape.positions)


def test_model_flops_by_hand() -> None:
    # gpt2_medium without its 1024 x 1024 position table: 354,823,168 - 1,048,576 = 353,774,592 parameters
    assert model_flops_per_token(MEDIUM, 1024) == 6 * 353_774_592 + 12 * 24 * 1024 * 1024


def test_model_flops_ignore_what_the_implementation_adds() -> None:
    unpadded = dataclasses.replace(MEDIUM, vocab=50304)
    assert unpadded.padded_vocab == MEDIUM.padded_vocab
    difference = model_flops_per_token(unpadded, 1024) - model_flops_per_token(MEDIUM, 1024)
    assert difference == 6 * 47 * 1024
    assert model_flops_per_token(dataclasses.replace(MEDIUM, positions=4096), 1024) == model_flops_per_token(
        MEDIUM, 1024
    )


def test_hardware_flops_of_an_unknown_attention() -> None:
    with pytest.raises(ValueError, match="unknown attention 'ring'; take one of eager, sdpa, flash"):
        hardware_flops_per_token(TINY, 64, recompute="off", attention="ring")


# --- Rates --------------------------------------------------------------------------------------------------


def test_rates() -> None:
    assert tokens_per_second(32_768, 0.125) == 262_144
    assert tflops_per_device(2.5e9, 32_768, 0.125, devices=2) == pytest.approx(327.68)
    assert mfu(494.7, 989.4e12) == pytest.approx(0.5)
    assert mfu(494.7, None) is None


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan])
def test_a_rate_needs_a_time(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive time"):
        tokens_per_second(1, seconds)


# --- Peak rates ---------------------------------------------------------------------------------------------

# name as the driver gives it -> bf16, fp16, fp32 in TFLOPS
KNOWN_PEAKS = {
    "NVIDIA GB200": (2500, 2500, 80),
    "NVIDIA B200": (2250, 2250, 75),
    "NVIDIA B100": (1750, 1750, 60),
    "NVIDIA H200": (989.4, 989.4, 66.9),
    "NVIDIA H200 NVL": (835.5, 835.5, 60),
    "NVIDIA GH200 480GB": (989.4, 989.4, 66.9),
    "NVIDIA GH200 144G HBM3e": (989.4, 989.4, 66.9),
    "NVIDIA H100 80GB HBM3": (989.4, 989.4, 66.9),
    "NVIDIA H100 PCIe": (756, 756, 51.2),
    "NVIDIA H100 NVL": (835.5, 835.5, 60),
    "NVIDIA H800": (989.4, 989.4, 66.9),
    "NVIDIA H800 PCIe": (756, 756, 51.2),
    "NVIDIA H20": (148, 148, 44),
    "NVIDIA A100-SXM4-80GB": (312, 312, 19.5),
    "NVIDIA A100-SXM4-40GB": (312, 312, 19.5),
    "NVIDIA A100-PCIE-40GB": (312, 312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 312, 19.5),
    "A100-SXM-80GB": (312, 312, 19.5),
    "NVIDIA A800-SXM4-80GB": (312, 312, 19.5),
    "NVIDIA A800 80GB PCIe": (312, 312, 19.5),
    "NVIDIA A800 40GB Active": (312, 312, 19.5),
    "NVIDIA A40": (149.7, 149.7, 37.4),
    "NVIDIA A30": (165, 165, 10.3),
    "NVIDIA A10": (125, 125, 31.2),
    "NVIDIA A10G": (70, 70, 35),
    "NVIDIA L4": (121, 121, 30.3),
    "NVIDIA L40": (181.05, 181.05, 90.5),
    "NVIDIA L40S": (362.05, 362.05, 91.6),
    "Tesla V100-SXM2-32GB": (None, 125, 15.7),
    "Tesla V100-SXM3-32GB": (None, 125, 15.7),
    "Tesla V100-PCIE-16GB": (None, 112, 14),
    "Tesla V100S-PCIE-32GB": (None, 130, 16.4),
    "Tesla T4": (None, 65, 8.1),
    "NVIDIA RTX A6000": (154.8, 154.8, 38.7),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 364.2, 91.1),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (503.8, 503.8, 126),
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": (438.9, 438.9, 109.7),
    # whitepapers: GA102 table 2, Ada appendix A, RTX Blackwell appendix A
    "NVIDIA GeForce RTX 3070": (40.6, 40.6, 20.3),
    "NVIDIA GeForce RTX 3080": (59.5, 59.5, 29.8),
    "NVIDIA GeForce RTX 3090": (71, 71, 35.6),
    "NVIDIA GeForce RTX 3090 Ti": (80, 80, 40),
    "NVIDIA GeForce RTX 4070": (58.3, 58.3, 29.1),
    "NVIDIA GeForce RTX 4070 SUPER": (71, 71, 35.5),
    "NVIDIA GeForce RTX 4070 Ti": (80.2, 80.2, 40.1),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (88.2, 88.2, 44.1),
    "NVIDIA GeForce RTX 4080": (97.5, 97.5, 48.7),
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6),
    "NVIDIA GeForce RTX 5070 Ti": (87.9, 87.9, 43.9),
    "NVIDIA GeForce RTX 5080": (112.6, 112.6, 56.3),
    "NVIDIA GeForce RTX 5090": (209.5, 209.5, 104.8),
}
# "AI TOPS" or "Tensor TFLOPS" on NVIDIA's product pages: the fastest type that the generation has, with
# sparsity and fp16 accumulation; by that much it is above the dense rate with fp32 accumulation (fp16: 2 x 2,
# fp8: x 2, fp4 without: x 8 / 2)
TOPS_OVER_DENSE = {"rtx 30": 4, "rtx 40": 8, "rtx 50": 16}
ADVERTISED_TOPS = {
    "rtx 3060": 102, "rtx 3060 ti": 130, "rtx 3070": 163, "rtx 3070 ti": 174, "rtx 3080": 238,
    "rtx 3080 ti": 273, "rtx 3090": 285, "rtx 3090 ti": 320, "rtx 4060": 242, "rtx 4060 ti": 353,
    "rtx 4070": 466, "rtx 4070 super": 568, "rtx 4070 ti": 641, "rtx 4070 ti super": 706, "rtx 4080": 780,
    "rtx 4080 super": 836, "rtx 4090": 1321, "rtx 4090 d": 1177, "rtx 5060": 614, "rtx 5060 ti": 759,
    "rtx 5070": 988, "rtx 5070 ti": 1406, "rtx 5080": 1801, "rtx 5090": 3352,
}  # fmt: skip
UNKNOWN_DEVICES = (
    "", "NVIDIA", "AMD EPYC 9654 96-Core Processor", "AMD Instinct MI300X",
    "Intel(R) Xeon(R) Platinum 8480C", "NVIDIA H100", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA A100-SXM-64GB", "NVIDIA A100X", "NVIDIA A10G-24Q",
    "GRID A100-10C", "NVIDIA H200-SXM-141C", "NVIDIA L400", "NVIDIA L40G", "NVIDIA A2", "NVIDIA A16",
    "NVIDIA A4000", "NVIDIA T400", "NVIDIA RTX A600", "NVIDIA RTX 6000",
    "NVIDIA GeForce RTX 4070 Laptop GPU", "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
    "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 3050", "NVIDIA GeForce RTX 5090 D",
    "NVIDIA GeForce RTX 5090 D v2", "NVIDIA GeForce GTX 1080 Ti", "NVIDIA GeForce RTX 40900",
    "NVIDIA B300 SXM6 AC", "NVIDIA RTX PRO 6000 Blackwell Server Edition", "Tesla P100-PCIE-16GB",
)  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_PEAKS)
def test_peak_of_a_known_device(name: str) -> None:
    for precision, expected in zip(("bf16", "fp16", "fp32"), KNOWN_PEAKS[name], strict=True):
        peak = peak_flops(name, precision)
        assert peak is None if expected is None else peak == pytest.approx(expected * 1e12, rel=0.005)


@pytest.mark.parametrize("name", UNKNOWN_DEVICES)
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert [peak_flops(name, precision) for precision in ("bf16", "fp16", "fp32")] == [None] * 3


@pytest.mark.parametrize("card", GEFORCE_CARDS, ids=lambda card: card.name)
def test_a_geforce_peak_is_what_its_advertised_tops_come_from(card: Any) -> None:
    peak = peak_flops(f"NVIDIA GeForce {card.name.upper()}", "bf16")
    assert peak is not None
    assert peak / 1e12 * TOPS_OVER_DENSE[card.name[:6]] == pytest.approx(ADVERTISED_TOPS[card.name], rel=0.005)


def test_every_row_has_a_name_a_source_and_no_rival() -> None:
    names = [*KNOWN_PEAKS, *(f"GeForce {card.name}" for card in GEFORCE_CARDS)]
    matched = set()
    for name in names:
        rows = [row for row in PEAK_RATES if re.fullmatch(row.name, name.lower().removeprefix("nvidia "))]
        assert len(rows) == 1, name
        matched.update(rows)
    assert matched == set(PEAK_RATES)
    assert all(row.source for row in PEAK_RATES)


def test_spelling_of_a_device_name_does_not_matter() -> None:
    assert peak_rates("  nvidia  H100 80GB  hbm3 ") == peak_rates("NVIDIA H100 80GB HBM3")


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown precision 'fp4'; take one of bf16, fp16, fp32, fp8"):
        peak_flops("NVIDIA H200", "fp4")


def test_fp8_has_no_peak() -> None:
    """Its matrix products are of two kinds, so that there is no one number to divide by."""
    assert peak_flops("NVIDIA H200", "fp8") is None


# --- Records and summaries ----------------------------------------------------------------------------------


def record(step: int, **fields: Any) -> StepRecord:
    defaults: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(StepRecord)), 0.0)
    return StepRecord(**{**defaults, "skipped_steps": 0, "host_memory_peak_rank": 0, **fields, "step": step})


def records_of(values: list[float], field: str = "step_seconds") -> list[StepRecord]:
    return [record(step, **{field: value}) for step, value in enumerate(values, start=1)]


def test_a_record_as_json_has_the_fields_of_the_record() -> None:
    as_dict = json.loads(to_json(record(3, loss=math.nan, grad_norm=math.inf, mfu=None, lr=3e-4)))
    assert as_dict.pop("non_finite") == {"loss": "nan", "grad_norm": "inf"}
    assert list(as_dict) == [field.name for field in dataclasses.fields(StepRecord)]
    assert (as_dict["step"], as_dict["lr"]) == (3, 3e-4)
    assert (as_dict["loss"], as_dict["grad_norm"], as_dict["mfu"]) == (None, None, None)
    json.dumps(as_dict, allow_nan=False)


def test_a_record_stays_as_it_was_measured() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record(1).loss = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    assert record(1).nonfinite_loss_ranks is not None and record(1) == record(1) != record(2)


def test_every_field_of_a_record_is_explained() -> None:
    explained = re.findall(r"^ {8}(\w+): ", StepRecord.__doc__ or "", flags=re.MULTILINE)
    assert explained == [field.name for field in dataclasses.fields(StepRecord)]


@pytest.mark.parametrize("count", range(1, 14))
def test_statistics_are_right_for_any_number_of_steps(count: int) -> None:
    values = numpy.random.default_rng(count).normal(size=count).tolist()
    statistics = summarize(records_of(values), warmup_step=0)["step_seconds"]
    assert statistics == pytest.approx(
        {
            "median": numpy.median(values),
            "p10": numpy.quantile(values, 0.1),
            "p90": numpy.quantile(values, 0.9),
        }
    )
    assert quantile(sorted(values), 0.0) == min(values)
    assert quantile(sorted(values), 1.0) == max(values)


def test_warm_up_steps_are_left_out_of_the_statistics() -> None:
    summary = summarize(records_of([100.0, 50.0, 1.0, 3.0, 2.0]), warmup_step=2)
    assert (summary["steps"], summary["warmup_step"], summary["steps_measured"]) == (5, 2, 3)
    assert summary["step_seconds"] == {"median": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8)}


def test_a_run_cut_short_in_its_warm_up_has_no_statistics() -> None:
    summary = summarize(records_of([100.0]), warmup_step=2)
    assert (summary["steps"], summary["steps_measured"]) == (1, 0)
    assert summary["step_seconds"] == {"median": None, "p10": None, "p90": None}
    assert summary["first_loss"] == summary["last_loss"] == 0.0


def test_what_is_not_known_is_left_out() -> None:
    norms = [1.0, None, 3.0, math.nan, math.inf]
    records = [record(step, grad_norm=norm, mfu=None) for step, norm in enumerate(norms, start=1)]
    summary = summarize(records, warmup_step=0)
    assert summary["grad_norm"] == {"median": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8)}
    assert summary["mfu"] == {"median": None, "p10": None, "p90": None}


def test_a_diverged_run_gives_valid_json_that_says_so() -> None:
    summary = summarize(records_of([7.0, 6.5, math.nan, math.inf], field="loss"), warmup_step=0)
    assert (summary["first_loss"], summary["last_loss"], summary["nonfinite_loss_steps"]) == (7.0, None, 2)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_peaks_of_memory_are_over_all_steps_and_name_their_rank() -> None:
    records = [
        record(
            1,
            device_memory_peak_mib=900.0,
            device_memory_peak_rank=3,
            host_memory_mib=10.0,
            host_memory_peak_rank=0,
        ),
        record(
            2,
            device_memory_peak_mib=100.0,
            device_memory_peak_rank=0,
            host_memory_mib=30.0,
            host_memory_peak_rank=2,
        ),
        record(3, device_memory_peak_mib=None, device_memory_peak_rank=None, host_memory_mib=20.0),
    ]
    summary = summarize(records, warmup_step=1)
    assert (summary["peak_device_memory_mib"], summary["peak_device_memory_rank"]) == (900.0, 3)
    assert (summary["peak_host_memory_mib"], summary["peak_host_memory_rank"]) == (30.0, 2)
    on_cpu = summarize([dataclasses.replace(each, device_memory_peak_mib=None) for each in records], warmup_step=1)
    assert (on_cpu["peak_device_memory_mib"], on_cpu["peak_device_memory_rank"]) == (None, None)


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("highest", [1, 2, 3])
def test_a_peak_of_memory_counts_in_whichever_step_it_is(where: str, highest: int) -> None:
    """Steps 1 and 2 are the warm-up."""
    field = {"device": "device_memory_peak_mib", "host": "host_memory_mib"}[where]
    records = [
        record(step, **{field: 50.0 if step == highest else 20.0, f"{where}_memory_peak_rank": step})
        for step in (1, 2, 3)
    ]
    summary = summarize(records, warmup_step=2)
    assert (summary[f"peak_{where}_memory_mib"], summary[f"peak_{where}_memory_rank"]) == (50.0, highest)


@pytest.mark.parametrize(("warmup", "measured"), [(0, [1, 2, 3]), (1, [2, 3]), (2, [3]), (3, []), (4, [])])
def test_the_warm_up_ends_after_its_last_step(warmup: int, measured: list[int]) -> None:
    summary = summarize(records_of([1.0, 2.0, 3.0]), warmup_step=warmup)
    assert summary["steps_measured"] == len(measured)
    assert summary["step_seconds"]["median"] == (numpy.median(measured) if measured else None)


def test_a_streak_begins_after_the_last_finite_loss() -> None:
    for bad in range(4):
        records = records_of([math.nan] * 2 + [1.0] + [math.inf] * bad, field="loss")
        assert [each.step for each in bad_streak(records)] == list(range(4, 4 + bad))


def test_skipped_steps_are_the_total() -> None:
    assert summarize([record(1, skipped_steps=1), record(2, skipped_steps=2)], warmup_step=1)["skipped_steps"] == 2


def test_numbers_that_only_name_things_are_not_averaged() -> None:
    assert {"step_seconds", "loss", "mfu", "device_memory_peak_mib"} <= set(MEASURED_FIELDS)
    assert not {"step", "skipped_steps", "device_memory_peak_rank", "host_memory_peak_rank"} & set(MEASURED_FIELDS)


def test_a_run_that_ended_before_its_first_step() -> None:
    summary = summarize([], warmup_step=2)
    assert (summary["steps"], summary["steps_measured"], summary["skipped_steps"]) == (0, 0, 0)
    assert summary["step_seconds"] == {"median": None, "p10": None, "p90": None}
    assert summary["last_loss"] is summary["peak_host_memory_rank"] is None


def test_bad_steps_are_those_at_the_end() -> None:
    records = records_of([1.0, math.nan, 7.0, math.inf, math.nan], field="loss")
    assert [each.step for each in bad_streak(records)] == [4, 5]
    assert bad_streak(records[:3]) == bad_streak([]) == []
    assert [each.step for each in bad_streak(records[1:2])] == [2]
    blamed = [dataclasses.replace(each, nonfinite_loss_ranks=[0, 3]) for each in records[3:]]
    assert describe_bad_steps(blamed).startswith("The loss is not finite in steps 4 to 5: it began as inf in step 4")
    assert describe_bad_steps(blamed).endswith("on ranks 0, 3.")
