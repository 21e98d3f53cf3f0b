"""Transformer families that attend across from image to text: SANA."""

import torch
from torch import Tensor, nn

from fastgen.backbones.family import Cond, Family, rebuilt


class Sana(Family):
    """SanaTransformer2DModel: flow, Gemma states with a mask; time is 1000 t times the config's
    timestep_scale.
    """

    name, net_class, pipelines = "sana", "SanaTransformer2DModel", ("SanaPipeline",)
    keys = ("encoder_hidden_states", "encoder_attention_mask", "guidance")
    factor, max_length = 32, 300
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")
    final_layers = ("proj_out", "time_embed.*", "caption_projection.*", "patch_embed.*")
    guidance_layers = ("time_embed.guidance_embedder.linear_1", "time_embed.guidance_embedder.linear_2")
    call_arguments = {"complex_human_instruction": None, "use_resolution_binning": False}

    def plain_call(self, info: dict) -> dict:
        return {"max_sequence_length": self.max_length} | super().plain_call(info)

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return super().call(net, x, time * net.config.timestep_scale, self.scaled(net, x, cond))

    def scaled(self, net: nn.Module, x: Tensor, cond: Cond) -> Cond:
        """With the guidance scale as SanaSprintPipeline passes it, if the network takes one; 1 if untold."""
        if not net.config.guidance_embeds:
            return {k: v for k, v in cond.items() if k != "guidance"}
        w = cond.get("guidance", torch.ones(len(x), device=x.device))
        return {**cond, "guidance": w.float() * net.config.guidance_embeds_scale}

    @torch.no_grad()
    def add_guidance(self, net: nn.Module) -> nn.Module:
        """SANA-Sprint's embedder beside the time's: first layer as the time's, last layer zero."""
        if net.config.guidance_embeds:
            return net
        told = rebuilt(net, ("time_embed.emb.", "time_embed."), guidance_embeds=True)
        embedder = told.time_embed.guidance_embedder
        embedder.linear_1.load_state_dict(told.time_embed.timestep_embedder.linear_1.state_dict())
        embedder.linear_2.weight.zero_()
        embedder.linear_2.bias.zero_()
        return told

    def cond_shapes(self, net: nn.Module, codec) -> dict[str, tuple[int, ...]]:
        length = codec.max_length
        return {
            "encoder_hidden_states": (length, net.config.caption_channels),
            "encoder_attention_mask": (length,),
        }

    @torch.no_grad()
    def encode(self, codec, prompts: list[str]) -> Cond:
        states, mask, _, _ = codec.pipe.encode_prompt(
            prompts, False, device=codec.device, max_sequence_length=codec.max_length
        )
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask}


FAMILIES = (Sana(),)
