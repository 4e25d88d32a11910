"""``python -m pyro_graphflows``."""

import sys

from pyro_graphflows.report.command import main

if __name__ == "__main__":
    sys.exit(main())
