"""Transformer families: SANA."""

import torch
from torch import Tensor, nn

from fastgen.backbones.base import Cond, Family, rebuilt


class Sana(Family):
    """SanaTransformer2DModel: flow, Gemma states with a mask; time is 1000 t times the config's
    timestep_scale.
    """

    name, net_class, pipeline, component = "sana", "SanaTransformer2DModel", "SanaPipeline", "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "conv_inverted", "conv_point")
    guidance_layers = ("time_embed.guidance_embedder.linear_1", "time_embed.guidance_embedder.linear_2")

    def call(self, net: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        guidance = None
        if net.config.guidance_embeds:  # SanaSprintPipeline passes the same; 1 where nobody tells w
            guidance = cond.get("guidance", torch.ones(len(x), device=x.device))
            guidance = guidance.float() * net.config.guidance_embeds_scale
        out = net(
            x,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=time * net.config.timestep_scale,
            guidance=guidance,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

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

    def taps(self, net: nn.Module) -> list[nn.Module]:
        return list(net.transformer_blocks)

    def default_taps(self, net: nn.Module) -> tuple[int, ...]:
        return (len(net.transformer_blocks) * 3 // 4,)

    def feature_map(self, net: nn.Module, out: Tensor, x: Tensor) -> Tensor:
        patch = net.config.patch_size
        return out.transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))

    def feature_channels(self, net: nn.Module) -> list[int]:
        width = net.config.num_attention_heads * net.config.attention_head_dim
        return [width] * len(net.transformer_blocks)


def perturb_zero_layers(net: nn.Module, std: float = 0.02) -> None:
    """Give zero-initialised layers small random weights, so that an untrained network's output depends on
    its input.
    """
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, std)
