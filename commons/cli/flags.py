"""From a command line and environment variables to a TrainConfig, with everything that is wrong told at once.

transformers' HfArgumentParser makes the flags from the dataclass. argparse itself would stop at the first
mistake, so it only splits the words here; their values are read and judged by this module.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TextIO, get_args, get_origin, get_type_hints

from commons.cli import defaults, planning
from commons.cli.checks import problems
from commons.cli.data import prepare
from commons.cli.defaults import Adapted
from commons.cli.limits import LIMITS
from commons.cli.planning import settings_of
from commons.cli.variables import FLAG_VARIABLES, name_variables, obsolete_notices, without_obsolete
from commons.cli.wording import count, nearest
from commons.config.schema import FLAG_GROUPS, TrainConfig
from commons.doctor.failure import DOCTOR
from commons.lifecycle.guard import WATCH_VARIABLE
from commons.lifecycle.job import JobPlace, read_job
from commons.lifecycle.standard_streams import quiet_without_reader

if TYPE_CHECKING:
    from commons.config.resolved import ResolvedConfig

CONFIG_ERROR = 2  # exit code, argparse's own
TELLING_SECONDS = 15.0  # after which rank 0 has told what is wrong, however slow its imports

DESCRIPTION = """\
Trains a GPT-2 on random tokens, or on text (--data), under one of the plans below and reports, every step, how
fast it was (tokens per second, TFLOPS, MFU) and how much memory it took. Without flags it trains in seconds on
any machine: every setting has a default that fits the device. Each run leaves config.json, env.json,
metrics.jsonl and summary.json in a folder of its own in --log_dir. Dashes instead of underscores work in every flag."""

EXAMPLES = """\
examples:
  bash run_gemini.sh                                          what this machine can do, in seconds
  bash run_gemini.sh --model_type gpt2_xl --batch_size 8      a bigger model
  GPUNUM=4 bash run_gemini.sh --placement auto                four GPUs, chunks moved by free memory
  bash run_gemini.sh --distplan CAI_ZeRO2 --precision fp16    another plan
  torchrun --nproc_per_node 2 train_gpt_demo.py --device cpu  without the launcher
  python train_gpt_demo.py --train_step 30 --warmup_step 10   one process"""


# What looks at this machine instead of starting anything; see commons/doctor.
DOCTOR_FLAGS = {
    "--doctor": "what would keep a training from running here, and its cure",
    "--doctor --json": "the same for programs",
    "--doctor --failure TEXT": "what here may have caused this error",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling a flag; no "(default: None)", where the help text says what is chosen."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        if isinstance(action.const, bool):
            return action.option_strings[0]
        metavar = action.metavar or f"{{{','.join(map(str, action.choices or ()))}}}"
        return f"{action.option_strings[0]} {metavar}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def help_text(prog: str, *sections: str) -> str:
    """The manual that --help prints; ``sections`` come before the examples."""
    parser = _build_parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=DESCRIPTION,
        epilog="\n\n".join([_plan_list(), _size_list(), *_variable_and_doctor_lists(), *sections, EXAMPLES]),
        formatter_class=HelpFormatter,
    )
    return parser.format_help()


def _build_parser(**options: Any) -> argparse.ArgumentParser:
    # the import takes seconds: it brings torch
    from transformers.hf_argparser import HfArgumentParser

    return HfArgumentParser(FLAG_GROUPS, allow_abbrev=False, **options)  # pyright: ignore[reportArgumentType]


def _plan_list() -> str:
    from commons.plans.registry import PLANS

    width = max(map(len, PLANS)) + 2
    return "\n".join(["plans (--distplan):", *(f"  {name:{width}}{plan.summary}" for name, plan in PLANS.items())])


def _size_list() -> str:
    from model_zoo import MODEL_SIZES

    width = max(map(len, MODEL_SIZES)) + 2
    sizes = (
        f"  {name:{width}}{s.layers:4} layers, hidden size {s.hidden:5}, {s.heads:3} heads"
        for name, s in MODEL_SIZES.items()
    )
    return "\n".join(["sizes (--model_type):", *sizes])


def _variable_and_doctor_lists() -> tuple[str, str]:
    variables = [f"  {variable:14}--{name}" for variable, name in FLAG_VARIABLES.items()]
    doctor = [f"  {flags:26}{text}" for flags, text in DOCTOR_FLAGS.items()]
    return (
        "\n".join(["environment variables that stand for flags (a flag wins):", *variables]),
        "\n".join(["instead of a training:", *doctor]),
    )


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A command line as read.

    Attributes:
        given: the settings that were given and could be read, by name.
        problems: what could not be read; these settings count as not given.
    """

    given: dict[str, Any]
    problems: list[str]

    def config(self) -> TrainConfig:
        return TrainConfig(**self.given)


def wants_doctor(argv: Sequence[str]) -> bool:
    return "--doctor" in argv


def become_doctor(argv: Sequence[str]) -> NoReturn:
    """Go on as the doctor, whose flags are the other words."""
    words = [word for word in argv if word != "--doctor"]
    os.execv(sys.executable, [sys.executable, DOCTOR, *words])


def wants_help(argv: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in argv)


def read_flags(argv: Sequence[str]) -> CommandLine:
    """Read flags without stopping at what cannot be read. The last of a repeated flag wins."""
    parser = _build_parser(add_help=False)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for action in parser._actions:
        # every value stays a text, a missing one becomes None, and a flag that is not there leaves no trace
        action.default, action.type, action.choices, action.nargs = argparse.SUPPRESS, None, None, "?"
        action.const = "true" if action.const is True else None
    texts, extras = parser.parse_known_args(list(argv))
    hints, given, found = get_type_hints(TrainConfig), {}, _extra_problems(extras, flags)
    for name, text in vars(texts).items():
        try:
            given[name] = read_value(name, text, hints[name])
        except ValueError as error:
            found.append(str(error))
    return CommandLine(given, found)


def read_value(name: str, text: str | None, hint: Any, label: str | None = None) -> Any:
    """The value of setting ``name`` from its text. ValueError with what to do where it has none.

    Args:
        hint: the field's type.
        label: what the user wrote, if not the flag (an environment variable).
    """
    label = label or f"--{name}"
    if text is None:
        raise ValueError(f"{label} needs a value: {label} {_example(name)}")
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise ValueError(f"{label} {text!r} does not exist: {nearest(text, get_args(hint))}")
        return text
    kind = next(k for k in (*get_args(hint), hint) if k is not type(None))
    read, description = READERS[kind]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{label} must be {description}, got {text!r}: try {label} {_example(name)}") from None


WORDS_FOR = {True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}
TRUTH = {word: value for value, words in WORDS_FOR.items() for word in words}

READERS: dict[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: TRUTH[text.lower()], "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "a text"),
}


def _example(name: str) -> str:
    if name in LIMITS:
        return f"{LIMITS[name].works:g}"
    if name == "run_name":
        return "my_run"
    default = getattr(TrainConfig().resolve("cpu"), name)
    return str(default).lower() if isinstance(default, bool) else str(default)


def _extra_problems(extras: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A problem for each word that is an unknown flag or belongs to none; what follows an unknown flag is its value."""
    found, after_unknown_flag = [], False
    for word in extras:
        is_flag = word.startswith("-") and len(word) > 1
        if is_flag:
            flag = word.split("=", 1)[0]
            close = difflib.get_close_matches(
                flag.replace("-", "_"), [f.replace("-", "_") for f in flags], n=2, cutoff=0.6
            )
            names = dict.fromkeys("--" + name.lstrip("_") for name in close)
            hint = f"did you mean {' or '.join(names)}?" if names else "see --help"
            found.append(f"unknown flag {flag}: {hint}")
        elif not after_unknown_flag:
            found.append(f"{word!r} does not belong to a flag: put the flag's name before it, see --help")
        after_unknown_flag = is_flag and "=" not in word
    return found


def report(found: Sequence[str], file: TextIO | None = None) -> None:
    """Print all problems, a line each."""
    count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
    lines = [f"{count} with the settings, nothing was started:", *(f"  - {problem}" for problem in found)]
    print("\n".join([*lines, "All flags are explained by --help."]), file=file or sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asked for, by flags and by environment variables.

    Attributes:
        line: all of it; a flag wins over its variable.
        flags: the settings that were given as flags.
        notices: what the user is told before anything starts.
    """

    line: CommandLine
    flags: frozenset[str]
    notices: tuple[str, ...]


def read_request(argv: Sequence[str], environ: Mapping[str, str]) -> Request:
    """Settings from flags and variables; what cannot be read is among the line's problems."""
    flags = read_flags(without_obsolete(argv))
    variables = _read_variables(environ, except_for=flags.given)
    line = CommandLine({**variables.given, **flags.given}, [*flags.problems, *variables.problems])
    return Request(line, frozenset(flags.given), tuple(obsolete_notices(argv, environ)))


def _read_variables(environ: Mapping[str, str], except_for: Mapping[str, Any]) -> CommandLine:
    """The settings that environment variables give; an empty one gives none, nor does one behind a flag."""
    hints, given, found = get_type_hints(TrainConfig), {}, []
    for variable, name in FLAG_VARIABLES.items():
        if environ.get(variable) and name not in except_for:
            try:
                given[name] = read_value(name, environ[variable], hints[name], label=variable)
            except ValueError as error:
                found.append(str(error))
    return CommandLine(given, found)


def read_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> ResolvedConfig:
    """Read the settings of one rank (or of a plain ``python``): resolved and checked.

    Where they are wrong, rank 0 prints all problems at once to stderr and every rank exits with code 2. ``--help``
    exits with 0. A ``run_name`` that was not given holds the time: ranks that start one by one take rank 0's.

    Args:
        environ: where variables that stand for flags are looked for; default: nowhere.
    """
    job = read_job()
    speaks = job.rank == 0 or bool(job.problems)  # ranks that are not one job do not know who tells
    if wants_doctor(argv) or wants_help(argv):
        if speaks:
            with quiet_without_reader():
                _tell_instead(argv)
        sys.exit(0)
    request = read_request(argv, environ or {})
    if planning.wants_answer(request.line.given):
        from commons.cli.answers import answer

        sys.exit(answer(request, job.world_size, job.local_world_size, speaks))
    config, found, notice = judge_and_tell(request.line, job.world_size, job.local_world_size)
    found = [*job.problems, *(name_variables(problem, environ or {}, request.flags) for problem in found)]
    watched = WATCH_VARIABLE in os.environ  # a launcher has started the ranks, and told its notices
    if config.max_restarts > 0 and not watched:
        found.append(
            f"--max_restarts {config.max_restarts} needs the launcher, which starts the ranks: use bash run_gemini.sh,"
            f" or torchrun's own --max-restarts={config.max_restarts}"
        )
    if config.auto and not watched:
        found.append("--auto needs the launcher, which starts the trials: use bash run_gemini.sh, or --plan_for")
    tells = speaks and not watched and environ is not None
    if tells:
        for line in (*request.notices, *_notices(config, job, environ or {}, runs=not found)):
            print(line, file=sys.stderr, flush=True)
        if not found and notice:
            print(notice, file=sys.stderr, flush=True)
    found = found or prepare(config, lambda line: print(line, file=sys.stderr, flush=True) if tells else None)
    if found:
        if speaks:
            report(found)
        else:
            time.sleep(TELLING_SECONDS)  # torchrun ends all ranks at the first that ends, and rank 0 has to speak
        sys.exit(CONFIG_ERROR)
    return config


def _tell_instead(argv: Sequence[str]) -> None:
    """What is asked for instead of a training."""
    if wants_doctor(argv):
        become_doctor(argv)
    print(help_text("train_gpt_demo.py"), end="")


def _notices(config: ResolvedConfig, job: JobPlace, environ: Mapping[str, str], runs: bool) -> Iterator[str]:
    """What the user is told of where the run takes place."""
    from commons.cli.machine import no_gpu_notice

    yield from job.notes
    wanted, here = environ.get("GPUNUM", ""), count(job.local_world_size, "rank")
    if wanted and wanted != str(job.local_world_size):
        yield (
            f"warning: GPUNUM={wanted} is ignored: this machine has {here} already; use bash run_gemini.sh, or"
            f" torchrun --nproc_per_node {wanted}"
        )
    if runs and config.device == "cpu" and not config.asked("device"):
        yield no_gpu_notice(config, job.world_size)


class Judged(NamedTuple):
    """A command line on this machine.

    Attributes:
        config: its resolved configuration.
        problems: all that is wrong with it.
        notice: what was taken in place of defaults that the GPU here cannot take, "" where they are as they are.
    """

    config: ResolvedConfig
    problems: list[str]
    notice: str


def judge(line: CommandLine, world_size: int, local_world_size: int) -> tuple[ResolvedConfig, list[str]]:
    """The resolved configuration of a command line on this machine, and every problem with it."""
    config, found, _ = judge_and_tell(line, world_size, local_world_size)
    return config, found


def judge_and_tell(line: CommandLine, world_size: int, local_world_size: int) -> Judged:
    """The same, with what the user is to be told."""
    from commons.plans.registry import PLANS

    given = line.config()
    device_type, gpu_count = find_devices(given.device)
    plan = PLANS.get(given.distplan)
    found = problems(
        given, world_size, device_type, gpu_count, plan, local_world_size=local_world_size, typed=line.given
    )
    config = given.resolve(device_type, world_size, local_world_size)
    adapted = defaults.NOTHING
    if not found and not line.problems:
        adapted = adapt_to_gpu(line, config, world_size, local_world_size)
        if adapted.settings:
            config = dataclasses.replace(given, **adapted.settings).resolve(device_type, world_size, local_world_size)
            # the user has not asked for these, and whoever wants to know hears so
            chosen = tuple(name for name in config.as_dict() if not config.asked(name) or name in adapted.settings)
            config = dataclasses.replace(config, chosen=chosen)
    return Judged(config, [*line.problems, *found], adapted.line)


def adapt_to_gpu(line: CommandLine, config: ResolvedConfig, world_size: int, local_world_size: int) -> Adapted:
    """What this machine's GPU asks for in place of defaults; see commons.cli.defaults."""
    if config.device != "cuda" or not find_devices("cuda")[1]:
        return defaults.NOTHING
    try:
        return defaults.adapt(settings_of(line.given), world_size, local_world_size)
    except Exception as error:  # a fault of the planner's own keeps no run from starting
        return Adapted({}, f"this GPU's memory was not planned ({type(error).__name__}: {error}): defaults as they are")


def find_devices(wanted: str) -> tuple[str, int]:
    """What ``wanted`` (auto, cuda, cpu) comes out as here, and the number of GPUs that can be used."""
    from commons.distributed.device import detect_type

    device_type = detect_type(wanted)
    if device_type == "cpu":
        return device_type, 0
    import torch

    return device_type, torch.cuda.device_count() if torch.cuda.is_available() else 0
