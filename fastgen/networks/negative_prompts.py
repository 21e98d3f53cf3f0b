"""NASA: negative prompts for few-step students, as attention processors of plain diffusers.

Paper: Nguyen et al. 2024, arXiv 2412.02687 (Sec. 4.2, eq. 8-10). In every cross-attention, queries Q:
  Z = softmax(Q K+^T / sqrt d) V+  -  scale softmax(Q K-^T / sqrt d) V-           before the output projection
with K-, V- from the negative prompt by the layer's own weights. In joint attention (SD3) Z- is the image's
queries over the negative text alone, whose states in each block come from a separate pass; the paper gives
no formulas for that case.

    from nasa import negative_prompt, remove
    negative_prompt(pipe, "red", scale=0.5)     # then call the pipeline as usual, guidance_scale 1
    remove(pipe)

An empty negative prompt has an effect too; use `remove` instead. This file needs torch only and is part of
exports.
"""

import inspect

import torch
import torch.nn.functional as F


class Cross:
    """Cross-attention by the layer's own processor, run twice; the input of its output projection becomes
    Z+ - scale Z-.
    """

    def __init__(self, inner, states, mask, scale):
        self.inner, self.states, self.mask, self.scale = inner, states, mask, scale

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        if encoder_hidden_states is None:  # self-attention
            return self.inner(attn, hidden_states, None, attention_mask, *args, **kwargs)
        batch, kept, last = len(hidden_states), [], attn.to_out[0]
        states = self.states.to(encoder_hidden_states).expand(batch, -1, -1)
        mask = None if self.mask is None else self.mask.to(hidden_states).expand(batch, -1, -1)
        keep = last.register_forward_pre_hook(lambda _m, a: kept.append(a[0]))
        try:
            self.inner(attn, hidden_states, states, mask, *args, **kwargs)
        finally:
            keep.remove()
        with _subtracting(last, self.scale * kept[0]):
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)


class Joint:
    """Joint attention: the first pass stores the states of the negative text, the second subtracts their
    attention.
    """

    def __init__(self, inner, shared):
        self.inner, self.shared, self.negative = inner, shared, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if encoder_hidden_states is not None and self.shared["keep"]:
            self.negative = encoder_hidden_states
        if encoder_hidden_states is None or self.shared["keep"]:
            return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        q, k, v = (
            t.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for t in (
                attn.to_q(hidden_states),
                attn.add_k_proj(self.negative),
                attn.add_v_proj(self.negative),
            )
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_added_k is None else attn.norm_added_k(k)
        removed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        with _subtracting(attn.to_out[0], self.shared["scale"] * removed.to(hidden_states)):
            return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


class _subtracting:
    """Context manager in which `removed` is subtracted from a layer's input."""

    def __init__(self, layer, removed):
        self.layer, self.removed = layer, removed

    def __enter__(self):
        self.handle = self.layer.register_forward_pre_hook(lambda _m, a: (a[0] - self.removed, *a[1:]))

    def __exit__(self, *_):
        self.handle.remove()


@torch.no_grad()
def attach(net, states, scale, mask=None) -> int:
    """Give a denoiser a negative prompt: text states [1, L, C] and a mask [1, L] of tokens.

    Returns the number of attention layers that use it.
    """
    remove(net)
    cross = {n: m for n, m in net.named_modules() if n.endswith("attn2") and hasattr(m, "processor")}
    joint = {n: m for n, m in net.named_modules() if getattr(m, "add_k_proj", None) is not None}
    joint = {n: m for n, m in joint.items() if "Joint" in type(m.processor).__name__}
    if not cross and not joint:
        raise ValueError(f"{type(net).__name__} has neither cross- nor joint attention to a text")
    if joint:
        shared = {"keep": False, "scale": scale}
        for module in joint.values():
            module.processor = Joint(module.processor, shared)
        net.forward = _twice(net.forward, states, shared)
        return len(joint)
    for name in ("caption_projection", "caption_norm"):  # SANA, PixArt
        if getattr(net, name, None) is not None:
            layer = getattr(net, name)
            states = layer(states.to(next(layer.parameters())))
    bias = None if mask is None else (1 - mask.float())[:, None] * -10000.0
    for module in cross.values():
        module.processor = Cross(module.processor, states, bias, scale)
    return len(cross)


def _twice(forward, states, shared):
    """A forward that first runs the negative prompt, so that every block stores its text states."""

    def both(hidden_states, encoder_hidden_states=None, *args, **kwargs):
        shared["keep"] = True
        try:
            with torch.no_grad():
                negative = states.to(encoder_hidden_states).expand(len(hidden_states), -1, -1)
                forward(hidden_states, negative, *args, **kwargs)
        finally:
            shared["keep"] = False
        return forward(hidden_states, encoder_hidden_states, *args, **kwargs)

    return both


def remove(net) -> None:
    """Remove the negative prompt from a denoiser or pipeline."""
    net = _denoiser(net)
    for module in net.modules():
        if isinstance(getattr(module, "processor", None), (Cross, Joint)):
            module.processor = module.processor.inner
    net.__dict__.pop("forward", None)


def negative_prompt(pipe, text: str, scale: float = 0.5, **encode) -> int:
    """Give a pipeline a negative prompt; `encode` is passed to its encode_prompt. Returns the number of
    attention layers that use it.
    """
    known = inspect.signature(pipe.encode_prompt).parameters
    arguments = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "device": pipe.device}
    arguments |= {"prompt_2": None, "prompt_3": None, **encode}
    with torch.no_grad():
        states, mask, *_ = pipe.encode_prompt(text, **{k: v for k, v in arguments.items() if k in known})
    is_mask = mask is not None and mask.shape == states.shape[:2]
    return attach(_denoiser(pipe), states, scale, mask if is_mask else None)


def _denoiser(pipe):
    return getattr(pipe, "transformer", None) or getattr(pipe, "unet", None) or pipe
