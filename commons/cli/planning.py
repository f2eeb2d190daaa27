"""The planning flags: --auto, --plan_for, --dry_run and their kin: what contradicts itself among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from commons.cli.job import Job
from commons.cli.limits import LIMITS, number_problem
from commons.cli.wording import unknown
from commons.config.schema import PlanningFlags
from commons.planner.choose import nothing_open
from commons.planner.machines import parse_machine
from commons.plans.registry import PLANS
from model_zoo import MODEL_SIZES

if TYPE_CHECKING:
    from commons.cli.flags import CommandLine

PLANNING = tuple(field.name for field in dataclasses.fields(PlanningFlags))


def planning(job: Job) -> Iterator[str]:
    """What contradicts itself among the planning flags."""
    given = job.given
    nothing = nothing_open(job.typed, given.distplan) if given.auto else None
    if nothing:
        yield nothing
    if given.plan_for:
        try:
            parse_machine(given.plan_for)
        except ValueError as error:
            yield f"--plan_for: {error}"
    if given.json and not (given.dry_run or given.plan_for):
        yield "--json prints what --dry_run and --plan_for found: remove it, or use --dry_run true"
    if given.calibrate and (given.auto or given.plan_for or given.dry_run):
        yield "--calibrate measures and does nothing else: remove --auto, --dry_run and --plan_for, or --calibrate"


def wrong_flags(line: CommandLine) -> list[str]:
    """What is wrong whatever --auto chooses, where the settings as a whole are not judged yet: names that do not exist,
    numbers out of their ranges, and nothing to choose.
    """
    config = line.config()
    names = (("model_type", MODEL_SIZES), ("distplan", PLANS))
    unknowns = [
        unknown(name, line.given[name], known)
        for name, known in names
        if name in line.given and line.given[name] not in known
    ]
    numbers = [
        number_problem(name, value, LIMITS[name])
        for name, value in line.given.items()
        if name in LIMITS and value is not None
    ]
    found = (*unknowns, *numbers, nothing_open(line.given, config.distplan))
    return [problem for problem in found if problem]


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` without the planning flags: what a training is asked to do."""
    return {name: value for name, value in given.items() if name not in PLANNING}


def wants_answer(given: Mapping[str, Any]) -> bool:
    """Whether a question is asked, rather than a training wanted."""
    return bool(given.get("plan_for") or given.get("dry_run") or given.get("calibrate"))
