"""The child processes, with a real library and a real nvidia-smi made here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from worlds.fake_machine import compile_libcuda
from worlds.sick_machines import run_doctor

from commons.doctor import Machine

SMI_SCRIPT = """#!/bin/sh
case "$*" in
    *query-gpu=*compute_cap*)
        echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;;
    *query-gpu=*)
        echo '0, GPU-1, NVIDIA Fake 1, 551.78, 12282, 10, Default' ;;
    "") echo '| NVIDIA-SMI 550.65   Driver Version: 551.78   CUDA Version: 12.4 |' ;;
esac
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler to make a libcuda")
@pytest.mark.parametrize(("init", "finding_id"), [(100, "libcuda.no-device"), (0, "libcuda"), (999, "libcuda.unknown")])
def test_real_library_and_real_nvidia_smi(tmp_path: Path, init: int, finding_id: str) -> None:
    """The way through dlopen, /proc/self/maps and a child process, with a library made here."""
    library = tmp_path / "libcuda.so.1"
    compile_libcuda(library, init)
    (tmp_path / "nvidia-smi").write_text(SMI_SCRIPT)
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    # without site-packages, since torch would be asked for its GPU
    done = run_doctor(
        "--json", "--topic", "gpu", python=(sys.executable, "-S"), PATH=path, LD_LIBRARY_PATH=str(tmp_path)
    )
    by_id = {finding["id"]: finding for finding in json.loads(done.stdout)["findings"]}
    if init and not Path("/dev/nvidiactl").exists() and (init == 100 or Machine().container):
        finding_id = "libcuda.device-nodes"  # and that is the reason for the answer
    assert f"{library}: " in by_id[finding_id]["seen"]
    assert init == 0 or f": cuInit answers {init}" in by_id[finding_id]["seen"]
    assert "551.78" in by_id["driver"]["title"]
    if init == 0:
        assert "NVIDIA Fake 1 (compute capability 8.9)" in by_id["libcuda"]["seen"]
        assert by_id["libcuda"]["title"].endswith("12.4")
