"""Families of diffusers denoisers: how each differs from the others, and which one a model folder holds."""
