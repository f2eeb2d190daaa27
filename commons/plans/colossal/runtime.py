"""The one door between the plans and Colossal-AI: everything is imported, registered and mended here, once a
process.
"""

from __future__ import annotations

import functools


@functools.cache
def prepare(device_type: str) -> None:
    """Make Colossal-AI ready for this process's device.

    Args:
        device_type: "cuda" or "cpu"; on "cpu" the host backend is installed.

    Raises:
        RuntimeError: Colossal-AI is missing or too old, or "cpu" was asked for where a CUDA device is
            visible.
    """
    from commons.plans.colossal.imports import import_colossalai

    import_colossalai()
    from colossalai.zero.gemini.memory_tracer import memstats_collector

    from commons.plans.colossal import adam_kernels, faults, split_gpt2, suite_chunk

    # placement auto prints "finish_collection 36" into the step lines
    memstats_collector.print = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    adam_kernels.register()
    suite_chunk.install()
    split_gpt2.register()
    if device_type == "cpu":
        from commons.plans.colossal import host_backend

        host_backend.install()
    faults.mend_all()  # asks upstream about devices, so the device comes first
