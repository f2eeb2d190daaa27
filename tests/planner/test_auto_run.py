"""--auto for real on two CPU ranks: layouts tried in processes of their own, then the training with the chosen one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from suite_runs import launch

from commons.cli.flags import read_request


@pytest.mark.slow
def test_auto_tries_chooses_and_trains(tmp_path: Path) -> None:
    given = ("--model_type", "gpt2_tiny", "--device", "cpu", "--batch_size", "4", "--activation_checkpointing", "off")
    run = launch(tmp_path, "--auto", "--auto_minutes", "0.4", *given, "--train_step", "3", ranks=2)
    assert run.returncode == 0, run.console
    choice = run.file("auto.json")
    (chosen,) = [layout for layout in choice["layouts"] if layout["chosen"]]
    assert len(choice["layouts"]) >= 4 and len({layout["settings"]["distplan"] for layout in choice["layouts"]}) >= 3
    others = [layout for layout in choice["layouts"] if not layout["chosen"]]
    assert all(layout["lost_because"] for layout in others)
    measured = [layout for layout in choice["layouts"] if (layout["measured"] or {}).get("tokens_per_second")]
    if measured:  # else this machine was too slow for any trial in its time
        assert chosen is max(measured, key=lambda layout: layout["measured"]["tokens_per_second"])
    config = run.file("config.json")
    assert config["distplan"] == chosen["settings"]["distplan"] and config["batch_size"] == 4 and not config["auto"]
    assert len(run.records) == 3 and run.file("summary.json")["ended"] == "finished"
    assert f"Without --auto: {choice['command']}" in run.console
    words = shlex.split(choice["command"])
    assert words[:3] == ["GPUNUM=2", "bash", "run_gemini.sh"]
    line = read_request(words[3:], {}).line
    assert not line.problems and line.given["distplan"] == config["distplan"]
    json.dumps(choice, allow_nan=False)
