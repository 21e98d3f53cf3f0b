"""Pieces that several methods share: the critic's turn, the GAN pair, time grids with segments."""
