"""--auto in the launcher: the layouts that fit, the best few tried, and the run with the one that won."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commons.cli import answers, planning
from commons.cli.flags import CONFIG_ERROR, CommandLine, judge, report
from commons.lifecycle.outcome import FAILURE
from commons.planner import choice_table, trials
from commons.planner.choose import Candidate, Search, plain_command, search
from commons.planner.machines import Machine, this_machine
from commons.planner.rates import CalibrationError, rates_of
from commons.planner.trials import Trial

if TYPE_CHECKING:
    from commons.launch.launcher import Launch

CHOICE_FILE = "auto.json"


def choose_layout(launch: Launch) -> Launch | int:
    """The launch with everything chosen that was open, after what was found is told; or the exit code to end with.

    2: no layout can run with what was given. 3: none fits. 1: none of the trials trained.
    """
    nodes, config = launch.nodes, launch.config
    machine = this_machine(nodes.count, nodes.ranks_per_node, config.device)
    given = answers.for_its_age(planning.settings_of(launch.given), machine)
    try:
        rates = rates_of(machine)
    except CalibrationError as error:
        report([str(error)])
        return CONFIG_ERROR
    found = search(given, machine, rates, answers.judge_here(nodes.world_size, nodes.ranks_per_node))
    if not found.fitting:
        return _nothing_fits(machine, found)
    tried = _try(given, found, machine, config.auto_minutes)
    chosen = _choice(found, tried)
    if chosen is None:
        choice_table.show(answers.table_console(), machine, found, tried)
        print("--auto: no layout trained; the table says why.", file=sys.stderr, flush=True)
        return FAILURE
    return _with_choice(launch, given, machine, found, tried, chosen)


def _nothing_fits(machine: Machine, found: Search) -> int:
    if found.nearest is None and not found.too_large:
        report(found.refusals or [answers.NO_LAYOUT])
        return CONFIG_ERROR
    choice_table.show(answers.table_console(), machine, found)
    print("--auto: no layout fits: use a smaller --model_type, or more GPUs.", file=sys.stderr, flush=True)
    return answers.NOT_FITTING


def _try(given: Mapping[str, Any], found: Search, machine: Machine, minutes: float) -> list[Trial]:
    """On one machine, and where there is a choice and time. Several nodes would have to start each trial together."""
    if machine.nodes > 1 or not minutes or len(found.fitting) < 2:
        return []
    print(f"--auto: {len(found.fitting)} layouts to try, {minutes:g} minutes at most", file=sys.stderr, flush=True)
    return trials.try_layouts(given, found.fitting, machine, minutes, _tell_trial)


def _tell_trial(trial: Trial) -> None:
    speed = f"{trial.tokens_per_second:,.0f} tokens/s" if trial.tokens_per_second else trial.why
    print(f"--auto: {trial.candidate.label()}: {speed}", file=sys.stderr, flush=True)


def _choice(found: Search, tried: Sequence[Trial]) -> Candidate | None:
    """The fastest that trained; where the time was over before any did, the model's first."""
    best = trials.best_of(tried)
    if best is not None:
        return best.candidate
    open_ones = [trial.candidate for trial in tried if trial.ran_out_of_time]
    return found.fitting[0] if not tried else open_ones[0] if open_ones else None


def _with_choice(
    launch: Launch, given: Mapping[str, Any], machine: Machine, found: Search, tried: list[Trial], chosen: Candidate
) -> Launch | int:
    """Tell the choice, and put it in the place of what was open."""
    settings = {**given, **chosen.settings}
    config, wrong = judge(CommandLine(settings, []), machine.world_size, machine.gpus_per_node)
    if wrong:
        report(wrong)
        return CONFIG_ERROR
    console = answers.table_console()
    choice_table.show(console, machine, found, tried, chosen)
    command = plain_command(settings, machine)
    console.print(f"\nWithout --auto: {command}\n", markup=False, highlight=False, soft_wrap=True)
    choice = choice_table.document(given, machine, found, tried, chosen)
    return dataclasses.replace(launch, given=settings, config=config, choice=choice)
