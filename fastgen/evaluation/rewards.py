"""Rewards by name, from the networks that evaluation has: what a student is tuned by, never what measures it.

  attributes     log-probability of what the prompt asks for, by a bundled classifier (assets/rewards/SET)
  motion, look   of clips: the same of the motion alone, and of all but the motion
  tinted-clip    cosine in the bundled two-tower net of Tinted Fashion
  clip, hps, pickscore, image_reward, aesthetic     as the metrics of these names, by local weights
  contrast       spread of the brightness; jpeg: minus the kilobytes of a JPEG file, which has no gradient
  NAME           a function of one's own: weights NAME=package.module:function

The function of one's own returns what is called with (images [B, 3, H, W] in [0, 1], prompts) and answers
[B]; an attribute `differentiable` of False says that it has no gradient, `clips` of True that it judges whole
clips [B, 3, F, H, W] and not single frames of them. Images are resized as tensors, with
an antialiased bicubic filter, where the metrics use Pillow's.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgen.core.errors import UserError, first_line, suggest
from fastgen.core.paths import asset, resolve
from fastgen.data import moving
from fastgen.data.bundled import attributes_of
from fastgen.evaluation.encoders import image_reward, plugin, resize
from fastgen.evaluation.encoders.base import TextImageEncoder, checksum, state_checksum
from fastgen.evaluation.encoders.catalogue import HEAD_WANTED, Encoders
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.evaluation.metrics.fvd_mini import ClipMeasurer
from fastgen.evaluation.metrics.text_scores import affine_head
from fastgen.evaluation.run_metrics import RunMetrics
from fastgen.networks.clip import image_text
from fastgen.networks.clip_net import measuring_net
from fastgen.networks.rewards import KEY, Reward

CLIP = "assets:measure/tinted-clip"
REMEMBERED = 10_000
"""prompts whose embedding a reward keeps"""


@lru_cache(maxsize=8)
def open_reward(name: str, weights: tuple[tuple[str, str], ...], mini_set: str, device: str) -> Reward:
    """The reward of a name; weights: (name, local path) pairs as --weights has them; mini_set: the bundled
    set of the teacher, if any. A UserError where one is missing.
    """
    given = dict(weights)
    if plugin.is_plugin(given.get(name, "")):
        return _own(name, given[name], device)
    if name not in KNOWN:
        ways = f"name one of {', '.join(KNOWN)}, or give weights {{{name}: package.module:function}}"
        raise UserError(KEY, f"no reward {name!r}{suggest(name, KNOWN)}", ways)
    try:
        return KNOWN[name](Encoders(given, mini_set, device=device), device)
    except UserError as error:
        instruction = error.instruction.replace("--weights ", f"{KEY}.weights, as ")
        raise UserError(KEY, error.found, instruction) from None


# -- without a network ---------------------------------------------------------------------------------------
def _contrast(_: Encoders, device: str) -> Reward:
    return Reward("contrast", lambda images, prompts: images.mean(1).flatten(1).std(1))


def _jpeg(_: Encoders, device: str) -> Reward:
    from PIL import Image

    def size(image: Tensor) -> float:
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        return buffer.tell() / 1000

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([-size(image) for image in images], device=images.device)

    return Reward("jpeg", score, differentiable=False)


# -- the bundled networks ------------------------------------------------------------------------------------
def _attributes(
    e: Encoders, device: str, name: str = "attributes", judges: Callable[[str], bool] = lambda head: True
) -> Reward:
    """Mean over the attributes that a prompt names of log p(attribute | image or clip); judges: whether an
    attribute counts.
    """
    place = e.weights.get(name) or f"assets:rewards/{e.mini_set}"
    try:
        folder = resolve(place)
        net = measuring_net(folder).to(device)
    except (OSError, ValueError, KeyError) as error:
        found = f"{name}: {place} cannot be read ({first_line(error)})"
        raise UserError(
            KEY, found, f"bundled for digits, tinted and moving; give weights {{{name}: FOLDER}}"
        ) from None
    if name != "attributes" and "motion" not in net.config["heads"]:
        raise UserError(KEY, f"{name}: {place} knows no motion", "name attributes, or a net of clips")
    named = lru_cache(maxsize=REMEMBERED)(partial(_named, set(net.config["heads"])))

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        channels = net.config["channels"]
        logits = net(images[:, :channels])["logits"]
        total, count = 0.0, torch.zeros(len(images), device=images.device)
        for head, values in logits.items():
            if not judges(head):
                continue
            wanted = torch.tensor([named(text).get(head, -1) for text in prompts], device=images.device)
            asked = wanted >= 0
            log_p = values.log_softmax(1).gather(1, wanted.clamp(min=0)[:, None])[:, 0]
            total, count = total + log_p * asked, count + asked
        return total / count.clamp(min=1)

    return Reward(name, score, weights=[checksum(folder)], clips="frames" in net.config)


def _named(heads: set[str], text: str) -> dict[str, int]:
    """What a prompt asks for: a class by its number, or the attributes that a caption names."""
    if heads == {"class"}:
        return {"class": int(text)} if text.isdecimal() else {}
    try:
        return moving.attributes_of(text) if "motion" in heads else attributes_of(text)
    except ValueError as error:
        raise UserError(KEY, f"attributes: {error}", "name each attribute once") from None


def _tinted_clip(_: Encoders, device: str) -> Reward:
    net = image_text(CLIP, device)
    return Reward("tinted-clip", net, weights=[tinted_clip()])


@lru_cache(maxsize=1)
def tinted_clip() -> str:
    """Checksum of the bundled two-tower net."""
    return checksum(asset(CLIP.removeprefix("assets:")))


# -- published networks --------------------------------------------------------------------------------------
def _embedded(encoder: TextImageEncoder, images: Tensor) -> Tensor:
    """Unit vectors [B, d], differentiable."""
    return normalize(encoder.outputs(resize.tensors(images, encoder.size))["features"], dim=-1)


def _remembering(embed: Callable[[list[str]], Tensor], device: str) -> Callable[[list[str]], Tensor]:
    """The same, each prompt embedded once."""
    known: dict[str, Tensor] = {}

    def texts(prompts: list[str]) -> Tensor:
        if len(known) > REMEMBERED:
            known.clear()
        new = sorted(set(prompts) - set(known))
        known.update(zip(new, embed(new).to(device) if new else ()))
        return torch.stack([known[text] for text in prompts])

    return texts


def _cosine(name: str, scale: float | None = None) -> Callable[[Encoders, str], Reward]:
    """Cosine of image and prompt, times a scale or (None) the network's own."""

    def make(e: Encoders, device: str) -> Reward:
        encoder = e.text_image(name)
        prefix, times = (e.preset.prefix, e.preset.scale) if name == "clip" else ("", scale or encoder.scale)
        texts = _remembering(lambda prompts: encoder.texts([prefix + p for p in prompts]), device)

        def score(images: Tensor, prompts: list[str]) -> Tensor:
            return times * (_embedded(encoder, images) * texts(prompts)).sum(-1)

        return Reward(name, score, weights=[encoder.weights])

    return make


def _image_reward(e: Encoders, device: str) -> Reward:
    encoder = e.open("image_reward")
    assert isinstance(encoder, image_reward.Reward)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        return encoder.of_pixels(resize.tensors(images, encoder.size), prompts)

    return Reward("image_reward", score, weights=[encoder.weights])


def _aesthetic(e: Encoders, device: str) -> Reward:
    encoder = e.text_image("clip_l14")
    path = e.path("aesthetic", HEAD_WANTED)
    row, offset = (value.float().to(device) for value in affine_head(path))

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        return _embedded(encoder, images) @ row + offset

    return Reward("aesthetic", score, weights=[checksum(path)])


KNOWN: Mapping[str, Callable[[Encoders, str], Reward]] = {
    "attributes": _attributes,
    "motion": partial(_attributes, name="motion", judges=lambda head: head == "motion"),
    "look": partial(_attributes, name="look", judges=lambda head: head != "motion"),
    "tinted-clip": _tinted_clip,
    "clip": _cosine("clip"),
    "hps": _cosine("hps", 100.0),
    "pickscore": _cosine("pickscore"),
    "image_reward": _image_reward,
    "aesthetic": _aesthetic,
    "contrast": _contrast,
    "jpeg": _jpeg,
}


def _own(name: str, where: str, device: str) -> Reward:
    """A function of the user's, given as package.module:function."""
    module, _, function = where.partition(":")
    wanted = "give a function without arguments that returns what scores (images, prompts)"
    try:
        score: Any = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever somebody's module raises
        found = f"{name}: {where} cannot be called ({type(error).__name__}: {first_line(error)})"
        raise UserError(KEY, found, wanted) from None
    if not callable(score):
        raise UserError(KEY, f"{name}: {where} returned {type(score).__name__}", wanted)
    weights = []
    if isinstance(score, nn.Module):
        score = score.eval().requires_grad_(False).to(device)
        weights = [state_checksum(score)]
    differentiable, clips = getattr(score, "differentiable", True), getattr(score, "clips", False)
    return Reward(name, score, differentiable, weights, clips)


# -- what tunes does not measure -----------------------------------------------------------------------------
def keep_apart(rewards: Sequence[Reward], measurer: object, metrics: RunMetrics | None) -> list[str]:
    """Names of the rewards that a run is tuned by. What the same network would measure is refused where it
    was asked for or cannot be left out, and otherwise left out.
    """
    tuned = {weight: reward.name for reward in rewards for weight in reward.weights}
    for wanted in metrics.wanted if metrics else ():
        encoder = metrics.encoders.opened.get(wanted.encoder) if metrics else None
        used = [encoder.weights] if encoder else []
        if wanted.metric.name == "aesthetic" and metrics is not None:
            used = [checksum(metrics.encoders.path("aesthetic", HEAD_WANTED))]
        if found := next((tuned[w] for w in used if w in tuned), ""):
            why = f"{wanted.label} looks through the network of {found}, which the student is tuned by"
            raise UserError("eval.metrics", why, "measure by another network, or leave it out")
    names = [measurer.name] if isinstance(measurer, Measurer) else []
    names = [moving.NAME, "tinted"] if isinstance(measurer, ClipMeasurer) else names
    for name in names:
        own = checksum(asset(f"measure/{name}"))
        if own in tuned:
            why = f"{tuned[own]} is the network that measures {name}"
            raise UserError(KEY, why, "tune by another one, as assets/rewards has them")
    if isinstance(measurer, Measurer):
        measurer.with_clip = tinted_clip() not in tuned
    return list(dict.fromkeys(reward.name for reward in rewards))
