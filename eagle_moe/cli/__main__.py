"""`python -m eagle_moe.cli`."""

import sys

from eagle_moe.cli import main

sys.exit(main())
