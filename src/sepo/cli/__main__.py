"""`accelerate launch -m sepo.cli` starts the command as `python -m sepo` does."""

import sys

from sepo.cli import main

if __name__ == "__main__":
    sys.exit(main())
