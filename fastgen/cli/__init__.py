"""The commands: train, sample, evaluate, merge_students."""
