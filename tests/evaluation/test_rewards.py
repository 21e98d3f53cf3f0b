"""Rewards: the metrics' own networks with a gradient, what is refused, and that what tunes never reports."""

import json

import pytest
import torch
import yaml

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.data import moving
from fastgen.data.bundled import load_images
from fastgen.evaluation.encoders import resize
from fastgen.evaluation.encoders.catalogue import Encoders
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.evaluation.metrics.fvd_mini import ClipMeasurer
from fastgen.evaluation.rewards import keep_apart, open_reward
from fastgen.evaluation.run_metrics import RunMetrics
from fastgen.networks.rewards import Reward
from tests.evaluation.test_encoders import clip_folder  # noqa: F401
from tests.evaluation.test_image_reward import folder as published_folder  # noqa: F401

PROMPTS = ["a red dress on a grey background", "a blue boot on a white background"]


def opened(name, mini_set="", **weights) -> Reward:
    return open_reward(name, tuple(sorted(weights.items())), mini_set, "cpu")


def smooth(num=2, size=40):
    """Images without sharp edges, [0, 1]."""
    coarse = torch.rand(num, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


# -- the interface -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "function,found",
    [
        ("shapeless", "returned shape ()"),
        ("undefined", "not finite for 2 of 2 images"),
        ("listed", "returned list"),
    ],
)
def test_a_broken_reward_is_one_line(function, found):
    reward = opened("mine", mine=f"tests.support.rewards:{function}")
    with pytest.raises(UserError) as error:
        reward(torch.zeros(2, 3, 4, 4), PROMPTS)
    assert found in str(error.value) and "mine" in str(error.value) and "\n" not in str(error.value)


def test_a_reward_without_gradient_gives_none():
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    assert not opened("mine", mine="tests.support.rewards:blind")(x, PROMPTS).requires_grad
    assert not opened("jpeg")(x, PROMPTS).requires_grad
    assert opened("contrast")(x, PROMPTS).requires_grad


@pytest.mark.parametrize(
    "name,weights,message",
    [
        ("picscore", {}, "did you mean 'pickscore'"),
        ("hps", {}, "none given for hps"),
        ("pickscore", {"pickscore": "nowhere"}, "nowhere does not exist"),
        ("mine", {"mine": "tests.support.rewards:nothing"}, "returned int"),
        ("mine", {"mine": "tests.support.rewards:missing"}, "cannot be called"),
        ("attributes", {"attributes": "nowhere"}, "nowhere cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_one_line(name, weights, message):
    with pytest.raises(UserError) as error:
        opened(name, **weights)
    assert str(error.value).startswith("objective.rewards: ") and message in str(error.value)


def test_jpeg_is_small_for_plain_images():
    images = torch.stack([torch.zeros(3, 32, 32), torch.rand(3, 32, 32)])
    plain, busy = opened("jpeg")(images, PROMPTS)
    assert plain > busy


# -- the bundled networks ------------------------------------------------------------------------------------
def test_attributes_prefer_what_was_asked_for():
    """Held-out images under their own caption, under another colour's, and one attribute alone."""
    held = load_images("tinted", "heldout")
    images, captions = held.images[:64].float() / 255, held.captions[:64]
    reward = opened("attributes", "tinted")
    own = reward(images, captions)
    turned = reward(images, captions[1:] + captions[:1])
    assert (own > turned).float().mean() > 0.85 and own.mean() > -0.5 and own.max() <= 0
    background = reward(images, ["on a white background"] * 64)
    assert abs(float((background > -0.7).float().mean()) - sum("white" in c for c in captions) / 64) < 0.05
    assert reward(images[:1], ["anything"]) == 0


def test_attributes_of_digits_go_by_their_number():
    held = load_images("digits", "heldout")
    images = (held.images[:50].float() / 255).expand(-1, 3, -1, -1)
    reward = opened("attributes", "digits")
    own = reward(images, [str(int(k)) for k in held.labels[:50]])
    assert (own > -0.7).float().mean() > 0.9
    assert (reward(images, [str((int(k) + 1) % 10) for k in held.labels[:50]]) < own).float().mean() > 0.9


def clips(num=24):
    held = moving.load_clips("heldout", range(num))
    return held.images.float() / 255, moving.captions(range(num), "heldout")


def test_clips_are_judged_by_their_motion_and_their_look():
    """Right captions beat those of another clip; motion alone hears the motion, look all but it."""
    shown, texts = clips()
    stood = shown[:, :, :1].expand_as(shown)  # the first frame throughout
    rows = moving.attributes(range(len(texts)), "heldout")
    moves = rows["motion"] != moving.MOTIONS.index("still")
    motion, look = opened("motion", "moving"), opened("look", "moving")
    assert motion.clips and look.clips and motion.weights == look.weights
    assert (motion(shown, texts) - motion(stood, texts))[moves].mean() > 1
    assert abs(float((look(shown, texts) - look(stood, texts)).mean())) < 0.5
    turned = texts[1:] + texts[:1]
    for reward in (motion, look, opened("attributes", "moving")):
        assert (reward(shown, texts) - reward(shown, turned)).mean() > 0.5, reward.name
    x = shown[:2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(motion(x, texts[:2]).sum(), x)
    assert (grad.abs().sum((1, 3, 4)) > 0).all(), "every frame has a gradient"


def test_rewards_of_pictures_judge_three_frames_of_a_clip():
    shown, texts = clips(3)
    reward, seen = opened("contrast"), (0, 4, 8)
    each = torch.stack([reward(shown[:, :, i], texts) for i in seen])
    torch.testing.assert_close(reward(shown, texts), each.mean(0))
    whole = Reward("mine", lambda x, prompts: x.flatten(1).mean(1), clips=True)
    torch.testing.assert_close(whole(shown, texts), shown.flatten(1).mean(1))


def test_a_net_that_knows_no_motion_is_refused():
    with pytest.raises(UserError, match="motion: assets:rewards/tinted knows no motion; name attributes"):
        opened("motion", "tinted")


def test_what_measures_clips_is_no_reward():
    reward = opened("motion", "moving", motion=str(asset("measure/moving")))
    with pytest.raises(UserError, match="motion is the network that measures moving"):
        keep_apart([reward], ClipMeasurer(), None)
    assert keep_apart([opened("look", "moving")], ClipMeasurer(), None) == ["look"]


# -- published networks --------------------------------------------------------------------------------------
def test_tensors_are_resized_as_pictures_are():
    for size in (24, 80):
        image = (smooth() * 255).round()
        wanted = resize.normalised(resize.cropped(image.byte(), size), resize.CLIP_MEAN, resize.CLIP_STD)
        found = resize.tensors(image / 255, size)
        assert (found - wanted).abs().max() < 3 / 255 / min(resize.CLIP_STD), size


def test_pickscore_is_the_metric_with_a_gradient(clip_folder):  # noqa: F811
    images = (smooth() * 255).round()
    encoder = Encoders({"pickscore": str(clip_folder)}).text_image("pickscore")
    features = torch.nn.functional.normalize(encoder(images.byte())["features"], dim=-1)
    wanted = encoder.scale * (features * encoder.texts(PROMPTS)).sum(-1)
    x = (images / 255).requires_grad_()
    found = opened("pickscore", pickscore=str(clip_folder))(x, PROMPTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * encoder.scale)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad.abs().sum() > 0
    step = 1e-3 * grad.sign()
    better = opened("pickscore", pickscore=str(clip_folder))((x + step).detach(), PROMPTS)
    assert (better > found).all()


def test_image_reward_is_the_metric_with_a_gradient(published_folder):  # noqa: F811
    images = (smooth(size=48) * 255).round()
    encoder = Encoders({"image_reward": str(published_folder)}).open("image_reward")
    wanted = encoder.rewards(images.byte(), PROMPTS).float()
    x = (images / 255).requires_grad_()
    found = opened("image_reward", image_reward=str(published_folder))(x, PROMPTS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(found.sum(), x)[0].abs().sum() > 0


# -- what tunes does not report ------------------------------------------------------------------------------
def test_the_measuring_net_is_no_reward():
    reward = opened("attributes", attributes=str(asset("measure/tinted")))
    with pytest.raises(UserError, match="attributes is the network that measures tinted"):
        keep_apart([reward], Measurer("tinted"), None)
    assert keep_apart([opened("attributes", "tinted")], Measurer("tinted"), None) == ["attributes"]


def test_the_two_towers_report_nothing_of_what_they_tuned():
    images, wanted = (
        torch.rand(4, 3, 32, 32),
        {k: torch.tensor([0, 1, 2, 0]) for k in ("garment", "colour", "background")},
    )
    for name, there in (("tinted-clip", False), ("contrast", True)):
        measurer = Measurer("tinted")
        keep_apart([opened(name)], measurer, None)
        assert (measurer._alignment(images, wanted) is not None) == there


def test_a_metric_of_the_reward_is_refused(clip_folder):  # noqa: F811
    reward = opened("pickscore", pickscore=str(clip_folder))
    metrics = RunMetrics(("pickscore",), {"pickscore": str(clip_folder)})
    with pytest.raises(UserError, match="pickscore looks through the network of pickscore"):
        keep_apart([reward], None, metrics)
    assert keep_apart([opened("contrast")], None, metrics) == ["contrast"]


def test_a_run_says_what_it_was_tuned_by(tiny, tmp_path, capsys):
    """From config to results.json; a reward that breaks while training is one line, exit code 2."""
    values = {
        "teacher": {"path": str(tiny("flow")), "num_steps": 2},
        "objective": {"name": "feedback", "rewards": [{"name": "contrast"}]},
        "data": {"name": "fashion"},
        "train": {"max_train_steps": 1, "train_batch_size": 2, "validation_steps": 0},
        "eval": {"num_samples": 4, "metrics": ["latency"]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    flags = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main(flags) == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["protocol"]["tuned_by"] == ["contrast"]
    values["objective"]["rewards"] = [
        {"name": "mine", "weights": {"mine": "tests.support.rewards:undefined"}}
    ]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main([*flags, "--overwrite"]) == 2
    assert "objective.rewards: mine is not finite" in capsys.readouterr().err.splitlines()[-1]
