"""Ranks that copy from each other's memory, each at a pace of its own. For torchrun; fails by assertion.

``copies``: tensors gathered and averaged, against what every rank must have written.
``training``: gpt2_tiny under Gemini with ``--peer_copies on``, against ``off``. For two ranks, whose mean is exact.
"""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from commons.cli.flags import read_config
from commons.config.schema import TrainConfig
from commons.distributed import device, peer_copies, process_group
from commons.distributed import peer_memory as peers
from commons.distributed.peer_copies import Flag, PeerCopies, find_peers
from commons.distributed.peer_memory import HostPeers
from commons.lifecycle import leaving
from commons.lifecycle.outcome import RunError
from commons.plans.colossal.runtime import prepare
from commons.training.loop import train_steps
from commons.training.session import build_session

HANGS_SECONDS = 200  # after which every rank shows where it is, and ends
FILES = "gemini-gpt2-"  # what the names of those begin with that ranks share memory through

ROUNDS = 60
# elements of a part: multiples of what parts are aligned to, others, and fewer than that
PART_SIZES = [384, 1, 127, 128, 1000, 129, 4096]
INFERENCE = 4  # every so many rounds, one averages nothing
# integers up to these are exact in the dtype, and so are their sums in fp32
LARGEST = {torch.bfloat16: 256, torch.float32: 1 << 20}


class UnevenPeers(HostPeers):
    """Ranks that stop for a random while wherever they signal each other, so that a missing wait shows."""

    def __init__(self, group: dist.ProcessGroup, flags: int = len(Flag), slow: bool = False) -> None:
        self._pauses = random.Random(dist.get_rank(group))
        self.captured = False
        super().__init__(group, flags)
        if slow:
            self.link_rate = 50e9

    def signal(self, peer: int, flag: int) -> None:
        self.pause()
        super().signal(peer, flag)
        self.pause()

    def wait(self, peer: int, flag: int) -> None:
        self.pause()
        super().wait(peer, flag)
        self.pause()

    def capturing(self) -> bool:
        return self.captured

    def pause(self) -> None:
        """Mostly none; sometimes long enough for the others to get far ahead."""
        if self._pauses.random() < 0.05:
            time.sleep(self._pauses.choice((1e-4, 5e-4, 3e-3)))


def numbers(dtype: torch.dtype, elements: int, *of: int) -> torch.Tensor:
    """Integers that ``of`` alone decides, the same on all ranks."""
    generator = torch.Generator().manual_seed(int.from_bytes(bytes(of), "big"))
    return torch.randint(-LARGEST[dtype], LARGEST[dtype] + 1, (elements,), generator=generator).to(dtype)


def check_copies(here: device.Device, dtype: torch.dtype, replicated: bool) -> None:
    """Rounds as Gemini's steps: parts are written, gathered in order, gathered again in the opposite order, each with
    an average after it, into the part's place or elsewhere. Some average nothing, as inference. From the middle on the
    others have barriers and use slots as passes do that were captured once. ``replicated`` tensors are gathered once
    per round, and what is averaged takes their place.
    """
    group: Any = dist.group.WORLD
    uneven = UnevenPeers(group)
    copies = PeerCopies(uneven, PART_SIZES, dtype, replicated=replicated)
    assert [len(part) for parts in copies.parts for part in parts] == [
        n for n in PART_SIZES for _ in range(uneven.size)
    ]
    tensors = range(len(PART_SIZES))
    ranks = range(uneven.size)
    wholes = copies.wholes or [torch.empty(uneven.size * size, dtype=dtype) for size in PART_SIZES]
    assert [len(whole) for whole in wholes] == [uneven.size * size for size in PART_SIZES]

    def gather(turn: int, index: int) -> None:
        copies.gather(copies.parts[index], wholes[index])
        written = torch.cat([numbers(dtype, PART_SIZES[index], 0, turn, index, rank) for rank in ranks])
        assert wholes[index].equal(written), (turn, index)

    def average(turn: int, index: int) -> None:
        own, size = copies.parts[index][here.rank], PART_SIZES[index]
        in_place = replicated or (turn + index) % 3 > 0
        out, before = own if in_place else torch.empty(size, dtype=dtype), own.clone()
        given = [numbers(dtype, len(wholes[index]), 1, turn, index, rank) for rank in ranks]
        whole = wholes[index].copy_(given[here.rank]) if replicated else given[here.rank].clone()
        copies.average(whole, out)
        total = sum(whole.double() for whole in given)
        assert isinstance(total, torch.Tensor)
        pieces = (total.float() / uneven.size).to(dtype).chunk(uneven.size)
        assert out.equal(pieces[here.rank]), (turn, index)
        assert in_place or own.equal(before), (turn, index)

    for turn in range(ROUNDS):
        inference = turn % INFERENCE == 1
        uneven.captured = turn > ROUNDS // 2 and not inference
        if uneven.captured:
            copies.start_with_slot(1)  # the first slot and the last are the same, so that it is used twice in turn
        for index in tensors:
            uneven.pause()
            copies.parts[index][here.rank].copy_(numbers(dtype, PART_SIZES[index], 0, turn, index, here.rank))
        copies.barrier()
        for index in tensors:
            uneven.pause()
            gather(turn, index)
        if replicated:
            copies.signal_read()
            uneven.pause()
            copies.wait_read()
        if inference:
            if not replicated:
                copies.barrier()
            continue
        for index in reversed(tensors):
            uneven.pause()
            if not replicated:
                gather(turn, index)
            average(turn, index)
    check_flags(copies)


def check_flags(copies: PeerCopies) -> None:
    """When all is over, nothing is signalled that no one has waited for."""
    dist.barrier()
    assert copies.raised_flags() == 0


def check_agreement(here: device.Device) -> None:
    """One rank that says no is enough."""
    assert process_group.every_rank(True, here.torch_device)
    assert not process_group.every_rank(here.rank != 0, here.torch_device)


def check_files(here: device.Device) -> None:
    """A file that ranks share has no name any more when they do: there, where there is no /dev/shm, and where there is
    no room for one rank, which all of them tell with the way out.
    """
    group: Any = dist.group.WORLD
    kept = HostPeers(group, len(Flag)).share(1000, torch.float32)
    dist.barrier()  # every rank takes its own file's name
    assert len(shared_files()) >= len(kept)
    assert all(line.endswith("(deleted)") for line in shared_files())
    folder = Path(tempfile.gettempdir())
    writable, limits = peers.os.access, resource.getrlimit(resource.RLIMIT_FSIZE)
    peers.os.access = lambda *_, **__: False
    try:
        kept += HostPeers(group, len(Flag)).share(1000, torch.float32)
        dist.barrier()
        assert sum(str(folder) in line for line in shared_files()) >= here.world_size
        if here.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
        find_peers(TrainConfig(peer_copies="on").resolve("cpu", here.world_size), here)
        raise AssertionError("there was room after all")
    except RunError as error:
        assert "do not reach each other" in str(error) and "use --peer_copies off" in str(error), error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        peers.os.access = writable
    dist.barrier()
    assert not list(folder.glob(f"{FILES}*")) and all(line.endswith("(deleted)") for line in shared_files())


def shared_files() -> list[str]:
    """The files that this process has mapped, a line each."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if FILES in line]


STEPS, TOKENS = 4, 4 * 64
LATE_SECONDS = 0.01
COMMON = (
    f"--model_type gpt2_tiny --batch_size 4 --seq_len 64 --lr 1e-3 --train_step {STEPS} --warmup_step 1"
    " --compile off --run_name unused"
)
CASES = {
    "defaults": "",
    "several chunks, gathered ahead": "--blocks_per_chunk 1 --max_prefetch 2",
    "accumulation, clipping": "--blocks_per_chunk 1 --grad_accum 2 --clip_grad_norm 0.5",
    "fp16": "--blocks_per_chunk 1 --precision fp16 --clip_grad_norm 0.5",
    "fp16 that overflows": "--blocks_per_chunk 1 --precision fp16 --initial_loss_scale 4294967296",
    "half sharded": "--blocks_per_chunk 1 --shard_param_frac 0.5 --max_prefetch 2",
    "replicated": "--blocks_per_chunk 1 --shard_param_frac 0",
    "replicated, nothing ahead, clipping": (
        "--blocks_per_chunk 1 --shard_param_frac 0 --max_prefetch 0 --clip_grad_norm 0.5"
    ),
    "replicated, accumulation": "--blocks_per_chunk 1 --shard_param_frac 0 --grad_accum 2 --clip_grad_norm 0.5",
    "replicated, fp16": "--blocks_per_chunk 1 --shard_param_frac 0 --precision fp16 --clip_grad_norm 0.5",
    "replicated in one chunk": "--shard_param_frac 0",
    "replicated, slow links": "--blocks_per_chunk 1 --shard_param_frac 0",
}


def check_training(here: device.Device) -> None:
    """The same losses and norms to the bit, and no collective of the process group for a chunk."""
    prepare("cpu")
    from commons.plans.colossal import chunk_gradients

    chunk_gradients.AVERAGED_BESIDE = TOKENS // 2  # as with thousands of them
    averages = Averages(chunk_gradients.ChunkGradients)
    for name, flags in CASES.items():
        found = {}
        group, slow = dist.group.WORLD, "slow" in name
        peer_copies.peers_of = lambda _, group=group, slow=slow: UnevenPeers(group, slow=slow)  # pyright: ignore
        for choice in ("on", "off"):
            config = read_config([*COMMON.split(), *flags.split(), "--peer_copies", choice]).resolve("cpu")
            session: Any = build_session(config, here)
            assert session.header().peer_copies == (choice == "on")
            with torch.no_grad():  # before the first step, which tells Gemini the order of its chunks
                early = session.trainable.forward(torch.arange(64).view(1, 64)).item()
            averages.after.clear()
            with Collectives() as counts, LateGathers(here.rank == 1 and "replicated" in name):
                records = [(step.loss, step.grad_norm, step.skipped_steps) for step in train_steps(session)]
            chunks, batches = chunks_of(session), STEPS * config.grad_accum
            if choice == "on":
                assert counts == {"gathers": STEPS}, counts  # of the record of a step
                # the first half waits where chunks stay whole, are not accumulated elsewhere, and links would sleep
                waits = len(chunks) // 2 if "replicated" in name and config.grad_accum == 1 and not slow else 0
                assert averages.after == [max(waits, index) + 1 for index in range(len(chunks))] * batches
                for chunk in chunks:
                    assert chunk.cuda_shard.data_ptr() == chunk.parts[here.rank].data_ptr()
                    assert chunk.memory_usage == {"cuda": chunk.shard_mem, "cpu": 0}
            else:
                assert counts["gathers"] >= STEPS + batches * len(chunks)
                assert counts["reductions"] == batches * len(chunks)
            inferences = [inferred(session, seed) for seed in range(3)]
            found[choice] = records, [early, *inferences], of_own_loss(session)
            if "overflows" not in name:  # in fp16 a mean can be finite where a sum is not
                found[choice] += (interrupted(session),)
            if choice == "on":
                check_flags(chunks[0].copies)
        if here.rank == 0:
            print(name, found["on"], flush=True)
        assert found["on"] == found["off"], name
        records, inferences, *_ = found["on"]
        assert len({loss for loss, _, _ in records}) == STEPS and len(set(inferences)) == len(inferences)
        assert ("overflows" in name) == (records[-1][2] > 0), name


def inferred(session: Any, seed: int) -> float:
    """The loss with other weights than before, which are loaded as soon as the last inference is through. One rank is
    behind the others when it begins to gather them.
    """
    rank = session.device.rank
    for index, chunk in enumerate(chunks_of(session)):
        generator = torch.Generator().manual_seed(1000 * seed + 10 * index + rank)
        chunk.cuda_shard.copy_(0.02 * torch.randn(chunk.shard_size, generator=generator))
    with LateGathers(rank == seed % 2), torch.no_grad():
        return session.trainable.forward(torch.arange(64).view(1, 64) + seed).item()


def of_own_loss(session: Any) -> list[float]:
    """Norms of gradients of a loss that is not the model's: without labels there is a hook per operation."""
    trainable = session.trainable
    logits = trainable.model(input_ids=torch.arange(64).view(1, 64) + session.device.rank).logits
    trainable.backward(logits.float().square().mean())
    return norms_of(session)


def interrupted(session: Any) -> list[float]:
    """After a call that fails on all ranks: the loss of an inference that comes between the two passes, and the norms
    of the gradients, one rank being late in between.
    """
    rank, trainable, tokens = session.device.rank, session.trainable, torch.arange(64).view(1, 64)
    inferred(session, 3)  # with weights again, whose place the last gradients have taken
    try:
        trainable.forward(tokens.float())
        raise AssertionError("numbers that are no tokens were taken")
    except RuntimeError:
        pass
    with LateGathers(rank == 1):
        loss = trainable.forward(tokens + rank)
        with torch.no_grad():
            between = trainable.forward(tokens).item()
    time.sleep(10 * LATE_SECONDS * rank)
    trainable.backward(loss)
    return [between, *norms_of(session)]


def norms_of(session: Any) -> list[float]:
    """Of this rank's gradients, a number a chunk; its padding does not count."""
    norms = []
    for chunk in chunks_of(session):
        gradients = chunk.grad_chunk or chunk
        norms.append(gradients.payload[: chunk.get_valid_length()].double().norm().item())
        gradients.l2_norm = None  # an update would forget it
    return norms


def chunks_of(session: Any) -> tuple[Any, ...]:
    gemini = session.trainable.model
    return gemini.chunk_manager.get_chunks(gemini.fp16_params)


class LateGathers:
    """This rank's copies from others come late, if it is ``late``."""

    def __init__(self, late: bool) -> None:
        self._late, self._gather = late, PeerCopies.gather

    def __enter__(self) -> None:
        def gather(*arguments: Any) -> None:
            time.sleep(LATE_SECONDS)
            self._gather(*arguments)

        if self._late:
            PeerCopies.gather = gather  # pyright: ignore[reportAttributeAccessIssue]

    def __exit__(self, *_: object) -> None:
        PeerCopies.gather = self._gather


class Averages:
    """How many chunks of a pass had all of their gradients when each average began."""

    def __init__(self, chunk_gradients: Any) -> None:
        self.after: list[int] = []
        self._delivered = 0
        for owner, name, before in (
            (chunk_gradients, "begin", self._begin),
            (chunk_gradients, "deliver", self._deliver),
            (PeerCopies, "average", lambda: self.after.append(self._delivered)),
        ):
            setattr(owner, name, self._told(getattr(owner, name), before))

    def _begin(self) -> None:
        self._delivered = 0

    def _deliver(self) -> None:
        self._delivered += 1

    @staticmethod
    def _told(original: Any, before: Any) -> Any:
        def call(*args: Any) -> Any:
            before()
            return original(*args)

        return call


class Collectives:
    """Counts the gathers and reductions that the process groups are asked for inside."""

    NAMES = (("all_gather_into_tensor", "gathers"), ("reduce_scatter_tensor", "reductions"))

    def __enter__(self) -> Counter:
        self.counts: Counter = Counter()
        self._originals = [(name, getattr(dist, name)) for name, _ in self.NAMES]
        for name, word in self.NAMES:
            setattr(dist, name, self._counted(getattr(dist, name), word))
        return self.counts

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals:
            setattr(dist, name, original)

    def _counted(self, original: Any, word: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.counts[word] += 1
            return original(*args, **kwargs)

        return call


def main() -> None:
    faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
    here = process_group.launch("cpu", 60)
    if sys.argv[1] == "training":
        check_training(here)
    else:
        for dtype in LARGEST:
            check_copies(here, dtype, replicated=False)
            check_copies(here, dtype, replicated=True)
        check_files(here)
        check_agreement(here)
    leaving.leave(0)  # the interpreter's own end can abort a process that is done and well


if __name__ == "__main__":
    main()
