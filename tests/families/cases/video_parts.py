"""What the tiny video pipelines share: text encoders, how they are saved, sampled and declared."""

import json
import string
from pathlib import Path

import torch

from fastgen.export.scheduler import bind
from fastgen.families.wan import pictures
from tests.families.cases import PROMPTS, Case
from tests.support.tiny import perturb_zero_layers

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


def plain_video(world, pipe, info, noise):
    """Frames [B, C, F, H, W] in [0, 1] by pipeline calls that a user could write, one request at a time."""
    family, codec = world.family, world.codec
    document = json.loads((world.folder / "fastgen.json").read_text())
    call = {"num_inference_steps": info["steps"]}
    if info["set_on_scheduler"]:
        bind(pipe.scheduler, info["timestep_arguments"])
    elif info["timestep_arguments"]:
        call = dict(info["timestep_arguments"])
    call |= family.size_call(codec) | family.guidance_call(codec.guidance) | family.plain_call(document)
    found = []
    for i, prompt in enumerate(PROMPTS):
        arguments = {"prompt": prompt} if family.takes_text else {}
        if family.needs_image:
            ends = world.images[i : i + 1] if world.images.ndim == 4 else world.images[i].transpose(0, 1)
            arguments |= dict(zip(("image", "last_image"), pictures(ends)))
        arguments["latents"] = family.pipeline_latents(noise[i : i + 1], world.schedule)
        generator = [torch.Generator().manual_seed(0)]  # of the image's condition, where one is drawn
        found.append(pipe(**arguments, generator=generator, output_type="pt", **call).frames)
    return torch.cat(found).transpose(1, 2)


def shown(side: int, last: bool = False):
    """Two pictures [2, 3, side, side] (with last pairs of them [2, 3, 2, side, side]) in [-1, 1], in whole
    8-bit steps as a file would hold them.
    """
    size = (2, 3, 2, side, side) if last else (2, 3, side, side)
    pixels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(5))
    return pixels.float() / 127.5 - 1


def case(family: str, build, *real: tuple, image: int = 0, last: bool = False, **more) -> Case:
    """A case with its released models as (model, config, published billions)."""
    published = [(m, config, 1e9 * float(n), 0.5 * _unit(n) / float(n)) for m, config, n in real]
    images = (lambda: shown(image, last)) if image else None
    return Case(family, build, plain=plain_video, images=images, published=published, **more)


def _unit(printed: str) -> float:
    return 10.0 ** -len(printed.partition(".")[2])
