"""Kills a training at random moments, again and again, and lets it go on each time.

python tests/workers/killed_worker.py results.json KILLS SEED RANKS "FLAGS"

The ranks are forked from this process, which has imported everything: a life takes a second. After each kill the last
whole checkpoint has to be there, and no older than the one before; every loss that any life sees has to be that of an
unbroken run. results.json: how many kills hit what, and every breach.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

from commons.checkpoint.files import CheckpointError
from commons.checkpoint.keeper import open_keeper
from commons.checkpoint.store import Checkpoint, checkpoint_folders
from commons.cli.flags import read_config
from commons.distributed import process_group
from commons.lifecycle import leaving
from commons.lifecycle.guard import Guard
from commons.plans.colossal.runtime import prepare
from commons.training.loop import train_steps
from commons.training.session import build_session

STEPS = 12
COMMON = (
    f"--model_type gpt2_tiny --num_layers 1 --batch_size 2 --seq_len 16 --train_step {STEPS} --warmup_step 0 --lr 1e-2"
    " --dropout 0.1 --run_name unused --device cpu"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def live(rank: int, ranks: int, port: int, folder: Path, flags: str) -> None:
    """The life of one rank; it ends the process."""
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    errors = os.open(folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 2)
    config = read_config(shlex.split(f"{COMMON} {flags}"))
    here = process_group.launch("cpu", 60.0)
    session, guard = build_session(config, here), Guard()
    keeper = open_keeper(session.trainable, config, here, guard)
    for record in train_steps(session, guard, keeper):
        if rank == 0:
            with (folder / "losses").open("a") as file:
                file.write(f"{record.step} {record.loss!r} {record.grad_norm!r}\n")
    leaving.leave(guard.ended.exit_code)


def start(ranks: int, folder: Path, flags: str) -> list[int]:
    """Fork all ranks; their process ids."""
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                live(rank, ranks, port, folder, flags)
            finally:
                os._exit(70)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def losses(folder: Path) -> dict[int, set[str]]:
    """What was seen of each step, by all lives. A line that is not whole is left out."""
    seen: dict[int, set[str]] = {}
    for line in (folder / "losses").read_text().splitlines(keepends=True):
        step, _, rest = line.partition(" ")
        if line.endswith("\n") and rest.count(" ") == 1:
            seen.setdefault(int(step), set()).add(rest.strip())
    return seen


def newest(save_dir: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none. Whatever has a checkpoint's name has to be whole."""
    for folder in checkpoint_folders(save_dir):
        checkpoint = Checkpoint(folder)
        checkpoint.verify()
        return checkpoint.step
    return 0


def main(results: Path, kills: int, seed: int, ranks: int, flags: str) -> None:
    prepare("cpu")
    rng, folder, counts, breaches = random.Random(seed), results.parent, Counter(), []
    begun = time.monotonic()
    assert set(wait(start(ranks, folder, flags))) == {0}, (folder / "errors-0").read_text()
    whole_seconds, expected = time.monotonic() - begun, losses(folder)
    save_dir, known = folder / "saved", 0
    saving = f"{flags} --save_dir {save_dir} --save_every 1 --keep 2 --resume auto"
    while counts["kills"] < kills:
        pids = start(ranks, folder, saving)
        time.sleep(rng.uniform(0.1, 1.2) * whole_seconds)
        for pid in rng.sample(pids, rng.randint(1, ranks)) + pids:
            os.kill(pid, signal.SIGKILL)
        codes = wait(pids)
        counts["kills"] += 1
        counts["in the middle of writing"] += any(save_dir.glob(".writing-*"))
        counts["before the first checkpoint"] += known == 0
        if any(code not in (0, -signal.SIGKILL) for code in codes):
            breaches.append(f"exit codes {codes}: {(folder / 'errors-0').read_text()[-2000:]}")
        try:
            now = newest(save_dir)
        except CheckpointError as error:
            breaches.append(str(error))
            break
        if now < known:
            breaches.append(f"from step {known} back to {now}")
        known = now
        if known == STEPS:
            counts["trainings"] += 1
            shutil.rmtree(save_dir)
            known = 0
    breaches += [f"step {step}: {seen}" for step, seen in losses(folder).items() if seen != expected[step]]
    results.write_text(json.dumps({**counts, "breaches": breaches}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
