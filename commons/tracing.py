"""``--trace_step``: one step under torch's profiler, as a file for Perfetto, chrome://tracing and benchmarks.trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACE_FILE = "trace.json.gz"


@contextmanager
def traced(path: Path | None, device_type: str) -> Iterator[None]:
    """Record what the block does into ``path``; nothing where that is None.

    On a GPU only the device's work and the launches are recorded: recording every operation of the host would slow
    down what is looked at.
    """
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device_type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
