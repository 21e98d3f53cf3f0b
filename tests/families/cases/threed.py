"""Tiny random 3D pipelines of the real diffusers classes, as folders on disk."""

from pathlib import Path

import torch

from fastgen.export.scheduler import bind
from tests.families.cases import PROMPTS, Case
from tests.families.cases.parts import clip_text, clip_tokenizer
from tests.families.cases.video_parts import alive
from tests.families.cases.video_real import REAL


def shap_e(folder: Path) -> Path:
    """Shap-E text to 3D: a prior over 32 latent tokens of width 16."""
    import diffusers
    from diffusers.pipelines.shap_e import ShapERenderer

    torch.manual_seed(51)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        embedding_dim=16,
        num_embeddings=32,
        embedding_proj_dim=32,
        time_embed_dim=64,
        num_layers=2,
        clip_embed_dim=32,
        additional_embeddings=0,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
    )
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)),
        d_latent=16,
        d_hidden=8,
        n_output=12,
        background=(0.1, 0.1, 0.1),
    )
    scheduler = diffusers.HeunDiscreteScheduler(
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
        clip_sample_range=1.0,
    )
    pipe = diffusers.ShapEPipeline(
        prior=alive(prior),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler,
        shap_e_renderer=renderer,
    )
    pipe.save_pretrained(folder)
    return folder


def plain_latents(world, pipe, info, noise):
    """x0 by an ordinary call; rendering it is too slow for a test."""
    call = info["timestep_arguments"] or {"num_inference_steps": info["steps"]}
    if info["set_on_scheduler"]:
        bind(pipe.scheduler, info["timestep_arguments"])
    latents = world.family.pipeline_latents(noise, world.schedule)
    found = pipe(PROMPTS, latents=latents, guidance_scale=1.0, output_type="latent", **call).images
    return found.transpose(1, 2)


CASES = [
    Case(
        "shap-e",
        shap_e,
        plain=plain_latents,
        latent=True,
        excused={
            "encode": "Shap-E's pipeline has no encoder for pictures",
            "checkpointing": "diffusers' PriorTransformer has no gradient checkpointing",
        },
        published=[("Shap-E", REAL["shap-e"], 0.3e9, 0.06)],
    )
]
