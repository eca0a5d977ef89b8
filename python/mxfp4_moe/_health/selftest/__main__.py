"""The worker process: `python -m mxfp4_moe._health.selftest`."""

import sys

from .worker import main

if __name__ == "__main__":
    sys.exit(main())
