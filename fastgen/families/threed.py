"""3D priors: Shap-E, whose latents are the weights of a radiance field."""

import torch
from torch import Tensor, nn

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.families.base import Family


class ShapE(Family):
    """PriorTransformer of Shap-E: x is [B, width, tokens], each token a row of the field's weights.

    It predicts x0 (and a variance, left out). There is no autoencoder in the pipeline, only a renderer:
    `decode` gives a turntable of views. The pipeline's scheduler clips x0 to [-1, 1]; a few-step student's
    does not.
    """

    name, net_class, component, pipelines = "shap-e", "PriorTransformer", "prior", ("ShapEPipeline",)
    schedules, sized = ("VP",), False
    keys = ("proj_embedding",)
    factor, decoder, views, size = 1, "shap_e_renderer", True, 64
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    final_layers = ("time_embedding.*", "embedding_proj", "proj_in", "proj_to_clip_embeddings")
    lora_loader = False
    unreached = {"clip_mean": "used to scale images' embeddings only", "clip_std": "likewise"}

    def matches(self, index: dict, config: dict) -> bool:
        return config.get("encoder_hid_proj_type", "linear") is None  # unCLIP priors have text states beside

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        out = net(x.transpose(1, 2), time, **self.given(x, cond), return_dict=False)[0]
        return out[..., : x.shape[1]].transpose(1, 2)

    def channels(self, net: nn.Module) -> int:
        return net.config.embedding_dim

    def grid(self, net: nn.Module) -> tuple[int, ...]:
        return (net.config.num_embeddings,)

    def cond_shapes(self, net: nn.Module, codec) -> dict[str, tuple[int, ...]]:
        return {"proj_embedding": (net.config.embedding_proj_dim or net.config.embedding_dim,)}

    def encode(self, codec, prompts: list[str]) -> Cond:
        return {"proj_embedding": codec.pipe._encode_prompt(prompts, codec.device, 1, False).float()}

    def null(self, codec) -> Cond:
        return {k: torch.zeros_like(v) for k, v in self.encode(codec, [""]).items()}

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        return noise.transpose(1, 2).flatten(1)

    def size_call(self, codec) -> dict:
        return {"frame_size": self.size}

    def encoded(self, vae: nn.Module, images: Tensor) -> Tensor:
        allowed = "distil without data, or give x0 itself"
        raise UserError("data.images", "Shap-E's pipeline has no encoder for pictures", allowed)

    def denormalise(self, vae: nn.Module, x0: Tensor) -> Tensor:
        return x0.transpose(1, 2)

    def decode(self, vae: nn.Module, z: Tensor) -> Tensor:
        """Views [B, 3, F, h, w] around each object; rays are jittered, always in the same way."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            views = [vae.decode_to_image(one[None], z.device, size=self.size) for one in z]
        return 2 * torch.stack(views).permute(0, 4, 1, 2, 3) - 1

    def feature_map(self, net: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        tokens = out[:, -x.shape[2] :].transpose(1, 2)  # the condition's tokens stand first
        w = 1 << (x.shape[2].bit_length() // 2)
        return tokens.unflatten(2, (-1, w))


FAMILIES: tuple[Family, ...] = (ShapE(),)
