"""Attention kernels: the exact one that tangents need, and the choice of one by name."""

from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def exact_attention():
    """The kernel with forward-mode derivatives: inside it, jvp passes through every family."""
    with sdpa_kernel([SDPBackend.MATH]):
        yield
