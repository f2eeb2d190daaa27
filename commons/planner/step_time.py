"""How long a step takes, by parts: :func:`forecast_step`, pure arithmetic over a configuration and a machine's rates.

Every part is FLOPs over a rate or bytes over a bandwidth. The FLOPs are those of commons.reporting.flops; the bytes
that the plans send are of their own algorithms: ring collectives take (n - 1) / n of a tensor per pass (Thakur et al.
2005, "Optimization of Collective Communication Operations in MPICH", section 3), data-parallel sharding three such
passes a step (Rajbhandari et al. 2020, "ZeRO", section 7), tensor parallelism four all-reduces of the hidden states per
block (Shoeybi et al. 2019, "Megatron-LM", section 3), and a pipeline of p stages and m microbatches idles for
(p - 1) / m of its work (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section
2.2). What share of the rates a training reaches is fitted to benchmarks/results: see `python -m benchmarks.step_time`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from commons.config.resolved import ResolvedConfig
from commons.planner.machines import Machine
from commons.planner.rates import Rates
from commons.reporting.flops import model_flops_per_token
from commons.reporting.peak_rates import TERA
from model_zoo import ModelShape, padded_parameter_count

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}


@dataclass(frozen=True)
class Fitted:
    """The shares that a training reaches of a machine's rates, fitted to H100s and H200s (benchmarks.step_time).

    Attributes:
        matmul: of the rate of a large product, by the products of a GPT-2.
        attention: rate of the fused kernel to that of a large product, masked positions counted as work.
        memory: of the bandwidth, by passes over activations and by the optimizer.
        forward_passes, backward_passes: times that a compiled block reads or writes its hidden states outside of
            products and attention.
        eager: times as many without compilation; ``fp8``: with its casts and transposes.
        scores_passes: times that eager attention reads or writes its scores, forward; twice that backward.
        loss_passes: times that the loss reads or writes the logits.
        awake_links: share by which products slow down where links never sleep, and where they do for most of a step.
        nccl: rate of NCCL beside computation, to the link's; what it takes, the computation takes longer.
        hidden_copies: share of the copies to and from the host that runs beside the computation.
    """

    matmul: float = 0.902
    attention: float = 0.543
    memory: float = 0.87
    forward_passes: float = 12.4
    backward_passes: float = 31.2
    eager: float = 3.0
    fp8: float = 3.4
    scores_passes: float = 12.0
    loss_passes: float = 2.0
    awake_links: tuple[float, float] = (0.035, 0.02)
    nccl: float = 0.39
    hidden_copies: float = 0.9


FITTED = Fitted()
ADAM_BYTES = 26  # per element: gradient in bf16, three fp32 states read and written, weight written
TORCH_ADAM_BYTES = 28  # gradient, weight and two moments in fp32 read, three written
COLLECTIVE_SECONDS = {"cuda": 20e-6, "cpu": 400e-6}  # before a collective's first byte
NODE_COLLECTIVE_SECONDS = 10e-6  # more for each doubling of the nodes
# Seconds per block that the host takes to launch a forward and a backward pass, where no graph is captured: gpt2_medium
# waits for it under FSDP2 (63 and 86 ms for 24 blocks, 2026-11-26-h100), hardly under Gemini. A host's own speed
# changes this by half.
LAUNCH_SECONDS = {"CAI_Gemini": (1.2e-3, 1.5e-3), "Pytorch_FSDP": (2.4e-3, 2.9e-3)}
OTHER_LAUNCH_SECONDS = (1.5e-3, 2.1e-3)
CPU_LAUNCH_SECONDS = (0.4e-3, 0.8e-3)
# Colossal-AI's ZeRO updates tensor by tensor from Python: 45 ms for the 292 of gpt2_medium (2026-11-23-h200).
ZERO_TENSOR_SECONDS, TENSORS_PER_BLOCK = 0.15e-3, 12


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, the parts one after the other; ``seconds`` is their sum.

    Attributes:
        forward, backward: computation, all micro-batches; recomputation counts as backward.
        optimizer: the update on the device.
        host_optimizer: the update on the host, which the device waits for.
        launches: what the device waits for its host to launch work.
        links: communication inside hosts that no computation hides, and what it takes from computation.
        node_links: likewise between hosts.
        host_copies: copies to and from the host that no computation hides.
        bubbles: what a pipeline idles.
        hidden: communication and copies beside computation, in no sum.
        tokens: of all ranks together.
        model_tflops: model TFLOPs per second and device.
    """

    forward: float
    backward: float
    optimizer: float
    host_optimizer: float
    launches: float
    links: float
    node_links: float
    host_copies: float
    bubbles: float
    hidden: float
    tokens: int
    model_tflops: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


# The parts that add up, and what tables call them.
PARTS = {
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer on the device",
    "host_optimizer": "optimizer on the host",
    "links": "exposed communication inside hosts",
    "node_links": "exposed communication between hosts",
    "host_copies": "exposed copies to and from the host",
    "bubbles": "pipeline bubbles",
    "launches": "waiting for launches",
}


@dataclass(frozen=True)
class _Traffic:
    """Seconds on each kind of link in a step, by whether computation runs beside it."""

    links: float = 0.0
    node_links: float = 0.0

    def __add__(self, other: _Traffic) -> _Traffic:
        return _Traffic(self.links + other.links, self.node_links + other.node_links)

    def __mul__(self, times: float) -> _Traffic:
        return _Traffic(self.links * times, self.node_links * times)


def forecast_step(config: ResolvedConfig, machine: Machine, rates: Rates, fitted: Fitted = FITTED) -> StepTime:
    """The step of ``config`` on all ranks of ``machine``; see :class:`StepTime`."""
    job = _Job(config, machine, rates, fitted)
    forward, backward = job.compute()
    copies = job.host_copies()
    beside, alone = job.communication()
    exposed = _exposed(beside, forward + backward, job)
    hidden = max(0.0, beside.links + beside.node_links - exposed.links - exposed.node_links)
    awake = job.awake_links() * (forward + backward)
    launches = job.launches(forward, backward, exposed.links + awake)
    bubbles = job.bubble_share() * (forward + backward)
    exposed_copies = max((1 - fitted.hidden_copies) * copies, copies - forward - backward)
    device, host = job.update()
    tokens = config.batch_size * config.seq_len * config.grad_accum * config.data_parallel_size(machine.world_size)
    time = StepTime(
        forward,
        backward,
        device,
        host,
        launches,
        exposed.links + alone.links + awake,
        exposed.node_links + alone.node_links,
        exposed_copies,
        bubbles,
        hidden + copies - exposed_copies,
        tokens,
        0.0,
    )
    flops = model_flops_per_token(config.shape(), config.seq_len) * tokens
    return dataclasses.replace(time, model_tflops=flops / time.seconds / machine.world_size / TERA)


def _exposed(beside: _Traffic, compute: float, job: _Job) -> _Traffic:
    """What communication beside computation costs: NCCL's kernels take the multiprocessors that they run on, copies
    nothing but what does not fit beside it. Both kinds of link work at the same time.
    """
    links = max(0.0, beside.links - compute) if job.copies else beside.links
    return _Traffic(links, max(0.0, beside.node_links - max(0.0, compute - links)))


@dataclass(frozen=True)
class _Job:
    """One configuration on one machine, with the sizes that its parts share."""

    config: ResolvedConfig
    machine: Machine
    rates: Rates
    fitted: Fitted

    # ---- sizes

    @cached_property
    def shape(self) -> ModelShape:
        return self.config.shape()

    @property
    def copies(self) -> bool:
        """Whether Gemini's ranks copy from each other's memory, rather than call NCCL."""
        return self.config.peer_copies == "on" and self.machine.has_peer_access

    @property
    def dp(self) -> int:
        return self.config.data_parallel_size(self.machine.world_size)

    @property
    def tokens(self) -> int:
        """Of one rank and micro-batch."""
        return self.config.batch_size * self.config.seq_len

    @property
    def layers(self) -> float:
        """Of the longest stage."""
        return -(-self.shape.layers // self.config.pp_degree)

    @property
    def elements(self) -> float:
        """Parameters of one copy of the model on one rank, before sharding over data-parallel ranks."""
        return padded_parameter_count(self.shape) / self.config.model_parallel_size

    @property
    def plain(self) -> bool:
        """A plan of torch's, with fp32 parameters that are cast."""
        return self.config.distplan.startswith("Pytorch")

    @property
    def offloaded(self) -> float:
        """Share of the optimizer on the host."""
        if self.config.distplan != "CAI_Gemini":
            return 0.0
        return 1.0 if self.config.placement == "auto" else self.config.offload_optim_frac

    # ---- computation

    def compute(self) -> tuple[float, float]:
        """Seconds of all forward and of all backward passes of a step."""
        forward, again = self._products(), self._recomputed()
        backward = 2 * self._products() + 2.5 * self._attention() + self._passes(self.fitted.backward_passes)
        forward += self._attention() + self._passes(self.fitted.forward_passes) + 3 * self._head() + self._loss()
        if self.config.distplan in ("Pytorch_DDP", "Pytorch_ZeRO"):  # weights are cast forward, gradients backward
            forward += self._memory(6 * self.elements)
            backward += self._memory(6 * self.elements)
        accum = self.config.grad_accum
        return accum * forward, accum * (backward + again)

    def _rate(self, precision: str) -> float:
        """FLOPs per second that the products of a block reach."""
        return self.rates.matmul_flops[precision] * self.fitted.matmul

    def _products(self) -> float:
        """One forward pass of all blocks' products."""
        flops = 24 * self.shape.hidden**2 * self.layers * self.tokens / self.config.tp_degree
        return flops / self._rate(self.config.precision)

    def _head(self) -> float:
        """One product of the head; it makes its gradients, two more, in the forward pass."""
        flops = 2 * self.shape.hidden * self.shape.padded_vocab * self.tokens / self.config.tp_degree
        return flops / self._rate(self.config.base_precision)

    def _loss(self) -> float:
        logits = self.tokens * self.shape.padded_vocab / self.config.tp_degree
        eager = 1.0 if self.config.runs_as_functions else self.fitted.eager
        return self._memory(logits * BYTES[self.config.precision] * self.fitted.loss_passes * eager)

    def _attention(self) -> float:
        """One forward pass of it: the fused kernel's FLOPs, or the passes over eager attention's scores."""
        scores = self.tokens * self.config.seq_len * self.layers / self.config.tp_degree
        flops = 4 * self.shape.hidden * scores
        if self.config.attention != "eager":
            return flops / (self.rates.matmul_flops[self.config.base_precision] * self.fitted.attention)
        moved = scores * self.shape.heads * BYTES[self.config.precision] * self.fitted.scores_passes
        return flops / self._rate(self.config.base_precision) + self._memory(moved)

    def _passes(self, number: float) -> float:
        """Passes over the hidden states of all blocks; TP splits half of them."""
        tp = self.config.tp_degree
        split = 1 / tp if self.config.sequence_parallel == "on" else (1 + 1 / tp) / 2
        eager = 1.0 if self.config.runs_as_functions else self.fitted.eager
        casts = self.fitted.fp8 if self.config.precision == "fp8" else 1.0
        hidden = self.tokens * self.shape.hidden * self.layers * BYTES[self.config.precision]
        return self._memory(number * hidden * split * eager * casts)

    def _recomputed(self) -> float:
        """The forward pass again, without its last product; "selective": its passes alone."""
        if self.config.activation_checkpointing == "off":
            return 0.0
        passes = self._passes(self.fitted.forward_passes)
        if self.config.activation_checkpointing == "selective":
            return 0.5 * passes
        return 2 / 3 * self._products() + self._attention() + passes

    def _memory(self, moved: float) -> float:
        return moved / (self.rates.memory_bandwidth * self.fitted.memory)

    def launches(self, forward: float, backward: float, slower: float) -> float:
        """What the host is behind, where it launches every kernel."""
        if self.config.cuda_graph == "on" and self.config.captures_graphs(self.machine.world_size, self.copies):
            return 0.0
        per_block = LAUNCH_SECONDS.get(self.config.distplan, OTHER_LAUNCH_SECONDS)
        if self.machine.device_type == "cpu":
            per_block = CPU_LAUNCH_SECONDS
            return self.config.grad_accum * self.layers * sum(per_block)
        eager = 1.0 if self.config.runs_as_functions else 1.4
        pieces = self.config.grad_accum * self.config.num_microbatches * self.layers * eager
        behind = pieces * per_block[0] - forward - slower / 3, pieces * per_block[1] - backward - slower * 2 / 3
        return sum(max(0.0, seconds) for seconds in behind)

    # ---- optimizer

    def update(self) -> tuple[float, float]:
        """Seconds on the device and on the host, one after the other."""
        sharded = self.elements / self._update_ranks()
        on_host = self.offloaded * sharded
        device = self._memory((sharded - on_host) * (TORCH_ADAM_BYTES if self.plain else ADAM_BYTES))
        if self.config.distplan in ("CAI_ZeRO1", "CAI_ZeRO2", "CAI_Hybrid") and self.machine.device_type == "cuda":
            device += self.layers * TENSORS_PER_BLOCK * ZERO_TENSOR_SECONDS
        host = on_host * self.machine.gpus_per_node / self.rates.host_adam
        return device, host

    def _update_ranks(self) -> int:
        everything = self.config.distplan == "Pytorch_DDP" or (
            self.config.distplan == "CAI_Hybrid" and self.config.zero_stage == 0
        )
        return 1 if everything else self.dp

    # ---- communication

    def communication(self) -> tuple[_Traffic, _Traffic]:
        """Of a step: what runs beside computation, and what everything waits for."""
        beside, alone = self._data_parallel()
        return beside, alone + self._tensor_parallel() + self._pipeline()

    def _data_parallel(self) -> tuple[_Traffic, _Traffic]:
        """Gathers and reductions over the copies of the model; beside computation, and after the update."""
        if self.dp == 1:
            return _Traffic(), _Traffic()
        weights, accum = self.elements * BYTES[self.config.precision], self.config.grad_accum
        once = self._ring(weights, self._pieces())
        match self.config.distplan:
            case "CAI_Gemini":
                gathers = 2 * accum * self.config.shard_param_frac + (1 - self.config.shard_param_frac)
                return once * (gathers + accum), _Traffic()
            case "Pytorch_FSDP":
                return once * (2 * accum + 1), _Traffic()
            case "Pytorch_DDP":
                return self._ring(self.elements * 4, self._pieces()) * 2, _Traffic()
            case "Pytorch_ZeRO":
                fp32 = self._ring(self.elements * 4, self._pieces())
                return fp32 * 2, fp32
            case "CAI_ZeRO2":
                return once * accum, once
            case _:  # CAI_ZeRO1 and CAI_Hybrid
                return once * 2, once if self._update_ranks() > 1 else _Traffic()

    def _pieces(self) -> int:
        """Collectives per pass over the model."""
        return max(1, round(self.layers / self.config.blocks_per_chunk)) + 1

    def _ring(self, size: float, pieces: int) -> _Traffic:
        """One pass of a ring collective over the data-parallel ranks: an all-gather or a reduce-scatter of ``size``
        bytes per rank. Ranks of one node that belong to other groups share the node's network.
        """
        groups = self.config.model_parallel_size
        in_node = min(self.dp, max(1, self.machine.gpus_per_node // groups))
        nodes = -(-self.dp // in_node)
        links = self._link_seconds(size * (in_node - 1) / in_node, pieces) if in_node > 1 else 0.0
        if nodes == 1:
            return _Traffic(links)
        sharing = min(groups, self.machine.gpus_per_node)
        network = sharing * size * (nodes - 1) / nodes / self.rates.node_bandwidth
        latency = pieces * (COLLECTIVE_SECONDS[self.machine.device_type] + NODE_COLLECTIVE_SECONDS * nodes.bit_length())
        return _Traffic(links, network + latency)

    def _link_seconds(self, size: float, pieces: int, beside: bool = True) -> float:
        if self.machine.device_type == "cpu" or self.copies:
            share = 1.0
        else:
            share = self.fitted.nccl if beside else 1.0
        latency = pieces * COLLECTIVE_SECONDS[self.machine.device_type]
        return size / (self.rates.link_bandwidth * share) + latency

    def _tensor_parallel(self) -> _Traffic:
        """Four all-reduces of the hidden states per block (with recomputation six), which everything waits for."""
        tp = self.config.tp_degree
        if tp == 1:
            return _Traffic()
        calls = self.config.grad_accum * self.layers * (6 if self.config.activation_checkpointing == "on" else 4)
        size = self.tokens * self.shape.hidden * BYTES[self.config.precision]
        pieces = round(calls * self.config.num_microbatches)
        if tp <= self.machine.gpus_per_node:
            return _Traffic(self._link_seconds(2 * calls * size * (tp - 1) / tp, 2 * pieces, beside=False))
        network = 2 * calls * size * self.machine.gpus_per_node / self.rates.node_bandwidth
        return _Traffic(0.0, network + pieces * COLLECTIVE_SECONDS[self.machine.device_type])

    def _pipeline(self) -> _Traffic:
        """Hidden states from stage to stage and back."""
        config = self.config
        if config.pp_degree == 1:
            return _Traffic()
        size = (
            2 * config.grad_accum * self.tokens * self.shape.hidden * BYTES[config.precision] * config.num_model_chunks
        )
        pieces = 2 * config.num_microbatches * config.num_model_chunks * config.grad_accum
        if config.model_parallel_size <= self.machine.gpus_per_node:
            return _Traffic(self._link_seconds(size, pieces, beside=False))
        network = size * config.tp_degree / self.rates.node_bandwidth
        return _Traffic(0.0, network + pieces * COLLECTIVE_SECONDS[self.machine.device_type])

    def bubble_share(self) -> float:
        """Idle time of a stage, to its work."""
        return (self.config.pp_degree - 1) / (self.config.num_microbatches * self.config.num_model_chunks)

    def awake_links(self) -> float:
        if self.dp == 1 or not self.copies:
            return 0.0
        always, at_times = self.fitted.awake_links
        return at_times + (always - at_times) * self.config.shard_param_frac

    # ---- host

    def host_copies(self) -> float:
        """Seconds of gradients to the host and weights from it; parameters kept there come twice more."""
        if self.machine.device_type == "cpu" or not self.offloaded:
            return 0.0
        size = self.elements / self.dp * BYTES[self.config.precision]
        passes = 2 * self.offloaded + 2 * self.config.offload_param_frac * self.config.grad_accum
        return size * passes / self.rates.host_link_bandwidth
