"""`python -m mxfp4_moe.cli` is `mxfp4-moe`, for an environment whose scripts are not on the PATH."""

import sys

from . import main

sys.exit(main())
