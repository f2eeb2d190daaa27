"""Every way of splitting the model trains the same model: each layout on real ranks against one fp32 process.

The cases and what each has to fulfil are benchmarks/parity_cases.py's. One torchrun a number of ranks runs all its
cases (benchmarks/parity_worker.py); the tests look at what it measured.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from suite_runs import launch, run_processes

from benchmarks.parity import Outcome, broken, run_cases, run_side_by_side, write
from benchmarks.parity_cases import (
    CASES,
    GROWING,
    OVERFLOWS,
    SAME_ON_TWO_COPIES,
    WEIGHT_BOUNDS,
    Case,
    claims,
    skips_as_it_must,
    why_not,
)
from commons.config.schema import FRACTIONS, PLACEMENTS
from commons.plans.registry import PLANS
from commons.reporting.environment import describe_environment

# The first test that asks for a number of ranks waits for all its cases: 70 of them take three minutes.
pytestmark = pytest.mark.timeout(1200)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPU_JOBS = 6
PARAMETERS = [pytest.param(ranks, case, id=f"{ranks}: {case}") for ranks, cases in CASES.items() for case in cases]

TP = "--distplan CAI_Gemini --tp_degree 2"
# both see the same data: whole on one rank, cut on two
SAVED = {1: Case("--distplan CAI_Gemini"), 2: Case(TP)}
KEPT = {ranks: [*map(str, SAME_ON_TWO_COPIES.get(ranks, [])), str(SAVED.get(ranks))] for ranks in CASES}
HYBRID = "--distplan CAI_Hybrid"


# What goes wrong without a part of the suite. The cases of one mode share a process, so one that fails for
# good comes last.
FAULTS: dict[str, dict[Case, Callable[[dict], bool]]] = {
    "unmended": {
        # GeminiOptimizer._calc_global_norm and collect_states
        Case(TP): lambda found: found["norm_spread"] > 1e-3 and "sharding spec" in found["saving_error"],
        # the norm of HybridParallelPlugin's optimizers
        Case(f"{HYBRID} --tp_degree 2 --precision fp32"): lambda found: found["grad_norm"] > 1e-3,
        # row-parallel biases under sequence parallelism: wrong, and each rank has its own
        Case(f"{HYBRID} --tp_degree 2 --precision fp32 --sequence_parallel on"): lambda found: (
            found["weights"]["transformer.h.0.mlp.c_proj.bias"] > 0.1 and found["replica_difference"] > 1e-3
        ),
        # StaticPlacementPolicy.setup_grads_device: half of the bytes, all are moved
        Case("--distplan CAI_Gemini --offload_optim_frac 0.5"): lambda found: found["offloaded"] == 1,
        # HybridAdam.torch_adam_update has no divisor: bf16 gradients on the host are not clipped
        Case("--distplan CAI_Gemini --placement cpu --clip_grad_norm 0.3 --adam_eps 1e-3"): lambda found: (
            max(found["weights"].values()) > 2 * WEIGHT_BOUNDS["bf16"]
        ),
        # GeminiOptimizer.step: what overflowed once is accumulated into every later step
        Case("--distplan CAI_Gemini --grad_accum 2 --precision fp16", poisoned_rank=1): lambda found: (
            found["skipped"] == [3, 4, 5]
        ),
        # FP16MixedPrecisionMixin.should_skip_step: divided by the scale of the step to come
        **{
            Case(f"{plan} {GROWING}", scale_grows=True): lambda found: max(found["weights"].values()) > 0.4
            for plan in ("--distplan CAI_Gemini", f"{HYBRID} --tp_degree 2", "--distplan CAI_ZeRO1")
        },
        # GeminiDDP._post_forward: what the first inference gathered ahead stops the second
        Case("--distplan CAI_Gemini --max_prefetch 2"): lambda found: found["error"].startswith(
            "AssertionError in add_work"
        ),
    },
    "unaligned_chunks": {
        # a weight and its bias in different chunks: fetching one drops the other before its gradient is in
        Case(TP): lambda found: "copy_tensor_to_chunk_slice" in found["error"],
    },
    "upstream_forward": {
        # the mask of shardformer's forward pass is not causal
        Case(f"{HYBRID} --precision fp32 --zero_stage 0"): lambda found: found["leak"] > 1e-4,
        # nor is it under Gemini; and DistCrossEntropy.backward loses its factor to ColoTensor
        Case(TP): lambda found: found["leak"] > 1e-4 and found["grad_norm"] > 1,
    },
    "upstream_dropout": {
        # DropoutForParallelInput: ranks drop other elements of what they all hold, and their copies drift apart
        Case(f"{HYBRID} --tp_degree 2 --precision fp32 --dropout 0.1 --lr 1e-2"): lambda found: (
            found["replica_difference"] > 1e-3
        ),
        Case(f"{TP} --dropout 0.1 --lr 1e-2"): lambda found: found["replica_difference"] > 1e-3,
    },
    "scaled_gradients": {
        # an error of a thousandth, planted: a hundred times the bound of an fp32 norm
        Case("--distplan Pytorch_DDP --precision fp32"): lambda found: 9e-4 < found["grad_norm"] < 1.1e-3,
        Case("--distplan Pytorch_FSDP --precision fp32"): lambda found: 9e-4 < found["grad_norm"] < 1.1e-3,
    },
    "upstream_loss": {
        # dist_cross_entropy's group is missing under Gemini, so it takes the world: half of the gradient
        Case(TP): lambda found: 0.4 < found["grad_norm"] < 0.6,
    },
}


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory):
    """(device, ranks) -> what the worker measured of each case, and its folder; started when first asked for.

    GEMINI_PARITY_OUT=FILE: what GPUs gave is written to FILE.json and FILE.md too, as benchmarks.parity does.
    """
    on_gpus: list[Outcome] = []

    @functools.cache
    def run(device: str, ranks: int) -> tuple[dict[Case, dict], Path]:
        if device == "cuda" and ranks > torch.cuda.device_count():
            pytest.skip(f"needs {ranks} GPUs, this machine has {torch.cuda.device_count()}")
        folder = tmp_path_factory.mktemp(f"{device}{ranks}")
        cases = [case for case in CASES[ranks] if why_not(case, device) is None]
        if device == "cuda":  # cores there are enough, and compiling takes long
            found = run_side_by_side(GPU_JOBS, ranks, cases, device, folder)
            on_gpus.extend(Outcome(ranks, *pair, device) for pair in zip(cases, found, strict=True))
            if "GEMINI_PARITY_OUT" in os.environ:
                out = Path(os.environ["GEMINI_PARITY_OUT"])
                write(out, on_gpus, "python -m pytest -m gpu tests/plans/test_splitting.py", describe_environment(None))
        else:
            found = run_cases(ranks, cases, device, folder, keep=KEPT.get(ranks, ()))
        return dict(zip(cases, found, strict=True)), folder

    return run


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory):
    """(mode, case) -> what the worker measured without a part of the suite."""

    @functools.cache
    def run(mode: str) -> dict[Case, dict]:
        cases, worker = list(FAULTS[mode]), ("tests/workers/faulty_parity_worker.py", mode)
        return dict(zip(cases, run_cases(2, cases, "cpu", tmp_path_factory.mktemp(mode), worker=worker), strict=True))

    return lambda mode, case: run(mode)[case]


@pytest.mark.parametrize(("ranks", "case"), PARAMETERS)
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_reference_s_model(measured, device: str, ranks: int, case: Case) -> None:
    """Losses, gradient norms, every tensor after training, causality, agreement of the ranks, skipped steps."""
    if why_not(case, device):
        pytest.skip(str(why_not(case, device)))
    found = measured(device, ranks)[0][case]
    assert "error" not in found, found["error"]
    assert "saving_error" not in found and found["missing"] == []
    assert skips_as_it_must(case, found["skipped"]), found["skipped"]
    told = {name: (claim.value, claim.bound) for name, claim in claims(case, found, device).items()}
    assert Outcome(ranks, case, found, device).holds, (broken(Outcome(ranks, case, found, device)), told)
    bound = WEIGHT_BOUNDS[case.precision]
    assert {name: distance for name, distance in found["weights"].items() if not distance <= bound} == {}


def test_every_placement_runs_on_every_number_of_ranks_and_with_everything() -> None:
    """Of the list itself: what the issue wants covered, so that nobody thins it out."""
    for cases in CASES.values():
        assert len(set(cases)) == len(cases)
    for ranks, cases in ((ranks, CASES[ranks]) for ranks in (1, 2, 4)):
        gemini = [case for case in cases if case.plan == "CAI_Gemini"]
        assert {case.flag("placement", "static") for case in gemini} == set(PLACEMENTS), ranks
        assert any(f"--{name}" in case.flags for case in gemini for name in FRACTIONS), ranks
        for wanted in ("--grad_accum", "--clip_grad_norm", "--max_prefetch", "--precision fp16"):
            assert any(wanted in case.flags for case in gemini), (ranks, wanted)
    assert any(case.flag("tp_degree", "1") == case.flag("pp_degree", "1") == "2" for case in CASES[8])
    every = [case for cases in CASES.values() for case in cases]
    assert {(case.plan, case.precision) for case in every} == {
        (name, precision) for name, plan in PLANS.items() for precision in plan.precisions if precision != "fp8"
    }


@pytest.mark.parametrize("flag", ["--grad_accum", "--clip_grad_norm", "--max_prefetch"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_prefetches_accumulates_and_clips(placement: str, flag: str) -> None:
    """Of the list itself: with Gemini's hooks a block, and under static with some of the chunks moved."""
    gemini = [case for cases in CASES.values() for case in cases if case.plan == "CAI_Gemini"]
    chosen = [
        case for case in gemini if case.flag("placement", "static") == placement and "--tp_degree" not in case.flags
    ]
    if placement == "static":
        chosen = [case for case in chosen if any(f"--{name}" in case.flags for name in FRACTIONS)]
    assert any(flag in case.flags for case in chosen)


def test_a_fraction_of_the_parameters_is_offloaded_in_some_case() -> None:
    """Of the list itself: neither none nor all of them."""
    fractions = [float(case.flag("offload_param_frac", "0")) for cases in CASES.values() for case in cases]
    assert any(0 < fraction < 1 for fraction in fractions)


@pytest.mark.parametrize("ranks", CASES)
def test_offloaded_fractions_are_of_bytes(measured, ranks: int) -> None:
    """Chunks are moved whole: as many as fit into the fraction, and one more would not."""
    for case in CASES[ranks]:
        placement = case.flag("placement", "static")
        if case.plan != "CAI_Gemini" or placement == "auto":
            continue
        wanted = float(case.flag("offload_optim_frac", str(PLACEMENTS[placement][1])))
        found = measured("cpu", ranks)[0][case]
        offloaded = found["offloaded"]
        assert offloaded == wanted or offloaded < wanted < offloaded + found["largest_chunk"], case


def test_a_user_sees_the_steps_that_an_overflow_costs(tmp_path: Path) -> None:
    """Through the launcher, split by tensor parallelism: counted, told, and the run goes on as the reference does."""
    flags = [*f"{HYBRID} --tp_degree 2 {OVERFLOWS} --warmup_step 1 --check_parity true".split(), "--device", "cpu"]
    run = launch(tmp_path, *flags, ranks=2)
    assert run.returncode == 0, run.console
    skipped = [record["skipped_steps"] for record in run.records]
    assert skipped[0] == 1 and skipped == sorted(skipped) and skipped[-1] < len(skipped)
    assert run.file("summary.json")["skipped_steps"] == skipped[-1]
    assert re.search(rf"skipped for overflow +{skipped[-1]} steps\n", run.console) and run.console.count("overflow") > 1
    assert run.file("parity.json")["holds"] is True


ACCUMULATED = [
    pytest.param(2, case, Case(case.flags.replace(" --grad_accum 4 --batch_size 1", "")), id=case.plan)
    for case in CASES[2]
    if "--grad_accum 4 --batch_size 1" in case.flags
]


@pytest.mark.parametrize(("ranks", "accumulated", "whole"), ACCUMULATED)
def test_accumulating_four_batches_is_a_batch_four_times_as_large(
    measured, ranks: int, accumulated: Case, whole: Case
) -> None:
    """Both draw the same tokens: a stream of 4 x 1 sequences is one of 4."""
    if why_not(whole, "cpu"):
        pytest.skip(str(why_not(whole, "cpu")))
    results = measured("cpu", ranks)[0]
    tolerance = 1e-6 if whole.precision == "fp32" else 2e-5
    assert results[accumulated]["losses"] == pytest.approx(results[whole]["losses"], rel=tolerance)
    assert len(ACCUMULATED) >= 5


def test_clipping_is_the_same_under_every_plan(measured) -> None:
    """fp32, two copies of the model, the same data: whole, sharded, or each cut by tensor or pipeline parallelism
    on four ranks. Losses, norms and every weight against the first of them.
    """
    runs, weights = {}, {}
    for ranks, cases in SAME_ON_TWO_COPIES.items():
        results, folder = measured("cpu", ranks)
        for case in (case for case in cases if case in results):
            runs[case] = results[case]
            weights[case] = torch.load(folder / f"{list(results).index(case)}.pt")
    first, *others = runs
    for case in others:
        assert runs[case]["losses"] == pytest.approx(runs[first]["losses"], rel=1e-6), case
        assert runs[case]["grad_norms"] == pytest.approx(runs[first]["grad_norms"], rel=1e-5), case
        for name, expected in weights[first].items():
            torch.testing.assert_close(weights[case][name], expected, rtol=1e-4, atol=2e-6, msg=f"{case}: {name}")
    assert min(runs[first]["grad_norms"]) > 0.3  # there was something to clip


def test_a_split_model_s_optimizer_is_saved_whole(measured) -> None:
    """Under tensor parallelism each parameter's moments in its own shape, and they are one rank's but for bf16's
    rounding.
    """
    files: list[dict] = []
    for ranks, case in SAVED.items():
        results, folder = measured("cpu", ranks)
        number = list(results).index(case)
        weights, states = (torch.load(folder / f"{number}{end}.pt", weights_only=False) for end in ("", ".optimizer"))
        shapes = sorted(state["exp_avg"].shape for state in states["state"].values())
        # the head is the embedding
        assert shapes == sorted(weight.shape for name, weight in weights.items() if name != "lm_head.weight"), case
        files.append(states["state"])
    whole, split = files
    assert whole.keys() == split.keys()
    for number, state in whole.items():
        for name in ("exp_avg", "exp_avg_sq"):
            expected, found = state[name], split[number][name]
            assert found.shape == expected.shape
            assert (found - expected).norm() < 0.1 * expected.norm(), (number, name, expected.shape)
        assert state["step"] == split[number]["step"] == 5


@pytest.mark.parametrize(("mode", "case"), [(mode, case) for mode, cases in FAULTS.items() for case in cases], ids=str)
def test_without_its_cure_a_fault_shows(faulty, mode: str, case: Case) -> None:
    found = faulty(mode, case)
    assert FAULTS[mode][case](found), found


# An embedding of 39 million elements behind a gradient that a few tokens make.
REAL_WIDTH = "--model_type gpt2_small --num_layers 1 --batch_size 1 --seq_len 16 --train_step 2 --precision"


def test_norms_are_exact_under_every_plan_where_an_embedding_is_of_real_size(tmp_path: Path) -> None:
    """Whole on one rank: within 1e-6 of the reference, which adds up in float64. A single sum in fp32 is 4e-5 off."""
    flags = [f"{plan.name} {REAL_WIDTH} fp32" for plan in PLANS.values() if "fp32" in plan.precisions]
    cases = [Case(f"--distplan {each}") for each in flags]
    cases = [case for case in cases if why_not(case, "cpu") is None]
    for case, found in zip(cases, run_cases(1, cases, "cpu", tmp_path), strict=True):
        assert "error" not in found, found["error"]
        assert found["grad_norm"] < 1e-6, (case, found["grad_norm"])


def test_a_case_that_fails_costs_no_other_its_result(tmp_path: Path) -> None:
    """Its ranks end, those of the next case are new ones."""
    cases = [Case("--distplan Pytorch_DDP --tp_degree 2"), Case("--distplan Pytorch_DDP --precision fp32")]
    told: list[tuple[Case, bool]] = []
    failed, good = run_cases(1, cases, "cpu", tmp_path, tell=lambda case, found: told.append((case, "error" in found)))
    assert "--tp_degree 2 has no effect with Pytorch_DDP" in failed["error"]
    assert Outcome(1, cases[1], good, "cpu").holds and not Outcome(1, cases[0], failed, "cpu").holds
    assert told == [(cases[0], True), (cases[1], False)]


@pytest.mark.parametrize(
    ("flags", "exit_code", "told"), [([], 0, "| yes |"), (["--", "--seq_len", "2000"], 1, "**failed**")]
)
def test_the_tool_writes_its_table_and_its_exit_code_is_the_verdict(
    tmp_path: Path, flags: list[str], exit_code: int, told: str
) -> None:
    only = "CAI_Hybrid --precision fp32"
    arguments = ["--ranks", "1", "--device", "cpu", "--only", only, "--out", str(tmp_path / "table"), *flags]
    command = [sys.executable, "-m", "benchmarks.parity", *arguments]
    returncode, console = run_processes(command, environment={"SUITE_COMMIT": "0123abc"})
    assert returncode == exit_code, console
    table = (tmp_path / "table.md").read_text()
    assert f"`{only}`" in table and told in table and "torch " in table.splitlines()[2]
    document = json.loads((tmp_path / "table.json").read_text())
    assert [case["flags"] for case in document["cases"]] == [f"--distplan {only}"]
    assert document["command"].startswith("python -m benchmarks.parity --ranks 1") and document["environment"]["commit"]
    assert document["cases"][0]["holds"] is (exit_code == 0)


def test_every_fault_is_seen_until_it_is_mended() -> None:
    """Its probe sees the fault before it is mended and not afterwards, whatever else is mended. In a process of its
    own: mends are for good.
    """
    program = """
from pathlib import Path
from commons.plans.colossal.imports import import_colossalai
import_colossalai()
import colossalai
from commons.plans.colossal import faults, host_backend
host_backend.install()
assert len(faults.FAULTS) >= 7 and len({fault.function for fault in faults.FAULTS}) == len(faults.FAULTS)
for fault in faults.FAULTS:
    upstream = Path(colossalai.__path__[0]) / fault.file
    assert fault.function.split(".")[-1].split()[0] in upstream.read_text(), "the address is no longer right"
    assert fault.address.endswith(f"/v0.5.0/colossalai/{fault.file}") and fault.symptom
    assert fault.seen() and fault.seen(), f"{fault.function}: probing changes nothing"
    fault.mend()
    assert not fault.seen() and not fault.seen(), fault.function
"""
    returncode, console = run_processes([sys.executable, "-c", program], environment={"CUDA_VISIBLE_DEVICES": ""})
    assert returncode == 0, console


def test_an_offload_fraction_is_one_of_bytes_counted_once_a_chunk() -> None:
    program = """
import torch
from commons.plans.colossal.imports import import_colossalai
import_colossalai()
from commons.plans.colossal import faults, host_backend
host_backend.install()
faults.mend_all()
from types import SimpleNamespace
from colossalai.zero.gemini.placement_policy import StaticPlacementPolicy

class Chunk:
    keep_gathered = False
    def __init__(self, index, size):
        self.chunk_mem, self.params = size, [(index, "weight"), (index, "bias"), (index, "norm")]
    def get_tensors(self):
        return self.params

chunks = [Chunk(i, size) for i, size in enumerate([100, 100, 100, 100, 300])]
params = [param for chunk in chunks for param in chunk.params]
manager = SimpleNamespace(get_chunk=lambda param: chunks[param[0]])
for fraction, expected in [(0.0, 0), (0.1, 0), (0.15, 100), (0.5, 300), (0.6, 400), (0.99, 400), (1.0, 700)]:
    policy = StaticPlacementPolicy(manager, offload_optim_frac=fraction, shard_param_frac=0.25)
    devices = {}
    policy.setup_grads_device(params, devices)
    offloaded = sum(chunk.chunk_mem for chunk in chunks if devices[chunk.params[0]].type == "cpu")
    assert offloaded == expected, (fraction, offloaded)
    assert policy.keep_gathered_chunk_mem == 0.75 * 700
"""
    returncode, console = run_processes([sys.executable, "-c", program], environment={"CUDA_VISIBLE_DEVICES": ""})
    assert returncode == 0, console
