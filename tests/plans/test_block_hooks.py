"""Gemini with a hook per block: the same bits as with a hook per operation, on real ranks."""

from __future__ import annotations

import pytest
import suite_runs
from suite_runs import REPOSITORY

WORKER = REPOSITORY / "tests" / "workers" / "region_worker.py"


@pytest.mark.parametrize("ranks", [1, 2])
def test_same_bits_as_with_a_hook_per_operation(ranks):
    returncode, console = suite_runs.torchrun(WORKER, ranks)
    assert returncode == 0, console[-4000:]
