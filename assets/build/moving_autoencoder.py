"""Train the AutoencoderKLWan of the video mini teacher: 3x9x32x32 clips in [-1, 1] to 8x5x8x8 latents.

The loss is the absolute error of the clip plus that of the tinted measuring net's feature maps of one of
its frames, and the divergence of the posterior from a unit Gaussian. It trains on the first frames of clips,
which a causal autoencoder sees no differently for those that follow. With --decoder the shipped one's decoder
alone trains on: latents stay what they are, and so does a teacher of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import ASSETS, Rows, one_cycle, readable, seconds, update, write_card
from torch import Tensor, nn

from fastgen.data import moving
from fastgen.networks.feature_net import FeatureNet, measure

LR, FEATURE_WEIGHT, KL_WEIGHT = 2e-3, 0.03, 3e-5
STEPS, BATCH_SIZE, FRAMES, CHANNELS = 900, 4, 5, 8


def build() -> nn.Module:
    """An untrained autoencoder of the shipped shape."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=20,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=4,
        scale_factor_temporal=2,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    with torch.no_grad():
        vae.quant_conv.bias[CHANNELS:] = -6  # a narrow posterior at the start: unit noise would hide the clip
    return vae


def train(vae: nn.Module, steps: int, seed: int, decoder: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    net = FeatureNet.load(ASSETS / "measure" / "tinted")
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()] if decoder else vae.parameters()
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.99), weight_decay=1e-4)
    rows = Rows(moving.count(), BATCH_SIZE, torch.Generator().manual_seed(seed))
    for step in range(steps):
        x = moving.compose(rows.next().tolist())[:, :, :FRAMES].float() / 127.5 - 1
        with torch.set_grad_enabled(not decoder):
            posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
        k = step % FRAMES
        with torch.no_grad():
            wanted = net.maps(x[:, :, k] / 2 + 0.5)
        seen = net.maps(out[:, :, k] / 2 + 0.5)
        pixels = (out - x).abs().mean()
        features = sum((a - b).abs().mean() for a, b in zip(seen, wanted))
        penalty = KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        loss = pixels + FEATURE_WEIGHT * features + penalty
        update(optimizer, loss, LR * one_cycle(step, steps), clip=1.0)
        if step % 20 == 0:
            print(
                step, steps, f"l1 {pixels.item():.4f} features {features.item():.4f}", seconds(), flush=True
            )
    return vae.eval()


@torch.no_grad()
def rebuild(vae: nn.Module, clips: Tensor, batch_size: int = 50) -> tuple[Tensor, Tensor]:
    """Latents [N, 8, 5, 8, 8] of uint8 clips, and what is decoded from them, in [-1, 1]."""
    latents = [vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in clips.split(batch_size)]
    return torch.cat(latents), torch.cat([vae.decode(z).sample for z in latents for z in z.split(batch_size)])


def main(out: Path, steps: int, seed: int, decoder: bool) -> None:
    if decoder:
        from diffusers import AutoencoderKLWan

        vae = train(AutoencoderKLWan.from_pretrained(out, torch_dtype=torch.float32), steps, seed, decoder)
    else:
        vae = train(build(), steps, seed)
        latents, _ = rebuild(vae, moving.load_clips("train", range(200)).images)
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.half().save_pretrained(out)
    readable(out)
    vae = type(vae).from_pretrained(out, torch_dtype=torch.float32).eval()
    held = moving.load_clips("heldout", range(200))
    _, decoded = rebuild(vae, held.images)
    error = decoded - (held.images.float() / 127.5 - 1)
    net = FeatureNet.load(ASSETS / "measure" / "tinted")
    middle = [clips[:, :, moving.FRAMES // 2] for clips in (held.images, decoded / 2 + 0.5)]
    right = [(measure(net, x)["logits"]["garment"].argmax(1) == held.labels).float().mean() for x in middle]
    write_card(
        out,
        parameters=sum(p.numel() for p in vae.parameters()),
        steps=steps,
        seed=seed,
        heldout_l1=round(error.abs().mean().item(), 4),
        heldout_psnr=round(-10 * (error / 2).square().mean().log10().item(), 2),
        heldout_psnr_by_frame=[
            round(-10 * (e / 2).square().mean().log10().item(), 2) for e in error.unbind(2)
        ],
        garment_accuracy_real=round(right[0].item(), 4),
        garment_accuracy_rebuilt=round(right[1].item(), 4),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "teachers" / "moving-wan" / "vae")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder", action="store_true", help="train on the decoder of the folder alone")
    args = parser.parse_args()
    main(args.out, args.steps, args.seed, args.decoder)
