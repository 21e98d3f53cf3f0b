"""python -m fastgen COMMAND: see fastgen/cli/main.py."""

import sys

from fastgen.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
