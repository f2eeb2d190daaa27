"""Keeps the libraries' chatter out of the console, and leaves in it every warning that could matter.

Nothing is silenced wholesale: what goes is listed here line by line, each with the reason why it says nothing
to anyone who trains a GPT-2 with this suite. A message that is in no table is shown.
"""

from __future__ import annotations

import logging
import re
import warnings
from typing import NamedTuple


class KnownWarning(NamedTuple):
    """A Python warning by its category and a regular expression that its text begins with."""

    category: type[Warning]
    pattern: str
    why: str


class KnownLogLine(NamedTuple):
    """Lines of one logger, of `level` or less, that a regular expression finds."""

    logger: str
    level: int
    pattern: str
    why: str


KNOWN_WARNINGS = (
    KnownWarning(
        UserWarning,
        r"Please install the latest tensornvme",
        "Colossal-AI, at import: asynchronous checkpoints, which the suite does not write",
    ),
    KnownWarning(
        UserWarning,
        r"Please install apex from source .* RMSNorm",
        "Colossal-AI, at import: GPT-2 has LayerNorm, and torch's own is used",
    ),
    KnownWarning(
        UserWarning,
        r"TypedStorage is deprecated",
        "Colossal-AI asks a storage for its size the old way, which works in all tested versions of torch",
    ),
    KnownWarning(
        FutureWarning,
        r"`torch\.distributed\.\w+` is deprecated",
        "torch 2.13 renames collectives; the old names do the same, and older versions have no others",
    ),
    KnownWarning(
        FutureWarning,
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        "Colossal-AI's pipeline unpickles messages; the newer spelling does the same",
    ),
    KnownWarning(
        FutureWarning,
        r"`broadcast_buffers` is deprecated",
        "Colossal-AI wraps one copy of the model in torch's DDP; GPT-2 has no buffers that could differ",
    ),
    KnownWarning(
        DeprecationWarning,
        r"`TorchScript` support for functional optimizers is deprecated",
        "Colossal-AI imports torch's distributed optimizers; the suite uses none that is compiled so",
    ),
    KnownWarning(
        FutureWarning,
        r"The pynvml package is deprecated",
        "torch, at import: about another package's name, nothing to do with the run",
    ),
    KnownWarning(
        UserWarning,
        r"FSDP2-wrapped module \(FSDPGPT2\w*\) returned a view tensor",
        "torch: only matters if a block's output is changed in place; GPT-2's blocks add out of place",
    ),
)

KNOWN_LOG_LINES = (
    KnownLogLine(
        "colossalai",
        logging.INFO,
        r"",
        "reports its own progress and the source line; the step lines report the run's",
    ),
    KnownLogLine(
        "torch._higher_order_ops.wrap",
        logging.WARNING,
        r"\s*Detected that context_fn is passed to torch.utils.checkpoint under torch.compile",
        "asks for no operations in place inside of what is recomputed; the blocks have none",
    ),
    KnownLogLine(
        "transformers.modeling_utils",
        logging.WARNING,
        r"`loss_type=None` was set in the config",
        "the default loss is what a causal language model is to have",
    ),
)


class _Drop(logging.Filter):
    """A logger's filter rather than its level: Colossal-AI sets the level of its logger when it makes it."""

    def __init__(self, line: KnownLogLine) -> None:
        super().__init__()
        self.line = line

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > self.line.level or not re.search(self.line.pattern, record.getMessage())


def quiet_libraries() -> None:
    """Silence what is known to be noise. Call it before Colossal-AI and transformers are imported."""
    for known in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=known.pattern, category=known.category)
    for line in KNOWN_LOG_LINES:
        logger = logging.getLogger(line.logger)
        if not any(isinstance(present, _Drop) and present.line == line for present in logger.filters):
            logger.addFilter(_Drop(line))
