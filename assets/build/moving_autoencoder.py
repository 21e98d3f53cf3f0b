"""Set the AutoencoderKLWan of a small Wan pipeline on the moving clips: 3x9x32x32 in [-1, 1] to 12x9x8x8
latents.

Nothing is trained. Its latents are the twelve principal components of 4x4 patches of the clips' frames, and
the decoder is their transpose. The network is linear where its weights make it so:

  - residual and attention blocks add nothing (their last layer is zero);
  - the norm before the last layer divides by the length of a vector that holds one large constant, so by
    nearly a constant;
  - SiLU is applied to every component and its negative, and silu(u) - silu(-u) = u.

Components of large variance keep more of it: they are divided by the root of their standard deviation, half
way between latents of one variance and latents whose errors are as large as the pixels'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import ASSETS, readable, write_card
from torch import Tensor, nn

from fastgen.data import moving
from fastgen.networks.feature_net import FeatureNet, measure

CHANNELS, PATCH, WIDTH, LARGE = 12, 4, 32, 512.0
CLIPS = 500
"""training clips that the components are of"""


def build() -> nn.Module:
    """An untrained autoencoder of the shipped shape."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=WIDTH,
        z_dim=CHANNELS,
        dim_mult=[1],
        num_res_blocks=0,
        attn_scales=[],
        temperal_downsample=[],
        patch_size=PATCH,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        scale_factor_spatial=PATCH,
        scale_factor_temporal=1,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )


def components(clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [48], principal components [12, 48] and their standard deviations [12] of uint8 clips' patches."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    patches = patchify(clips.float() / 127.5 - 1, PATCH).movedim(1, -1).flatten(0, -2).double()
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    order = values.argsort(descending=True)[:CHANNELS]
    return patches.mean(0), vectors[:, order].T, values[order].sqrt()


def signs(num: int) -> Tensor:
    """[width, num]: a component, its negative, and nothing for the constant."""
    return torch.cat([torch.eye(num), -torch.eye(num), torch.zeros(WIDTH - 2 * num, num)]).double()


@torch.no_grad()
def set_weights(vae: nn.Module, mean: Tensor, basis: Tensor) -> None:
    """The encoder as z = B (x - mean), the decoder as x = B' z + mean."""
    for name, value in vae.named_parameters():
        if name.endswith("gamma"):
            continue
        value.zero_()
    scale = LARGE / WIDTH**0.5  # what the norm divides by
    pairs, centre = signs(CHANNELS), (slice(None), slice(None), -1, 1, 1)  # this frame's, this pixel's
    constant = 2 * CHANNELS
    first = vae.encoder.conv_in
    first.weight[centre] = pairs @ basis
    first.bias.copy_(-pairs @ basis @ mean)
    first.bias[constant] = LARGE
    vae.encoder.conv_out.weight[centre][:CHANNELS] = scale * pairs.T
    for layer in (vae.quant_conv, vae.post_quant_conv):
        layer.weight[:, :, 0, 0, 0] = torch.eye(len(layer.weight))
    vae.quant_conv.bias[CHANNELS:] = -20.0  # a narrow posterior
    first = vae.decoder.conv_in
    first.weight[centre] = pairs
    first.bias[constant] = LARGE
    vae.decoder.conv_out.weight[centre] = scale * basis.T @ pairs.T
    vae.decoder.conv_out.bias.copy_(mean)


@torch.no_grad()
def rebuild(vae: nn.Module, clips: Tensor, batch_size: int = 50) -> tuple[Tensor, Tensor]:
    """Latents [N, 12, 9, 8, 8] of uint8 clips, and what is decoded from them, in [-1, 1]."""
    latents = [vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in clips.split(batch_size)]
    return torch.cat(latents), torch.cat([vae.decode(z).sample for z in latents])


def main(out: Path) -> None:
    known = moving.load_clips("train", range(CLIPS))
    mean, basis, deviations = components(known.images)
    vae = build()
    set_weights(vae, mean, basis)
    kept = deviations.sqrt() * deviations.square().sum().sqrt() / deviations.sum().sqrt()
    vae.register_to_config(latents_std=[round(v, 5) for v in kept.tolist()])
    vae.half().save_pretrained(out)
    readable(out)
    vae = type(vae).from_pretrained(out, torch_dtype=torch.float32).eval()
    held = moving.load_clips("heldout", range(200))
    latents, decoded = rebuild(vae, held.images)
    error = decoded - (held.images.float() / 127.5 - 1)
    net = FeatureNet.load(ASSETS / "measure" / "tinted")
    middle = [clips[:, :, moving.FRAMES // 2] for clips in (held.images, decoded / 2 + 0.5)]
    right = [(measure(net, x)["logits"]["garment"].argmax(1) == held.labels).float().mean() for x in middle]
    scaled = latents / torch.tensor(vae.config.latents_std)[:, None, None, None]
    write_card(
        out,
        parameters=sum(p.numel() for p in vae.parameters()),
        latent_std=[round(v, 3) for v in scaled.std((0, 2, 3, 4)).tolist()],
        heldout_l1=round(error.abs().mean().item(), 4),
        heldout_psnr=round(-10 * (error / 2).square().mean().log10().item(), 2),
        garment_accuracy_real=round(right[0].item(), 4),
        garment_accuracy_rebuilt=round(right[1].item(), 4),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "teachers" / "moving-wan" / "vae")
    main(parser.parse_args().out)
