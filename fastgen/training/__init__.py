"""One run: the cast of networks, the loop, checkpoints, validation, memory estimate and dry run."""
