"""What leaves and comes back: diffusers folders, LoRA files, schedulers, model cards, and their readers."""
