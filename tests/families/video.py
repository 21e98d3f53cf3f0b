"""Tiny random video pipelines of the real diffusers classes, as folders on disk."""

import json
import string
from pathlib import Path

import torch

from fastgen.backbones.family import perturb_zero_layers
from fastgen.backbones.wan import pictures
from fastgen.serving import bind
from tests.families import PROMPTS, Case
from tests.families.parts import clip_text, clip_tokenizer, t5_tokenizer
from tests.families.video_real import REAL

SIZE, FRAMES = 32, 9  # pixels a side and frames that these folders are sampled at


def llama_tokenizer():
    """Llama tokenizer over printable characters."""
    from transformers import LlamaTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", "\u2581", *(c for c in string.printable if c not in string.whitespace)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return LlamaTokenizerFast(vocab=vocab, merges=[], pad_token="<unk>", padding_side="right")  # noqa: S106


def t5_encoder(multilingual: bool = False, width: int = 32):
    """T5 (or UMT5) encoder of two layers."""
    import transformers

    kind = "UMT5" if multilingual else "T5"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=99, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip_vision(width: int, projection: bool = False, size: int = SIZE, patch: int = 8):
    """CLIP image encoder and its processor."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )

    config = CLIPVisionConfig(
        hidden_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=size,
        intermediate_size=16,
        patch_size=patch,
    )
    processor = CLIPImageProcessor(crop_size=size, size=size)
    return (CLIPVisionModelWithProjection if projection else CLIPVisionModel)(config), processor


def alive(net):
    """The network in eval mode, none of its layers zero (an untrained one would ignore its input)."""
    perturb_zero_layers(net)
    return net.eval()


def save(pipe, folder: Path, **info) -> Path:
    """The pipeline on disk, with the size that fastgen samples it at."""
    pipe.save_pretrained(folder)
    (folder / "fastgen.json").write_text(json.dumps({"height": SIZE, "width": SIZE, **info}))
    return folder


# -- Wan -------------------------------------------------------------------------------------------------
def wan_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def wan_net(cls: str = "WanTransformer3DModel", **other):
    import diffusers

    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32}
    sizes |= {"in_channels": 16, "out_channels": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2}
    return alive(getattr(diffusers, cls)(**{**sizes, "rope_max_seq_len": 32, **other}))


def wan_parts(seed: int):
    torch.manual_seed(seed)
    from diffusers import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(True),
        "scheduler": UniPCMultistepScheduler(**flow),
    }


def wan(folder: Path) -> Path:
    """Wan 2.1 text to video."""
    from diffusers import WanPipeline

    pipe = WanPipeline(**wan_parts(11), vae=wan_vae(), transformer=wan_net())
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan22(folder: Path) -> Path:
    """Wan 2.2 text to video: two experts, split at 0.875."""
    from diffusers import WanPipeline

    parts = wan_parts(12)
    pipe = WanPipeline(
        **parts, vae=wan_vae(), transformer=wan_net(), transformer_2=wan_net(), boundary_ratio=0.875
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan_i2v(folder: Path) -> Path:
    """Wan 2.1 image to video: CLIP image states, mask and image latents beside the noise."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts(13)
    encoder, processor = clip_vision(4)
    net = wan_net(in_channels=36, image_dim=4)
    more = {"image_encoder": encoder, "image_processor": processor}
    pipe = WanImageToVideoPipeline(**parts, vae=wan_vae(), transformer=net, **more)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan22_i2v(folder: Path) -> Path:
    """Wan 2.2 image to video: two experts without CLIP image states."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts(14)
    nets = {"transformer": wan_net(in_channels=36), "transformer_2": wan_net(in_channels=36)}
    pipe = WanImageToVideoPipeline(**parts, vae=wan_vae(), **nets, boundary_ratio=0.9)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan_5b_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        decoder_base_dim=3,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.1] * 48,
        latents_std=[1.5] * 48,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )


def wan_ti2v(folder: Path) -> Path:
    """Wan 2.2 TI2V-5B asked for by text."""
    from diffusers import WanPipeline

    parts = wan_parts(15)
    net = wan_net(in_channels=48, out_channels=48)
    pipe = WanPipeline(**parts, vae=wan_5b_vae(), transformer=net, expand_timesteps=True)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def wan_ti2v_image(folder: Path) -> Path:
    """Wan 2.2 TI2V-5B asked for by text and a first frame, whose tokens stand at time zero."""
    from diffusers import WanImageToVideoPipeline

    parts = wan_parts(16)
    net = wan_net(in_channels=48, out_channels=48)
    pipe = WanImageToVideoPipeline(**parts, vae=wan_5b_vae(), transformer=net, expand_timesteps=True)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def anyflow(folder: Path) -> Path:
    """AnyFlow: a Wan that also knows where its step goes."""
    from diffusers import AnyFlowPipeline, FlowMapEulerDiscreteScheduler

    parts = wan_parts(17) | {"scheduler": FlowMapEulerDiscreteScheduler(shift=5.0)}
    net = wan_net("AnyFlowTransformer3DModel", deltatime_type="r", gate_value=0.25)
    pipe = AnyFlowPipeline(**parts, vae=wan_vae(), transformer=net)
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


# -- CogVideoX -------------------------------------------------------------------------------------------
def _cogvideox(folder: Path, pipeline: str, channels: int, **net) -> Path:
    import diffusers

    kinds = {f"{d}_block_types": (f"CogVideoX{d.title()}Block3D",) * 4 for d in ("down", "up")}
    vae = diffusers.AutoencoderKLCogVideoX(
        **kinds,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=SIZE,
        sample_width=SIZE,
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=FRAMES,
        max_text_seq_length=16,
        **net,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipe = getattr(diffusers, pipeline)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae,
        transformer=alive(transformer),
        scheduler=scheduler,
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def cogvideox(folder: Path) -> Path:
    """CogVideoX text to video, sine position table (the 2B form)."""
    torch.manual_seed(21)
    return _cogvideox(folder, "CogVideoXPipeline", 4)


def cogvideox_5b(folder: Path) -> Path:
    """CogVideoX text to video, rotary positions (the 5B form)."""
    torch.manual_seed(22)
    more = {"use_rotary_positional_embeddings": True}
    return _cogvideox(folder, "CogVideoXPipeline", 4, **more, spatial_interpolation_scale=1.0)


def cogvideox_i2v(folder: Path) -> Path:
    """CogVideoX image to video."""
    torch.manual_seed(23)
    more = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    return _cogvideox(folder, "CogVideoXImageToVideoPipeline", 8, **more)


# -- HunyuanVideo, LTX -----------------------------------------------------------------------------------
def hunyuan_video(folder: Path) -> Path:
    """HunyuanVideo, guidance embedded."""
    import diffusers
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(31)
    kinds = {f"{d}_block_types": (f"HunyuanVideo{d.title()}Block3D",) * 4 for d in ("down", "up")}
    vae = diffusers.AutoencoderKLHunyuanVideo(
        **kinds,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=True,
    )
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
        guidance_embeds=True,
    )
    tokenizer = _templated(llama_tokenizer())
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=len(tokenizer),
        pad_token_id=0,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=tokenizer,
        transformer=alive(net),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


def _templated(tokenizer):
    """The tokenizer taught to read HunyuanVideo's prompt template in about the 95 tokens it crops."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as template

    prefix, num = template["template"].partition("{}")[0], template["crop_start"] - 1
    bounds = [len(prefix) * i // num for i in range(num + 1)]
    tokenizer.add_tokens(sorted({prefix[a:b] for a, b in zip(bounds, bounds[1:])}))
    return tokenizer


def ltx(folder: Path) -> Path:
    """LTX-Video: packed tokens, dynamic shift, per-channel statistics as buffers."""
    import diffusers

    torch.manual_seed(32)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1),
        patch_size=2,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        num_layers=2,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipe = diffusers.LTXPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=alive(net),
    )
    return save(pipe, folder, num_frames=FRAMES, max_sequence_length=16)


# -- UNets -----------------------------------------------------------------------------------------------
def animatediff(folder: Path) -> Path:
    """AnimateDiff: an SD UNet with motion modules, four frames of 16 x 16."""
    import diffusers

    torch.manual_seed(41)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipe = diffusers.AnimateDiffPipeline(
        vae=vae,
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        motion_adapter=motion,
        scheduler=diffusers.DDIMScheduler(**betas, clip_sample=False, steps_offset=1),
    )
    alive(pipe.unet)
    return save(pipe, folder, height=16, width=16, num_frames=4)


def svd(folder: Path) -> Path:
    """Stable Video Diffusion: image to video in the EDM form, three frames of 32 x 32."""
    import diffusers

    torch.manual_seed(42)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
        num_frames=3,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
    )
    encoder, processor = clip_vision(32, projection=True, size=224, patch=56)  # the pipeline resizes to 224
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipe = diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=encoder,
        unet=alive(unet),
        scheduler=scheduler,
        feature_extractor=processor,
    )
    return save(pipe, folder, num_frames=3)


def plain_video(world, pipe, info, noise):
    """Frames [B, C, F, H, W] in [0, 1] by pipeline calls that a user could write, one request at a time."""
    family, codec = world.family, world.codec
    document = json.loads((world.folder / "fastgen.json").read_text())
    call = {"num_inference_steps": info["steps"]}
    if info["bound"]:
        bind(pipe.scheduler, info["arguments"])
    elif info["arguments"]:
        call = dict(info["arguments"])
    call |= family.size_call(codec) | family.guidance_call(codec.guidance) | family.plain_call(document)
    found = []
    for i, prompt in enumerate(PROMPTS):
        asked = {"prompt": prompt} if family.takes_text else {}
        if family.needs_image:
            asked["image"] = pictures(world.images)[i]
        asked["latents"] = family.pipeline_latents(noise[i : i + 1], world.schedule)
        generator = [torch.Generator().manual_seed(0)]  # of the image's condition, where one is drawn
        found.append(pipe(**asked, generator=generator, output_type="pt", **call).frames)
    return torch.cat(found).transpose(1, 2)


def shown(side: int):
    """Two pictures [2, 3, side, side] in [-1, 1], in whole 8-bit steps as a file would hold them."""
    pixels = torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(5))
    return pixels.float() / 127.5 - 1


def _case(family: str, build, *real: tuple, image: int = 0, **more) -> Case:
    """A case with its released models as (model, config, published billions)."""
    published = [(m, config, 1e9 * float(n), 0.5 * _unit(n) / float(n)) for m, config, n in real]
    images = (lambda: shown(image)) if image else None
    return Case(family, build, plain=plain_video, images=images, published=published, **more)


def _unit(printed: str) -> float:
    return 10.0 ** -len(printed.partition(".")[2])


CASES = [
    _case("wan", wan, ("Wan 2.1 1.3B", REAL["wan-1.3b"], "1.42"), ("Wan 2.1 14B", REAL["wan-14b"], "14")),
    _case("wan", wan22, name="wan22"),
    _case("wan-i2v", wan_i2v, ("Wan 2.1 I2V 14B", REAL["wan-i2v-14b"], "16.4"), image=SIZE),
    _case("wan-i2v", wan22_i2v, name="wan22-i2v", image=SIZE),
    _case("wan-ti2v", wan_ti2v, ("Wan 2.2 TI2V 5B", REAL["wan-5b"], "5")),
    _case("wan-ti2v-image", wan_ti2v_image, image=SIZE),
    _case("anyflow", anyflow, ("AnyFlow 14B", REAL["anyflow"], "14")),
    _case("cogvideox", cogvideox, ("CogVideoX 2B", REAL["cogvideox-2b"], "2")),
    _case("cogvideox", cogvideox_5b, ("CogVideoX 5B", REAL["cogvideox-5b"], "5.6"), name="cogvideox-rotary"),
    _case("cogvideox-i2v", cogvideox_i2v, ("CogVideoX 5B I2V", REAL["cogvideox-i2v"], "5.6"), image=SIZE),
    _case("hunyuan-video", hunyuan_video, ("HunyuanVideo", REAL["hunyuan-video"], "13")),
    _case("ltx", ltx, ("LTX-Video", REAL["ltx"], "2")),
    _case("animatediff", animatediff, ("AnimateDiff v1.5", REAL["animatediff"], "1.3")),
    _case("svd", svd, ("Stable Video Diffusion", REAL["svd"], "1.5"), image=32),
]
