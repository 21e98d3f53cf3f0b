"""Published configs of released video and 3D networks: the class, and what differs from its defaults.

Wan 1.3B, CogVideoX 5B and Wan I2V are counted by the size of their weight files, which their names round.
"""

WAN = {"_class_name": "WanTransformer3DModel"}
COG = {"_class_name": "CogVideoXTransformer3DModel"}
COG_5B = {**COG, "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}

REAL = {
    "wan-1.3b": {**WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan-14b": WAN,
    "wan-i2v-14b": {**WAN, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    "wan-5b": {
        **WAN,
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
    },
    "anyflow": {"_class_name": "AnyFlowTransformer3DModel"},
    "cogvideox-2b": COG,
    "cogvideox-5b": COG_5B,
    "cogvideox-i2v": {**COG_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
    "hunyuan-video": {"_class_name": "HunyuanVideoTransformer3DModel"},
    "ltx": {"_class_name": "LTXVideoTransformer3DModel"},
    "animatediff": {
        "_class_name": "UNetMotionModel",
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "motion_max_seq_length": 32,
        "use_motion_mid_block": False,
    },
    "svd": {"_class_name": "UNetSpatioTemporalConditionModel"},
    "shap-e": {
        "_class_name": "PriorTransformer",
        "num_attention_heads": 16,
        "attention_head_dim": 64,
        "num_layers": 24,
        "embedding_dim": 1024,
        "num_embeddings": 1024,
        "additional_embeddings": 0,
        "time_embed_act_fn": "gelu",
        "norm_in_type": "layer",
        "encoder_hid_proj_type": None,
        "added_emb_type": None,
        "time_embed_dim": 4096,
        "embedding_proj_dim": 768,
        "clip_embed_dim": 2048,
    },
}
