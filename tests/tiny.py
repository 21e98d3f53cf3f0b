"""Tiny random teachers of the real diffusers classes, as folders on disk, built in a second."""

import json
import string
from pathlib import Path

import torch

from fastgen.backbones.family import perturb_zero_layers

PROMPTS = ("a red dress on a grey background", "a blue boot on a white background")


def _unet2d(channels: int, size: int):
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=11,
    )


def _label_folder(folder: Path, net, scheduler, info: dict) -> Path:
    perturb_zero_layers(net)
    net.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "fastgen.json").write_text(json.dumps(info))
    return folder


def flow_folder(folder: Path, shift: float = 1.0) -> Path:
    """Class-conditional flow UNet2DModel on 1x16x16 images folded to 4x8x8."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return _label_folder(folder, _unet2d(4, 8), scheduler, {"patch": 2, "num_classes": 10})


def edm_folder(folder: Path) -> Path:
    """Class-conditional EDM UNet2DModel on 1x8x8 images."""
    from diffusers import EDMEulerScheduler

    torch.manual_seed(2)
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, num_train_timesteps=20)
    return _label_folder(folder, _unet2d(1, 8), scheduler, {"num_classes": 10})


def vp_folder(folder: Path) -> Path:
    """Class-conditional v-prediction UNet2DModel on 1x8x8 images."""
    from diffusers import DDPMScheduler

    torch.manual_seed(3)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    return _label_folder(folder, _unet2d(1, 8), scheduler, {"num_classes": 10})


def clip_tokenizer(max_length: int = 77):
    """CLIPTokenizer over single bytes: no vocabulary to download."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = ["<|startoftext|>", "!!", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    end = "<|endoftext|>"
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        model_max_length=max_length,
        bos_token="<|startoftext|>",
        eos_token=end,
        unk_token=end,
        pad_token=end,
    )


def sd_folder(folder: Path) -> Path:
    """StableDiffusionPipeline, eps on the scaled-linear schedule, 16x16 images from 4x8x8 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
    )
    perturb_zero_layers(unet)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            projection_dim=32,
            vocab_size=515,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**betas, steps_offset=1)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def gemma_tokenizer():
    """GemmaTokenizer over printable characters."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"]
    tokens = [*special, *(c for c in string.printable if c not in string.whitespace)]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def sana_folder(folder: Path, shift: float = 1.0, max_length: int = 48) -> Path:
    """SanaPipeline, flow, 32x32 images from 4x16x16 latents."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(5)
    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=16,
        patch_size=1,
    )
    perturb_zero_layers(net)
    blocks = {f"{side}_block_types": ("ResBlock", "EfficientViTBlock") for side in ("encoder", "decoder")}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        **blocks,
    )
    tokenizer = gemma_tokenizer()
    text = Gemma2Model(
        Gemma2Config(
            hidden_size=8,
            head_dim=4,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_hidden_layers=2,
            sliding_window=2,
            vocab_size=len(tokenizer),
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = SanaPipeline(tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=net, scheduler=scheduler)
    pipe.save_pretrained(folder)
    (folder / "fastgen.json").write_text(json.dumps({"max_sequence_length": max_length}))
    return folder


FOLDERS = {"flow": flow_folder, "edm": edm_folder, "vp": vp_folder, "sd": sd_folder, "sana": sana_folder}
