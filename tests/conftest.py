"""What every test may rely on, however the tests were started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest

# A shell that starts the tests in the background lets them ignore Ctrl-C, and their children would inherit that;
# a handler, unlike an ignored signal, is not passed on: children start with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    """torch.compile compiles one function in eight versions at most, and tests share the process."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
