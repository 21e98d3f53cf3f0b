"""The released UNets by their published configs, with the parameter counts that are stated for them.

SD1.5: the example of diffusers' ModelMixin.num_parameters; SD2.1 and SDXL: the counts their checkpoints
carry; ControlNet: the side network of SD1.5; DDPM: 35.7M for CIFAR-10 (arXiv 2006.11239, appendix B);
consistency models: the 296M of ADM at 64 x 64 (arXiv 2206.00364, table 6), whose UNet they share.
"""

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SD21 = {
    "_class_name": "UNet2DConditionModel",
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "sample_size": 96,
}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
CONTROLNET = {"_class_name": "ControlNetModel", "cross_attention_dim": 768, "attention_head_dim": 8}
DDPM = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "norm_num_groups": 32,
}
CONSISTENCY = {
    "_class_name": "UNet2DModel",
    "sample_size": 64,
    "block_out_channels": [192, 384, 576, 768],
    "layers_per_block": 3,
    "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
    "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "attention_head_dim": 64,
    "num_class_embeds": 1000,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 32,
}
PUBLISHED = {
    "sd": [("SD1.5", SD15, 859_520_964, 0)],
    "sd-v": [("SD2.1", SD21, 865_910_724, 0)],
    "sdxl": [("SDXL", SDXL, 2_567_463_684, 0)],
    "controlnet": [("ControlNet SD1.5", CONTROLNET, 361_279_120, 0)],
    "ddpm": [("DDPM CIFAR-10", DDPM, 35.7e6, 2e-3)],
    "consistency": [("consistency ImageNet 64", CONSISTENCY, 296e6, 2e-3)],
}
