"""torch.compile under every plan: one graph for all blocks, the same losses, and a way on where it does not
work.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import types

import pytest
import suite_runs
import torch
from suite_runs import REPOSITORY

from commons.config import auto, resolved
from commons.config.schema import TrainConfig
from commons.model import compile as compiling
from commons.model.gpt2 import gpt2_functions
from commons.ops.activation_checkpointing import MODES
from model_zoo import MODEL_SIZES, build_model

WORKER = REPOSITORY / "tests" / "workers" / "compile_worker.py"
SHAPE = MODEL_SIZES["gpt2_tiny"]


def tokens() -> torch.Tensor:
    return torch.randint(SHAPE.vocab, (2, 32), generator=torch.Generator().manual_seed(0))


def as_functions(attention: str, dropout: float, recompute: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(SHAPE, attention=attention, dropout=dropout, activation_checkpointing=recompute)
    functions = gpt2_functions(SHAPE, attention=attention, dropout=dropout, recompute=recompute)
    compiling.run_as_functions(model, functions)
    return model


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_functions_are_huggingfaces_model(attention, dropout, recompute):
    torch.manual_seed(0)
    reference = build_model(SHAPE, attention=attention, dropout=dropout, activation_checkpointing=recompute)
    model = as_functions(attention, dropout, recompute)
    outcomes = []
    for each in (reference, model):
        torch.manual_seed(1)
        loss = each(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        outcomes.append((loss.item(), {name: param.grad for name, param in each.named_parameters()}))
    (wanted_loss, wanted), (loss, got) = outcomes
    assert loss == pytest.approx(wanted_loss, abs=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_later_token_changes_no_earlier_row_of_a_block(compiled, attention, recompute):
    """Nor its gradient: what a later row gets goes back to itself and to earlier ones only."""
    transform = functools.partial(torch.compile, backend="aot_eager") if compiled else lambda function: function
    block = gpt2_functions(SHAPE, attention=attention, recompute=recompute, transform=transform).block
    model = build_model(SHAPE)
    parameters = [p for name, p in model.named_parameters() if name.startswith("transformer.h.0.")]
    hidden = torch.randn(2, 32, SHAPE.hidden, generator=torch.Generator().manual_seed(0), requires_grad=True)
    last = torch.zeros_like(hidden)
    last[:, -1] = torch.randn(SHAPE.hidden, generator=torch.Generator().manual_seed(1))
    before, after = block(hidden, *parameters), block(hidden + last, *parameters)
    assert torch.equal(before[:, :-1], after[:, :-1]) and not torch.equal(before[:, -1], after[:, -1])
    (gradient,) = torch.autograd.grad(before[:, :-1].sum(), hidden)
    assert gradient[:, -1].eq(0).all() and gradient[:, -2].ne(0).any()


def test_without_labels_a_model_run_as_functions_gives_logits():
    assert as_functions("sdpa", 0.0, "off")(input_ids=tokens()).logits.shape == (2, 32, SHAPE.padded_vocab)


def test_recomputation_leaves_out_the_last_matrix_product():
    products = []

    def count(graph: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        from torch._functorch.aot_autograd import make_boxed_func

        names = [str(node.target) for node in graph.graph.nodes]
        products.append(sum("mm" in name for name in names))
        return make_boxed_func(graph.forward)  # pyright: ignore

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    block = build_model(SHAPE).transformer.h[0]
    functions = gpt2_functions(
        SHAPE,
        recompute="on",
        transform=lambda function: torch.compile(function, backend=backend, fullgraph=True),
    )
    hidden = torch.randn(2, 32, SHAPE.hidden, requires_grad=True)
    functions.block(hidden, *block.parameters()).sum().backward()
    forward, backward = products
    assert forward == 4
    assert backward == 8 + 3  # two a matrix, and the recomputed ones but for the feed-forward layer's second


def test_every_plan_compiles_with_one_graph_for_all_blocks():
    returncode, console = suite_runs.torchrun(WORKER, 2)
    assert returncode == 0, console[-4000:]


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on a CPU")
def test_inductor_trains_a_tiny_model(tmp_path):
    flags = ("--train_step", "3", "--warmup_step", "1", "--num_layers", "2", "--seq_len", "32")
    run = suite_runs.launch(tmp_path, *flags, "--compile", "on")
    assert run.returncode == 0, run.console
    assert "compiled the model's blocks" in run.console and "torch.compile failed" not in run.console
    assert run.losses == pytest.approx([math.log(SHAPE.vocab)] * 3, abs=0.05)  # of a new model on random tokens


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(capsys):
    def branching(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1 if tensor.sum() > 0 else tensor - 1

    function = compiling.CompiledFunction(branching, "eager")
    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert function(-torch.ones(2)).tolist() == [-2.0, -2.0]
    assert capsys.readouterr().err.count("torch.compile failed for branching") == 1


def compiled(device_type, **settings):
    return TrainConfig(**settings).resolve(device_type).compile


def test_auto_compiles_on_gpus_that_can(monkeypatch):
    monkeypatch.setattr(resolved, "compile_problem", lambda device_type: None)
    assert compiled("cuda") == "on" and compiled("cpu") == "off"
    assert compiled("cuda", tp_degree=2) == "off"
    assert compiled("cpu", compile="on") == "on"
    assert compiled("cuda", compile="off") == "off"
    # what these do not compile is not said to be
    assert compiled("cuda", distplan="CAI_Hybrid") == "off" and compiled("cuda", gemini_hooks="operation") == "off"
    assert compiled("cuda", distplan="Pytorch_DDP", gemini_hooks="operation") == "on"
    monkeypatch.setattr(resolved, "compile_problem", lambda device_type: "no compiler")
    assert compiled("cuda") == "off"


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(auto, "find_spec", lambda name: types.SimpleNamespace())
    for device_type, variable in (("cpu", "CXX"), ("cuda", "CC")):
        problem = auto.compile_problem(device_type)
        assert problem is not None and variable in problem
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    assert "triton" in str(auto.compile_problem("cuda"))


def test_cache_is_kept_where_the_user_wants_it_else_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiling.CACHE_VARIABLE, raising=False)
    compiling.keep_cache()
    assert os.environ[compiling.CACHE_VARIABLE].startswith(str(tmp_path))
    monkeypatch.setenv(compiling.CACHE_VARIABLE, "/chosen")
    compiling.keep_cache()
    assert os.environ[compiling.CACHE_VARIABLE] == "/chosen"
