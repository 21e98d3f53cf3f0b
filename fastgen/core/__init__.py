"""Used by all other packages: errors, paths, files, random numbers, moving averages and batches."""
