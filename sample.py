"""Sample a few-step student: python sample.py --model runs/quickstart/export (see fastgen/sample.py)."""

import sys

from fastgen.sample import main

if __name__ == "__main__":
    sys.exit(main())
