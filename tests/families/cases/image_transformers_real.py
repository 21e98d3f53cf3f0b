"""The released image transformers by their published configs, with the parameter counts their makers state.

Written as the diffusers class, what of its config differs from the class's defaults, and the count of the
model card or paper as it is printed there. Counted is everything a checkpoint stores, learned or not (SD3.5
medium's 2.5B holds 0.2B of position embedding).
"""

DIT = {
    "num_layers": 28,
    "patch_size": 2,
    "attention_head_dim": 72,
    "num_attention_heads": 16,
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
}
PIXART = {**DIT, "norm_type": "ada_norm_single", "cross_attention_dim": 1152, "caption_channels": 4096}
SD3 = {"sample_size": 128, "pooled_projection_dim": 2048}
SANA_06 = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
KLEIN = {"guidance_embeds": False}

# name: (class, config, published count)
MODELS = {
    "PixArt-alpha XL": ("PixArtTransformer2DModel", {**PIXART, "sample_size": 128}, "0.6B"),
    "PixArt-sigma XL": (
        "PixArtTransformer2DModel",
        {**PIXART, "sample_size": 128, "use_additional_conditions": False},
        "0.6B",
    ),
    "SD3 medium": (
        "SD3Transformer2DModel",
        {
            **SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        "2B",
    ),
    "SD3.5 medium": (
        "SD3Transformer2DModel",
        {
            **SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        "2.5B",
    ),
    "SD3.5 large": (
        "SD3Transformer2DModel",
        {
            **SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "8.1B",
    ),
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, "12B"),
    "FLUX.1 schnell": ("FluxTransformer2DModel", {"guidance_embeds": False}, "12B"),
    "FLUX.2 klein 4B": (
        "Flux2Transformer2DModel",
        {
            **KLEIN,
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
        "4B",
    ),
    "FLUX.2 klein 9B": (
        "Flux2Transformer2DModel",
        {
            **KLEIN,
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
        },
        "9B",
    ),
    "SANA 0.6B": ("SanaTransformer2DModel", SANA_06, "0.6B"),
    "SANA 1.6B": ("SanaTransformer2DModel", {}, "1.6B"),
    "SANA-Sprint 0.6B": ("SanaTransformer2DModel", {**SANA_06, **SPRINT}, "0.6B"),
    "SANA-Sprint 1.6B": ("SanaTransformer2DModel", SPRINT, "1.6B"),
    "Lumina-Image 2.0": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, "2.6B"),
    "Z-Image": ("ZImageTransformer2DModel", {}, "6B"),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}, "20B"),
}


def _published(cls: str, config: dict, printed: str) -> tuple[dict, float, float]:
    """(whole config, count, tolerance): half a unit of the last printed digit."""
    digits = printed.removesuffix("B")
    unit = 10.0 ** -len(digits.partition(".")[2])
    return {"_class_name": cls, **config}, float(digits) * 1e9, 0.5 * unit / float(digits)


REAL = {name: _published(*model) for name, model in MODELS.items()}
