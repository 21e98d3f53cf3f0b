"""ImageReward on random weights in the published file's layout equals the formulas written out here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import gelu, layer_norm, linear, softmax

from fastgen.cli.evaluate import main
from fastgen.core.errors import UserError
from fastgen.evaluation.encoders import image_reward, resize
from fastgen.evaluation.encoders.catalogue import Encoders
from fastgen.evaluation.material import Material, measure
from fastgen.evaluation.registry import wanted
from fastgen.evaluation.sources import Arrays

VISION, TEXT, DEPTH, PATCH, SIDE, HEADS = 64, 128, 2, 16, 3, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "boot", "bag", "##s", "blue"]
HEAD = (128, 12, 7, 5, 3, 1)
"""widths of the stack of linear layers; the released one has 768, 1024, 128, 64, 16, 1"""


def published_state(seed=0) -> dict[str, torch.Tensor]:
    """Random weights under the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    found = {}

    def affine(name, out, into):
        found[f"{name}.weight"], found[f"{name}.bias"] = random(out, into), random(out)

    def norm(name, width):
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + random(width), random(width)

    root = "blip.visual_encoder"
    found[f"{root}.cls_token"] = random(1, 1, VISION)
    found[f"{root}.pos_embed"] = random(1, SIDE * SIDE + 1, VISION)
    found[f"{root}.patch_embed.proj.weight"] = random(VISION, 3, PATCH, PATCH) / 5
    found[f"{root}.patch_embed.proj.bias"] = random(VISION)
    norm(f"{root}.norm", VISION)
    for i in range(DEPTH):
        block = f"{root}.blocks.{i}"
        norm(f"{block}.norm1", VISION)
        norm(f"{block}.norm2", VISION)
        affine(f"{block}.attn.qkv", 3 * VISION, VISION)
        affine(f"{block}.attn.proj", VISION, VISION)
        affine(f"{block}.mlp.fc1", 96, VISION)
        affine(f"{block}.mlp.fc2", VISION, 96)
    root = "blip.text_encoder"
    found[f"{root}.embeddings.position_ids"] = torch.arange(40)[None]
    found[f"{root}.embeddings.word_embeddings.weight"] = random(len(WORDS) + 2, TEXT)
    found[f"{root}.embeddings.position_embeddings.weight"] = random(40, TEXT)
    norm(f"{root}.embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        layer = f"{root}.encoder.layer.{i}"
        for kind, width in (("attention", TEXT), ("crossattention", VISION)):
            affine(f"{layer}.{kind}.self.query", TEXT, TEXT)
            affine(f"{layer}.{kind}.self.key", TEXT, width)
            affine(f"{layer}.{kind}.self.value", TEXT, width)
            affine(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        affine(f"{layer}.intermediate.dense", 80, TEXT)
        affine(f"{layer}.output.dense", TEXT, 80)
        norm(f"{layer}.output.LayerNorm", TEXT)
    for number, (into, out) in zip((0, 2, 4, 6, 7), zip(HEAD, HEAD[1:])):
        affine(f"mlp.layers.{number}", out, into)
    return found


def by_hand(state, pixels, ids, mask) -> torch.Tensor:
    """The reward [B] by the formulas of ViT, BLIP's BERT and the head."""

    def dense(x, name):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, heads, keep=None):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None].bool(), -torch.inf)
        return (softmax(scores, -1) @ v).transpose(1, 2).flatten(2)

    root = "blip.visual_encoder"
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3)
    kernel = state[f"{root}.patch_embed.proj.weight"].flatten(1)
    x = linear(patches.flatten(1, 2), kernel, state[f"{root}.patch_embed.proj.bias"])
    x = torch.cat([state[f"{root}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{root}.pos_embed"]
    for i in range(DEPTH):
        block = f"{root}.blocks.{i}"
        q, k, v = dense(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, -1)
        x = x + dense(attend(q, k, v, VISION // 64), f"{block}.attn.proj")
        x = x + dense(gelu(dense(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{root}.norm", 1e-6)

    root = "blip.text_encoder"
    h = state[f"{root}.embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{root}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(h, f"{root}.embeddings.LayerNorm", 1e-12)
    for i in range(DEPTH):
        layer = f"{root}.encoder.layer.{i}"
        for kind, of, keep in (("attention", None, mask), ("crossattention", seen, None)):
            own = f"{layer}.{kind}"
            source = h if of is None else of
            parts = dense(h, f"{own}.self.query"), dense(source, f"{own}.self.key")
            out = attend(*parts, dense(source, f"{own}.self.value"), HEADS, keep)
            h = norm(dense(out, f"{own}.output.dense") + h, f"{own}.output.LayerNorm", 1e-12)
        inner = gelu(dense(h, f"{layer}.intermediate.dense"))
        h = norm(dense(inner, f"{layer}.output.dense") + h, f"{layer}.output.LayerNorm", 1e-12)
    y = h[:, 0]
    for number in (0, 2, 4, 6, 7):
        y = dense(y, f"mlp.layers.{number}")
    return (y[:, 0] - 0.16717) / 1.03334


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "image_reward"
    place.mkdir()
    torch.save(published_state(), place / "ImageReward.pt")
    med = {"num_attention_heads": HEADS, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "encoder_width": 768}
    (place / "med_config.json").write_text(json.dumps(med))
    (place / "vocab.txt").write_text("\n".join(WORDS))
    return place


def test_the_reward_is_the_one_computed_by_hand(folder):
    """Two pictures and prompts of different lengths, one cut at 35 tokens."""
    images = torch.randint(0, 256, (2, 3, 60, 48), generator=torch.Generator().manual_seed(1)).byte()
    prompts = ["a Red boots bag", " ".join(["blue bag"] * 30)]
    ids = torch.zeros(2, 35, dtype=torch.long)
    ids[0, :7] = torch.tensor([2, 5, 6, 7, 9, 8, 3])
    ids[1] = torch.tensor([2, *([10, 8] * 17)[:33], 3])
    square = resize.cropped(images, SIDE * PATCH)
    pixels = resize.normalised(square, resize.CLIP_MEAN, resize.CLIP_STD)
    expected = by_hand(published_state(), pixels, ids, (ids > 0).long())

    encoders = Encoders({"image_reward": str(folder)})
    material = Material(Arrays(images, "two", "--images"), encoders, prompts=prompts)
    found = measure(material, [wanted("image_reward")])["image_reward"]
    torch.testing.assert_close(found.contributions().float(), expected, rtol=1e-4, atol=1e-5)
    assert abs(float(expected[0] - expected[1])) > 1e-2
    swapped = encoders.open("image_reward").rewards(images, prompts[::-1])
    assert not torch.allclose(swapped.float(), expected, atol=1e-3)
    assert material.describe()["encoders"]["image_reward"]["weights_sha256"]


def test_what_is_missing_is_named(folder, tmp_path, capsys):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "0.png")
    (tmp_path / "p.txt").write_text("a bag")

    def refused(*argv):
        base = ["--images", tmp_path, "--metrics", "image_reward"]
        assert main([str(a) for a in (*base, *argv)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    prompts = ("--prompts", tmp_path / "p.txt")
    weights = ("--weights", f"image_reward={folder}")
    assert "ImageReward.pt and med_config.json" in refused(*prompts)
    assert "--prompts: none given" in refused(*weights)
    (folder / "vocab.txt").rename(folder / "kept.txt")
    assert "vocab.txt does not exist" in refused(*prompts, *weights)
    (folder / "kept.txt").rename(folder / "vocab.txt")
    state = published_state()
    torch.save({k: v for k, v in state.items() if "crossattention" not in k}, folder / "ImageReward.pt")
    assert "cannot be read" in refused(*prompts, *weights)
    with pytest.raises(UserError, match="no features"):
        torch.save(state, folder / "ImageReward.pt")
        image_reward.load(folder)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
