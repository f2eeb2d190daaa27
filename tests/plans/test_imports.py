"""Importing Colossal-AI leaves out what the suite never calls, installed or not."""

from __future__ import annotations

import os
import sys

import pytest
from suite_runs import run_processes

from commons.plans.colossal.imports import UNUSED_PACKAGES

IMPORT = """
import sys
from commons.plans.colossal.imports import UNUSED_PACKAGES, import_colossalai
import_colossalai()
print("left behind:", sorted(set(UNUSED_PACKAGES) & set(sys.modules)))
"""


@pytest.mark.parametrize("installed", [False, True])
def test_packages_that_nobody_calls_are_not_imported(tmp_path, installed):
    if installed:
        for package in UNUSED_PACKAGES:
            (tmp_path / f"{package}.py").write_text(f"raise RuntimeError('{package} was imported')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    returncode, console = run_processes([sys.executable, "-c", IMPORT], environment={"PYTHONPATH": path})
    assert returncode == 0, console
    assert "left behind: []" in console
