"""What plans keep between steps, by their own rules as arithmetic."""

from __future__ import annotations

import torch
from suite_runs import REPOSITORY, torchrun

from commons.config.schema import TrainConfig
from commons.planner.states import gemini_chunks, model_parameters, stage_blocks, states, zero_redundancy_parts
from model_zoo import MODEL_SIZES, build_model, padded_parameter_count


def test_parameters_are_those_of_the_model() -> None:
    shape = MODEL_SIZES["gpt2_tiny"]
    with torch.device("meta"):
        model = build_model(shape)
    real = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [(parameter.name, parameter.shape) for parameter in model_parameters(shape)] == real


def test_every_plan_s_states_on_two_ranks_are_planned_to_the_byte() -> None:
    returncode, console = torchrun(REPOSITORY / "tests" / "workers" / "state_bytes_worker.py", 2)
    assert returncode == 0, console


def test_static_fractions_move_the_first_chunks_that_fit() -> None:
    half = TrainConfig(model_type="gpt2_medium", offload_optim_frac=0.5).resolve("cuda", 2)
    chunks = gemini_chunks(half, 2)
    sizes = [cut.size for cut in chunks.cuts]
    moved = sum(sizes[number] for number in chunks.offloaded)
    assert sorted(chunks.offloaded) == list(range(len(chunks.offloaded)))
    assert 0.5 * sum(sizes) - max(sizes[:-2]) < moved <= 0.5 * sum(sizes)


def test_layers_left_over_go_to_the_middle_stages() -> None:
    config = TrainConfig(distplan="CAI_Hybrid", pp_degree=4, num_layers=10).resolve("cuda", 4)
    assert [len(stage_blocks(config, stage)) for stage in range(4)] == [2, 3, 3, 2]
    assert [block for stage in range(4) for block in stage_blocks(config, stage)] == list(range(10))


def test_parts_of_the_redundant_optimizer_cover_all_parameters_once() -> None:
    everything = tuple(model_parameters(MODEL_SIZES["gpt2_small"]))
    parts = zero_redundancy_parts(everything, 3)
    assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in everything)
    sizes = [sum(p.elements for p in part) for part in parts]
    assert max(sizes) - min(sizes) < max(p.elements for p in everything)


def test_all_ranks_together_hold_each_moment_once() -> None:
    config = TrainConfig(model_type="gpt2_small").resolve("cuda", 4)
    moments = sum(
        held.nbytes for rank in range(4) for held in states(config, 4, rank) if held.kind == "optimizer states"
    )
    assert moments == 8 * padded_parameter_count(MODEL_SIZES["gpt2_small"])
