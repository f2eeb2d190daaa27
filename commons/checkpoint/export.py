"""``python -m commons.checkpoint.export RUN --to FOLDER``: a trained model as a HuggingFace folder.

One process on the CPU; the tensors go by one after another, so that the memory of the model is not needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from commons.checkpoint.files import CheckpointError
from commons.checkpoint.huggingface import DTYPES, refuse_used_folder, write_folder
from commons.checkpoint.stored_model import StoredModel, is_huggingface, open_run, tokenizer_of, write_tokenizer
from commons.data.tokenizer import TextTokenizer

WRONG_INPUT = 2  # exit code, argparse's own
GB = 10**9


def main(argv: Sequence[str]) -> int:
    """Returns the process's exit code: 2 where what is given cannot be exported, 1 where writing failed."""
    given = _parser().parse_args(argv)
    run, target = Path(given.run).expanduser(), Path(given.to).expanduser()
    try:
        refuse_used_folder(target)
        if is_huggingface(run):
            raise ValueError(f"{run} is a HuggingFace folder already: name a run, or one of its checkpoints")
        model = open_run(run)
        for line in model.notes:
            print(line, file=sys.stderr)
        tokenizer = _tokenizer(model, given.tokenizer)
        files = export(model, target, given.dtype, tokenizer)
    except (ValueError, CheckpointError) as error:
        print(f"nothing was exported: {error}", file=sys.stderr)
        return WRONG_INPUT
    except OSError as error:
        print(f"cannot write {target}: {error.strerror or error}: name a folder elsewhere with --to", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in files) / GB
    text = f"tokenizer {tokenizer.name}" if tokenizer else "no tokenizer: it was not trained on text"
    print(f"{model.place} (step {model.step}) exported to {target}: {size:.3g} GB in {given.dtype}, {text}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m commons.checkpoint.export",
        description="Writes a trained model as a HuggingFace folder, for AutoModelForCausalLM.from_pretrained().",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, a folder of checkpoints, or one checkpoint")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a new folder, or an empty one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32, as trained)")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="the tokenizer to put beside the model: a folder, gpt2 or bytes (default: what the run's text was read"
        " with; none for token files and random tokens)",
    )
    return parser


def _tokenizer(model: StoredModel, wanted: str | None) -> TextTokenizer | None:
    """None where the model was not trained on text and none is asked for."""
    return None if wanted is None and model.tokenizer is None else tokenizer_of(model, wanted)


def export(model: StoredModel, target: Path, dtype: str, tokenizer: TextTokenizer | None) -> list[Path]:
    """Write ``model`` to ``target``, whole or not at all; the weight files. See huggingface.write_folder for errors."""

    def add_tokenizer(folder: Path) -> None:
        if tokenizer is not None:
            write_tokenizer(tokenizer, folder, model.shape.positions)

    return write_folder(
        model.reader,
        model.shape,
        target,
        dtype=DTYPES[dtype],
        dropout=(model.settings or {}).get("dropout", 0.0),
        end_of_text=tokenizer.end_of_text if tokenizer else None,
        add_files=add_tokenizer,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
