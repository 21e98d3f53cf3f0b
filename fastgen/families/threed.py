"""3D priors: Shap-E, whose latents are the weights of a radiance field."""

import torch
from torch import Tensor

from fastgen.core.batch import Cond
from fastgen.core.errors import UserError
from fastgen.families.base import Family
from fastgen.families.parts import DiffusersModel


class ShapE(Family):
    """PriorTransformer of Shap-E: x is [B, width, tokens], each token a row of the field's weights.

    It predicts x0 (and a variance, which is not used). The pipeline has no autoencoder, only a renderer:
    `decode` renders views around the object. The pipeline's scheduler clips x0 to [-1, 1]; that of a
    few-step student does not.
    """

    name, net_class, component, pipelines = "shap-e", "PriorTransformer", "prior", ("ShapEPipeline",)
    schedules, has_size = ("VP",), False
    keys = ("proj_embedding",)
    factor, decoder, views, size = 1, "shap_e_renderer", True, 64
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    final_layers = ("time_embedding.*", "embedding_proj", "proj_in", "proj_to_clip_embeddings")
    lora_loader = False
    unreached = {"clip_mean": "used to scale images' embeddings only", "clip_std": "likewise"}

    def matches(self, index: dict, config: dict) -> bool:
        return config.get("encoder_hid_proj_type", "linear") is None  # unCLIP priors also take text states

    def call(self, net: DiffusersModel, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        out = net(x.transpose(1, 2), time, **self.inputs(x, cond), return_dict=False)[0]
        return out[..., : x.shape[1]].transpose(1, 2)

    def channels(self, net: DiffusersModel) -> int:
        return net.config.embedding_dim

    def grid(self, net: DiffusersModel) -> tuple[int, ...]:
        return (net.config.num_embeddings,)

    def cond_shapes(self, net: DiffusersModel, codec) -> dict[str, tuple[int, ...]]:
        return {"proj_embedding": (net.config.embedding_proj_dim or net.config.embedding_dim,)}

    def encode(self, codec, prompts: list[str]) -> Cond:
        return {"proj_embedding": codec.pipe._encode_prompt(prompts, codec.device, 1, False).float()}

    def null(self, codec) -> Cond:
        return {k: torch.zeros_like(v) for k, v in self.encode(codec, [""]).items()}

    def pipeline_latents(self, noise: Tensor, schedule) -> Tensor:
        return noise.transpose(1, 2).flatten(1)

    def size_call(self, codec) -> dict:
        return {"frame_size": self.size}

    def to_latents(self, vae: DiffusersModel, images: Tensor) -> Tensor:
        found = "the pipeline of Shap-E has no encoder, so images cannot be turned into training data"
        raise UserError("data.images", found, "remove it and choose a method that needs no data")

    def denormalise(self, vae: DiffusersModel, x0: Tensor) -> Tensor:
        return x0.transpose(1, 2)

    def decode(self, vae: DiffusersModel, z: Tensor) -> Tensor:
        """Views [B, 3, F, h, w] around each object; the random jitter of the rays is always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            views = [vae.decode_to_image(one[None], z.device, size=self.size) for one in z]
        return 2 * torch.stack(views).permute(0, 4, 1, 2, 3) - 1

    def feature_map(self, net: DiffusersModel, out: Tensor, x: Tensor) -> Tensor:
        tokens = out[:, -x.shape[2] :].transpose(1, 2)  # the condition's tokens stand first
        w = 1 << (x.shape[2].bit_length() // 2)
        return tokens.unflatten(2, (-1, w))


FAMILIES: tuple[Family, ...] = (ShapE(),)
