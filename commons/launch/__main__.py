"""The launcher's address: `python -m commons.launch`, or from any folder `python .../commons/launch`."""

import os
import sys

if not __package__:  # started by the folder's path: the suite's own code goes before whatever else has its names
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def run() -> int:
    from commons.doctor import explain_uncaught
    from commons.lifecycle.caches import settle_caches
    from commons.lifecycle.standard_streams import open_missing_streams, quiet_without_reader

    open_missing_streams()
    settle_caches()
    explain_uncaught()
    from commons.launch.launcher import main

    with quiet_without_reader():
        return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run())
