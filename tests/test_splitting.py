"""Every way of splitting the model trains the same model: each layout on real ranks against one fp32 process.

One torchrun a number of ranks runs all its cases (parity_worker.py); the tests look at what it measured.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes

from commons.parity import BOUNDS

TIMEOUT_SECONDS = 420

# with this epsilon Adam's update grows with the gradient, so that clipping shows in the weights too
CLIPPED = "--clip_grad_norm 0.3 --adam_eps 1e-3"
RECOMPUTED = "--activation_checkpointing on"
INTERLEAVED = "--num_model_chunks 2 --num_microbatches 4"

# flags of a case; a name of its own only where another test asks for it
CASES: dict[int, tuple[str, ...]] = {
    1: (
        "--distplan CAI_Gemini",
        "--distplan CAI_Gemini --placement cpu --precision fp16",
        "--distplan CAI_Gemini --placement auto",
        "--distplan CAI_Hybrid --precision fp32",
        "--distplan CAI_Hybrid",
    ),
    2: (
        "--distplan CAI_Gemini",
        "--distplan CAI_Gemini --placement const --grad_accum 2",
        "--distplan CAI_Gemini --placement cpu --precision fp16 --max_prefetch 2",
        f"--distplan CAI_Gemini --placement auto {CLIPPED}",
        f"--distplan CAI_Gemini --placement cuda --precision fp16 {CLIPPED}",
        "--distplan CAI_Gemini --shard_param_frac 0.5 --offload_optim_frac 0.3",
        "--distplan CAI_Gemini --tp_degree 2",
        f"--distplan CAI_Gemini --tp_degree 2 --precision fp16 {CLIPPED}",
        "--distplan CAI_Gemini --tp_degree 2 --placement cpu --grad_accum 2",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32",
        f"--distplan CAI_Hybrid --tp_degree 2 --precision fp32 {CLIPPED}",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp16",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32 --sequence_parallel on",
        f"--distplan CAI_Hybrid --tp_degree 2 --precision fp32 {RECOMPUTED} --attention eager",
        "--distplan CAI_Hybrid --pp_degree 2 --precision fp32",
        f"--distplan CAI_Hybrid --pp_degree 2 --precision fp32 {INTERLEAVED}",
        "--distplan CAI_Hybrid --pp_degree 2 --precision fp32 --activation_checkpointing on",
        f"--distplan CAI_Hybrid --pp_degree 2 --precision fp16 {CLIPPED}",
        "--distplan CAI_Hybrid --zero_stage 2",
        "--distplan CAI_Hybrid --zero_stage 0 --precision fp32",
        "--distplan CAI_ZeRO1 --precision fp32 --grad_accum 4 --batch_size 1",
        "--distplan CAI_ZeRO1 --precision fp32",
        f"--distplan Pytorch_DDP --precision fp32 {CLIPPED}",
        f"--distplan Pytorch_FSDP --precision fp32 {CLIPPED}",
    ),
    4: (
        "--distplan CAI_Gemini",
        "--distplan CAI_Gemini --tp_degree 4 --precision fp16",
        f"--distplan CAI_Gemini --tp_degree 2 {CLIPPED}",
        "--distplan CAI_Gemini --tp_degree 2 --placement auto --precision fp16",
        "--distplan CAI_Gemini --tp_degree 2 --placement const --max_prefetch 2",
        "--distplan CAI_Hybrid --tp_degree 4 --precision fp32",
        "--distplan CAI_Hybrid --tp_degree 2 --zero_stage 0 --precision fp32 --grad_accum 2",
        "--distplan CAI_Hybrid --tp_degree 2 --zero_stage 1 --precision fp16 --sequence_parallel on",
        "--distplan CAI_Hybrid --tp_degree 2 --zero_stage 2",
        f"--distplan CAI_Hybrid --tp_degree 2 --zero_stage 2 --grad_accum 2 {CLIPPED}",
        "--distplan CAI_Hybrid --tp_degree 2 --pp_degree 2 --precision fp32",
        "--distplan CAI_Hybrid --tp_degree 2 --pp_degree 2 --precision fp32 --sequence_parallel on",
        f"--distplan CAI_Hybrid --tp_degree 2 --pp_degree 2 --precision fp16 {INTERLEAVED}",
        "--distplan CAI_Hybrid --pp_degree 2 --zero_stage 1",
        f"--distplan CAI_Hybrid --pp_degree 2 --zero_stage 1 --precision fp16 --grad_accum 2 {CLIPPED}",
        f"--distplan CAI_Hybrid --pp_degree 2 --zero_stage 1 {INTERLEAVED}",
        "--distplan CAI_Hybrid --pp_degree 4 --precision fp32",
    ),
}

# Distance of a tensor from the reference's after 5 steps over the way that the reference's went, beyond the
# rounding of the checkpoint. Adam divides by the gradient's size, so a gradient that is mostly rounding moves
# its weight as far as any other.
WEIGHT_BOUNDS = {"fp32": 1e-3, "fp16": 0.25, "bf16": 0.3}

# What goes wrong without a part of the suite. The cases of one mode share a process, so one that fails for
# good comes last.
FAULTS: dict[str, dict[str, Callable[[dict], bool]]] = {
    "unmended": {
        # GeminiOptimizer._calc_global_norm and collect_states
        "--distplan CAI_Gemini --tp_degree 2": lambda found: (
            not found["norms_equal_on_ranks"] and "sharding spec" in found["saving_error"]
        ),
        # the norm of HybridParallelPlugin's optimizers
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32": lambda found: found["grad_norm"] > 1e-3,
        # row-parallel biases under sequence parallelism
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32 --sequence_parallel on": lambda found: (
            found["weights"]["transformer.h.0.mlp.c_proj.bias"] > 0.1
        ),
    },
    "unaligned_chunks": {
        # a weight and its bias in different chunks: fetching one drops the other before its gradient is in
        "--distplan CAI_Gemini --tp_degree 2": lambda found: "copy_tensor_to_chunk_slice" in found["error"],
    },
    "upstream_forward": {
        # the mask of shardformer's forward pass is not causal
        "--distplan CAI_Hybrid --precision fp32 --zero_stage 0": lambda found: found["leak"] > 1e-4,
        # DistCrossEntropy.backward under ColoTensor, and the missing sequence-parallel group
        "--distplan CAI_Gemini --tp_degree 2": lambda found: found["grad_norm"] > 1,
    },
}

PARAMETERS = [pytest.param(ranks, case, id=f"{ranks}: {case}") for ranks, cases in CASES.items() for case in cases]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory):
    """(ranks, flags) -> what the worker measured; the ranks are started when first asked for."""

    @functools.cache
    def run(ranks: int, mode: str) -> dict[str, dict]:
        cases = CASES[ranks] if mode == "mended" else tuple(FAULTS[mode])
        folder: Path = tmp_path_factory.mktemp(f"{mode}{ranks}")
        (folder / "cases.json").write_text(json.dumps(cases))
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            "tests/parity_worker.py",
        ]
        paths = [str(folder / "cases.json"), str(folder / "results.json"), mode]
        returncode, console = run_processes([sys.executable, *command, *paths], seconds=TIMEOUT_SECONDS, cwd=REPOSITORY)
        assert returncode == 0, console[-6000:]
        return dict(zip(cases, json.loads((folder / "results.json").read_text()), strict=True))

    return lambda ranks, case, mode="mended": run(ranks, mode)[case]


def _precision(case: str) -> str:
    words = case.split()
    return words[words.index("--precision") + 1] if "--precision" in words else "bf16"


@pytest.mark.parametrize(("ranks", "case"), PARAMETERS)
def test_losses_and_gradient_norms_are_the_reference_s(measured, ranks: int, case: str) -> None:
    found, bound = measured(ranks, case), BOUNDS[_precision(case)]
    assert found["skipped"] == 0
    assert found["loss"] <= bound.loss
    assert found["grad_norm"] <= bound.grad_norm
    assert found["norms_equal_on_ranks"]


@pytest.mark.parametrize(("ranks", "case"), PARAMETERS)
def test_no_logit_depends_on_a_later_token(measured, ranks: int, case: str) -> None:
    leak = measured(ranks, case)["leak"]
    if leak is None:
        pytest.skip("Colossal-AI cannot run two inferences with max_prefetch")
    assert leak == 0.0


@pytest.mark.parametrize(("ranks", "case"), [p for p in PARAMETERS if "Pytorch" not in str(p.values[1])])
def test_weights_are_the_reference_s_tensor_by_tensor(measured, ranks: int, case: str) -> None:
    found = measured(ranks, case)
    assert "saving_error" not in found
    assert found["missing"] == []
    far = {name: d for name, d in found["weights"].items() if not d <= WEIGHT_BOUNDS[_precision(case)]}
    assert far == {}


def test_accumulating_four_batches_is_a_batch_four_times_as_large(measured) -> None:
    """Both draw the same tokens: a stream of 4 x 1 sequences is one of 4."""
    accumulated = measured(2, "--distplan CAI_ZeRO1 --precision fp32 --grad_accum 4 --batch_size 1")
    whole = measured(2, "--distplan CAI_ZeRO1 --precision fp32")
    assert accumulated["losses"] == pytest.approx(whole["losses"], rel=1e-6)


@pytest.mark.parametrize(("mode", "case"), [(mode, case) for mode, cases in FAULTS.items() for case in cases])
def test_without_its_cure_a_fault_shows(measured, mode: str, case: str) -> None:
    found = measured(2, case, mode)
    assert FAULTS[mode][case](found), found


def test_every_fix_is_needed_and_mends() -> None:
    """Before it is applied its probe finds the fault, afterwards it does not. In a process of its own: fixes
    are for good.
    """
    program = """
from commons.colossal.imports import import_colossalai
import_colossalai()
from commons.colossal import host_backend, upstream_fixes
host_backend.install()
for fix in upstream_fixes.FIXES:
    assert fix.is_needed(), fix.function
    fix.apply()
    assert not fix.is_needed(), fix.function
"""
    returncode, console = run_processes([sys.executable, "-c", program], environment={"CUDA_VISIBLE_DEVICES": ""})
    assert returncode == 0, console


def test_an_offload_fraction_is_one_of_bytes_counted_once_a_chunk() -> None:
    program = """
import torch
from commons.colossal.imports import import_colossalai
import_colossalai()
from commons.colossal import host_backend, upstream_fixes
host_backend.install()
upstream_fixes.apply()
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
