"""Networks that metrics look through: images to features, each by name from a local file, never swapped."""
