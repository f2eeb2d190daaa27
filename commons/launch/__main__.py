"""The launcher's address: `python -m commons.launch`, or from any folder `python .../commons/launch`."""

import os
import signal
import sys

if not __package__:  # started by the folder's path: the suite's own code goes before whatever else has its names
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def run() -> int:
    from commons.doctor import explain_uncaught
    from commons.lifecycle.caches import settle_caches
    from commons.lifecycle.standard_streams import open_missing_streams

    open_missing_streams()
    settle_caches()
    explain_uncaught()
    from commons.launch.launcher import main

    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(run())
