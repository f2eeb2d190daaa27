"""--auto: of all layouts that a machine's memory takes, those that the time model finds fastest.

A layout is what the user left open of SEARCHED. Layouts are ranked by the time model, which costs microseconds, and the
memory forecast is asked from the fastest on, until enough have been found that fit.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig, as_typed, as_words
from commons.planner.machines import Machine, resolve_for
from commons.planner.rates import Rates
from commons.planner.step_time import StepTime, forecast_step
from commons.plans.registry import PLANS, Plan
from model_zoo import divisors, padded_parameter_count

if TYPE_CHECKING:
    from commons.planner.memory import Forecast

# What --auto chooses where the user does not.
SEARCHED = (
    "distplan",
    "tp_degree",
    "pp_degree",
    "shard_param_frac",
    "offload_optim_frac",
    "offload_param_frac",
    "zero_stage",
    "num_microbatches",
    "batch_size",
    "activation_checkpointing",
)
# Those that every plan has.
MAIN = ("distplan", "batch_size", "activation_checkpointing")
FRACTION_NAMES = ("shard_param_frac", "offload_optim_frac", "offload_param_frac")
BATCHES = {"cuda": (1, 2, 4, 8, 16, 32, 64), "cpu": (1, 2, 4, 8, 16)}
RECOMPUTE = ("off", "selective", "on")
# in the order of FRACTION_NAMES
FRACTIONS = (
    (1.0, 0.0, 0.0),
    (0.0, 0.0, 0.0),
    *((1.0, tenths / 10, 0.0) for tenths in (2, 4, 5, 6, 7, 8, 9, 10)),
    (1.0, 1.0, 0.5),
    (1.0, 1.0, 1.0),
)
# What need not be said, since it is so without being said.
UNSAID = {"tp_degree": 1, "pp_degree": 1, "offload_optim_frac": 0.0, "offload_param_frac": 0.0}
# On one rank nothing is sharded: these do what Pytorch_DDP and CAI_ZeRO1 do.
ALIKE_ALONE = ("Pytorch_ZeRO", "CAI_ZeRO2")
MICROBATCHES_PER_STAGE = (1, 2, 4, 8)
CLOSE = 0.01  # of the speed: what a smaller batch may cost
WANTED = 6  # layouts that fit, for the table and the trials
SEARCH_SECONDS = 30.0  # for exact forecasts of memory: each traces a block; after that they are rough, and high
MOST_REFUSED = 60  # with none that can run before the first: the fault is in what was given
MOST_JUDGED = 20
DEVICE_SHARE = 0.99  # of a device's memory that a layout may take: forecasts are up to 1 % too low
PROBED = (8, 16)  # batches from which the memory of the others is bounded

Settings = Mapping[str, Any]
Memory = Callable[[ResolvedConfig, Machine, bool], "Forecast"]
Judge = Callable[[Settings], Sequence[str]]


class Kind(NamedTuple):
    """A kind of layout. ``offload``: 0 nothing, 1 the optimizer, 2 parameters too."""

    distplan: str
    degrees: tuple[int, int]
    shard_param_frac: float
    offload: int


@dataclass(frozen=True)
class Candidate:
    """One layout.

    Attributes:
        settings: what was chosen, without what the user gave.
        config: all settings, resolved for the machine.
        memory: None before it was asked for.
    """

    settings: Settings
    config: ResolvedConfig
    time: StepTime
    memory: Forecast | None = None

    @property
    def kind(self) -> Kind:
        """What tells layouts apart that are worth a trial each; of one kind only the best batch is."""
        config = self.config
        offload = (config.offload_optim_frac > 0) + (config.offload_param_frac > 0)
        return Kind(config.distplan, (config.tp_degree, config.pp_degree), config.shard_param_frac, offload)

    def label(self) -> str:
        """The chosen settings in short, for a line of a table."""
        return " ".join(f"{name}={as_typed(value)}" for name, value in self.settings.items()) or "as given"


@dataclass
class Search:
    """What a search came to.

    Attributes:
        fitting: layouts that fit, the fastest first, one of a kind.
        nearest: where none fits, the one that lacks least.
        too_large, refused: layouts that do not fit, and that the settings' checks refuse, of all ``considered``.
        refusals: why the fastest of the refused cannot run.
        complete: False where the time for exact forecasts was over, and rough ones may have left out what fits.
    """

    fitting: list[Candidate] = field(default_factory=list)
    nearest: Candidate | None = None
    considered: int = 0
    too_large: int = 0
    refused: int = 0
    refusals: list[str] = field(default_factory=list)
    complete: bool = True


def nothing_open(given: Iterable[str], distplan: str) -> str | None:
    """Why ``--auto`` has nothing to choose, None where it has.

    Args:
        given: names of the settings that the user gave; ``distplan`` is the plan's value.
    """
    names, plan = set(given), PLANS.get(distplan)
    if "distplan" not in names or plan is None:
        return None
    wanted = {"batch_size", "activation_checkpointing"}
    wanted |= set(FRACTION_NAMES) if plan.placement and "placement" not in names else set()
    wanted |= {"tp_degree"} if plan.tensor_parallel else set()
    wanted |= {"pp_degree"} if plan.pipeline else set()
    return None if wanted - names else "--auto has nothing to choose, since everything is given: remove it"


def search(
    given: Settings,
    machine: Machine,
    rates: Rates,
    judge: Judge,
    *,
    memory: Memory | None = None,
    wanted: int = WANTED,
    seconds: float = SEARCH_SECONDS,
) -> Search:
    """The fastest layouts of ``given`` that fit on ``machine``; see :class:`Search`.

    Args:
        given: the settings that the user gave, by name; each is kept.
        judge: what is wrong with settings, empty where nothing is.
        memory: the forecast of a configuration on a machine, exact, or rough and high but fast (default:
            commons.planner.memory's).
        wanted: layouts, of as many kinds.
        seconds: after which forecasts are rough.
    """
    ranked = sorted(candidates(given, machine, rates), key=lambda layout: -layout.time.tokens_per_second)
    asked = _AskedMemory(memory or forecast_on, machine, time.monotonic() + seconds)
    looking = _Looking(_Verdicts(given, judge), asked, Search(considered=len(ranked)))
    for layout in ranked:
        if len(looking.best) >= wanted and layout.kind not in looking.best:
            break
        if looking.result.refused >= MOST_REFUSED and not looking.best and not looking.result.too_large:
            break
        looking.at(layout)
    return looking.finish(ranked)


class _Verdicts:
    """What is wrong with layouts. Batch and recomputation change little of it: of a layout that was found right, others
    are judged when they fit.
    """

    def __init__(self, given: Settings, judge: Judge) -> None:
        self._given, self._judge = given, judge
        self._right: set[tuple[Any, ...]] = set()

    def on(self, layout: Candidate, *, again: bool = False) -> Sequence[str]:
        key = tuple((name, value) for name, value in layout.settings.items() if name not in MAIN[1:])
        if key in self._right and not again:
            return ()
        wrong = self._judge({**self._given, **layout.settings})
        if not wrong:
            self._right.add(key)
        return wrong


class _Looking:
    """One search as it goes on, from the fastest layout by the model to the slower ones.

    Attributes:
        best: what fits, by kind.
    """

    def __init__(self, verdicts: _Verdicts, asked: _AskedMemory, result: Search) -> None:
        self._verdicts, self._asked, self.result = verdicts, asked, result
        self.best: dict[Kind, Candidate] = {}
        self._failed: dict[tuple[Any, ...], int] = {}
        self._least = float("inf")

    def at(self, layout: Candidate) -> None:
        """Look at one layout: whether it is worth it, can run, and fits."""
        kind, machine = layout.kind, self._asked.machine
        if (kind in self.best and not _is_close(layout, self.best[kind])) or _fits_with_less(kind, self.best):
            return
        if _already_failed(layout, self._failed) or least_device_bytes(layout.config, machine) > _device_bytes(machine):
            self.result.too_large += 1
        elif wrong := self._verdicts.on(layout):
            self._refuse(wrong)
        elif self._asked.cannot_fit(layout):
            self.result.too_large += 1
        else:
            self._ask(dataclasses.replace(layout, memory=self._asked.forecast(layout.config)))

    def _ask(self, layout: Candidate) -> None:
        lacking = shortfall(layout.memory, self._asked.machine)
        if lacking and not self._asked.exact and not self.best:  # that nothing fits is not said on a rough guess
            layout = dataclasses.replace(layout, memory=self._asked.exactly(layout.config))
            lacking = shortfall(layout.memory, self._asked.machine)
        if lacking:
            self.result.too_large += 1
            _remember_failure(layout, self._failed)
            if max(lacking.values()) < self._least:
                self._least, self.result.nearest = max(lacking.values()), layout
        elif wrong := self._verdicts.on(layout, again=True):
            self._refuse(wrong)
        else:
            self.best[layout.kind] = layout

    def _refuse(self, wrong: Sequence[str]) -> None:
        self.result.refused += 1
        self.result.refusals = self.result.refusals or list(wrong)

    def finish(self, ranked: Sequence[Candidate]) -> Search:
        result = self.result
        if not self.best and result.nearest is None and result.too_large:  # nothing was worth a forecast
            result.nearest = self._smallest(ranked)
        result.complete = self._asked.exact
        result.fitting = sorted(self.best.values(), key=lambda layout: -layout.time.tokens_per_second)
        return result

    def _smallest(self, ranked: Sequence[Candidate]) -> Candidate | None:
        """The layout that can run and needs least of the device at least, with its memory."""
        fewest = sorted(ranked, key=lambda layout: least_device_bytes(layout.config, self._asked.machine))
        for layout in fewest[:MOST_JUDGED]:
            if not self._verdicts.on(layout):
                return dataclasses.replace(layout, memory=self._asked.forecast(layout.config))
        return None


def _is_close(layout: Candidate, best: Candidate) -> bool:
    """Whether it is nearly as fast with a smaller batch: that leaves memory free, and is nearer to what trains well."""
    as_fast = layout.time.tokens_per_second >= (1 - CLOSE) * best.time.tokens_per_second
    same = layout.config.activation_checkpointing == best.config.activation_checkpointing
    return as_fast and same and layout.config.batch_size < best.config.batch_size


def _fits_with_less(kind: Kind, fitting: Mapping[Kind, Candidate]) -> bool:
    """Whether the same with less on the host fits, and is faster then."""
    return any(kind._replace(offload=less) in fitting for less in range(kind.offload))


def _without_batch(layout: Candidate) -> tuple[Any, ...]:
    kept = {name: value for name, value in layout.settings.items() if name not in ("batch_size", "num_microbatches")}
    return (*kept.items(), layout.config.num_microbatches // layout.config.pp_degree)


def _already_failed(layout: Candidate, failed: Mapping[tuple[Any, ...], int]) -> bool:
    """A smaller batch of the same did not fit."""
    return layout.config.batch_size >= failed.get(_without_batch(layout), 1 << 62)


def _remember_failure(layout: Candidate, failed: dict[tuple[Any, ...], int]) -> None:
    failed[_without_batch(layout)] = min(layout.config.batch_size, failed.get(_without_batch(layout), 1 << 62))


# ---- memory


def forecast_on(config: ResolvedConfig, machine: Machine, rough: bool = False) -> Forecast:
    """The memory forecast of one rank of ``machine``. Imports torch."""
    from commons.planner.memory import forecast

    return forecast(config, machine.world_size, machine.gpus_per_node, machine.gpu, rough=rough)


class _AskedMemory:
    """Forecasts of memory on one machine, and what follows from them for others.

    The peak is the largest of several moments, each of which grows linearly with the batch: it is a convex function of
    it, and lies above the line through two of its points everywhere beside them. So two exact forecasts of a layout say
    of every batch what it takes at least, without a trace.
    """

    def __init__(self, memory: Memory, machine: Machine, end: float) -> None:
        self._memory, self.machine, self._end = memory, machine, end
        self._lines: dict[tuple[Any, ...], tuple[int, int]] = {}
        self.exact = True

    def forecast(self, config: ResolvedConfig) -> Forecast:
        self.exact = self.exact and time.monotonic() < self._end
        return self._memory(config, self.machine, not self.exact)

    def exactly(self, config: ResolvedConfig) -> Forecast:
        return self._memory(config, self.machine, False)

    def cannot_fit(self, layout: Candidate) -> bool:
        """Whether the device has too little for it, by two forecasts of the same with other batches."""
        low, high = PROBED
        batch = layout.settings.get("batch_size")
        if layout.config.pp_degree > 1 or not self.exact or batch is None or batch in PROBED:
            return False
        key = _without_batch(layout)
        if key not in self._lines:
            ends = [dataclasses.replace(layout.config, batch_size=batch) for batch in PROBED]
            first, last = (self.forecast(config).device_peak for config in ends)
            self._lines[key] = first, last
        line = self._lines[key]
        least = line[0] + (line[1] - line[0]) * (batch - low) / (high - low)
        return least > _device_bytes(self.machine)


def shortfall(memory: Forecast | None, machine: Machine) -> dict[str, int]:
    """Bytes that are lacking, by "device" and "host"; empty where it fits."""
    if memory is None:
        return {}
    device = memory.device_peak - _device_bytes(machine) if machine.gpu is not None else 0
    host = memory.host_bytes * memory.ranks_per_host - (machine.host_bytes or float("inf"))
    if machine.gpu is None:  # CPU ranks compute in the host's memory
        host += memory.device_peak * memory.ranks_per_host
    lacking = {"device": device, "host": host}
    return {where: int(size) for where, size in lacking.items() if size > 0}


def _device_bytes(machine: Machine) -> float:
    return DEVICE_SHARE * machine.gpu.memory_bytes if machine.gpu is not None else float("inf")


def least_device_bytes(config: ResolvedConfig, machine: Machine) -> float:
    """Bytes that one device takes at the very least: weights, the optimizer's states, every block's input. It
    leaves out, without a forecast, what cannot fit by far.
    """
    dp = config.data_parallel_size(machine.world_size)
    elements = padded_parameter_count(config.shape()) / config.model_parallel_size
    plan, width = PLANS[config.distplan], 4 if config.precision == "fp32" else 2
    states = 4 * 3 if config.precision != "fp32" else 4 * 2
    share = dp if "optimizer states" in plan.sharded else 1
    if config.distplan == "CAI_Hybrid" and config.zero_stage == 0:
        share = 1
    weights = width * elements / (dp if "parameters" in plan.sharded and config.shard_param_frac > 0 else 1)
    offloaded = 1.0 if config.placement == "auto" else config.offload_optim_frac
    kept = 0.0 if config.offload_param_frac else weights
    inputs = width * config.batch_size * config.seq_len * config.hidden_size * config.num_layers
    inputs /= config.model_parallel_size  # a pipeline keeps one batch in all, TP with sequence parallelism a part
    return kept + states * elements / share * (1 - offloaded) + inputs


# ---- candidates


def candidates(given: Settings, machine: Machine, rates: Rates) -> Iterator[Candidate]:
    """Every layout with what the user left open, with its step time."""
    config = TrainConfig(**given)
    open_names = [name for name in SEARCHED if name not in given]
    plans = [plan for plan in PLANS.values() if "distplan" not in given or plan.name == given["distplan"]]
    alone = machine.world_size == 1
    for plan in plans:
        if config.precision not in plan.precisions or (plan.name in ALIKE_ALONE and len(plans) > 1 and alone):
            continue
        for layout in _layouts(plan, given, machine):
            try:
                base = resolve_for(TrainConfig(**{**given, **layout}), machine)
            except (ZeroDivisionError, ValueError):  # degrees that cannot be, which the checks would refuse
                continue
            yield from _batches(base, layout, open_names, machine, rates)


def _layouts(plan: Plan, given: Settings, machine: Machine) -> Iterator[dict[str, Any]]:
    """The plan, its degrees, its fractions, as settings beside those given."""
    named = {} if "distplan" in given else {"distplan": plan.name}
    for tp, pp in _degrees(plan, given, machine):
        degrees = {name: value for name, value in (("tp_degree", tp), ("pp_degree", pp)) if name not in given}
        if not plan.tensor_parallel:
            degrees.pop("tp_degree", None)
        if not plan.pipeline:
            degrees.pop("pp_degree", None)
        for extra in _extras(plan, given, machine.world_size // (tp * pp), pp):
            settings = {**named, **degrees, **extra}
            yield {name: value for name, value in settings.items() if value != UNSAID.get(name)}


def _degrees(plan: Plan, given: Settings, machine: Machine) -> Iterator[tuple[int, int]]:
    world, shape = machine.world_size, resolve_for(TrainConfig(model_type=given.get("model_type")), machine)
    tps = [given["tp_degree"]] if "tp_degree" in given else divisors(machine.gpus_per_node)
    pps = [given["pp_degree"]] if "pp_degree" in given else divisors(world)
    for tp in tps if plan.tensor_parallel else [1]:
        for pp in pps if plan.pipeline else [1]:
            if tp >= 1 and pp >= 1 and world % (tp * pp) == 0 and pp <= shape.num_layers:
                yield tp, pp


def _extras(plan: Plan, given: Settings, dp: int, pp: int) -> Iterator[dict[str, Any]]:
    """Fractions for a plan with placement, ZeRO stages for one with pipelines; nothing for the others."""
    if plan.placement and "placement" not in given:
        names, seen = FRACTION_NAMES, set()
        for values in FRACTIONS:
            if dp == 1 and values[0] == 0.0:  # nothing is sharded
                continue
            extra = {name: value for name, value in zip(names, values, strict=True) if name not in given}
            if tuple(extra.items()) not in seen and _agrees(given, dict(zip(names, values, strict=True))):
                seen.add(tuple(extra.items()))
                yield extra
    elif plan.pipeline and "zero_stage" not in given and dp > 1 and given.get("precision") != "fp32":
        yield from ({"zero_stage": stage} for stage in ((0, 1) if pp > 1 else (0, 1, 2)))
    else:
        yield {}


def _agrees(given: Settings, values: Mapping[str, float]) -> bool:
    """Gemini keeps parameters on the host beside their whole optimizer only."""
    merged = {**values, **{name: given[name] for name in values if given.get(name) is not None}}
    whole = merged["shard_param_frac"] == 1 and merged["offload_optim_frac"] == 1
    return not merged["offload_param_frac"] or whole


def _batches(
    base: ResolvedConfig, layout: Settings, open_names: Sequence[str], machine: Machine, rates: Rates
) -> Iterator[Candidate]:
    """A layout with every batch, cut into microbatches, and everything that can be computed again."""
    batches = BATCHES[machine.device_type] if "batch_size" in open_names else [base.batch_size]
    recompute = [base.activation_checkpointing]
    if "activation_checkpointing" in open_names:
        recompute = [mode for mode in RECOMPUTE if mode != "selective" or base.tp_degree == 1]
    for batch in batches:
        for pieces in _microbatches(base, batch, "num_microbatches" in open_names):
            for mode in recompute:
                changed = {"batch_size": batch, "activation_checkpointing": mode}
                if base.pp_degree > 1:
                    changed["num_microbatches"] = pieces
                config = dataclasses.replace(base, **changed)
                settings = {**layout, **{name: value for name, value in changed.items() if name in open_names}}
                yield Candidate(settings, config, forecast_step(config, machine, rates))


def _microbatches(base: ResolvedConfig, batch: int, is_open: bool) -> Iterator[int]:
    if base.pp_degree == 1 or not is_open:
        if batch % base.num_microbatches == 0:
            yield base.num_microbatches
        return
    for per_stage in MICROBATCHES_PER_STAGE:
        if batch % (per_stage * base.pp_degree) == 0:
            yield per_stage * base.pp_degree


# ---- what is said of it


def plain_command(given: Settings, machine: Machine) -> str:
    """The command that trains so without ``--auto``. On several nodes with what each of them has to fill in."""
    variables = [f"GPUNUM={machine.gpus_per_node}"]
    if machine.nodes > 1:
        variables = [f"NNODES={machine.nodes}", "NODE_RANK=0", "MASTER_ADDR=node0", *variables]
    return " ".join([*variables, "bash run_gemini.sh", *map(shlex.quote, as_words(given))])
