"""Gemini with a hook per block: the same bits as with a hook per operation, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import suite_runs

WORKER = Path(__file__).with_name("region_worker.py")


@pytest.mark.parametrize("ranks", [1, 2])
def test_same_bits_as_with_a_hook_per_operation(ranks):
    returncode, console = suite_runs.torchrun(WORKER, ranks)
    assert returncode == 0, console[-4000:]
