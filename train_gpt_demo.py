#!/usr/bin/env python
"""Train a HuggingFace GPT-2 on random tokens or text under one of the plans and log TFLOPS and memory every step.

One rank of a run. ``bash run_gemini.sh`` starts all of them; so does
``torchrun --nproc_per_node 2 train_gpt_demo.py``, and plain ``python train_gpt_demo.py`` is a run of one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # which PYTHONSAFEPATH=1 leaves out

from commons.cli.flags import read_config
from commons.cli.less_memory import with_advice
from commons.cli.preflight import preflight
from commons.config.resolved import ResolvedConfig
from commons.distributed import process_group
from commons.distributed.device import Device
from commons.doctor import explain_uncaught
from commons.lifecycle.caches import settle_caches
from commons.lifecycle.guard import Guard, on_duty
from commons.lifecycle.heartbeat import group_timeout_seconds
from commons.reporting.noise import quiet_libraries
from commons.reporting.run_folder import with_own_folder
from commons.reporting.run_log import open_log, summary_in_any_case


def main(argv: list[str]) -> None:
    settle_caches()
    with on_duty() as guard:  # signals and errors end the run in order from here on
        config = read_config(argv, os.environ)
        quiet_libraries()
        guard.beat("join")
        guard.timeout_seconds, guard.advise = config.timeout, partial(with_advice, config)
        here = process_group.launch(config.device, group_timeout_seconds(config.timeout))
        guard.ended = preflight(config, here)
        if not guard.finished:
            guard.leave()
        config = with_own_folder(config, here.rank)
        name = process_group.first_rank_s(config.run_name)
        train(dataclasses.replace(config, run_name=name), here, guard)
        guard.leave()


def train(config: ResolvedConfig, here: Device, guard: Guard) -> None:
    """Build the session, train, and let rank 0 log it (collective). How it ended is with the guard."""
    from commons.checkpoint.keeper import open_keeper
    from commons.training.loop import train_steps
    from commons.training.parity import check_parity, with_known_norms
    from commons.training.session import build_session

    if config.check_parity:
        config = with_known_norms(config)
    with summary_in_any_case(config, guard):
        guard.beat("build")
        session = build_session(config, here)
        keeper = open_keeper(session.trainable, config, here, guard)
    with open_log(session.settled_config(0), session.header(), guard) as log:
        for record in train_steps(session, guard, keeper):
            log.add(record)
            log.settle(session.settled_config(record.step))
        log.finish(guard.ended)
    if config.check_parity and guard.finished:
        guard.beat("parity")
        guard.ended = check_parity(session, log.records)


if __name__ == "__main__":
    explain_uncaught()
    main(sys.argv[1:])
