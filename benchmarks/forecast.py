"""Forecasts of device memory beside the peaks in benchmarks/results, and what other formulas say of the same runs.

    python -m benchmarks.forecast                a table of all records, and how far off each way is
    python -m benchmarks.forecast --json         the same for programs

No GPU is needed. Records of older code are planned as that code ran where it differed: its loss kept the gradient of a
piece beside the logits, nothing was copied between GPUs, and torch's plans were not captured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commons.cli.flags import read_flags
from commons.config import resolved
from commons.config.resolved import ResolvedConfig
from commons.planner.calibration import Calibration
from commons.planner.gpus import GPU_MODELS
from commons.planner.memory import Forecast, forecast
from model_zoo import parameter_count

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
H100 = GPU_MODELS["H100-80GB"]
# Commits whose loss and norms were not Triton's yet, and those before copies between GPUs and before captured plans of
# torch's. "kept gathered" of 38b6125 gathered another way than today's replicated chunks.
BEFORE_KERNELS = ("28d23ef", "e687914", "029a35a", "210b4eb", "c99beee")
BEFORE_COPIES = (*BEFORE_KERNELS, "399d281")
BEFORE_CAPTURE = ("28d23ef", "e687914", "029a35a", "210b4eb")
CAPTURED_TORCH = ("2e943c2", "ef1e512")
NOT_PLANNED = (("38b6125", "kept gathered"),)
# the oldest GPUs that it may be, so that nothing is planned with Triton's kernels
OLDER = dataclasses.replace(H100, capability=(7, 5))


@dataclass(frozen=True)
class Record:
    """One measured run, or several that differ by nothing.

    Attributes:
        peak: the highest of the repeats, MiB.
        host: the lowest of the repeats' resident memory, MiB; None where it was not kept.
    """

    label: str
    folder: str
    commit: str
    config: ResolvedConfig
    ranks: int
    peak: float
    host: float | None

    @property
    def is_today_s(self) -> bool:
        """Whether the memory of its passes is that of today's code."""
        return self.commit not in BEFORE_KERNELS


def records() -> Iterator[Record]:
    """All runs with a device peak whose settings are known."""
    for file in sorted(RESULTS.glob("*/*.json")):
        document = json.loads(file.read_text())
        for case in document.get("cases", []) if isinstance(document, dict) else []:
            record = _record(file, document["environment"], case)
            if record is not None:
                yield record


def _record(file: Path, environment: dict[str, Any], case: dict[str, Any]) -> Record | None:
    runs = [run for run in case.get("runs", []) if run.get("peak_device_memory_mib")]
    label, commit = case.get("label", ""), str(environment.get("commit", ""))[:7]
    if (
        not runs
        or not label
        or "independent" in label
        or any(commit == c and words in label for c, words in NOT_PLANNED)
    ):
        return None
    before = re.search(r"before \((\w+)\)", label)
    commit = before[1] if before else commit
    flags = case.get("flags") or _flags_of(label)
    common = shlex.split(environment.get("command", ""))
    if "--batch_size" in common:
        flags = ["--batch_size", common[common.index("--batch_size") + 1], *flags]
    config = _resolved(flags, commit, case["ranks"])
    hosts = [run["peak_host_memory_mib"] for run in runs if run.get("peak_host_memory_mib")]
    peak = max(run["peak_device_memory_mib"] for run in runs)
    return Record(label, file.parent.name, commit, config, case["ranks"], peak, min(hosts, default=None))


def _flags_of(label: str) -> list[str]:
    plan, size = re.findall(r"\w+_\w+", label)[:2]
    return ["--distplan", plan, "--model_type", size]


def _resolved(flags: list[str], commit: str, ranks: int) -> ResolvedConfig:
    config = read_flags(flags).config()
    plan = config.distplan
    captured = commit not in BEFORE_CAPTURE if plan == "CAI_Gemini" else commit in CAPTURED_TORCH
    changes = {"cuda_graph": "auto" if captured else "off"}
    if commit in BEFORE_COPIES and plan == "CAI_Gemini":
        changes["peer_copies"] = "off"
    return dataclasses.replace(config, **changes).resolve("cuda", ranks)


def planned(record: Record) -> Forecast:
    gpu = H100 if record.is_today_s else OLDER
    return forecast(record.config, record.ranks, record.ranks, gpu, Calibration())


# --- other formulas ---------------------------------------------------------------------------------------------------


def megatron(record: Record) -> float | None:
    """Megatron-LM: 18 bytes a parameter, 12 of them shared with a distributed optimizer, and
    34 bytes for each of tokens x hidden x layers with fused attention. Not for states on the host.
    https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/theoretical_memory_usage.py
    """
    config, shape = record.config, record.config.shape()
    if config.offload_optim_frac:
        return None
    shared = config.distplan not in ("Pytorch_DDP",)
    states = parameter_count(shape) * (6 + 12 / record.ranks if shared else 18)
    tokens = config.batch_size * config.seq_len
    inputs = 2 * tokens * shape.hidden * shape.layers
    blocks = inputs if config.activation_checkpointing == "on" else 17 * inputs
    ends = 8 * tokens + tokens * shape.hidden + 4 * tokens * shape.hidden * (1 + shape.padded_vocab / shape.hidden)
    return (states + blocks + ends) / MIB


def deepspeed(record: Record) -> float | None:
    """DeepSpeed's estimators of model states, which leave activations out: ZeRO-2 and ZeRO-3 without offload.
    https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/runtime/zero/stage3.py
    """
    config, shape = record.config, record.config.shape()
    parameters = parameter_count(shape)
    if config.offload_optim_frac or config.distplan == "Pytorch_DDP":
        return None
    if config.distplan in ("CAI_Gemini", "Pytorch_FSDP"):
        return (4 * shape.padded_vocab * shape.hidden + 18 * parameters / record.ranks) / MIB
    return (4 * parameters + 16 * parameters / record.ranks) / MIB


def eleuther(record: Record) -> float | None:
    """EleutherAI: 2 bytes of weights, 4 of gradients and 12 of optimizer for each parameter, and
    activations with the scores of attention written out. Not for states on the host.
    https://blog.eleuther.ai/transformer-math/
    """
    config, shape = record.config, record.config.shape()
    if config.offload_optim_frac:
        return None
    sharded = {"CAI_Gemini": 3, "Pytorch_FSDP": 3, "CAI_ZeRO2": 2, "CAI_ZeRO1": 1, "Pytorch_ZeRO": 1}
    stage = sharded.get(config.distplan, 0)
    shares = [record.ranks if stage >= needed else 1 for needed in (3, 2, 1)]
    states = parameter_count(shape) * sum(size / share for size, share in zip((2, 4, 12), shares, strict=True))
    each = {"on": 2.0, "selective": 34.0}.get(
        config.activation_checkpointing, 34 + 5 * shape.heads * config.seq_len / shape.hidden
    )
    return (states + each * config.batch_size * config.seq_len * shape.hidden * shape.layers) / MIB


OTHERS: dict[str, Callable[[Record], float | None]] = {
    "Megatron": megatron,
    "DeepSpeed": deepspeed,
    "EleutherAI": eleuther,
}


# --- the table --------------------------------------------------------------------------------------------------------


def row_of(record: Record) -> dict[str, Any]:
    """One record and all forecasts of it; errors in percent of what was measured."""
    plan = planned(record)
    ways = {"forecast": plan.allocated_peak / MIB, **{name: way(record) for name, way in OTHERS.items()}}
    return {
        "case": record.label,
        "folder": record.folder,
        "commit": record.commit,
        "today": record.is_today_s,
        "measured_mib": record.peak,
        "forecast_mib": ways["forecast"],
        "phase": plan.peak_phase,
        "host_measured_mib": record.host,
        "host_forecast_mib": plan.host_bytes / MIB,
        "error": {name: None if way is None else 100 * (way / record.peak - 1) for name, way in ways.items()},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By way: how far off it is."""
    found = {}
    for name in ("forecast", *OTHERS):
        errors = [row["error"][name] for row in rows if row["error"][name] is not None]
        found[name] = {
            "cases": len(errors),
            "median_percent": statistics.median(map(abs, errors)),
            "within_2_percent": sum(abs(error) <= 2 for error in errors) / len(errors),
            "lowest_percent": min(errors),
            "highest_percent": max(errors),
        }
    return found


def _show(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "commit", box=box.SIMPLE)
    for heading in ("measured, MiB", "forecast", "error, %", *(f"{name}, %" for name in OTHERS)):
        table.add_column(heading, justify="right")
    for row in rows:
        errors = ["–" if error is None else f"{error:+.2f}" for error in row["error"].values()]
        numbers = f"{row['measured_mib']:,.1f}", f"{row['forecast_mib']:,.1f}"
        table.add_row(row["case"], row["commit"], *numbers, *errors)
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    for name, found in summary(rows).items():
        console.print(
            f"{name}: {found['cases']:.0f} cases, median {found['median_percent']:.2f} % off,"
            f" {100 * found['within_2_percent']:.0f} % of them within 2 %,"
            f" from {found['lowest_percent']:+.2f} to {found['highest_percent']:+.2f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    resolved.compile_problem = lambda device_type: None  # the machines of the records had Triton and a compiler
    rows = [row_of(record) for record in records()]
    if arguments.json:
        print(json.dumps({"rows": rows, "summary": summary(rows)}, indent=1))
    else:
        _show(rows)


if __name__ == "__main__":
    main()
