"""Whoever does what the messages say about wrong settings gets a run: every way out that they name is tried.

Configurations, most of them wrong in several ways, are drawn with a fixed seed.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import get_type_hints

import pytest

from commons.cli import output
from commons.cli.checks import problems
from commons.cli.flags import read_value
from commons.config.schema import TrainConfig
from commons.plans.registry import PLANS

HINTS = get_type_hints(TrainConfig)

# What is drawn for each flag; None is a flag that is not given, likelier for those that few runs have.
DRAWN: dict[str, list[str | None]] = {
    "distplan": list(PLANS),
    "model_type": ["gpt2_tiny", "gpt2_small", "gpt2_xl"],
    "num_heads": [None, None, None, None, "3", "5", "6", "0"],
    "hidden_size": [None, None, None, None, None, "60", "65", "96"],
    "num_layers": [None, None, None, None, "1", "3"],
    "tp_degree": ["1", "1", "2", "3", "4", "8"],
    "pp_degree": ["1", "1", "2", "3", "4", "5"],
    "zero_stage": [None, None, "0", "1", "2", "3"],
    "num_microbatches": [None, None, "1", "2", "3", "4"],
    "num_model_chunks": [None, None, None, "1", "2", "3"],
    "sequence_parallel": [None, None, "on"],
    "seq_len": [None, None, "7", "63", "64", "2000"],
    "batch_size": [None, "1", "3", "4", "8"],
    "placement": [None, None, "static", "auto", "cuda", "cpu", "const"],
    "shard_param_frac": [None, None, None, "0.3", "1", "1.5"],
    "offload_optim_frac": [None, None, None, "0.3", "1", "-1"],
    "offload_param_frac": [None, None, None, "0.3", "1", "nan"],
    "warmup_non_model_data_ratio": [None, None, None, None, "0.5"],
    "max_prefetch": [None, None, None, "2", "-2"],
    "blocks_per_chunk": [None, None, None, "2", "0"],
    "gemini_hooks": [None, None, None, "operation"],
    "precision": [None, "bf16", "fp16", "fp32"],
    "initial_loss_scale": [None, None, None, None, "1024", "0.5"],
    "grad_accum": [None, None, None, "4", "0"],
    "cuda_graph": [None, None, None, "on", "off"],
    "peer_copies": [None, None, None, "on", "off"],
}
RANKS = range(1, 9)
DRAWS = 250
MOST_STEPS = 30  # more problems than any of these configurations has


@dataclass(frozen=True)
class Attempt:
    """What a user typed: flags with their values, and a number of ranks; ``gpus`` are those of the machine."""

    ranks: int
    flags: tuple[tuple[str, str], ...]
    gpus: int = 0

    def problems(self) -> list[str]:
        config = TrainConfig(**{name: read_value(name, value, HINTS[name]) for name, value in self.flags})
        gpus = 0 if config.device == "cpu" else self.gpus
        plan, typed = PLANS.get(config.distplan), [name for name, _ in self.flags]
        return problems(config, self.ranks, "cuda" if gpus else "cpu", gpus, plan, typed=typed)

    def with_changes(self, changes: dict[str, str | None]) -> Attempt:
        """``changes``: new values by flag, None where it is left out; GPUNUM for the ranks."""
        flags: dict[str, str | None] = {**dict(self.flags), **changes}
        ranks = int(flags.pop("GPUNUM", None) or self.ranks)
        flags.pop("nproc_per_node", None)  # torchrun's word for the same
        return Attempt(ranks, tuple((name, value) for name, value in flags.items() if value is not None), self.gpus)


def draw(random_numbers: random.Random) -> Attempt:
    share = random_numbers.choice((0.2, 1.0))  # of the flags: few make few mistakes
    drawn = {name: random_numbers.choice(values) for name, values in DRAWN.items() if random_numbers.random() < share}
    return Attempt(random_numbers.choice(RANKS), ()).with_changes(drawn)


@pytest.fixture(autouse=True)
def installed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.13.0")  # reading it thousands of times takes long


VALUES = re.compile(r"(--\w+ |GPUNUM=)([\w.+-]+(?:, (?!--|or )[\w.+-]+)*(?: or (?!less|--)[\w.+-]+)?)")


def ways_out(problem: str) -> Iterator[dict[str, str | None]]:
    """The changes that a problem's text names: one dictionary for each alternative and, in it, each listed value."""
    told, advice = problem.rsplit(": ", 1)
    for alternative in re.split(r", or ", advice):
        if "remove it" in alternative:
            yield {told.split()[0].removeprefix("--"): None}
        found = VALUES.findall(alternative)
        names = [flag.strip("- =") for flag, _ in found]
        listed = [re.split(r", | or ", values) for _, values in found]
        yield from (dict(zip(names, choice, strict=True)) for choice in itertools.product(*listed) if names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--a 1 is x: use --a 2, 3 or 4, or --b 5", [{"a": "2"}, {"a": "3"}, {"a": "4"}, {"b": "5"}]),
        ("--a 1 is x: remove it, or use --b on", [{"a": None}, {"b": "on"}]),
        ("--a 9 is x: use --a 8 or less", [{"a": "8"}]),
        (
            "--a 1 is x: start 8 ranks (GPUNUM=8 on one machine), or use --b 1 --c 2",
            [{"GPUNUM": "8"}, {"b": "1", "c": "2"}],
        ),
    ],
)
def test_ways_out_are_read_as_a_person_would(text: str, expected: list[dict]) -> None:
    assert list(ways_out(text)) == expected


def kind(problem: str) -> str:
    """A problem without its numbers: what must be gone once its advice is followed."""
    told = problem.rsplit(": ", 1)[0].replace("a multiple of", "at least")  # one rule, with interleaving and without
    return re.sub(r"[\d.]+", "N", told)


def test_every_way_out_of_a_problem_ends_it() -> None:
    numbers, tried, alone, kinds = random.Random(0), 0, 0, set()
    for _ in range(DRAWS):
        attempt = draw(numbers)
        told = attempt.problems()
        for problem in told:
            kinds.add(kind(problem))
            ways = list(ways_out(problem))
            assert ways, f"names no setting that works: {problem}"
            for changes in ways:
                after = attempt.with_changes(changes).problems()
                assert kind(problem) not in map(kind, after), (attempt, problem, changes, after)
                # another plan or placement may lack something else that was asked for
                if len(told) == 1 and not {"distplan", "placement"} & set(changes):
                    assert after == [], (attempt, problem, changes)
                    alone += 1
                tried += 1
    assert tried > 5 * DRAWS and alone > DRAWS / 10 and len(kinds) > 40


def test_following_the_first_advice_again_and_again_ends_in_a_run() -> None:
    numbers = random.Random(1)
    for _ in range(DRAWS):
        first = attempt = draw(numbers)
        for _ in range(MOST_STEPS):
            told = attempt.problems()
            if not told:
                break
            attempt = attempt.with_changes(next(ways_out(told[0])))
        assert not told, (first, told)


# --- Small spaces, every point of them ------------------------------------------------------------------------

DEGREES, BATCHES, PIECES = range(1, 7), range(1, 9), (None, *range(1, 7))


def layouts(plan: str, pipelines: Iterable[int]) -> Iterator[Attempt]:
    for tp, pp, ranks in itertools.product(DEGREES, pipelines, RANKS):
        yield small(ranks, distplan=plan, tp_degree=tp, pp_degree=pp)


def pieces() -> Iterator[Attempt]:
    """Each layout with every way of cutting batch and model."""
    for layout in layouts("CAI_Hybrid", DEGREES):
        for batch, number, chunks in itertools.product(BATCHES, PIECES, (1, 2)):
            cut = {"batch_size": str(batch), "num_microbatches": number and str(number)}
            yield layout.with_changes({**cut, "num_model_chunks": str(chunks)})


def on_gpus() -> Iterator[Attempt]:
    for attempt, gpus in itertools.product(layouts("CAI_Hybrid", DEGREES), (1, 2, 3, 4, 8)):
        yield replace(attempt.with_changes({"batch_size": "8"}), gpus=gpus)  # the default is another on a CPU


def small(ranks: int, **flags: int | str | None) -> Attempt:
    return Attempt(ranks, (("model_type", "gpt2_tiny"),)).with_changes(
        {name: None if value is None else str(value) for name, value in flags.items()}
    )


SPACES: dict[str, Callable[[], Iterator[Attempt]]] = {
    "tensor and pipeline parallel": lambda: layouts("CAI_Hybrid", DEGREES),
    "tensor parallel": lambda: layouts("CAI_Gemini", [1]),
    "sequence parallel": lambda: (
        layout.with_changes({"sequence_parallel": "on"}) for layout in layouts("CAI_Hybrid", DEGREES)
    ),
    "batches in pieces": pieces,
    "on GPUs": on_gpus,
}


@pytest.mark.parametrize("space", SPACES)
def test_all_advice_about_a_layout_is_accepted(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends its problem and makes no other: what is the only problem is gone for good."""
    monkeypatch.setattr(output, "folder_problem", lambda folder: [])  # tries the disk
    judged = functools.cache(Attempt.problems)
    tried = 0
    for attempt in SPACES[space]():
        told = judged(attempt)
        kinds = {kind(problem) for problem in told}
        assert len(kinds) == len(told), (attempt, told)
        for problem in told:
            ways = list(ways_out(problem))
            assert ways, f"names no setting that works: {problem}"
            for changes in ways:
                after = judged(attempt.with_changes(changes))
                assert {kind(p) for p in after} <= kinds - {kind(problem)}, (attempt, problem, changes, after)
                tried += 1
    assert tried > 50
