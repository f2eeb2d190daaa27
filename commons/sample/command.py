"""``python -m commons.sample RUN --prompt TEXT``: text from a run, one of its checkpoints or a HuggingFace folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from commons.checkpoint.files import CheckpointError
from commons.checkpoint.huggingface import load_model
from commons.checkpoint.stored_model import open_model, tokenizer_of
from commons.distributed.device import detect_type
from commons.sample.generate import DEFAULT_NEW_TOKENS, Sampling, continue_prompt, encode_prompt, sampling_problems

WRONG_INPUT = 2  # exit code, argparse's own


def main(argv: Sequence[str]) -> int:
    """Prints the prompt and what the model writes behind it; returns the process's exit code."""
    given = _parser().parse_args(argv)
    sampling = Sampling(given.temperature, given.top_k, given.seed, given.max_new_tokens)
    try:
        stored = open_model(Path(given.run).expanduser())
        tokenizer = tokenizer_of(stored, given.tokenizer)
        prompt = encode_prompt(tokenizer, given.prompt)
        found = list(sampling_problems(sampling, len(prompt), stored.shape.positions))
        if found:
            raise ValueError("\n".join(found))
        model = load_model(stored.reader, stored.shape).to(detect_type(given.device))
    except (ValueError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return WRONG_INPUT
    step = "" if stored.step is None else f", step {stored.step}"
    told = [*stored.notes, f"{stored.place}{step}; tokenizer {tokenizer.name}", *filter(None, [tokenizer.note])]
    print("\n".join(told), file=sys.stderr)
    print(f"{given.prompt}{continue_prompt(model, tokenizer, prompt, sampling)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m commons.sample",
        description="Continues a text with a model that was trained here, or with any GPT-2 in a HuggingFace folder.",
        allow_abbrev=False,
    )
    default = Sampling()
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, a folder of checkpoints, one checkpoint, or a HuggingFace folder")
    add("--prompt", metavar="TEXT", default="", help="what the text begins with (default: nothing)")
    add("--max_new_tokens", metavar="N", type=int,
        help=f"tokens to write at most (default: {DEFAULT_NEW_TOKENS}, or what fits the model)")  # fmt: skip
    add("--temperature", metavar="T", type=float, default=default.temperature,
        help="below 1 the likely tokens get likelier; 0: always the likeliest (default: %(default)s)")  # fmt: skip
    add("--top_k", metavar="N", type=int, default=default.top_k,
        help="draw from the N likeliest tokens; 0: from all (default: %(default)s)")  # fmt: skip
    add("--seed", metavar="N", type=int, default=default.seed, help="of the draws (default: %(default)s)")
    add("--tokenizer", metavar="FOLDER", help="a folder, gpt2 or bytes (default: the run's own)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU where there is one")
    return parser
