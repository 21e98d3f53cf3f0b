"""Train the autoencoder of a captioned mini teacher: --kind kl (Stable Diffusion) or dc (Sana).

Both map 3x32x32 images in [-1, 1] to 4x8x8 latents. The loss is the absolute error of the image plus that
of the feature maps of the set's measuring net; kl adds the divergence of its posterior from a unit Gaussian,
dc adds noise to its latents and a penalty on their size, so that both decoders bear a denoiser's small
errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import ASSETS, Rows, frechet, one_cycle, readable, seconds, update, write_card
from torch import Tensor, nn

from fastgen.data.bundled import WORDS, Images, load_images
from fastgen.networks.feature_net import FeatureNet, measure

LR, FEATURE_WEIGHT, KL_WEIGHT, SIZE_WEIGHT, NOISE = 2e-3, 0.03, 3e-5, 1e-3, 0.05
STEPS, BATCH_SIZE = {"kl": 4200, "dc": 5600}, {"kl": 32, "dc": 64}
TEACHER = {"kl": "sd", "dc": "sana"}


def build(kind: str) -> nn.Module:
    """An untrained autoencoder of the shipped shape."""
    from diffusers import AutoencoderDC, AutoencoderKL

    if kind == "kl":
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            sample_size=32,
            block_out_channels=(16, 48, 48),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
        )
        with torch.no_grad():
            vae.quant_conv.bias[4:] = -6  # a narrow posterior at the start: unit noise would hide the image
        return vae
    return AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_out_channels=(32, 64, 64),
        decoder_block_out_channels=(32, 64, 64),
        encoder_layers_per_block=(0, 1, 2),
        decoder_layers_per_block=(0, 2, 2),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )


def encode(vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents to decode in training, and the penalty on them."""
    encoded = vae.encode(images)
    if hasattr(encoded, "latent_dist"):
        posterior = encoded.latent_dist
        return posterior.sample(), KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
    latents = encoded.latent
    return latents + NOISE * torch.randn_like(latents), SIZE_WEIGHT * latents.square().mean()


@torch.no_grad()
def rebuild(vae: nn.Module, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Latents [N, 4, 8, 8] of uint8 images, and what is decoded from them, in [-1, 1]."""
    latents, decoded = [], []
    for chunk in images.split(batch_size):
        encoded = vae.encode(chunk.float() / 127.5 - 1)
        latents.append(encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent)
        decoded.append(vae.decode(latents[-1]).sample.clamp(-1, 1))
    return torch.cat(latents), torch.cat(decoded)


def train(kind: str, name: str, init: Path | None, steps: int, seed: int, feature_weight: float) -> nn.Module:
    torch.manual_seed(seed)
    images, vae = load_images(name, "train").images, build(kind)
    if init is not None:
        vae.load_state_dict(type(vae).from_pretrained(init, torch_dtype=torch.float32).state_dict())
    net = FeatureNet.load(ASSETS / "measure" / name)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=1e-4)
    rows = Rows(len(images), BATCH_SIZE[kind], torch.Generator().manual_seed(seed))
    for step in range(steps):
        x = images[rows.next()].float() / 127.5 - 1
        latents, penalty = encode(vae, x)
        out = vae.decode(latents).sample
        with torch.no_grad():
            wanted = net.maps(x / 2 + 0.5)
        pixels = (out - x).abs().mean()
        features = sum((a - b).abs().mean() for a, b in zip(net.maps(out / 2 + 0.5), wanted))
        loss = pixels + feature_weight * features + penalty
        update(optimizer, loss, LR * one_cycle(step, steps), clip=1.0)
        if step % 100 == 0:
            print(
                kind,
                step,
                steps,
                f"l1 {pixels.item():.4f} features {features.item():.4f}",
                seconds(),
                flush=True,
            )
    return vae.eval()


def score(vae: nn.Module, name: str, train_images: Tensor, heldout: Images) -> dict:
    """What the card records: errors of held-out images, and what the measuring net sees in them."""
    latents, decoded = rebuild(vae, heldout.images)
    error = decoded - (heldout.images.float() / 127.5 - 1)
    net = FeatureNet.load(ASSETS / "measure" / name)
    real, seen, known = (measure(net, x) for x in (heldout.images, decoded / 2 + 0.5, train_images))
    what = next(iter(net.config["heads"]))
    right = {
        which: (m["logits"][what].argmax(1) == heldout.labels).float().mean().item()
        for which, m in (("real", real), ("rebuilt", seen))
    }
    return {
        "latent_mean": [round(v, 3) for v in latents.mean((0, 2, 3)).tolist()],
        "latent_std": [round(v, 3) for v in latents.std((0, 2, 3)).tolist()],
        "heldout_l1": round(error.abs().mean().item(), 4),
        "heldout_psnr": round(-10 * (error / 2).square().mean().log10().item(), 2),
        f"{what}_accuracy_real": round(right["real"], 4),
        f"{what}_accuracy_rebuilt": round(right["rebuilt"], 4),
        "frechet_rebuilt_vs_heldout": round(frechet(seen["features"], real["features"]), 3),
        "frechet_rebuilt_vs_train": round(frechet(seen["features"], known["features"]), 3),
        "frechet_train_vs_heldout": round(frechet(known["features"], real["features"]), 3),
    }


def main(args: argparse.Namespace) -> None:
    """args: as parsed below."""
    kind, name, seed, steps = args.kind, args.set, args.seed, args.steps or STEPS[args.kind]
    out = args.out or ASSETS / "teachers" / f"{name}-{TEACHER[kind]}" / "vae"
    vae = train(kind, name, args.init, steps, seed, args.feature_weight)
    images, heldout = load_images(name, "train").images, load_images(name, "heldout")
    scale = 1 / rebuild(vae, images[:5000])[0].std().item()
    vae.register_to_config(scaling_factor=round(scale, 5))
    vae.half().save_pretrained(out)
    readable(out)
    vae = type(vae).from_pretrained(out, torch_dtype=torch.float32).eval()
    facts = {"parameters": sum(p.numel() for p in vae.parameters()), "steps": steps, "seed": seed}
    write_card(out, **facts, scaling_factor=round(scale, 5), **score(vae, name, images, heldout))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=STEPS, required=True)
    parser.add_argument("--set", choices=WORDS, default="tinted", help="bundled image set with captions")
    parser.add_argument("--init", type=Path, help="folder of an autoencoder of the same shape to start from")
    parser.add_argument("--out", type=Path, help="folder to write; the shipped one if not given")
    parser.add_argument("--steps", type=int, help="training steps; as recorded if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--feature_weight", type=float, default=FEATURE_WEIGHT, help="weight of the measuring net's maps"
    )
    main(parser.parse_args())
