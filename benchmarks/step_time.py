"""The planner's step times beside the measured ones: `python -m benchmarks.step_time [--json | --held_out]`

Takes every record of a GPU run with a step time in benchmarks/results, forecasts the same configuration, and prints
both with the error. Records of the code's present state are those that the model's constants were fitted to; older ones
were slower code, and are shown beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from commons.cli.flags import read_value
from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig
from commons.planner.machines import USUAL_CORES_PER_GPU, USUAL_NODE_LINK, Machine, find_gpu, resolve_for
from commons.planner.rates import default_rates
from commons.planner.step_time import FITTED, Fitted, StepTime, forecast_step

RESULTS = Path(__file__).resolve().parent / "results"
# From the commit that captured Gemini's passes on several GPUs; torch's plans were captured at the last of them.
FITTED_COMMITS = ("58ee7a4", "b6faf85", "38b6125", "294a010", "2e943c2")
# Torch's plans were measured at these too, in a state long gone: their host was what took the time.
GONE = {("Pytorch", commit) for commit in FITTED_COMMITS[:-1]}
LABEL = re.compile(r"(?P<plan>\w+), (?P<size>\w+) × \d+")


@dataclass(frozen=True)
class Record:
    """One case of a result file: its flags, and the medians over its runs, in seconds."""

    file: str
    commit: str
    gpu: str
    ranks: int
    flags: str
    seconds: float
    phases: dict[str, float]

    @property
    def fitted(self) -> bool:
        """Whether the constants of the model were fitted to it."""
        plan = "Pytorch" if "Pytorch" in self.flags else ""
        return self.commit in FITTED_COMMITS and (plan, self.commit) not in GONE

    def job(self) -> tuple[ResolvedConfig, Machine]:
        words = shlex.split(self.flags)
        hints = get_type_hints(TrainConfig)
        given = {
            word.removeprefix("--"): read_value(word.removeprefix("--"), value, hints[word.removeprefix("--")])
            for word, value in zip(words[::2], words[1::2], strict=True)
        }
        cores = USUAL_CORES_PER_GPU * self.ranks
        machine = Machine(1, self.ranks, find_gpu(self.gpu), None, USUAL_NODE_LINK, cores)
        return resolve_for(TrainConfig(**given), machine), machine

    def forecast(self) -> StepTime:
        config, machine = self.job()
        return forecast_step(config, machine, default_rates(machine))


def read_records(folder: Path = RESULTS) -> Iterator[Record]:
    """Every case of a GPU run in the result files that has a step time and flags of the suite."""
    for path in sorted(folder.glob("*/*.json")):
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            continue
        environment = document.get("environment") or {}
        gpu = (environment.get("gpus") or [environment.get("device_name")])[0]
        if gpu is None:
            continue
        for case in document.get("cases", [document | {"runs": [document]}]):
            record = _record(case, f"{path.parent.name}/{path.name}", environment["commit"][:7], gpu)
            if record is not None:
                yield record


def _record(case: dict[str, Any], file: str, commit: str, gpu: str) -> Record | None:
    runs = [run for run in case.get("runs", []) if "step_seconds" in run]
    flags, label = case.get("flags"), LABEL.fullmatch(case.get("label", ""))
    if flags is None and label is not None and not label["plan"].startswith("independent"):
        flags = ("--distplan", label["plan"], "--model_type", label["size"])
    if not runs or flags is None:
        return None

    def median(name: str) -> float:
        return statistics.median((run.get(name) or {}).get("median") or 0.0 for run in runs)

    phases = {phase: median(f"{phase}_seconds") for phase in ("forward", "backward", "optimizer")}
    text = flags if isinstance(flags, str) else shlex.join(flags)
    return Record(file, commit, gpu, case["ranks"], text, median("step_seconds"), phases)


def table(rows: list[tuple[Record, StepTime]]) -> str:
    """A Markdown table, a row per record, those of the present state first."""
    lines = [
        "| record | flags | GPUs | measured, ms | forecast, ms | error |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for record, time in rows:
        error = time.seconds / record.seconds - 1
        lines.append(
            f"| {record.file} `{record.commit}` | {record.flags} | {record.ranks} | {1000 * record.seconds:.1f} |"
            f" {1000 * time.seconds:.1f} | {100 * error:+.1f} % |"
        )
    return "\n".join(lines)


def summary(rows: list[tuple[Record, StepTime]], what: str) -> str:
    errors = sorted(abs(time.seconds / record.seconds - 1) for record, time in rows)
    if not errors:
        return f"{what}: none"
    return (
        f"{what}: {len(errors)} records, median error {100 * statistics.median(errors):.1f} %, largest"
        f" {100 * errors[-1]:.1f} %"
    )


# Where the search for the constants begins, far from what it finds, and how far it goes.
FREE = {
    "matmul": (0.9, 0.8, 1.0),
    "attention": (0.65, 0.4, 0.9),
    "forward_passes": (19.0, 8.0, 30.0),
    "backward_passes": (40.0, 20.0, 60.0),
    "nccl": (0.45, 0.2, 0.7),
}
TRIES = 1500


def fit(jobs: Sequence[tuple[ResolvedConfig, Machine, float]]) -> Fitted:
    """The constants of FREE with the least squared error over ``jobs`` and their measured seconds, by a random walk."""
    numbers = random.Random(0)
    best = dataclasses.replace(FITTED, **{name: start for name, (start, _, _) in FREE.items()})
    least = sum(_error(best, *job) ** 2 for job in jobs)
    for _ in range(TRIES):
        changed = {}
        for name in numbers.sample(list(FREE), numbers.choice([1, 2])):
            _, low, high = FREE[name]
            moved = getattr(best, name) + numbers.gauss(0, (high - low) * numbers.choice([0.03, 0.15]))
            changed[name] = min(high, max(low, moved))
        tried = dataclasses.replace(best, **changed)
        error = sum(_error(tried, *job) ** 2 for job in jobs)
        if error < least:
            best, least = tried, error
    return best


def _error(constants: Fitted, config: ResolvedConfig, machine: Machine, seconds: float) -> float:
    return forecast_step(config, machine, default_rates(machine), constants).seconds / seconds - 1


def held_out() -> Iterator[str]:
    """How well constants fitted to all other sizes foretell the records of one, a line per size."""
    jobs = [(*record.job(), record.seconds) for record in read_records() if record.fitted]
    for size in dict.fromkeys(config.model_type for config, _, _ in jobs):
        constants = fit([job for job in jobs if job[0].model_type != size])
        errors = sorted(abs(_error(constants, *job)) for job in jobs if job[0].model_type == size)
        yield (
            f"{size}, {len(errors)} records, fitted without them: median error"
            f" {100 * statistics.median(errors):.1f} %, largest {100 * errors[-1]:.1f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a list of records instead of tables")
    parser.add_argument("--held_out", action="store_true", help="foretell each size by constants fitted to the others")
    arguments = parser.parse_args()
    if arguments.held_out:
        print("\n".join(held_out()))
        return
    rows = [(record, record.forecast()) for record in read_records()]
    if arguments.json:
        fields = [{**vars(record), "fitted": record.fitted, "forecast": vars(time)} for record, time in rows]
        print(json.dumps(fields, indent=1))
        return
    for fitted, title in ((True, "the code's present state"), (False, "older code, which was slower")):
        group = [row for row in rows if row[0].fitted is fitted]
        print(f"{summary(group, title.capitalize())}\n\n{table(group)}\n")


if __name__ == "__main__":
    main()
