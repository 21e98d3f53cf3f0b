"""UNet families at tiny size."""

import torch

from tests.families.cases import Case
from tests.families.cases.parts import BETAS, autoencoder, clip_text, clip_tokenizer
from tests.families.cases.unets_real import PUBLISHED
from tests.support.tiny import edm_folder, flow_folder, perturb_zero_layers, sana_folder, sd_folder, vp_folder

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),
}


def _unet(**more):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(4)
    net = UNet2DConditionModel(**UNET | more)
    perturb_zero_layers(net)
    return net.eval()


def _sd(cls, folder, unet, scheduler, **more):
    pipe = cls(
        vae=autoencoder(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )
    pipe.save_pretrained(folder)


def sd_v_folder(folder):
    """Stable Diffusion 2.1: v-prediction, schedule rescaled to zero terminal SNR."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    _sd(StableDiffusionPipeline, folder, _unet(use_linear_projection=True), scheduler)


def restorer_folder(folder, colours=3):
    """UNet2DModel that enlarges to 16x16 pictures, folded to 12x8x8 (grey: 4x8x8)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from tests.support.tiny import unet2d, write_unet2d

    torch.manual_seed(6)
    net = unet2d(4 * colours, 8, shown=4 * colours, num_class_embeds=None)
    info = {"patch": 2, "enlarges": 4, "start_noise": 0.6}
    return write_unet2d(folder, net, FlowMatchEulerDiscreteScheduler(), info, "")


def restorer_images():
    generator = torch.Generator().manual_seed(5)
    return 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1


def restorer_loop(world, pipe, info, noise):
    """The loop of the export's card."""
    shown = torch.pixel_unshuffle(world.images, 2)
    x, scheduler = 0.8 * shown + 0.6 * noise, pipe.scheduler
    scheduler.set_timesteps(**(info["timestep_arguments"] or {"num_inference_steps": info["steps"]}))
    for t in scheduler.timesteps:
        x = scheduler.step(pipe.unet(torch.cat([x, shown], 1), t).sample, t, x).prev_sample
    return world.codec.decode(x)


def lcm_folder(folder):
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    _sd(LatentConsistencyModelPipeline, folder, _unet(time_cond_proj_dim=32), LCMScheduler(**BETAS))


def controlnet_folder(folder):
    from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

    unet = _unet()
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    perturb_zero_layers(net)
    _sd(StableDiffusionControlNetPipeline, folder, unet, DDIMScheduler(**BETAS), controlnet=net.eval())


def pix2pix_folder(folder):
    """The image's latents are more channels of the network's input."""
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline

    unet = _unet(in_channels=8)
    _sd(StableDiffusionInstructPix2PixPipeline, folder, unet, DDIMScheduler(**BETAS))


def sdxl_folder(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = _unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    ).save_pretrained(folder)


def _label_net(**more):
    from diffusers import UNet2DModel

    settings = {k: UNET[k] for k in ("block_out_channels", "layers_per_block", "norm_num_groups")}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(6)
    given = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "attention_head_dim": 8}
    net = UNet2DModel(**settings, **blocks, **given, **more)
    perturb_zero_layers(net)
    return net.eval()


def ddpm_folder(folder):
    """Unconditional DDPM, eps."""
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(_label_net(), DDPMScheduler(clip_sample=False)).save_pretrained(folder)


def consistency_folder(folder):
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    more = {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 10}
    ConsistencyModelPipeline(_label_net(**more), CMStochasticIterativeScheduler()).save_pretrained(folder)


def ddpm_call(world, pipe, info, noise):
    """DDPMPipeline takes a generator, not latents: hand it one that draws our noise."""
    generator = torch.Generator().manual_seed(3)
    steps = {"num_inference_steps": info["steps"]}
    return pipe(2, generator, output_type="pt", **steps).images


def consistency_call(world, pipe, info, noise):
    labels, generator = world.cond["class_labels"].tolist(), torch.Generator().manual_seed(7)
    steps = info["timestep_arguments"] or {"num_inference_steps": info["steps"]}
    scale = pipe.scheduler.config.sigma_max / float(pipe.scheduler.init_noise_sigma)
    given = {"latents": noise * scale, "class_labels": labels, "generator": generator}
    return pipe(batch_size=2, output_type="pt", **given, **steps).images


NO_NULL = "consistency models have no null class: guidance is refused for them"
CASES = [
    Case("sd", sd_folder),
    Case("sd", sd_v_folder, name="sd-v"),
    Case("lcm", lcm_folder, sampler="renoise"),
    Case("sdxl", sdxl_folder),
    Case(
        "controlnet",
        controlnet_folder,
        images=lambda: torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16),
        call={"image": (torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16) + 1) / 2},
    ),
    Case(
        "instruct-pix2pix",
        pix2pix_folder,
        images=lambda: torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16),
        call={"image": (torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16) + 1) / 2},
    ),
    Case("unet2d", vp_folder, name="unet2d-vp"),
    Case("unet2d", flow_folder, name="unet2d-flow"),
    Case("unet2d", edm_folder, name="unet2d-edm"),
    Case("unet2d", ddpm_folder, name="ddpm", plain=ddpm_call, excused={"guidance": "unconditional"}),
    Case(
        "consistency",
        consistency_folder,
        sampler="renoise",
        plain=consistency_call,
        excused={"guidance": NO_NULL},
    ),
    Case(
        "restorer",
        restorer_folder,
        images=restorer_images,
        plain=restorer_loop,
        excused={"guidance": "each picture is its own null condition"},
    ),
    Case("sana", sana_folder),
]
for case in CASES:
    case.published = PUBLISHED.get(case.name or case.family, [])
