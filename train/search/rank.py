"""One process of a trial on several GPUs: `train.run`, but it ends with the torchrun above it.

torchrun gives its processes sessions of their own, so that a killed one would leave them behind.
"""

from __future__ import annotations

import sys

from train.jobs.worker import end_with_parent
from train.run import main

if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
