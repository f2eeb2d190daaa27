"""What only a GPU shows of Gemini's chunks: memory that is given out again while another stream still reads it."""

from __future__ import annotations

import sys

import pytest
from suite_runs import run_processes

# One rank of two, whose peer is not there: nothing here communicates.
RELEASE_BESIDE_ANOTHER_STREAM = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
from commons.colossal.runtime import prepare
prepare("cuda")
from colossalai.zero.gemini.chunk import Chunk

elements = 8 * 2**20
chunk = Chunk(elements, dist.group.WORLD, torch.bfloat16, init_device=torch.device("cuda"))
chunk.append_tensor(torch.nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16, device="cuda")))
chunk.close_chunk()
torch.cuda.empty_cache()
chunk.access_chunk()
chunk.cuda_global_chunk.fill_(1)
reductions = torch.cuda.Stream()
reductions.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(reductions):
    torch.cuda._sleep(500_000_000)
    chunk.release_chunk()
next_gather = torch.full((elements,), 7, dtype=torch.bfloat16, device="cuda")
torch.cuda.synchronize()
assert chunk.cuda_shard.unique().tolist() == [1], chunk.cuda_shard.unique()
"""


@pytest.mark.gpu
def test_a_released_chunk_is_copied_before_its_memory_is_given_out() -> None:
    returncode, console = run_processes([sys.executable, "-c", RELEASE_BESIDE_ANOTHER_STREAM])
    assert returncode == 0, console
