"""Assets in three dimensions: cameras, Gaussians and fields, how they are rendered, and their files."""
