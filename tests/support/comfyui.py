"""What ComfyUI makes of a LoRA file and of a workflow, written from its documented rules, not its code.

Keys       `lora_unet_` + the diffusers path of a UNet's module, dots as underscores; `transformer.` + the
           path of an SD3 or Flux block's module; .lora_down / .lora_up / .alpha or .lora_A / .lora_B; other
           keys are dropped with a warning
Strength   up @ down * alpha / rank, and without alpha up @ down
Workflow   nodes by number, each with its class and inputs; [number, k] is output k of another node
Sampling   noise sigma * eps, or sqrt(1 + sigma^2) eps at the model's last level; x / sqrt(1 + sigma^2) goes
           into an eps network, D = x - sigma eps; flow networks take (1 - sigma) x0 + sigma eps, and
           D = x - sigma v
"""

import re

import torch

NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({"unet_name": str, "weight_dtype": str}, ("MODEL",)),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str, "strength_model": float}, ("MODEL",)),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": str, "zsnr": bool}, ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": str}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": float}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    "SamplerCustom": (
        {
            "model": "MODEL",
            "add_noise": bool,
            "noise_seed": int,
            "cfg": float,
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
BLOCK = re.compile(
    r"norm1(_context)?\.linear|attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|norm_(added_)?[qk])"
    r"|ff(_context)?\.net\.(0\.proj|2)"
)
SINGLE = re.compile(r"norm\.linear|attn\.(to_[qkv]|norm_[qk])|proj_mlp|proj_out")


def problems(nodes: dict) -> list[str]:
    """What ComfyUI would refuse in a workflow: unknown nodes, inputs that are missing, unknown or of a wrong
    type, links to nothing.
    """
    found = []
    for number, node in nodes.items():
        inputs, _ = NODES.get(node["class_type"], ({}, ()))
        if node["inputs"].keys() != inputs.keys():
            found.append(f"{number} {node['class_type']}: {sorted(node['inputs'].keys() ^ inputs.keys())}")
        for name, kind in inputs.items():
            value = node["inputs"].get(name)
            if isinstance(kind, type):
                good = type(value) is kind
            else:
                source = nodes.get(value[0]) if isinstance(value, list) else None
                outputs = NODES[source["class_type"]][1] if source else ()
                good = bool(outputs) and outputs[value[1]] == kind
            if not good:
                found.append(f"{number} {node['class_type']}.{name}: {value!r}")
    saved = [n for n in nodes.values() if n["class_type"] == "SaveImage"]
    return found + ([] if len(saved) == 1 else ["nothing is saved"])


def unet_names(net) -> dict[str, str]:
    """Original name of every module with weights, by the diffusers path, from the UNet's own shape."""
    layers, depth = net.config.layers_per_block, len(net.config.block_out_channels)

    def original(path: str) -> str:
        if path in TOP:
            return TOP[path]
        kind, _, rest = path.partition(".")
        if kind == "mid_block":
            part, index, rest = rest.split(".", 2)
            return f"middle_block.{2 * int(index) if part == 'resnets' else 1}.{inner(part, rest)}"
        block, part, index, rest = rest.split(".", 3)
        if kind == "down_blocks":
            first = 1 + int(block) * (layers + 1)
            if part == "downsamplers":
                return f"input_blocks.{first + layers}.0.op"
            return f"input_blocks.{first + int(index)}.{int(part == 'attentions')}.{inner(part, rest)}"
        first = int(block) * (layers + 1)
        if part == "upsamplers":
            attends = hasattr(net.up_blocks[int(block)], "attentions")
            return f"output_blocks.{first + layers}.{1 + attends}.conv"
        return f"output_blocks.{first + int(index)}.{int(part == 'attentions')}.{inner(part, rest)}"

    def inner(part: str, rest: str) -> str:
        return RESNET[rest] if part == "resnets" else rest

    assert depth == len(net.down_blocks)
    return {path: original(path) for path, m in net.named_modules() if getattr(m, "weight", None) is not None}


def original_state(net) -> dict[str, torch.Tensor]:
    """The weights of a UNet under the names of the original checkpoint."""
    names = unet_names(net)
    found = {}
    for key, value in net.state_dict().items():
        path, _, end = key.rpartition(".")
        found[f"model.diffusion_model.{names[path]}.{end}"] = value
    return found


def patched(state: dict, names: dict[str, str], tensors: dict) -> tuple[dict, list[str]]:
    """The original checkpoint with a LoRA file's update, and the keys that ComfyUI drops."""
    known = {f"lora_unet_{path.replace('.', '_')}": name for path, name in names.items()}
    state, left = dict(state), set(tensors)
    for start, name in known.items():
        down, up = (tensors.get(f"{start}.lora_{end}.weight") for end in ("down", "up"))
        if down is None or up is None:
            continue
        key = f"model.diffusion_model.{name}.weight"
        alpha = tensors.get(f"{start}.alpha")
        scale = float(alpha) / down.shape[0] if alpha is not None else 1.0
        update = (up.float().flatten(1) @ down.float().flatten(1)).reshape(state[key].shape)
        state[key] = state[key] + scale * update
        left -= {f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha"}
    return state, sorted(left)


def unread_of_transformer(keys) -> list[str]:
    """Keys of a LoRA file that ComfyUI drops for SD3 and Flux."""
    found = []
    for key in keys:
        path = re.sub(r"\.lora_[AB]\.weight$", "", key)
        block = re.fullmatch(r"transformer\.transformer_blocks\.\d+\.(.+)", path)
        single = re.fullmatch(r"transformer\.single_transformer_blocks\.\d+\.(.+)", path)
        read = (block and BLOCK.fullmatch(block[1])) or (single and SINGLE.fullmatch(single[1]))
        if path == key or not read:
            found.append(key)
    return found


@torch.no_grad()
def sample(nodes: dict, network, last: float, noise: torch.Tensor, more, flow: bool = False) -> torch.Tensor:
    """x0 as ComfyUI's sampler of a workflow reaches it. network(x, sigma): the prediction; last: the model's
    highest level; more(x): fresh noise.
    """
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    sigmas = [float(v) for v in kinds["ManualSigmas"]["sigmas"].split(",")]
    name = kinds["KSamplerSelect"]["sampler_name"]
    unit = sigmas[0] > last or abs(sigmas[0] - last) <= 1e-5 * last
    if flow:
        x = sigmas[0] * noise
    else:
        x = noise * ((1 + sigmas[0] ** 2) ** 0.5 if unit else sigmas[0])
    for sigma, following in zip(sigmas, sigmas[1:]):
        given = x if flow else x / (1 + sigma**2) ** 0.5
        x0 = x - sigma * network(given, sigma)
        if name == "lcm":
            x = x0
            if following > 0:
                x = (1 - following) * x0 + following * more(x) if flow else x0 + following * more(x)
        else:
            assert name == "euler"
            x = x + (x - x0) / sigma * (following - sigma)
    return x
