"""Findings as text and as JSON."""

from __future__ import annotations

import json
import os
import pty
import re

from worlds.fake_machine import FakeMachine
from worlds.sick_machines import check_schema, shadow

from commons.doctor import as_text, diagnose
from commons.doctor.report import as_json, wants_colour


def test_json_schema(wsl: FakeMachine) -> None:
    answer = json.loads(json.dumps(as_json(diagnose(shadow(wsl)))))
    check_schema(answer)
    assert answer["exit_code"] == 1
    assert answer["counts"]["error"] == 1


def test_text(wsl: FakeMachine) -> None:
    findings = diagnose(shadow(wsl))
    text = as_text(findings, width=80)
    assert "\x1b" not in text
    cure = "cure: LD_LIBRARY_PATH=/usr/lib/wsl/lib bash run_gemini.sh   # at once, without removing anything"
    assert f"         {cure}" in text.splitlines(), "a command is one line, however narrow the terminal"
    others = [line for line in text.splitlines() if "cure:" not in line and not line.startswith(" " * 15)]
    assert max(map(len, others)) <= 80
    assert "id:   libcuda.shadowed" in text
    coloured = as_text(findings, colour=True, width=80)
    assert coloured != text
    assert re.sub(r"\x1b\[\d+m", "", coloured) == text


def test_colour_is_for_terminals() -> None:
    main_side, other_side = pty.openpty()
    with os.fdopen(main_side), os.fdopen(other_side, "w") as terminal, open(os.devnull, "w") as file:
        assert wants_colour(terminal, {})
        assert wants_colour(terminal, {"NO_COLOR": ""})
        assert not wants_colour(terminal, {"NO_COLOR": "1"})
        assert not wants_colour(terminal, {"TERM": "dumb"})
        assert not wants_colour(file, {})
