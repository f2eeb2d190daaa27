"""The worked example of docs/training.md, run as it stands there: trained, killed, resumed, exported, sampled."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from suite_runs import REPOSITORY, run_processes
from transformers import AutoModelForCausalLM, AutoTokenizer

PAGE = REPOSITORY / "docs" / "training.md"
SECONDS = 280


def example() -> str:
    """The section's commands, in order."""
    section = re.search(r"^## A worked example\n(.*?)^## ", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert section
    return "\n".join(re.findall(r"```bash\n(.*?)```", section[1], re.DOTALL))


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.slow
def test_the_example_is_what_happens(tmp_path: Path) -> None:
    for name in ("run_gemini.sh", "commons", "model_zoo.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)  # as if this were the suite's folder
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    code, console = run_processes(
        ["bash", "-c", f"set -x\n{example()}"], environment={"PATH": path}, seconds=SECONDS, cwd=tmp_path
    )
    assert code == 0, console
    logs = tmp_path / "gemini_logs"
    killed, resumed = steps(logs / "example"), steps(logs / "example2")
    assert killed[0]["loss"] > 6.5 and 100 <= len(killed) < 200, console
    assert not (logs / "example" / "summary.json").exists(), "it was to be killed, and has ended"
    # it goes on behind the last whole checkpoint, whose steps it does not train again
    assert resumed[0]["step"] % 20 == 1 and 101 <= resumed[0]["step"] <= len(killed) + 1, console
    assert resumed[-1]["step"] == 200
    assert resumed[0]["loss"] < 4 and resumed[-1]["loss"] < 3 < killed[20]["loss"], console
    twice = {record["step"]: record["loss"] for record in killed}
    for record in resumed:
        if record["step"] in twice:  # the same samples, in fp32 instead of bf16
            assert record["loss"] == pytest.approx(twice[record["step"]], rel=0.02)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "example_model")
    tokens = tokenizer("The statement", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "example_model")
    assert model(**tokens).logits.shape[-1] == 1000
    assert "The statement" in console.rpartition("tokenizer")[2]
