"""What every registered method owes: turns, determinism, a frozen teacher, every network family, full and
LoRA.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastgen.config.parse import merge
from fastgen.config.run import dump, validate
from fastgen.core.errors import UserError
from fastgen.core.paths import config as config_file
from fastgen.core.rng import Rng
from fastgen.data.loader import Data
from fastgen.networks.codecs import TextCodec
from fastgen.objectives import REGISTRY, requirements_of
from fastgen.training.assembly import make_cast
from tests.support.heavier import some_of
from tests.support.play import batch, play

MODULES = {n: sys.modules[c.__module__] for n, c in REGISTRY.items()}
OURS = [n for n, m in MODULES.items() if m.__name__.startswith("fastgen.")]
TESTS = {n: importlib.import_module(f"tests.objectives.test_{n}") for n in OURS}
SHORT = {n: module.SHORT for n, module in TESTS.items()}
TEACHER = {n: getattr(module, "SHORT_TEACHER", {}) for n, module in TESTS.items()}
STUDENT = {n: getattr(module, "STUDENT", {}) for n, module in TESTS.items()}
"""settings of teacher and student where a method needs others than the default"""
DATA = {n: getattr(module, "SHORT_DATA", {}) for n, module in TESTS.items()}
"""and of the data section"""
STILL = {n for n, module in TESTS.items() if getattr(module, "STILL", False)}
"""methods that have nothing to learn of a picture"""
each = pytest.mark.parametrize("name", sorted(REGISTRY))


def make(name, teacher, kind="full", **train):
    """(config, cast, objective) of a method over a teacher folder."""
    cfg = validate(
        {
            "teacher": {"path": str(teacher), "guidance": 1.5, **TEACHER.get(name, {})},
            "student": {"kind": kind, "lora": {"rank": 2}, **STUDENT.get(name, {})},
            "critic": {"lora": {"rank": 2}},
            "objective": {"name": name, **SHORT.get(name, {})},
            "data": {"name": "fashion", **DATA.get(name, {})},
            "train": train,
        }
    )
    cast = make_cast(cfg)
    cast.divide(conditions(cast))
    objective = cast.stage(cfg.all_stages()[0], Rng(0))
    objective.prepare()
    return cfg, cast, objective


def conditions(cast):
    """A data set of conditions alone: every class, or prompts of which one names a class too."""
    codec, texts = cast.teacher.codec, ["a red dress of size 0", "a bag", "a boot"]
    if isinstance(codec, TextCodec):
        return Data(None, codec.prompts(texts), torch.arange(3), codec.null(1), codec.shape, texts)
    rows = torch.arange(codec.num_classes)
    return Data(None, codec.labels(rows), rows, codec.null(1), codec.shape)


@each
def test_yaml_exists_and_round_trips(name):
    beside = Path(MODULES[name].__file__).with_suffix(".yaml")  # where a plugin keeps it
    file = config_file(f"objectives/{name}.yaml") if name in OURS else beside
    values = yaml.safe_load(file.read_text())
    cfg = validate(merge({"data": {"name": "fashion"}}, values))
    assert cfg.objective.name == name
    assert validate(yaml.safe_load(dump(cfg))) == cfg


@each
def test_docstring_has_paper_and_differences(name):
    text = MODULES[name].__doc__
    assert "arXiv" in text and "Differs" in text


NETWORKS = ("flow", "edm", "vp", "sd", "sana")
EVERY = [(n, family, kind) for n in sorted(REGISTRY) for kind in ("full", "lora") for family in NETWORKS]
BY_DEFAULT = {(n, NETWORKS[i % 5], "full") for i, n in enumerate(sorted(REGISTRY))}
BY_DEFAULT |= {(n, NETWORKS[(i + 3) % 5], "lora") for i, n in enumerate(sorted(REGISTRY))}
"""one kind of network each for a full student and an adapter, going round the kinds of network"""


@pytest.mark.parametrize(("name", "family", "kind"), some_of(EVERY, BY_DEFAULT))
def test_every_family_full_and_lora(name, family, kind, tiny):
    """Finite losses, gradients in one's own turn only, and a teacher that stays as it was."""
    _, cast, objective = make(name, tiny(family), kind)
    one = batch(cast)
    t = torch.full((2,), cast.teacher.schedule.steps(2)[1], dtype=torch.float64)
    with torch.no_grad():
        before = cast.parts["teacher"](one.noise, t, one.cond)
    found = play(objective, one, 0, check=True) + play(objective, one, 1, check=True)
    assert all(torch.isfinite(torch.tensor(v)) for _, v in found)
    assert {player for player, _ in found} == set(objective.players)
    shared_by_student = cast.parts["student"].backbone is cast.teacher.backbone and kind == "full"
    with torch.no_grad():
        after = cast.parts["teacher"](one.noise, t, one.cond)
        moved = cast.parts["student"](one.noise, t, one.cond)
    assert shared_by_student or torch.equal(before, after), "the teacher moved"
    stood = torch.allclose(moved, before, atol=1e-4) if name in STILL else torch.equal(moved, before)
    assert stood == (name in STILL), "the student did not move"


@each
def test_same_seed_same_run(name, tiny):
    runs = []
    for _ in range(2):
        _, cast, objective = make(name, tiny("flow"))
        runs.append([play(objective, batch(cast), k) for k in range(2)])
    assert runs[0] == runs[1]


@each
def test_what_is_learned_may_be_guided_otherwise_than_the_teachers_samples(name, tiny, monkeypatch):
    """Every call of the guided teacher takes real_guidance; a method that makes none refuses the key."""
    monkeypatch.setitem(SHORT, name, {**SHORT.get(name, {}), "real_guidance": 3.0})
    try:
        _, cast, objective = make(name, tiny("flow"))
    except UserError as error:
        cfg = REGISTRY[name].config(name=name, **SHORT[name])
        assert "real_guidance" in str(error) and not requirements_of(cfg).follows_guidance
        return
    guided, used = objective.teacher.guided, []
    spy = lambda x, t, c, u, w: (used.append(w), guided(x, t, c, u, w))[1]  # noqa: E731
    object.__setattr__(objective.teacher, "guided", spy)  # of this very role, which hosts share
    for k in range(3):
        play(objective, batch(cast), k)
    assert set(used) == {3.0}


def test_guidance_is_set_on_the_method_around():
    with pytest.raises(ValueError, match="scm.real_guidance"):
        REGISTRY["sana_sprint"].config(scm={"real_guidance": 3.0})


@each
def test_bf16_autocast_is_finite(name, tiny):
    _, cast, objective = make(name, tiny("flow"))
    turns = objective.step(batch(cast), 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = next(turns)
    assert torch.isfinite(loss) and loss.dtype == torch.float32


@pytest.mark.parametrize("name", ["dmd2", "consistency"])
def test_checkpointed_gradients_are_the_plain_ones(name, tiny):
    """Also through two adapters at once: each block is recomputed under the adapter of its own forward
    pass.
    """
    grads = []
    for on in (False, True, "selective"):
        _, cast, objective = make(name, tiny("sd"), "lora", gradient_checkpointing=on)
        for role in ("student", "critic"):
            if role in cast.parts:
                generator = torch.Generator().manual_seed(5)
                for p in cast.parts[role].trainable().values():
                    p.data = 0.05 * torch.randn(p.shape, generator=generator)
        loss, _ = next(objective.step(batch(cast), 0))
        loss.backward()
        grads.append({n: p.grad for n, p in objective.players["student"].trainable().items()})
    assert all(g is not None for g in grads[0].values())
    for key, plain in grads[0].items():
        torch.testing.assert_close(grads[1][key], plain, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(grads[2][key], plain, rtol=1e-4, atol=1e-7)


def test_shared_base_equals_full_copies_at_the_start(tiny):
    outputs = []
    for kind in ("full", "lora"):
        _, cast, _ = make("dmd2", tiny("sd"), kind)
        one = batch(cast)
        t = torch.full((2,), 500.0, dtype=torch.float64)
        with torch.no_grad():
            outputs.append([cast.parts[p](one.noise, t, one.cond) for p in ("teacher", "student", "critic")])
    for full, shared in zip(*outputs):
        torch.testing.assert_close(full, shared, rtol=1e-5, atol=1e-5)


def test_compile_switch_reaches_every_network(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    make("consistency", tiny("flow"), compile=True)
    assert compiled == ["UNet2DModel"] * 3  # teacher, student, target
    compiled.clear()
    make("consistency", tiny("flow"))
    assert compiled == []
    make("consistency", tiny("flow"), compile_blocks=True)
    assert "UNet2DModel" not in compiled and len(compiled) % 3 == 0 and len(compiled) >= 6, compiled
    compiled.clear()
    make("consistency", tiny("sana"), "lora", compile_blocks=True)
    assert set(compiled) == {"SanaTransformerBlock"}


def data_free():
    found = {n: requirements_of(cls.config(**SHORT.get(n, {}))) for n, cls in REGISTRY.items()}
    return sorted(n for n, needs in found.items() if not needs.real_data)


@pytest.mark.parametrize("name", data_free())
@pytest.mark.parametrize("source", ["bundled", "folder"])
def test_data_free_methods_open_no_image(name, source, tiny, tmp_path, monkeypatch, no_finish):
    """Labels alone are read of a bundled set, file names of a folder; reading a pixel is an error."""
    from PIL import Image

    from fastgen.cli.train import main
    from fastgen.data import bundled, sources

    for i in range(4):
        Image.new("L", (16, 16), 60 * i).save(tmp_path / f"{i}.png")

    def refuse(*args, **kwargs):
        raise AssertionError("a data-free method opened an image")

    read = bundled.bundled_part
    only_labels = lambda name, split, part: read(name, split, part) if part == "labels" else refuse()  # noqa: E731
    monkeypatch.setattr(bundled, "bundled_part", only_labels)
    monkeypatch.setattr(sources, "load_images", refuse)
    monkeypatch.setattr(Image, "open", refuse)
    values = {
        "teacher": {"path": str(tiny("flow")), **TEACHER[name]},
        "student": STUDENT[name],
        "objective": {"name": name, **SHORT[name]},
        "data": {"name": "fashion"} if source == "bundled" else {"name": "", "images": str(tmp_path)},
        "train": {"max_train_steps": 2, "train_batch_size": 2, "validation_steps": 0},
        "eval": {"num_samples": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
