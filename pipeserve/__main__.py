"""`python -m pipeserve`, for launchers that start modules."""

import sys

from pipeserve.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
