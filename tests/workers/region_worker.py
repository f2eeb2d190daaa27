"""Trains gpt2_tiny under Gemini with a hook per block and with one per operation, and compares. For torchrun;
fails by assertion.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch.nn import functional

import commons.model.gpt2
import model_zoo
from commons.cli.flags import read_config
from commons.distributed import device, process_group
from commons.lifecycle import leaving
from commons.training.loop import train_steps
from commons.training.session import build_session

STEPS = 3
FLAGS = [
    "--train_step",
    str(STEPS),
    "--warmup_step",
    "1",
    "--lr",
    "1e-3",
    "--run_name",
    "unused",
    "--compile",
    "off",
    "--blocks_per_chunk",
    "1",
    "--max_prefetch",
    "0",
]

CASES = {
    "clipping": "--clip_grad_norm 0.5",
    "fp16, accumulation": "--precision fp16 --clip_grad_norm 0.5 --grad_accum 2",
    "dropout, recompute": "--dropout 0.1 --activation_checkpointing on",
    "eager attention, dropout": "--attention eager --dropout 0.1",
    "accumulation": "--grad_accum 3 --clip_grad_norm 0.5",
    "all on the host, accumulation": "--placement cpu --grad_accum 2 --clip_grad_norm 0.5",
    "half of the optimizer on the host": "--placement const --clip_grad_norm 0.3",
    "auto, accumulation, prefetch": "--placement auto --grad_accum 2 --max_prefetch 2",
    "two blocks a chunk": "--blocks_per_chunk 2 --max_prefetch 1",
    "half sharded": "--shard_param_frac 0.5 --offload_optim_frac 0.5",
    "kept gathered, prefetch": "--shard_param_frac 0 --max_prefetch 2",
    "prefetch from the host, recompute": "--max_prefetch 2 --placement cpu --activation_checkpointing on",
}

# the cases that are also compared with the loss in pieces, which is equal up to rounding only
IN_PIECES = ("clipping", "fp16, accumulation", "all on the host, accumulation")


def written_out_loss(hidden: Any, weight: Any, tokens: Any, vocab: int, kernel: Any) -> torch.Tensor:
    return model_zoo.next_token_loss(functional.linear(hidden, weight), tokens, vocab=vocab)


def train(here: device.Device, flags: str, hooks: str) -> tuple[Any, list[tuple[float, float | None]]]:
    config = read_config([*FLAGS, *flags.split(), "--gemini_hooks", hooks])
    session = build_session(config, here)
    torch.manual_seed(here.rank)  # of dropout
    return session, [(record.loss, record.grad_norm) for record in train_steps(session)]


def check_equal(here: device.Device) -> None:
    """Every bit the same with the same loss; with the loss in pieces, all but rounding."""
    in_pieces = commons.model.gpt2.next_token_loss
    # what goes on inside of a region does not depend on the ranks
    skipped = ("dropout, recompute", "eager attention, dropout") if here.world_size == 1 else ()
    for name, flags in CASES.items():
        if name in skipped:
            continue
        _, by_operation = train(here, flags, "operation")
        commons.model.gpt2.next_token_loss = written_out_loss
        _, by_block = train(here, flags, "block")
        commons.model.gpt2.next_token_loss = in_pieces
        if here.rank == 0:
            print(name, by_operation, by_block, flush=True)
        assert by_block == by_operation, name
        if name not in IN_PIECES:
            continue
        _, rounded = train(here, flags, "block")
        for (loss, norm), (wanted_loss, wanted_norm) in zip(rounded, by_operation, strict=True):
            assert abs(loss - wanted_loss) < 1e-3, name
            assert norm is None or wanted_norm is None or abs(norm - wanted_norm) < 5e-3 * wanted_norm, name


def check_calls(here: device.Device) -> None:
    """One hook per region in each pass, no handler per parameter, and no gradient left at a parameter."""
    from colossalai.tensor.param_op_hook import ColoParamOpHookManager
    from colossalai.zero.gemini.gemini_ddp import GeminiDDP

    from commons.plans.colossal.regions import Region

    counts: Counter = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        setattr(owner, name, call)

    counted(Region, "gather")
    counted(Region, "release")
    counted(ColoParamOpHookManager, "pre_op")
    counted(GeminiDDP, "grad_handle")  # which the model's hooks are made of
    session, _ = train(here, "", "block")
    counts.clear()
    next(train_steps(session))
    regions = session.shape.layers + 2
    print(dict(counts))
    assert counts == {"gather": 2 * regions, "release": 2 * regions}
    chunk_manager = session.trainable.model.chunk_manager
    assert chunk_manager.accessed_mem == 0
    assert not session.trainable.model.gemini_manager.async_works


def check_logits_without_labels(here: device.Device) -> None:
    """Without labels the model gives logits, as before."""
    session, _ = train(here, "", "block")
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        model = session.trainable.model
        assert model(input_ids=tokens).logits.shape == (1, 8, session.shape.padded_vocab)
        loss = model(input_ids=tokens, labels=tokens).loss
    assert loss.ndim == 0 and not loss.requires_grad


def check_classes(here: device.Device) -> None:
    """Everything is the suite's by class: nothing is put onto an instance or into upstream's classes."""
    session, _ = train(here, "--grad_accum 2", "block")
    from colossalai.zero.gemini.chunk import Chunk

    from commons.plans.colossal.gemini import SuiteGemini, SuiteGeminiOptimizer
    from commons.plans.colossal.suite_chunk import SuiteChunk

    model, optimizer = session.trainable.model, session.trainable.optimizer
    assert type(model) is SuiteGemini and type(optimizer) is SuiteGeminiOptimizer
    chunks = model.chunk_manager.get_chunks(model.fp16_params)
    every = [kind for chunk in chunks for kind in (chunk, chunk.paired_chunk, chunk.grad_chunk)]
    assert len(every) == 3 * len(chunks) and {type(chunk) for chunk in every} == {SuiteChunk}
    for owner in (model, model.module, model.async_reduce_stream, optimizer):
        put_on = vars(owner) if hasattr(owner, "__dict__") else {}
        assert not {"forward", "step", "zero_grad", "synchronize", "_setup_grads_ptr"} & set(put_on)
    assert {function.__module__ for function in vars(Chunk).values() if callable(function)} == {Chunk.__module__}


def check_losses_of_ones_own(here: device.Device) -> None:
    """Without labels there is a hook per operation, also in the backward pass, again and again."""
    session, _ = train(here, "", "block")
    trainable, norms = session.trainable, []
    tokens = torch.arange(64).view(1, 64)
    with torch.no_grad():
        trainable.model(input_ids=tokens)
    before = trainable.model.state_dict(only_rank_0=False)
    for _ in range(3):
        trainable.backward(trainable.model(input_ids=tokens).logits.float().square().mean())
        chunks = trainable.model.chunk_manager.get_chunks(trainable.model.fp16_params)
        norms.append([chunk.payload[: chunk.get_valid_length()].double().norm().item() for chunk in chunks])
        trainable.optimizer._update_fp16_params()  # the weights again, in the gradients' place
    assert norms[0] == norms[1] == norms[2] and any(norm > 0 for norm in norms[0]), norms
    after = trainable.model.state_dict(only_rank_0=False)
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def check_auto_trains_before_it_infers(here: device.Device) -> None:
    """Placement auto measures its first step, which an inference must not be."""
    session = build_session(read_config([*FLAGS, "--placement", "auto", "--gemini_hooks", "block"]), here)
    try:
        with torch.no_grad():
            session.trainable.forward(torch.arange(64).view(1, 64))  # pyright: ignore[reportAttributeAccessIssue]
    except AssertionError:
        return
    raise RuntimeError("an inference was taken for the first step")


def check_no_copies_on_one_rank(here: device.Device) -> None:
    """A chunk of one rank lies where it lies, whole or "sharded", and is counted once."""
    session, _ = train(here, "", "block")
    manager = session.trainable.model.chunk_manager
    chunks = list(manager.get_chunks(session.trainable.model.fp16_params))
    places = [chunk.cuda_global_chunk.data_ptr() for chunk in chunks]
    assert all(
        not chunk.is_gathered and chunk.cuda_shard.data_ptr() == place
        for chunk, place in zip(chunks, places, strict=True)
    )
    before = dict(manager.total_mem)
    next(train_steps(session))
    assert places == [chunk.cuda_global_chunk.data_ptr() for chunk in chunks]
    assert manager.total_mem == before
    states = sum(
        tensor.nbytes
        for state in session.trainable.adam.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    )
    assert before["cuda"] == sum(chunk.chunk_mem + chunk.paired_chunk.chunk_mem for chunk in chunks)
    assert before["cpu"] == states  # the host backend's states say where they are


def check_offload_frees_on_one_rank(here: device.Device) -> None:
    """A chunk that is on the host takes no memory of the device."""
    session, _ = train(here, "--placement cpu", "block")
    manager = session.trainable.model.chunk_manager
    for chunk in manager.get_chunks(session.trainable.model.fp16_params):
        assert chunk.device_type == "cpu" and chunk.cuda_global_chunk.untyped_storage().nbytes() == 0
    assert manager.total_mem["cuda"] == 0


def main() -> None:
    here = process_group.launch("cpu", 60)
    checks = [check_equal, check_logits_without_labels, check_classes, check_losses_of_ones_own]
    checks += [check_auto_trains_before_it_infers]
    if here.world_size == 1:
        checks += [check_no_copies_on_one_rank, check_offload_frees_on_one_rank]
    checks += [check_calls]  # replaces functions, so it comes last
    for check in checks:
        print(check.__name__, flush=True)
        check(here)
    leaving.leave(0)  # the interpreter's own end can abort a process that is done and well


if __name__ == "__main__":
    sys.exit(main())
