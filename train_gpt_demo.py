#!/usr/bin/env python
"""Train a HuggingFace GPT-2 on random tokens under one of the plans and log TFLOPS and memory every step.

One rank of a run. ``bash run_gemini.sh`` starts all of them; so does
``torchrun --nproc_per_node 2 train_gpt_demo.py``, and plain ``python train_gpt_demo.py`` is a run of one.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # which PYTHONSAFEPATH=1 leaves out

from commons.cli.flags import read_config
from commons.config.schema import TrainConfig
from commons.distributed import device
from commons.doctor import explain_uncaught
from commons.lifecycle.caches import settle_caches
from commons.lifecycle.guard import Guard, on_duty
from commons.lifecycle.heartbeat import group_timeout_seconds
from commons.lifecycle.standard_streams import open_closed_streams
from commons.reporting.noise import quiet_libraries
from commons.reporting.run_folder import with_own_folder
from commons.reporting.run_log import open_log


def main(argv: list[str]) -> None:
    open_closed_streams()
    settle_caches()
    with on_duty() as guard:  # signals and errors end the run in order from here on
        config = read_config(argv)
        quiet_libraries()
        guard.beat("join")
        guard.timeout_seconds = config.timeout
        here = device.launch(config.device, group_timeout_seconds(config.timeout))
        train(with_own_folder(config, here.world_size, here.rank), here, guard)
        guard.leave()


def train(config: TrainConfig, here: device.Device, guard: Guard) -> None:
    """Build the session, train, and let rank 0 log it (collective). How it ended is with the guard."""
    from commons.training.loop import build_session, train_steps
    from commons.training.parity import check_parity, with_known_norms

    if config.check_parity:
        config = with_known_norms(config)
    guard.beat("build")
    session = build_session(config, here)
    with open_log(config, session.header(), guard) as log:
        for record in train_steps(session, guard):
            log.add(record)
        log.finish(guard.ended)
    if config.check_parity and guard.finished:
        guard.ended = check_parity(session, log.records)


if __name__ == "__main__":
    explain_uncaught()
    main(sys.argv[1:])
