"""What is answered instead of a training: --plan_for, --dry_run and --calibrate.

The exit code says whether it fits: 0, or NOT_FITTING.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commons.cli import flags
from commons.cli.checks import problems
from commons.cli.defaults import by_age
from commons.cli.planning import PLANNING, settings_of, wrong_flags
from commons.cli.variables import name_variables
from commons.config.schema import TrainConfig
from commons.planner import choose
from commons.planner.machines import Machine, parse_machine, resolve_for, this_machine
from commons.planner.rates import CalibrationError, Rates, calibration_path, rates_of, save_rates
from commons.planner.step_time import forecast_step
from commons.plans.registry import PLANS

if TYPE_CHECKING:
    from commons.cli.flags import CommandLine, Request
    from commons.planner.choose import Candidate, Search

WRONG, NOT_FITTING = 2, 3  # exit codes
FIRST_FP8 = (8, 9)
NO_LAYOUT = "--auto found no layout that can run with these settings: give fewer"


def judge_on(machine: Machine) -> choose.Judge:
    """What is wrong with settings on a machine that is not at hand, with everything installed there."""

    def judge(given: Mapping[str, Any]) -> Sequence[str]:
        settings = {**given, "compile": "auto"}
        found = []
        if settings.get("precision") == "fp8":  # its check asks the GPU at hand
            settings["precision"] = "bf16"
            if machine.gpu is None or machine.gpu.capability < FIRST_FP8:
                found.append("--precision fp8 needs a GPU that has it (RTX 40, L40S, H100 or newer): use bf16")
        config = TrainConfig(**settings)
        typed = [name for name in given if name not in ("compile", *PLANNING)]
        ranks, per_node = machine.world_size, machine.gpus_per_node
        plan, gpus = PLANS.get(config.distplan), per_node if machine.gpu else 0
        wrong = problems(config, ranks, machine.device_type, gpus, plan, local_world_size=per_node, typed=typed)
        return [*found, *wrong]

    return judge


def judge_here(world_size: int, local_world_size: int) -> choose.Judge:
    """What is wrong with settings on this machine."""

    def judge(given: Mapping[str, Any]) -> Sequence[str]:
        return flags.judge(flags.CommandLine(dict(given), []), world_size, local_world_size)[1]

    return judge


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found, and the exit code that says whether anything fits; ``problems`` where settings are wrong."""

    exit_code: int
    problems: Sequence[str] = ()


def plan(given: Mapping[str, Any], machine: Machine, judge: choose.Judge, *, auto: bool, as_json: bool) -> Answer:
    """Print what a run takes on ``machine``, or with ``auto`` the best layouts there."""
    try:
        rates = rates_of(machine)
    except CalibrationError as error:
        return Answer(WRONG, [str(error)])
    if auto:
        found = choose.search(given, machine, rates, judge)
    else:
        wrong = list(judge(given))
        if wrong:
            return Answer(WRONG, wrong)
        found = as_given(given, machine, rates)
    if not found.fitting and found.nearest is None and not found.too_large:
        return Answer(WRONG, found.refusals or [NO_LAYOUT])
    chosen = found.fitting[0] if found.fitting else None
    tell(given, machine, found, chosen, as_json)
    return Answer(0 if chosen else NOT_FITTING)


def for_its_age(given: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """``given``, and the precision that the machine's GPUs have, where none was given."""
    return {**given, **(by_age(given, machine.gpu).settings if machine.gpu is not None else {})}


def as_given(given: Mapping[str, Any], machine: Machine, rates: Rates) -> Search:
    """A search of one layout, the one that was asked for."""
    config = resolve_for(TrainConfig(**given), machine)
    layout = choose.Candidate({}, config, forecast_step(config, machine, rates), choose.forecast_on(config, machine))
    lacking = choose.shortfall(layout.memory, machine)
    return choose.Search([] if lacking else [layout], layout if lacking else None, 1, int(bool(lacking)))


def tell(given: Mapping[str, Any], machine: Machine, found: Search, chosen: Candidate | None, as_json: bool) -> None:
    """A table on the screen, or a JSON document, and the plain command."""
    from commons.planner import choice_table
    from commons.reporting.writing import to_json

    if as_json:
        print(to_json(choice_table.document(given, machine, found, chosen=chosen), indent=2), flush=True)
        return
    console = table_console()
    choice_table.show(console, machine, found, chosen=chosen)
    if chosen is not None:
        command = choose.plain_command({**given, **chosen.settings}, machine)
        console.print(f"\n{command}", markup=False, highlight=False, soft_wrap=True)


def table_console() -> Any:
    """A console that is wide enough for the tables where its output goes to a file."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def answer(request: Request, world_size: int, local_world_size: int, speaks: bool = True) -> int:
    """Answer --plan_for, --dry_run or --calibrate; returns the exit code.

    Args:
        world_size: ranks in all; ``local_world_size`` of them on this machine.
        speaks: this rank prints. The others wait for nothing and find the same exit code but for wrong settings.
    """
    if not speaks:
        return 0
    answered = _answer(request.line, world_size, local_world_size)
    if answered.problems:
        flags.report([name_variables(problem, os.environ, request.flags) for problem in answered.problems])
    return answered.exit_code


def _answer(line: CommandLine, world_size: int, local_world_size: int) -> Answer:
    if line.problems:
        return Answer(WRONG, line.problems)
    given = line.given
    wrong = wrong_flags(line) if given.get("auto") else []
    if given.get("plan_for"):
        try:
            machine = parse_machine(given["plan_for"])
        except ValueError as error:
            return Answer(WRONG, [f"--plan_for: {error}"])
        settings = {name: value for name, value in settings_of(given).items() if name != "device"}
        judge = judge_on(machine)
    else:
        device_type, _ = flags.find_devices(line.config().device)
        machine = this_machine(max(1, world_size // local_world_size), local_world_size, device_type)
        settings, judge = settings_of(given), judge_here(world_size, local_world_size)
        if given.get("calibrate"):
            wrong = judge({name: given[name] for name in given if name in PLANNING})
            return Answer(WRONG, wrong) if wrong else Answer(calibrate(machine))
    if wrong:
        return Answer(WRONG, wrong)
    settings = for_its_age(settings, machine)
    return plan(settings, machine, judge, auto=bool(given.get("auto")), as_json=bool(given.get("json")))


def calibrate(machine: Machine) -> int:
    """--calibrate: measure, keep and print this machine's rates; returns the exit code."""
    import torch

    from commons.planner.measure import measure

    def tell_rate(name: str, value: float) -> None:
        print(f"{name:24}{value:12.4g} per second", flush=True)

    measured = measure(machine, tell_rate)
    path = calibration_path(machine)
    try:
        save_rates(path, machine, measured, torch.__version__)
    except OSError as error:
        print(f"The rates cannot be kept: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"Kept in {path}, for --auto and --dry_run on this machine.", flush=True)
    return 0
