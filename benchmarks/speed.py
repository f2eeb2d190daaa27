"""Speed of plans and sizes: every case in a process of its own, the repeats interleaved, medians and spread.

    python -m benchmarks.speed plans --out results/plans    all plans on gpt2_medium, on one GPU and on all
    python -m benchmarks.speed --list                       the sets of cases

Writes OUT.json (every repeat's summary, hardware, versions, command, commit) and OUT.md (a table).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from commons.plans.registry import PLANS
from commons.reporting.environment import describe_environment

CASE_SECONDS = 420


@dataclass(frozen=True)
class Case:
    """One configuration: a label of its own, the flags of train_gpt_demo.py, how many ranks, and the GPUs that they see
    (CUDA_VISIBLE_DEVICES), where that is not all.
    """

    label: str
    flags: tuple[str, ...]
    ranks: int = 1
    gpus: str | None = None


def _plans(devices: int) -> list[Case]:
    """Every data-parallel plan on gpt2_medium, batch 16, sequence 1024, bf16."""
    names = [name for name, plan in PLANS.items() if not plan.pipeline]
    counts = sorted({1, devices})
    return [Case(f"{name} × {ranks}", ("--distplan", name), ranks) for ranks in counts for name in names]


def _overlap(devices: int) -> list[Case]:
    """Gemini on the first GPU, the last and all, with its ways to gather, and FSDP2: gpt2_medium and gpt2_xl."""
    # all of them together are as fast as the slowest, so the first alone does not tell what several lose
    last = str(devices - 1)
    cases = {
        "CAI_Gemini": ("--distplan CAI_Gemini", 1, None),
        "CAI_Gemini, last GPU": ("--distplan CAI_Gemini", 1, last),
        "CAI_Gemini, prefetch 2": ("--distplan CAI_Gemini --max_prefetch 2", devices, None),
        "Pytorch_FSDP": ("--distplan Pytorch_FSDP", devices, None),
        "CAI_Gemini, prefetch 0": ("--distplan CAI_Gemini --max_prefetch 0", devices, None),
        "CAI_Gemini, replicated": ("--distplan CAI_Gemini --max_prefetch 2 --shard_param_frac 0", devices, None),
        "CAI_Gemini, NCCL": ("--distplan CAI_Gemini --max_prefetch 2 --peer_copies off", devices, None),
    }
    return [
        Case(f"{name}, {size} × {ranks}", tuple(f"{flags} --model_type {size}".split()), ranks, gpus)
        for size in ("gpt2_medium", "gpt2_xl")
        for name, (flags, ranks, gpus) in cases.items()
    ]


def _sizes(devices: int) -> list[Case]:
    """Gemini on one GPU: gpt2_medium, gpt2_xl, in fp8 too, and gpt2_medium as the Colossal-AI example runs it."""
    example = "--attention eager --dropout 0.1 --activation_checkpointing on --gemini_hooks operation --compile off"
    cases = {
        "gpt2_medium": "--model_type gpt2_medium",
        "gpt2_xl": "--model_type gpt2_xl",
        "gpt2_medium, fp8": "--model_type gpt2_medium --precision fp8",
        "gpt2_xl, fp8": "--model_type gpt2_xl --precision fp8",
        "gpt2_medium, the example's settings": f"--model_type gpt2_medium {example}",
    }
    return [Case(f"CAI_Gemini, {name}", tuple(flags.split())) for name, flags in cases.items()]


def _large(devices: int) -> list[Case]:
    """gpt2_10b with Gemini on all devices: blocks recomputed, what is cheap of them, the optimizer on the host."""
    common = "--model_type gpt2_10b --batch_size 8 --max_prefetch 2 --activation_checkpointing"
    cases = {
        "recompute on": f"{common} on",
        "recompute selective": f"{common} selective",
        "recompute on, optimizer on the host, batch 32": f"{common} on --offload_optim_frac 1 --batch_size 32",
    }
    return [Case(f"gpt2_10b, {name} × {devices}", tuple(flags.split()), devices) for name, flags in cases.items()]


def _smoke(devices: int) -> list[Case]:
    """Two plans on gpt2_tiny, for a look at the tool itself."""
    return [
        Case(name, ("--distplan", name, "--model_type", "gpt2_tiny"), devices) for name in ("CAI_Gemini", "Pytorch_DDP")
    ]


# name -> the cases for a machine with so many devices
SETS: dict[str, Callable[[int], list[Case]]] = {
    "plans": _plans,
    "sizes": _sizes,
    "overlap": _overlap,
    "large": _large,
    "smoke": _smoke,
}

COLUMNS: dict[str, Callable[[list[dict]], str]] = {
    "step, ms": lambda runs: _spread(runs, "step_seconds", 1000, 1),
    "forward": lambda runs: _spread(runs, "forward_seconds", 1000, 1),
    "backward": lambda runs: _spread(runs, "backward_seconds", 1000, 1),
    "optimizer": lambda runs: _spread(runs, "optimizer_seconds", 1000, 1),
    "tokens/s": lambda runs: _spread(runs, "tokens_per_second", 1, 0),
    "model TFLOPS a device": lambda runs: _spread(runs, "model_tflops_per_device", 1, 1),
    "MFU": lambda runs: _spread(runs, "mfu", 100, 1),
    "start to first step, s": lambda runs: median_and_range([run["first_step_seconds"] for run in runs], 1, 1),
    "peak memory, MiB": lambda runs: median_and_range([run["peak_device_memory_mib"] for run in runs], 1, 0),
}


def _spread(runs: list[dict], key: str, factor: float, digits: int) -> str:
    """Of the medians over steps that each repeat has under ``key``."""
    return median_and_range([run[key]["median"] for run in runs], factor, digits)


def median_and_range(values: list[float | None], factor: float, digits: int) -> str:
    """The median of the repeats, and from where to where they go if that shows; a dash for what was not measured."""
    known = [value * factor for value in values if value is not None]
    if not known:
        return "–"
    middle, low, high = (f"{pick(known):.{digits}f}" for pick in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low}–{high})"


def run_case(case: Case, common: list[str]) -> dict:
    """Train the case through the launcher; its summary, or what went wrong under "error"."""
    with tempfile.TemporaryDirectory() as log_dir:
        command = [
            sys.executable,
            "-m",
            "commons.launch",
            "--log_dir",
            log_dir,
            "--run_name",
            "run",
            *common,
            *case.flags,
        ]
        environment = {**os.environ, "GPUNUM": str(case.ranks)}
        if case.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = case.gpus
        run_dir, console = Path(log_dir) / "run", Path(log_dir) / "console"
        with console.open("w") as output:
            start = time.monotonic()
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            first_step_seconds = _wait(process, run_dir / "metrics.jsonl", start)
        summary = run_dir / "summary.json"
        if process.returncode or not summary.exists():
            return {"error": console.read_text()[-2000:], "returncode": process.returncode}
        return {**json.loads(summary.read_text()), "first_step_seconds": first_step_seconds}


def _wait(process: subprocess.Popen, metrics: Path, start: float) -> float | None:
    """Until the process has ended, killed after CASE_SECONDS; when the first step was logged, None if never."""
    first_step_seconds = None
    while process.poll() is None:
        now = time.monotonic() - start
        if first_step_seconds is None and metrics.exists() and metrics.stat().st_size:
            first_step_seconds = now
        if now > CASE_SECONDS:
            process.terminate()  # the launcher ends its ranks
            process.wait()
        time.sleep(0.05)
    return first_step_seconds


def table(cases: list[Case], results: dict[str, list[dict]]) -> str:
    """A Markdown table, a row a case: medians over repeats of the medians over steps, with the range of the
    repeats.
    """
    rows = [["case", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for case in cases:
        good = [run for run in results[case.label] if "error" not in run]
        rows.append([case.label, *(column(good) if good else "failed" for column in COLUMNS.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", default="plans", choices=SETS)
    parser.add_argument("--out", type=Path, default=Path("speed"), help="files to write, without their ending")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", type=int, help="ranks of the larger cases (default: the visible GPUs)")
    parser.add_argument("--only", type=re.compile, help="cases whose label holds this (a regular expression)")
    parser.add_argument("--list", action="store_true", help="print the sets of cases and end")
    arguments, common = parser.parse_known_args()
    if arguments.list:
        print("\n".join(f"{name:10}{build.__doc__}" for name, build in SETS.items()))
        return
    devices = arguments.devices or _visible_gpus()
    cases = [case for case in SETS[arguments.set](devices) if not arguments.only or arguments.only.search(case.label)]
    results: dict[str, list[dict]] = {case.label: [] for case in cases}
    for repeat in range(arguments.repeats):
        for case in cases:
            result = run_case(case, common)
            results[case.label].append(result)
            told = result.get("error") or f"{result['step_seconds']['median']:.4f} s a step"
            print(f"repeat {repeat + 1}: {case.label}: {told}", flush=True)
            write(arguments.out, cases, results)


def write(out: Path, cases: list[Case], results: dict[str, list[dict]]) -> None:
    """After every run, so that a cut-off benchmark leaves what it has."""
    out.parent.mkdir(parents=True, exist_ok=True)
    import torch  # noqa: F401  (the description names the GPUs where torch is there to ask)

    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    document = {
        "command": command,
        "environment": describe_environment(None),
        "cases": [
            {"label": case.label, "flags": case.flags, "ranks": case.ranks, "runs": results[case.label]}
            for case in cases
        ],
    }
    out.with_suffix(".json").write_text(json.dumps(document, indent=1))
    out.with_suffix(".md").write_text(f"`{command}`\n\n{table(cases, results)}")


def _visible_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


if __name__ == "__main__":
    main()
