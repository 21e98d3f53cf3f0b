"""Families of diffusers denoisers: what each does differently, and which one a folder holds."""
