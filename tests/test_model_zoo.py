"""The sizes, their exact counts, and the model that is built from a size: what it computes, not how."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from commons.plans.colossal.chunks import chunk_configuration
from model_zoo import (
    MODEL_SIZES,
    ModelShape,
    build_model,
    flops_parameter_count,
    next_token_loss,
    padded_parameter_count,
    parameter_count,
)

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = MODEL_SIZES["gpt2_tiny"]
SMALLEST = ModelShape(layers=2, hidden=32, heads=4, positions=32, vocab=100)  # 28 padding rows

every_size = pytest.mark.parametrize("name", MODEL_SIZES)


def tokens_of(shape: ModelShape, batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(shape.vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def seeded_model(shape: ModelShape = SMALLEST, **options) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return build_model(shape, **options)


def without_padding(model: GPT2LMHeadModel, vocab: int) -> GPT2LMHeadModel:
    """transformers' own model, loss included, with the same weights and no padding rows."""
    config = copy.deepcopy(model.config)
    config.vocab_size = vocab
    plain = GPT2LMHeadModel(config)
    weights = {name: tensor[:vocab] if "wte" in name or "lm_head" in name else tensor
               for name, tensor in model.state_dict().items()}  # fmt: skip
    plain.load_state_dict(weights)
    return plain.train()


# --- The table ----------------------------------------------------------------------------------------------


@every_size
def test_counts_are_exact(name: str) -> None:
    shape = MODEL_SIZES[name]
    with torch.device("meta"):
        model = build_model(shape)
    assert sum(param.numel() for param in model.parameters()) == padded_parameter_count(shape)
    padding_rows = model.transformer.wte.weight.shape[0] - shape.vocab
    assert 0 <= padding_rows < 128
    assert padded_parameter_count(shape) - parameter_count(shape) == padding_rows * shape.hidden
    assert parameter_count(shape) - flops_parameter_count(shape) == model.transformer.wpe.weight.numel()


@pytest.mark.parametrize(
    ("name", "count"),
    {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}.items(),
)
def test_small_to_xl_have_as_many_parameters_as_the_published_ones(name: str, count: int) -> None:
    assert parameter_count(MODEL_SIZES[f"gpt2_{name}"]) == count


@pytest.mark.parametrize("name", [name for name in MODEL_SIZES if re.search(r"_\d+b$", name)])
def test_a_size_in_billions_is_what_its_name_says(name: str) -> None:
    billions = float(name.split("_")[1].removesuffix("b"))
    assert parameter_count(MODEL_SIZES[name]) == pytest.approx(billions * 1e9, rel=0.07)


def test_hidden_size_and_layers_of_the_large_sizes() -> None:
    expected = {"10b": (4096, 50), "14b": (4096, 70), "20b": (8192, 25), "24b": (8192, 30), "30b": (8192, 37),
                "40b": (8192, 50)}  # fmt: skip
    for name, hidden_and_layers in expected.items():
        shape = MODEL_SIZES[f"gpt2_{name}"]
        assert (shape.hidden, shape.layers) == hidden_and_layers
    assert (MODEL_SIZES["gpt2_xl"].heads, MODEL_SIZES["gpt3_175b"].positions) == (25, 2048)


@every_size
def test_heads_suit_flash_attention(name: str) -> None:
    shape = MODEL_SIZES[name]
    assert shape.hidden % shape.heads == 0
    assert shape.head_dim <= 128
    assert shape.head_dim % 8 == 0
    assert shape.padded_vocab % 128 == 0


@pytest.mark.parametrize(("vocab", "padded"), [(1, 128), (128, 128), (129, 256), (1000, 1024), (50257, 50304)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab: int, padded: int) -> None:
    assert dataclasses.replace(TINY, vocab=vocab).padded_vocab == padded


def test_the_table_prints_itself_whole_into_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "model_zoo.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "…" not in done.stdout
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip().startswith("gpt")}
    assert list(rows) == list(MODEL_SIZES)
    for name, shape in MODEL_SIZES.items():
        numbers = (shape.layers, shape.hidden, shape.heads, shape.head_dim, shape.positions, shape.vocab)
        counts = [f"{parameter_count(shape):,}", f"{padded_parameter_count(shape):,}"]
        assert rows[name][1:] == [*map(str, numbers), *counts]


def test_importing_the_table_imports_neither_torch_nor_transformers() -> None:
    question = "import model_zoo, sys; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", question],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("change", [{"layers": 0}, {"hidden": -64}, {"vocab": 1000.0}, {"heads": True}])
def test_a_shape_of_anything_but_positive_integers_is_refused(change: dict) -> None:
    (name, value), = change.items()  # fmt: skip
    with pytest.raises(ValueError, match=rf"positive integers, got {name} {re.escape(repr(value))}$"):
        dataclasses.replace(TINY, **change)


# --- The model ----------------------------------------------------------------------------------------------


def test_the_model_is_the_class_that_shardformer_looks_for() -> None:
    model = seeded_model()
    assert type(model) is GPT2LMHeadModel
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.training


def test_initial_weights_are_those_of_transformers() -> None:
    model = seeded_model(TINY)
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(
        GPT2Config(vocab_size=TINY.padded_vocab, n_positions=128, n_embd=64, n_layer=4, n_head=4, bos_token_id=0)
    )
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["transformer.wte.weight"][: TINY.vocab].std().item() == pytest.approx(0.02, rel=0.02)
    residual = ours["transformer.h.0.mlp.c_proj.weight"].std().item()
    assert residual == pytest.approx(0.02 / math.sqrt(2 * TINY.layers), rel=0.03)


def test_the_activation_is_gelu_new() -> None:
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    assert seeded_model().config.activation_function == "gelu_pytorch_tanh"
    difference = (ACT2FN["gelu_pytorch_tanh"](x) - ACT2FN["gelu_new"](x)).abs().max().item()
    assert difference < 1e-14
    # the bound can tell functions apart: the exact gelu is another one
    assert (ACT2FN["gelu"](x) - ACT2FN["gelu_new"](x)).abs().max().item() > 1e-4


@every_size
def test_special_tokens_are_in_the_vocabulary(name: str) -> None:
    shape = MODEL_SIZES[name]
    with torch.device("meta"):
        config = build_model(dataclasses.replace(shape, layers=1)).config
    assert config.bos_token_id == config.eos_token_id == shape.vocab - 1
    assert shape.vocab != 50257 or config.eos_token_id == 50256


def test_training_keeps_no_keys_and_values() -> None:
    tokens = tokens_of(SMALLEST)
    assert seeded_model()(input_ids=tokens, labels=tokens).past_key_values is None


@pytest.mark.parametrize(("attention", "implementation"), [("sdpa", "sdpa"), ("flash", "sdpa"), ("eager", "eager")])
def test_attention_is_causal_and_the_same_function_in_every_implementation(attention: str, implementation: str) -> None:
    model = seeded_model(attention=attention)
    assert model.config._attn_implementation == implementation
    tokens = tokens_of(SMALLEST)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SMALLEST.vocab
    backend = SDPBackend.FLASH_ATTENTION if attention == "flash" else SDPBackend.MATH
    with torch.no_grad(), sdpa_kernel(backend):
        logits, after = model(input_ids=tokens).logits, model(input_ids=changed).logits
        reference = seeded_model(attention="eager")(input_ids=tokens).logits
    assert torch.equal(logits[:, :-1], after[:, :-1])
    assert not torch.equal(logits[:, -1], after[:, -1])
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)


def test_dropout_reaches_embeddings_attention_and_residuals() -> None:
    config = seeded_model(dropout=0.25).config
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.25, 0.25, 0.25)
    tokens = tokens_of(SMALLEST)
    for dropout, same in ((0.0, True), (0.25, False)):
        model = seeded_model(dropout=dropout)
        losses = [model(input_ids=tokens, labels=tokens).loss.item() for _ in range(2)]
        assert (losses[0] == losses[1]) is same


@pytest.mark.parametrize("mode", ["selective", "on"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_checkpointing_computes_blocks_twice_and_the_same_gradients(dropout: float, mode: str) -> None:
    tokens, gradients, block_calls = tokens_of(SMALLEST), [], []
    for checkpointing in ("off", mode):
        model, calls = seeded_model(dropout=dropout, activation_checkpointing=checkpointing), []
        for block in model.transformer.h.children():
            block.get_submodule("ln_1").register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(7)
        model(input_ids=tokens, labels=tokens).loss.backward()
        block_calls.append(len(calls))
        gradients.append([param.grad for param in model.parameters()])
    assert block_calls == [SMALLEST.layers, 2 * SMALLEST.layers]
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash3"}, "unknown attention 'flash3'; take one of sdpa, eager, flash"),
        ({"activation_checkpointing": True}, "unknown activation_checkpointing True; take one of off, selective, on"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, got nan"),
        (
            {"shape": dataclasses.replace(TINY, heads=5)},
            "5 heads do not divide the hidden size 64; 4 heads would",
        ),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(**{"shape": TINY, **options})


def test_the_model_can_be_copied_and_pickled_with_its_loss() -> None:
    model, tokens = seeded_model(), tokens_of(SMALLEST)
    expected = model(input_ids=tokens, labels=tokens).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=tokens, labels=tokens).loss, expected)


# --- The loss -----------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_a_model_without_padding() -> None:
    model, tokens = seeded_model(), tokens_of(SMALLEST)
    plain = without_padding(model, SMALLEST.vocab)
    losses = [each(input_ids=tokens, labels=tokens).loss for each in (model, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, atol=0, rtol=1e-6)
    expected = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        wanted = expected[name].grad
        assert param.grad is not None
        assert wanted is not None
        torch.testing.assert_close(param.grad[: wanted.shape[0]], wanted, atol=1e-8, rtol=1e-4, msg=name)


def test_padding_rows_get_no_gradient_and_no_probability() -> None:
    model, tokens = seeded_model(), tokens_of(SMALLEST)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    gradient = model.transformer.wte.weight.grad
    assert gradient is not None
    assert torch.count_nonzero(gradient[SMALLEST.vocab :]) == 0
    assert torch.count_nonzero(gradient[: SMALLEST.vocab]).item() == SMALLEST.vocab * SMALLEST.hidden
    with torch.no_grad():
        model.transformer.wte.weight[SMALLEST.vocab :] = 1e4
    assert model(input_ids=tokens, labels=tokens).loss.item() == loss.item()


def test_loss_is_the_mean_over_all_predicted_positions() -> None:
    logits = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(2))
    labels = tokens_of(SMALLEST, batch=3, length=7)
    log_probabilities = functional.log_softmax(logits[..., :100].double(), dim=-1)
    terms = [-log_probabilities[b, t, labels[b, t + 1]].item() for b in range(3) for t in range(6)]
    loss = next_token_loss(logits, labels, vocab=100)
    assert loss.item() == pytest.approx(sum(terms) / 18, rel=1e-6)
    labels[0, 3:] = -100  # the targets of positions 2 to 5
    terms = [term for i, term in enumerate(terms) if not 2 <= i <= 5]
    loss = next_token_loss(logits, labels, vocab=100)
    assert loss.item() == pytest.approx(sum(terms) / 14, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_computed_in_fp32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(3))).to(dtype).requires_grad_()
    labels = tokens_of(SMALLEST, length=16)
    loss, reference = (next_token_loss(each, labels, vocab=100) for each in (logits, logits.detach().float()))
    assert loss.dtype == torch.float32
    assert loss.item() == reference.item()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_a_sequence_without_a_next_token_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        next_token_loss(torch.zeros(1, 1, 128), torch.zeros(1, 1, dtype=torch.long), vocab=100)


def test_an_untrained_model_guesses_evenly_over_the_real_vocabulary() -> None:
    tokens = tokens_of(SMALLEST, batch=16, length=32)
    loss = seeded_model()(input_ids=tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(math.log(SMALLEST.vocab), rel=0.01)  # with the 28 padding rows it would be 5 % more


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_a_chunk_of_all_blocks_holds_the_whole_model(size: str) -> None:
    shape = MODEL_SIZES[size]
    whole = chunk_configuration(shape, zero_size=4, blocks=shape.layers)[4]["chunk_size"]
    assert 0 <= whole - padded_parameter_count(shape) < 4
