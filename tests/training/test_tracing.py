"""The trace of a step, and what benchmarks.trace makes of one."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import trace
from commons.training.tracing import TRACE_FILE, traced


def test_a_traced_block_leaves_a_trace(tmp_path: Path) -> None:
    with traced(tmp_path / "run" / TRACE_FILE, "cpu"):
        torch.dot(torch.ones(8), torch.ones(8))
    with gzip.open(tmp_path / "run" / TRACE_FILE, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::dot" in names


def test_no_path_no_trace(tmp_path: Path) -> None:
    with traced(None, "cpu"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cuda, spared", [("12.4", True), ("12.6", False), ("13.0", False), (None, False)])
def test_older_profilers_are_kept_from_what_crashes_graphs(tmp_path, monkeypatch, cuda, spared) -> None:
    for name in ("DISABLE_CUPTI_LAZY_REINIT", "TEARDOWN_CUPTI"):
        monkeypatch.setenv(name, "unset")  # put back afterwards
    monkeypatch.setattr("torch.version.cuda", cuda)
    with traced(tmp_path / TRACE_FILE, "cpu"):
        pass
    found = os.environ["DISABLE_CUPTI_LAZY_REINIT"], os.environ["TEARDOWN_CUPTI"]
    assert found == (("1", "0") if spared else ("unset", "unset"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A step of 100 us: a matrix product of 40, a gather that starts 10 before its end and lasts 30, a gap, Adam."""
    pieces = [
        ("nvjet_sm90_gemm", "kernel", 1000, 40),
        ("ncclDevKernel_AllGather_RING_LL", "kernel", 1030, 30),
        ("triton_poi_fused_add_0", "kernel", 1080, 20),
        ("cudaLaunchKernel", "cuda_runtime", 900, 500),
    ]
    events = [{"name": name, "cat": cat, "ts": ts, "dur": dur} for name, cat, ts, dur in pieces]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    return file


def test_breakdown(path: Path) -> None:
    found = trace.breakdown(trace.read_work(path))
    assert found == pytest.approx(
        {
            "communication": 0.03,
            "matrix products": 0.04,
            "compiled pointwise work, norms, loss and Adam": 0.02,
            "not hidden by computation": 0.02,
            "idle": 0.02,
            "first to last piece of work": 0.1,
        }
    )


def test_report_names_kernels_and_gaps(path: Path) -> None:
    text = trace.report(path, kernels=3)
    assert "`nvjet_sm90_gemm` | 0.04 | 1 |" in text
    assert "| 0.06 | 0.020 | `ncclDevKernel_AllGather_RING_LL` | `triton_poi_fused_add_0` |" in text


def test_a_trace_without_a_device_says_so(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": []}))
    assert "no work of a GPU" in trace.report(file, kernels=0)
