"""What a compiled block keeps for its backward pass under --activation_checkpointing, of whatever layers it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from suite_runs import launch

from commons.model.gpt2 import BLOCK_PARAMETERS, gpt2_functions
from model_zoo import MODEL_SIZES, build_model

# saved tensors in sizes of the hidden states, at most; see commons/ops/activation_checkpointing.py
KEPT = {"off": 17, "selective": 11, "on": 1.5}
# and at least: below, something dear is computed again, attention's result being one of these sizes
LEAST = {"off": 16.0, "selective": 10.0, "on": 1.0}
LEAST_OF = {"fp8": {"off": 8.3, "selective": 5.5}, "GELU in products": {"selective": 6.0}, "both": {"selective": 6.0}}
LAYERS = {"plain": {}, "fp8": {"fp8": True}, "kernels": {"kernels": True}, "GELU in products": {"fused_gelu": True}}
LAYERS["both"] = {"kernels": True, "fused_gelu": True}


def kept(function: Any, hidden: torch.Tensor, parameters: list[torch.Tensor]) -> float:
    """Bytes that one call keeps beside the parameters, in sizes of ``hidden``."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(hidden, *parameters)
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage()._cdata, None)
    torch.autograd.grad(out.sum(), [hidden, *parameters])
    return sum(sizes.values()) / hidden.untyped_storage().nbytes()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("mode", KEPT)
def test_no_more_is_kept_than_is_told(mode, layers):
    torch._dynamo.reset()
    shape = MODEL_SIZES["gpt2_tiny"]

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    block = gpt2_functions(shape, recompute=mode, transform=compiled, **LAYERS[layers]).block
    model: Any = build_model(shape)
    parameters = [model.transformer.h[0].get_parameter(name) for name in BLOCK_PARAMETERS]
    hidden = torch.randn(2, 64, shape.hidden, requires_grad=True)
    block(hidden, *parameters)  # to be compiled
    sizes = kept(block, hidden, parameters)
    assert LEAST_OF.get(layers, {}).get(mode, LEAST[mode]) <= sizes < KEPT[mode]
    assert mode != "off" or sizes > 5 * KEPT["on"]  # what is counted is there


@pytest.mark.timeout(300)
def test_a_compiled_run_that_recomputes_has_a_quiet_console(tmp_path):
    run = launch(
        tmp_path, "--device", "cpu", "--train_step", "3", "--compile", "on", "--activation_checkpointing", "on"
    )
    assert run.returncode == 0, run.console
    assert "Detected" not in run.console and "fall" not in run.console
