"""The camera as an input of a denoiser: an embedding of it is added to that of the time (ProlificDreamer,
arXiv 2305.16213; MVDream, arXiv 2308.16512, takes it likewise).
"""

import torch
from torch import Tensor, nn

from fastgen.core.errors import UserError

WHOLE = "whole"
"""name under which a network without adapters keeps its embedding"""


class CameraEmbedding(nn.Module):
    """Two layers from a camera-to-world matrix [B, 16] to the width of the time embedding, for each adapter
    of a network that reads cameras. The last starts at zero: the network is what it was.
    """

    def __init__(self, time_embedding: nn.Module):
        super().__init__()
        last = [m for m in time_embedding.modules() if isinstance(m, nn.Linear)][-1]
        self.width = last.out_features
        self.nets = nn.ModuleDict()
        self.active: str | None = None
        self.c2w: Tensor | None = None
        """of the pass that is under way"""
        time_embedding.register_forward_hook(self._add)

    def add(self, name: str | None) -> None:
        """Give an adapter, or (None) the whole network, an embedding of its own."""
        last = nn.Linear(self.width, self.width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.nets[name or WHOLE] = nn.Sequential(nn.Linear(16, self.width), nn.SiLU(), last)

    def _add(self, _module: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        name = self.active or WHOLE
        if self.c2w is None or name not in self.nets:
            return out
        net = self.nets[name]
        return out + net(self.c2w.to(next(net.parameters()).dtype)).to(out.dtype)


def attach(net: nn.Module) -> CameraEmbedding:
    """An embedding for a network whose time embedding is a module; a UserError for others."""
    time_embedding = getattr(net, "time_embedding", None)
    if not isinstance(time_embedding, nn.Module):
        found = f"{type(net).__name__} has no time embedding that a camera could be added to"
        raise UserError(
            "student.asset", found, "use a teacher of the Stable Diffusion family, or objective sds"
        )
    with torch.device(next(net.parameters()).device):
        return CameraEmbedding(time_embedding)
