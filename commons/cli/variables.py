"""Environment variables that are another spelling of flags, and what the old example had that has no effect any more:
the same for every entry point.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

# Environment variables and the flags that they are another spelling of.
FLAG_VARIABLES = {
    "DISTPLAN": "distplan",
    "MODEL_TYPE": "model_type",
    "BATCH_SIZE": "batch_size",
    "TRAIN_STEP": "train_step",
    "TPDEGREE": "tp_degree",
    "PPDEGREE": "pp_degree",
    "PLACEMENT": "placement",
    "SEQ_LEN": "seq_len",
    "PRECISION": "precision",
}

# Settings of the Colossal-AI example's launcher that have no effect here.
OBSOLETE_VARIABLES = {"USE_SHARD_INIT": "models are always built without filling memory first, where that helps"}
OBSOLETE_FLAGS = {"--shardinit": OBSOLETE_VARIABLES["USE_SHARD_INIT"]}


def without_obsolete(argv: Sequence[str]) -> list[str]:
    return [word for word in argv if _flag_of(word) not in OBSOLETE_FLAGS]


def obsolete_notices(argv: Sequence[str], environ: Mapping[str, str]) -> Iterator[str]:
    """A warning for each setting that is ignored."""
    given = [name for name in OBSOLETE_VARIABLES if environ.get(name)]
    given += [flag for flag in OBSOLETE_FLAGS if flag in map(_flag_of, argv)]
    for name in given:
        yield f"warning: {name} has no effect any more and is ignored: {(OBSOLETE_VARIABLES | OBSOLETE_FLAGS)[name]}"


def _flag_of(word: str) -> str:
    """``--flag`` of ``--flag=value``."""
    return word.split("=", 1)[0]


def name_variables(problem: str, environ: Mapping[str, str], flags: Collection[str]) -> str:
    """Add which variables a problem comes from: the user never typed the flags that it speaks of.

    Args:
        flags: the settings that were given as flags, which win over variables.
    """
    sources = [
        f"{variable}={environ[variable]}"
        for variable, name in FLAG_VARIABLES.items()
        if environ.get(variable) and name not in flags and re.search(rf"--{name}\b", problem)
    ]
    return f"{problem} [{', '.join(sources)} in the environment]" if sources else problem
