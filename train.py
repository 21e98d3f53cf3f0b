"""Train a few-step student: python train.py --config configs/recipes/NAME.yaml, or with accelerate launch.

Without arguments it distils the bundled Fashion-MNIST teacher into one step. The run itself reads top to
bottom in fastgen/cli/train.py, one training step in fastgen/training/trainer.py (`_micro_step`), one method
in fastgen/objectives/dmd2.py.
"""

import sys

from fastgen.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
