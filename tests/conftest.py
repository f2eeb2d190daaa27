"""What every test may rely on, however the tests were started."""

from __future__ import annotations

import signal

# A shell that starts the tests in the background lets them ignore Ctrl-C, and their children would inherit that;
# a handler, unlike an ignored signal, is not passed on: children start with the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
