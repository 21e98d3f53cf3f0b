"""The device a command computes on."""

import torch

from fastgen.core.errors import UserError, first_line


def open_device(name: str = "") -> torch.device:
    """The named device if it is there, else CUDA where there is one, else the CPU."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(chosen)
        torch.ones(1, device=device).cpu()  # meta devices hold no numbers
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError
        found = f"found {chosen!r} ({first_line(error)})"
        raise UserError(
            "--device", found, "use cpu, or a device that PyTorch finds on this machine, e.g. cuda"
        ) from None
    return device
