#!/usr/bin/env python
"""Train a HuggingFace GPT-2 on random tokens under one of the plans and log TFLOPS and memory every step.

One rank of a run. ``bash run_gemini.sh`` starts all of them; so does
``torchrun --nproc_per_node 2 train_gpt_demo.py``, and plain ``python train_gpt_demo.py`` is a run of one.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from commons import device
from commons.config import TrainConfig
from commons.doctor import explain_uncaught
from commons.noise import quiet_libraries
from commons.sinks import open_sinks


@record
def main(argv: list[str]) -> None:
    config = TrainConfig.from_cli(argv)
    quiet_libraries()
    here = device.launch(config.device, config.timeout)
    sound = train(config.named(here.world_size), here)
    # only after success: with a rank gone, leaving the group together would hang
    device.leave(0 if sound else 1)


def train(config: TrainConfig, here: device.Device) -> bool:
    """Build the session, train, and let rank 0 log it (collective); False if --check_parity finds a difference."""
    from commons.engine import build_session, train_steps
    from commons.metrics import summarize
    from commons.parity import check_parity, with_known_norms

    if config.check_parity:
        config = with_known_norms(config)
    session = build_session(config, here)
    with open_sinks(session) as sinks:
        records = []
        for step in train_steps(session):
            records.append(step)
            for sink in sinks:
                sink.log(step)
        summary = summarize(records, config.warmup_step)
        for sink in sinks:
            sink.report(summary)
    return not config.check_parity or check_parity(session, records)


if __name__ == "__main__":
    explain_uncaught()
    main(sys.argv[1:])
