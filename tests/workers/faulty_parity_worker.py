"""benchmarks/parity_worker.py with a part of the suite left out, to show what that part is for.

torchrun --nproc_per_node 2 tests/workers/faulty_parity_worker.py MODE job.json
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks import parity_worker
from commons.plans.colossal.imports import import_colossalai


def leave_unmended() -> None:
    """Run with Colossal-AI's own norms, fractions, savings, partial biases, scales and steps of Gemini's optimizer."""
    import_colossalai()
    from colossalai.zero.gemini.gemini_optimizer import GeminiOptimizer

    from commons.plans.colossal import faults, split_gpt2
    from commons.plans.colossal.gemini import SuiteGeminiOptimizer

    faults.FAULTS = ()
    split_gpt2.SplitGPT2Policy._mark_partial_biases = lambda self: None
    SuiteGeminiOptimizer.step = GeminiOptimizer.step
    SuiteGeminiOptimizer.zero_grad = GeminiOptimizer.zero_grad


def take_upstream_forward() -> None:
    """Run with shardformer's own forward pass and loss, given the attention mask without which it fails."""
    import_colossalai()
    from commons.plans.colossal import boosted, split_gpt2

    split_gpt2.register = lambda: None

    def run(model: Any, tokens: torch.Tensor) -> Any:
        return model(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens))

    boosted.BoostedTrainable.forward = lambda self, tokens: run(self.model, tokens).loss
    parity_worker.logits = lambda session, tokens: run(session.trainable.model, tokens).logits.float()


def take_upstream_loss() -> None:
    """Run with shardformer's loss behind the suite's forward pass, kept from ColoTensor's replaced operations."""
    import_colossalai()
    from colossalai.shardformer.layer.loss import dist_cross_entropy

    from commons.plans.colossal import split_gpt2

    def loss(model: Any, logits: torch.Tensor, labels: torch.Tensor, shard_config: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            plain = logits.as_subclass(torch.Tensor)
            return dist_cross_entropy(labels, plain, shard_config, model.lm_head.out_features, plain.dtype)

    split_gpt2._loss = loss


def take_upstream_dropout() -> None:
    """Run with the dropout layers that shardformer's policy chooses."""
    import_colossalai()
    from commons.plans.colossal import split_gpt2

    split_gpt2.SplitGPT2Policy._match_dropout = lambda self, policy, sequence_parallel: None
    split_gpt2.attend_over_own_heads = split_gpt2.sdpa_attention_forward


def scale_gradients() -> None:
    """Run torch's own plans with gradients that are a thousandth too large."""
    from commons.plans.torch_native import TorchTrainable

    backward = TorchTrainable.backward
    TorchTrainable.backward = lambda self, loss: backward(self, loss * 1.001)


def leave_chunks_unaligned() -> None:
    """Cut Gemini's chunks without regard to blocks, just above the largest matrix."""
    import_colossalai()
    from commons.plans.colossal import boosted

    def chunk_configuration(shape: Any, zero_size: int, tp_degree: int, blocks: int) -> dict:
        return {zero_size: {"chunk_size": 4 * shape.hidden**2 // tp_degree, "keep_gathered": False}}

    boosted.chunk_configuration = chunk_configuration


MODES = {
    "unmended": leave_unmended,
    "unaligned_chunks": leave_chunks_unaligned,
    "upstream_forward": take_upstream_forward,
    "scaled_gradients": scale_gradients,
    "upstream_dropout": take_upstream_dropout,
    "upstream_loss": take_upstream_loss,
}


if __name__ == "__main__":
    mode, job_path = sys.argv[1:]
    parity_worker.main(job_path, MODES[mode], go_on=True)
