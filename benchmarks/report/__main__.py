"""The report's address: `python -m benchmarks.report`, or from any folder `python .../benchmarks/report`."""

import os
import sys

if not __package__:  # started by the folder's path: the suite's own code goes before whatever else has its names
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if __name__ == "__main__":
    from benchmarks.report.command import main

    sys.exit(main(sys.argv[1:]))
