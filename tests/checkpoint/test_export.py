"""From a run's checkpoint to HuggingFace and to text: ``commons.checkpoint.export`` and ``commons.sample``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from suite_runs import launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from commons.checkpoint import export
from commons.checkpoint.stored_model import open_model, open_run
from commons.data.tokenizer import ByteTokenizer, from_folder
from commons.sample import command as sample
from model_zoo import MODEL_SIZES, build_model

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. Ärger — 時計. " * 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemini in bf16 on two ranks, four steps on a text, two checkpoints."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = ("--data", str(folder / "text.txt"), "--train_step", "4", "--save_every", "2", "--lr", "1e-2")
    done = launch(folder, "--device", "cpu", *flags, ranks=2)
    assert done.returncode == 0, done.console
    return done.run_dir


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    target = run.parent / "model"
    assert export.main([str(run), "--to", str(target)]) == 0
    return target


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


def test_the_exported_model_is_the_trained_one(run: Path, folder: Path) -> None:
    """Logits equal, to the bit, to those of the suite's own model with the checkpoint's masters, in fp32."""
    stored = open_run(run)
    assert stored.step == 4 and stored.place == newest(run)
    model = build_model(MODEL_SIZES["gpt2_tiny"]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: stored.reader.shape(name)[0]] = stored.reader.read(name)
        loaded, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(told.values()), told
        tokens = torch.randint(257, (2, 60), generator=torch.Generator().manual_seed(2))
        assert torch.equal(loaded(tokens).logits, model(input_ids=tokens).logits[..., :1000])
    assert loaded.generate(tokens[:1], max_new_tokens=4).shape[1] <= 64


def test_masters_are_exported_not_rounded_weights(folder: Path) -> None:
    weight = AutoModelForCausalLM.from_pretrained(folder).transformer.h[0].mlp.c_fc.weight
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())


def test_the_tokenizer_goes_with_it(folder: Path) -> None:
    tokenizer, own = AutoTokenizer.from_pretrained(folder), ByteTokenizer()
    (tokens,) = own.encode([TEXT])
    assert tokenizer(TEXT)["input_ids"] == tokens.tolist() and tokenizer.decode(tokens) == TEXT
    assert tokenizer.eos_token_id == own.end_of_text
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == own.end_of_text
    again = from_folder(folder)
    assert again.encode([TEXT])[0].tolist() == tokens.tolist() and again.end_of_text == own.end_of_text


def test_one_checkpoint_and_another_dtype(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run / "checkpoints" / "step-00000002"), "--to", str(tmp_path / "it"), "--dtype", "bf16"]
    assert export.main(arguments) == 0
    assert "(step 2) exported to" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "it", torch_dtype="auto").dtype == torch.bfloat16


def test_what_cannot_be_exported_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "empty").mkdir()
    damaged = Path(shutil.copytree(newest(run), tmp_path / "damaged"))
    weights = damaged / "rank-00001-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-99] ^= 1
    weights.write_bytes(content)
    for source, target, sign in (
        (run, "full", "is a folder that holds something already: name a new folder"),
        (tmp_path / "nothing", "new", f"{tmp_path / 'nothing'} is not a folder"),
        (tmp_path / "empty", "new", "holds no checkpoint: name the folder of a run that was started with --save_every"),
        (damaged, "new", f"{weights} was altered after it was written"),
    ):
        assert export.main([str(source), "--to", str(tmp_path / target)]) == 2
        assert sign in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "empty", "full"]


def test_a_folder_is_not_exported_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(folder), "--to", str(tmp_path / "new")]) == 2
    assert "is a HuggingFace folder already" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_passed_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (newest(copy) / "index.json").write_text("{}")
    assert export.main([str(copy), "--to", str(tmp_path / "it")]) == 0
    told = capsys.readouterr()
    assert "passed over: " in told.err and "(step 2) exported" in told.out


# ---- sampling


def sampled(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = sample.main(list(arguments))
    told = capsys.readouterr()
    return code, told.out, told.err


def test_run_and_folder_write_the_same(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompt", "It was", "--max_new_tokens", "20", "--device", "cpu")
    code, text, told = sampled(capsys, str(run), *flags)
    assert code == 0 and text.startswith("It was") and len(text) > 10
    assert "step 4; tokenizer bytes" in told and "text is taken byte by byte" in told
    assert sampled(capsys, str(folder), *flags)[:2] == (0, text)
    assert sampled(capsys, str(newest(run)), *flags)[1] == text
    assert sampled(capsys, str(run), *flags, "--seed", "43")[1] != text


def test_without_a_temperature_nothing_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The likeliest byte every time, of those that the tokenizer has."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), ByteTokenizer()
    tokens = tokenizer.encode(["It was"])[0].tolist()
    for _ in range(8):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :257].argmax()))
    for seed in ("1", "2"):
        flags = ("--prompt", "It was", "--temperature", "0", "--max_new_tokens", "8", "--seed", seed)
        _, text, _ = sampled(capsys, str(folder), *flags, "--device", "cpu")
        assert text == tokenizer.decode(tokens) + "\n"


def test_what_cannot_be_sampled_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--temperature", "-1", "--top_k", "-2", "--seed", "-3", "--max_new_tokens", "200", "--prompt", "abc")
    code, _, told = sampled(capsys, str(folder), *flags)
    assert code == 2
    for sign in ("--temperature must", "--top_k must", "--seed must", "at most 125, the model's 128 positions"):
        assert sign in told
    code, _, told = sampled(capsys, str(folder), "--prompt", "a" * 128)
    assert code == 2 and "the prompt has 128 tokens, the model 128 positions" in told
    code, _, told = sampled(capsys, str(folder), "--tokenizer", str(tmp_path))
    assert code == 2 and "has no tokenizer" in told
    code, _, told = sampled(capsys, str(tmp_path))
    assert code == 2 and "holds no checkpoint" in told


def test_a_folder_without_a_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    assert open_model(bare).tokenizer is None
    code, _, told = sampled(capsys, str(bare), "--max_new_tokens", "3", "--device", "cpu")
    assert code == 0 and "text is taken byte by byte" in told
