"""``--trace_step``: one step under torch's profiler, as a file for Perfetto, chrome://tracing and benchmarks.trace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packaging.version import Version

TRACE_FILE = "trace.json.gz"
# Before, the profiler's end could crash a process with CUDA graphs: https://github.com/pytorch/pytorch/issues/112507
CUPTI_SURVIVES_GRAPHS = Version("12.6")


@contextmanager
def traced(path: Path | None, device_type: str) -> Iterator[None]:
    """Record what the block does into ``path``; nothing where that is None.

    On a GPU only the device's work and the launches are recorded: recording every operation of the host would slow
    down what is looked at.
    """
    if path is None:
        yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.version.cuda is not None and Version(torch.version.cuda) < CUPTI_SURVIVES_GRAPHS:
        os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
    activity = ProfilerActivity.CUDA if device_type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
