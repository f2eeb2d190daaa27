"""The doctor's address: `python -m commons.doctor`, or from any folder `python .../commons/doctor`; see command.py.

Like __init__.py it keeps to what a very old Python can parse.
"""

import os
import sys

if not __package__:  # started by the folder's path: the suite's own code goes before whatever else has its names
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def run():
    from commons.doctor.command import main
    from commons.lifecycle.standard_streams import quiet_without_reader

    try:
        with quiet_without_reader():
            return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(run())
