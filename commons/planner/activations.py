"""What a transformer block keeps for its backward pass and needs beside it, traced on fake tensors.

The block is the suite's own function (commons.model.gpt2), traced forward and backward for the shapes of the run and
cut into its two passes by the rule that the compiler uses. Fake tensors have shapes and no memory; they are on "cpu",
since fakes on "cuda" abort in a CPU build of torch. So the operators are a CPU's, whose results have the shapes and
dtypes of a GPU's.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from commons.model.gpt2 import gpt2_functions
from commons.ops.activation_checkpointing import dear_operations
from commons.planner.states import block_parameters
from model_zoo import ModelShape


@dataclass(frozen=True)
class BlockCase:
    """What the memory of a block depends on.

    Attributes:
        tokens: [batch, sequence] of one pass.
        dtype: of parameters as the function gets them; ``hidden_dtype`` of hidden states; ``autocast`` to which dtype
            matrix products are cast, None: to none.
        recompute: "off", "selective" or "on".
        compiled: the compiler cuts the passes and fuses pointwise operations.
        fused_gelu, kernels: as commons.model.gpt2.gpt2_functions takes them.
        tp: ranks that share every matrix.
    """

    shape: ModelShape
    tokens: tuple[int, int]
    dtype: torch.dtype
    hidden_dtype: torch.dtype
    autocast: torch.dtype | None
    recompute: str
    compiled: bool
    fused_gelu: bool
    kernels: bool
    attention: str
    dropout: float
    fp8: bool
    tp: int = 1


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of one block.

    Attributes:
        saved: kept from the forward to the backward pass, without parameters and the block's input.
        keeps_input: whether the input is among what the backward pass needs.
        forward: needed at most during the forward pass, beside what is there before: the result and ``saved`` included.
        backward: needed at most during the backward pass beside ``saved``, the input and the gradient of the result:
            the gradients of parameters and input included.
        result: the result's.
    """

    saved: int
    keeps_input: bool
    forward: int
    backward: int
    result: int


@functools.cache
def block_memory(case: BlockCase) -> BlockMemory:
    """Trace one block."""
    if case.recompute == "on" and not case.compiled:
        whole = block_memory(dataclasses.replace(case, recompute="off"))
        return BlockMemory(0, True, whole.forward, whole.saved + whole.backward, whole.result)
    with _fakes(), torch.autocast("cpu", case.autocast or torch.bfloat16, enabled=case.autocast is not None):
        passes = _traced(case)
    return _measured(case, *passes)


# In hidden states of one block, all of them fp32: twice what any trace of a block has shown (dropout, eager recompute)
ROUGH_SAVED, ROUGH_PASS = 30, 50


def rough_block_memory(case: BlockCase) -> BlockMemory:
    """More than a block takes, without a trace."""
    batch, sequence = case.tokens
    hidden = batch * sequence * case.shape.hidden * 4
    scores = batch * case.shape.heads * sequence**2 * 4 * (4 if case.attention == "eager" else 0)
    parameters = 12 * case.shape.hidden**2 * 4
    saved = ROUGH_SAVED * hidden + scores + parameters
    kept = 0 if case.recompute == "on" else saved
    return BlockMemory(kept, True, ROUGH_PASS * hidden + 2 * scores, ROUGH_PASS * hidden + 2 * scores + saved, hidden)


@contextmanager
def _fakes() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _traced(case: BlockCase) -> tuple[Any, Any]:
    """The graphs of the forward and the backward pass."""
    from functorch.compile import default_partition, min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_function

    cut: Callable = (
        min_cut_rematerialization_partition if case.compiled or case.recompute != "off" else default_partition
    )
    passes: list[Any] = []

    def partition(joint: Any, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Any:
        if case.recompute != "off":
            _mark_recomputed(joint, num_fwd_outputs, dear_operations() if case.recompute == "selective" else set())
        options.pop("static_lifetime_input_indices", None)
        passes.extend(cut(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options))
        return passes

    kept: Any = _as_it_is
    run = aot_function(
        _function(case),
        fw_compiler=kept,
        bw_compiler=kept,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    batch, sequence = case.tokens
    hidden = torch.empty(batch, sequence, case.shape.hidden, dtype=case.hidden_dtype, requires_grad=True)
    parameters = [
        torch.empty(parameter.shape, dtype=case.dtype, requires_grad=True)
        for parameter in block_parameters(case.shape.hidden, case.tp)
    ]
    run(hidden, *parameters)
    return passes[0], passes[1]


def _as_it_is(graph: Any, _inputs: Any) -> Any:
    return graph


def _function(case: BlockCase) -> Callable:
    shape = dataclasses.replace(case.shape, heads=case.shape.heads // case.tp)
    return gpt2_functions(
        shape,
        attention=case.attention,
        dropout=case.dropout,
        fp8=case.fp8,
        fused_gelu=case.fused_gelu,
        kernels=case.kernels,
    ).block


def _mark_recomputed(joint: Any, results: int, kept: set[Any]) -> None:
    """Mark what the forward pass computes as the compiler finds it under a checkpoint: ``kept`` is saved, all else is
    computed again.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    *_, output = joint.graph.nodes
    waiting = [node for node in output.args[0][:results] if node is not None]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    for node in seen:
        if node.op == "call_function":
            of_several = node.target is operator.getitem and node.args[0].target in kept
            saves = node.target in kept or of_several
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = 1


# --- what is alive when -----------------------------------------------------------------------------------------------


def _measured(case: BlockCase, forward: Any, backward: Any) -> BlockMemory:
    nodes = list(forward.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    (results,) = nodes[-1].args
    result, *kept = [node for node in results if node is not None]
    given = {key: nbytes for node in inputs for key, nbytes in _storages(node)}
    saved = {key: nbytes for node in kept for key, nbytes in _storages(node) if key not in given}
    saved_elsewhere = {key for key, _ in _storages(result)}
    hidden = {key for key, _ in _storages(inputs[0])}
    keeps_input = any(key in hidden for node in kept for key, _ in _storages(node))
    return BlockMemory(
        saved=sum(nbytes for key, nbytes in saved.items() if key not in saved_elsewhere),
        keeps_input=keeps_input,
        forward=_peak(nodes, case.compiled),
        backward=_peak(list(backward.graph.nodes), case.compiled),
        result=sum(nbytes for _, nbytes in _storages(result)),
    )


def _storages(node: Any) -> list[tuple[int, int]]:
    """Key and bytes of each tensor that a node gives; views of one memory have one key."""
    from torch.utils._pytree import tree_leaves

    value = node.meta.get("val")
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()) for tensor in tensors]


def _peak(nodes: list[Any], fuses: bool) -> int:
    """Bytes at most alive of what a pass makes itself.

    ``fuses``: a pointwise result that only pointwise operations and reductions read is never written, and the passes
    run in an order that needs little, as the compiler looks for one; else in that of the graph.
    """
    in_order = _peak_in(nodes, fuses)
    return min(in_order, _peak_in(_frugal_order(nodes), fuses)) if fuses else in_order


def _peak_in(nodes: list[Any], fuses: bool) -> int:
    unwritten = {node for node in nodes if fuses and _is_fused(node)}
    given = {key for node in nodes if node.op == "placeholder" for key, _ in _storages(node)}
    dying: dict[Any, list[int]] = {}
    for key, node in _last_uses(nodes).items():
        dying.setdefault(node, []).append(key)
    alive: dict[int, int] = {}
    now = peak = 0
    for node in nodes:
        before = now
        for key, nbytes in [] if node in unwritten else _storages(node):
            if key not in alive and key not in given:
                alive[key] = nbytes
                now += nbytes
        freed = sum(alive.pop(key, 0) for key in dying.get(node, ()) if node.op != "output")
        # the compiler writes a pointwise result over an input that nothing reads any more
        peak = max(peak, before, now - freed if fuses and _is_pointwise(node) else now)
        now -= freed
    return peak


def _last_uses(nodes: list[Any]) -> dict[int, Any]:
    """By memory: the last node that makes or reads it."""
    last: dict[int, Any] = {}
    for node in nodes:
        for source in (*node.all_input_nodes, node):
            for key, _ in _storages(source):
                last[key] = node
    return last


def _frugal_order(nodes: list[Any]) -> list[Any]:
    """Of what can run next, always that which adds least to what is alive."""
    readers: dict[int, int] = {}
    sizes: dict[int, int] = {}
    reads = {node: {key for source in node.all_input_nodes for key, _ in _storages(source)} for node in nodes}
    given = {key for node in nodes if node.op == "placeholder" for key, _ in _storages(node)}
    for node in nodes:
        for key in reads[node]:
            readers[key] = readers.get(key, 0) + 1
        sizes.update(_storages(node))
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [node for node in nodes if not missing[node]]
    order: list[Any] = []
    made: set[int] = set(given)

    def growth(node: Any) -> tuple[int, int]:
        """What is added in all, and, where that is equal, what is made: views come first."""
        new = sum(nbytes for key, nbytes in _storages(node) if key not in made)
        return new - sum(sizes[key] for key in reads[node] if readers[key] == 1 and key not in given), new

    while ready:
        node = min(ready, key=growth)
        ready.remove(node)
        order.append(node)
        made.update(key for key, _ in _storages(node))
        for key in reads[node]:
            readers[key] -= 1
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    return order


def _is_pointwise(node: Any) -> bool:
    return node.op == "call_function" and torch.Tag.pointwise in getattr(node.target, "tags", ())


REDUCTIONS = ("sum", "mean", "amax", "var_mean", "native_layer_norm", "native_layer_norm_backward", "_to_copy")


def _is_fused(node: Any) -> bool:
    return _is_pointwise(node) and all(
        _is_pointwise(user) or getattr(user.target, "__name__", "").split(".")[0] in REDUCTIONS for user in node.users
    )
