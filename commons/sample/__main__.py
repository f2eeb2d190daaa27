"""``python -m commons.sample RUN --prompt TEXT``; see command.py."""

from __future__ import annotations

import sys

from commons.sample.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
