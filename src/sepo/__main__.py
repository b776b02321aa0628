"""`python -m sepo` is the `sepo` command, for launchers that start a module (torchrun, accelerate launch)."""

import sys

from sepo.cli import main

if __name__ == "__main__":
    sys.exit(main())
