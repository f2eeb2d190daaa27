"""A prompt continued by a model, with HuggingFace's ``generate()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from commons.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0: always the most likely token.
        top_k: the most likely tokens, of which one is drawn; 0: all of them.
        seed: of the draws.
        max_new_tokens: None for as many as the model has positions for, at most 100.
    """

    temperature: float = 1.0
    top_k: int = 50
    seed: int = 42
    max_new_tokens: int | None = None


DEFAULT_NEW_TOKENS = 100


def sampling_problems(sampling: Sampling, prompt_tokens: int, positions: int) -> Iterator[str]:
    """What keeps a prompt from being continued so, a sentence each."""
    room = positions - prompt_tokens
    wanted = sampling.max_new_tokens
    if not 0 <= sampling.temperature < float("inf"):
        yield f"--temperature must be at least 0, got {sampling.temperature:g}: try --temperature 0.8"
    if sampling.top_k < 0:
        yield f"--top_k must be at least 0, got {sampling.top_k}: try --top_k 50, or 0 for all tokens"
    if not 0 <= sampling.seed < 2**63:
        yield f"--seed must be at least 0 and below 2**63, got {sampling.seed}: try --seed 42"
    if room < 1:
        yield f"the prompt has {prompt_tokens} tokens, the model {positions} positions: use a shorter --prompt"
    elif wanted is not None and not 1 <= wanted <= room:
        yield (
            f"--max_new_tokens must be at least 1 and at most {room}, the model's {positions} positions without the"
            f" prompt's {prompt_tokens} tokens, got {wanted}: try --max_new_tokens {min(room, DEFAULT_NEW_TOKENS)}"
        )


def encode_prompt(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """The prompt's tokens; an empty one begins where a text ended."""
    return [int(token) for token in tokenizer.encode([prompt])[0]] or [tokenizer.end_of_text]


def continue_prompt(model: Any, tokenizer: TextTokenizer, prompt: list[int], sampling: Sampling) -> str:
    """The text that ``model`` writes behind ``prompt``.

    Args:
        model: a ``GPT2LMHeadModel`` with the vocabulary of ``tokenizer`` or a larger one.
    """
    from transformers import GenerationConfig

    torch.manual_seed(sampling.seed)
    tokens = torch.tensor([prompt], device=model.device)
    room = model.config.n_positions - len(prompt)
    draws = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens or min(room, DEFAULT_NEW_TOKENS),
        eos_token_id=tokenizer.end_of_text,
        pad_token_id=tokenizer.end_of_text,
        # ids of the model that are no token: its vocabulary can be larger
        suppress_tokens=list(range(tokenizer.vocab, model.config.vocab_size)) or None,
        **(draws if sampling.temperature > 0 else {"do_sample": False}),
    )
    with torch.inference_mode():
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    return tokenizer.decode(written[0, len(prompt) :].tolist())
