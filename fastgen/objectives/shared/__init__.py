"""Pieces that several methods share: the critic's turn, the GAN pair, the consistency family's intervals."""
