"""A WanPipeline of the bundled clips' autoencoder and text encoder with a small random transformer."""

import json
from pathlib import Path

import torch

from fastgen.core.paths import asset


def clip_teacher(folder: Path, first_frame: bool = False, patch: int = 0, heads: int = 2) -> Path:
    """A teacher of 9 frames of 32 x 32, as a folder; with first_frame it is shown that, as Wan 2.2 5B is.
    patch: latent frames of a token, where another is wanted.
    """
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5EncoderModel

    parts = asset("teachers/moving-wan")
    torch.manual_seed(5)
    net = WanTransformer3DModel(
        patch_size=(patch or (1 if first_frame else 3), 2, 2),
        num_attention_heads=heads,
        attention_head_dim=20,
        in_channels=12,
        out_channels=12,
        text_dim=64,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )
    more = {"image_processor": None, "image_encoder": None, "expand_timesteps": True} if first_frame else {}
    pipe = (WanImageToVideoPipeline if first_frame else WanPipeline)(
        tokenizer=AutoTokenizer.from_pretrained(parts / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(parts / "text_encoder", dtype=torch.float32),
        vae=AutoencoderKLWan.from_pretrained(parts / "vae", torch_dtype=torch.float32),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=net,
        **more,
    )
    pipe.save_pretrained(folder)
    info = {"measure": "moving", "max_sequence_length": 16, "height": 32, "width": 32, "num_frames": 9}
    (folder / "fastgen.json").write_text(json.dumps(info))
    return folder
