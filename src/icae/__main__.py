"""`python -m icae`: the command `icae`."""

import sys

from icae.cli import main


if __name__ == "__main__":
    sys.exit(main())
