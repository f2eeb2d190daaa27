"""Checks of what a run trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from commons.cli.job import Job
from commons.config.resolved import ResolvedConfig
from commons.data.batch_source import RANDOM


def settings(job: Job) -> Iterator[str]:
    """Settings of data that there is none for."""
    config, typed = job.config, job.typed
    rules: tuple[tuple[bool, str], ...] = (
        (
            config.data == RANDOM and "tokenizer" in typed,
            "--tokenizer is of texts, and --data random has none: name a text with --data, or remove it",
        ),
        (
            config.data == RANDOM and "eval_fraction" in typed,
            "--eval_fraction is held out of --data, which is random: name a text with --data, or remove it",
        ),
        (
            config.data == RANDOM and config.eval_every > 0,
            f"--eval_every {config.eval_every} needs data that something can be learnt from: name a text with --data,"
            " or use --eval_every 0",
        ),
        (
            config.data != RANDOM and config.eval_every > 0 and config.eval_fraction == 0,
            f"--eval_every {config.eval_every} evaluates on what --eval_fraction holds out, which is nothing: use"
            " --eval_fraction 0.01, or --eval_every 0",
        ),
    )
    return (text for applies, text in rules if applies)


def corpus(job: Job) -> Iterator[str]:
    """What ``--data`` names, as far as that shows without reading all of it; :func:`prepare` does the rest."""
    if job.config.data == RANDOM:
        return iter(())
    from commons.data.corpus import look_at

    return _told(lambda: look_at(job.config.data, job.config.tokenizer), job.config.data)


def prepare(config: ResolvedConfig, say: Callable[[str], object]) -> list[str]:
    """Have the data ready before any rank needs it, and every problem with that; for settings that are right.

    Texts are tokenised here if they never were, which takes as long as it takes: see commons.data.corpus.prepare.

    Args:
        say: is told what the user should know.
    """
    if config.data == RANDOM:
        return []
    from commons.data.corpus import prepare as prepare_text

    def work() -> None:
        note = prepare_text(config.data_request()).note
        if note:
            say(note)

    return list(_told(work, config.data))


def _told(work: Callable[[], object], path: str) -> Iterator[str]:
    """What ``work`` failed for, if it did."""
    try:
        work()
    except ValueError as error:
        yield str(error)
    except OSError as error:
        yield f"--data {path}: {error.filename or path}: {error.strerror or error}: make it readable, or name another"
