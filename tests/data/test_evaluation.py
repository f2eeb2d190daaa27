"""Evaluation under every plan: it leaves no trace in the training, and says what it should. And whole runs on text."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, launch, run_processes, torchrun

from commons.plans.registry import PLANS

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40  # 2,880 bytes

# On two ranks, with dropout, which draws random numbers; what is captured or compiled needs a GPU or a minute.
CASES = [
    "--distplan Pytorch_DDP --precision fp32 --dropout 0.1",
    "--distplan Pytorch_ZeRO --dropout 0.1",
    "--distplan Pytorch_FSDP --dropout 0.1 --grad_accum 2",
    "--distplan CAI_ZeRO1 --dropout 0.1",
    "--distplan CAI_ZeRO2 --precision fp16 --dropout 0.1",
    "--distplan CAI_Gemini --blocks_per_chunk 1 --dropout 0.1",
    "--distplan CAI_Gemini --blocks_per_chunk 1 --gemini_hooks operation --max_prefetch 2 --dropout 0.1",
    "--distplan CAI_Gemini --placement auto",
    "--distplan CAI_Gemini --placement cpu --grad_accum 2",
    "--distplan CAI_Gemini --peer_copies on --blocks_per_chunk 1",
    "--distplan CAI_Gemini --tp_degree 2 --dropout 0.1",
    "--distplan CAI_Hybrid --dropout 0.1",
    "--distplan CAI_Hybrid --tp_degree 2 --sequence_parallel on --dropout 0.1",
    "--distplan CAI_Hybrid --pp_degree 2 --dropout 0.1",
    "--distplan CAI_Hybrid --pp_degree 2 --num_model_chunks 2 --num_microbatches 4 --grad_accum 2",
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What the ranks saw of every case."""
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text(TEXT)
    worker = REPOSITORY / "tests" / "workers" / "evaluation_worker.py"
    returncode, console = torchrun(worker, 2, str(text), *CASES)
    told = [json.loads(line) for line in re.findall(r"^SEEN (.*)$", console, re.MULTILINE)]
    assert returncode == 0, console[-3000:]
    return {each["case"]: each for each in told}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_evaluation_leaves_no_trace(seen: dict[str, dict], case: str) -> None:
    without, with_them = seen[case]["without"], seen[case]["with"]
    assert [step[:2] for step in with_them] == [step[:2] for step in without], "losses and gradient norms"
    assert [step[2] is not None for step in without] == [False] * 4
    assert [step[2] is not None for step in with_them] == [False, True, False, True]
    assert all(math.isfinite(loss) for loss in (with_them[1][2], with_them[3][2]))


def test_every_plan_is_among_the_cases() -> None:
    assert {case.split()[1] for case in CASES} == set(PLANS)


def test_the_held_out_loss_is_that_of_the_model(seen: dict[str, dict]) -> None:
    """Of the trained weights, a sample at a time, without dropout; and other plans', which train the same model."""
    expected = seen[CASES[0]]["expected"]
    assert seen[CASES[0]]["with"][-1][2] == pytest.approx(expected, rel=1e-6)
    for case in CASES:
        if "dropout" in case and not any(other in case for other in ("accum", "fp16", "_degree")):
            assert seen[case]["with"][-1][2] == pytest.approx(expected, rel=2e-3), case


@pytest.mark.timeout(300)
def test_a_run_on_text(tmp_path: Path) -> None:
    """Through the launcher: tokenised before the ranks, the same model as the reference, and what the files say."""
    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.split(". ")))
    flags = "--distplan Pytorch_DDP --precision fp32 --train_step 9 --seq_len 16 --lr 1e-3"
    flags += " --eval_every 4 --eval_fraction 0.1 --log_every 3"
    run = launch(tmp_path, *flags.split(), "--data", str(text), "--check_parity", "true", ranks=2)
    assert run.returncode == 0, run.console
    assert run.console.count("tokenising corpus.jsonl") == 1 and run.console.count("text is taken byte by byte") == 1
    assert re.search(r"^data +corpus\.jsonl · [\d,]+ tokens · tokenizer bytes · 18 of 1\d\d .* epochs planned$",
                     run.console, re.MULTILINE), run.console  # fmt: skip
    assert re.findall(r"^ *(\d)/9 ", run.console, re.MULTILINE) == ["1", "3", "4", "6", "8", "9"]
    assert len(re.findall(r"^ *eval +\d\.\d{4}  perplexity ", run.console, re.MULTILINE)) == 3
    assert [record["step"] for record in run.records] == list(range(1, 10))
    assert [record["step"] for record in run.records if record["eval_loss"] is not None] == [4, 8, 9]
    assert [record["tokens_seen"] for record in run.records] == [step * 2 * 4 * 16 for step in range(1, 10)]
    assert run.losses[-1] < run.losses[0] - 0.3
    summary, last = run.file("summary.json"), run.records[-1]
    assert summary["evaluations"] == 3 and summary["tokens_seen"] == 9 * 128
    assert summary["last_eval_loss"] == summary["best_eval_loss"] == last["eval_loss"]
    assert summary["last_eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    assert run.file("parity.json")["holds"] is True


@pytest.mark.parametrize("entry", [["-m", "commons.launch"], ["train_gpt_demo.py"]])
def test_bad_data_ends_both_entries_before_anything_is_built(tmp_path: Path, entry: list[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": "not so"}\n')
    command = [
        sys.executable,
        *entry,
        "--device",
        "cpu",
        "--data",
        str(tmp_path / "bad.jsonl"),
        "--log_dir",
        str(tmp_path),
    ]
    returncode, console = run_processes(command)
    assert returncode == 2 and "1 problem with the settings, nothing was started" in console
    assert 'bad.jsonl, line 2: no JSON object with a "text": each line needs one' in console
    assert "Traceback" not in console and not list(tmp_path.glob("*/config.json"))
