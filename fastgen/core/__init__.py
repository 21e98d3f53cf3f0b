"""What every room uses: errors, paths, files, random numbers, moving averages and batches."""
