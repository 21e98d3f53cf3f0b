"""Sample a few-step student: python sample.py --model runs/quickstart/export (see fastgen/cli/sample.py)."""

import sys

from fastgen.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())
