"""Every way of splitting the model trains the same model: each layout on real ranks against one fp32 process.

One torchrun a number of ranks runs all its cases (parity_worker.py); the tests look at what it measured.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes

from commons.parity import BOUNDS

TIMEOUT_SECONDS = 420

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
        "--distplan CAI_Gemini --placement auto --clip_grad_norm 0.5",
        "--distplan CAI_Gemini --placement cuda --precision fp16 --clip_grad_norm 0.5",
        "--distplan CAI_Gemini --shard_param_frac 0.5 --offload_optim_frac 0.3",
        "--distplan CAI_Gemini --tp_degree 2",
        "--distplan CAI_Gemini --tp_degree 2 --precision fp16 --clip_grad_norm 0.5",
        "--distplan CAI_Gemini --tp_degree 2 --placement cpu --grad_accum 2",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32 --clip_grad_norm 0.5",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp16",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32 --sequence_parallel on",
        "--distplan CAI_Hybrid --tp_degree 2 --precision fp32 --activation_checkpointing on --attention eager",
        "--distplan CAI_Hybrid --pp_degree 2 --precision fp32",
        "--distplan CAI_Hybrid --pp_degree 2 --precision fp32 --num_model_chunks 2 --num_microbatches 4",
        "--distplan CAI_Hybrid --pp_degree 2 --precision fp32 --activation_checkpointing on",
        "--distplan CAI_Hybrid --pp_degree 2 --precision fp16 --clip_grad_norm 0.5",
        "--distplan CAI_Hybrid --zero_stage 2",
        "--distplan CAI_Hybrid --zero_stage 0 --precision fp32",
        "--distplan CAI_ZeRO1 --precision fp32 --grad_accum 4 --batch_size 1",
        "--distplan CAI_ZeRO1 --precision fp32",
        "--distplan Pytorch_DDP --precision fp32 --clip_grad_norm 0.5",
        "--distplan Pytorch_FSDP --precision fp32 --clip_grad_norm 0.5",
    ),
    4: (
        "--distplan CAI_Gemini",
        "--distplan CAI_Gemini --tp_degree 4 --precision fp16",
        "--distplan CAI_Gemini --tp_degree 2 --clip_grad_norm 0.5",
        "--distplan CAI_Gemini --tp_degree 2 --placement auto --precision fp16",
        "--distplan CAI_Gemini --tp_degree 2 --placement const --max_prefetch 2",
        "--distplan CAI_Hybrid --tp_degree 4 --precision fp32",
        "--distplan CAI_Hybrid --tp_degree 2 --zero_stage 0 --precision fp32 --grad_accum 2",
        "--distplan CAI_Hybrid --tp_degree 2 --zero_stage 1 --precision fp16 --sequence_parallel on",
        "--distplan CAI_Hybrid --tp_degree 2 --zero_stage 2",
        "--distplan CAI_Hybrid --tp_degree 2 --zero_stage 2 --grad_accum 2 --clip_grad_norm 0.5",
        "--distplan CAI_Hybrid --tp_degree 2 --pp_degree 2 --precision fp32",
        "--distplan CAI_Hybrid --tp_degree 2 --pp_degree 2 --precision fp32 --sequence_parallel on",
        "--distplan CAI_Hybrid --tp_degree 2 --pp_degree 2 --precision fp16 --num_model_chunks 2 --num_microbatches 4",
        "--distplan CAI_Hybrid --pp_degree 2 --zero_stage 1",
        "--distplan CAI_Hybrid --pp_degree 2 --zero_stage 1 --precision fp16 --grad_accum 2 --clip_grad_norm 0.5",
        "--distplan CAI_Hybrid --pp_degree 2 --zero_stage 1 --num_model_chunks 2 --num_microbatches 4",
        "--distplan CAI_Hybrid --pp_degree 4 --precision fp32",
    ),
}

# Distance of a tensor from the reference's after 5 steps over the way that the reference's went, beyond the rounding of the
# checkpoint. Adam divides by the gradient's size, so a gradient that is mostly rounding moves its weight as far as any other.
WEIGHT_BOUNDS = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}

PARAMETERS = [pytest.param(ranks, case, id=f"{ranks}: {case}") for ranks, cases in CASES.items() for case in cases]


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory):
    """(ranks, flags) -> what the worker measured; the ranks are started when first asked for."""

    @functools.cache
    def run(ranks: int) -> dict[str, dict]:
        folder: Path = tmp_path_factory.mktemp(f"ranks{ranks}")
        (folder / "cases.json").write_text(json.dumps(CASES[ranks]))
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "tests/parity_worker.py"]
        paths = [str(folder / "cases.json"), str(folder / "results.json")]
        returncode, console = run_processes([sys.executable, *command, *paths], seconds=TIMEOUT_SECONDS, cwd=REPOSITORY)
        assert returncode == 0, console[-6000:]
        return dict(zip(CASES[ranks], json.loads((folder / "results.json").read_text()), strict=True))

    return lambda ranks, case: run(ranks)[case]


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
    assert found["missing"] == []
    far = {name: d for name, d in found["weights"].items() if not d <= WEIGHT_BOUNDS[_precision(case)]}
    assert far == {}


def test_accumulating_four_batches_is_a_batch_four_times_as_large(measured) -> None:
    """Both draw the same tokens: a stream of 4 x 1 sequences is one of 4."""
    accumulated = measured(2, "--distplan CAI_ZeRO1 --precision fp32 --grad_accum 4 --batch_size 1")
    whole = measured(2, "--distplan CAI_ZeRO1 --precision fp32")
    assert accumulated["losses"] == pytest.approx(whole["losses"], rel=1e-6)
