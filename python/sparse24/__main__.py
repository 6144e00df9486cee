"""`python -m sparse24` is the command `sparse24`."""

import sys

from sparse24.cli import main

if __name__ == "__main__":
    sys.exit(main())
