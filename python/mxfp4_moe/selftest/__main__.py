"""The worker process: `python -m mxfp4_moe.selftest`."""

import sys

from .worker import main

if __name__ == "__main__":
    sys.exit(main())
