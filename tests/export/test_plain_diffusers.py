"""P4: what an export gives in plain diffusers is what the student gave here, in every family."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgen.cli.sample import Generator, draw, main
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.export import lora, snippet
from fastgen.export.load import Loaded, load_export, sample_command
from fastgen.export.lora import load_lora_into
from fastgen.networks.codecs import TextCodec
from fastgen.roles.roles import Student, StudentSpec
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.support.plain import run_plain
from tests.support.tiny import PROMPTS

SUPPORT = Path(__file__).parents[1] / "support"
LABELS, SEEDS = [3, 7], [11, 12]
RANK, ALPHA = 4, 10
NAMES = [
    f"{family}-{kind}-{sampler}-{steps}"
    for family in ("flow", "edm", "vp", "sd", "sana")
    for kind in ("full", "lora")
    for sampler, steps in (("renoise", 1), ("renoise", 4), ("ode", 4))
    if (kind, sampler) != ("lora", "ode")
]


def make_run(
    folder: Path,
    kind: str = "full",
    out: Path = Path("out"),
    moved: bool = True,
    teacher: dict | None = None,
    **student,
):
    """A trainer as the exporter sees it: a cast whose student was moved well away from its teacher."""
    cfg = validate(
        {
            "output_dir": str(out),
            "teacher": {"path": str(folder), "num_steps": 6, **(teacher or {})},
            "objective": {"name": "dmd2", "gan_weight": 0.0},
            "data": {"name": ""},
            "student": {"kind": kind, "lora": {"rank": RANK, "lora_alpha": ALPHA}, **student},
            "critic": {"lora": {"rank": 2, "lora_alpha": 2}},
        }
    )
    cast = make_cast(cfg)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in cast.parts["student"].trainable().items():
            if moved and (kind == "full" or "lora_B" in name):
                std = 0.02 if kind == "full" else 0.2
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return SimpleNamespace(cast=cast, train_cfg=cfg.train, step=5, example="", enlarges=0, folder=out)


def ours(loaded, condition: list) -> torch.Tensor:
    """Images as sample.py draws them, before they become PNGs."""
    codec = loaded.codec
    cond = codec.prompts(condition) if isinstance(codec, TextCodec) else codec.labels(torch.tensor(condition))
    painter = Generator(loaded, 0, 1.0, codec.null(1))
    return draw(painter, cond, SEEDS, batch_size=2)[0]


def replay_case(name: str, folder: Path, teacher, base: Path, steps: int = 0) -> dict:
    """What replay_cases.py needs: only facts that stand in the export and its card; `steps` for another
    count than the export's own.
    """
    document = json.loads((folder / "fastgen.json").read_text())
    info = document["export"]
    scheduler = info["scheduler"]["_class_name"]
    case = {"name": name, "folder": str(folder), "seeds": SEEDS, "scheduler": scheduler}
    call = info["timestep_arguments"] or {"num_inference_steps": info["steps"]}
    if steps:
        other = info["other_step_counts"][str(steps)]
        call = other["arguments"] or {"num_inference_steps": steps}
        case["override"] = other["scheduler"]
    case["step"] = info["step_arguments"]
    if not isinstance(teacher.codec, TextCodec):
        if info["lora"]:
            case["folder"] = str(folder / "merged")
        if call.get("sigmas") and case["scheduler"].startswith("EDM"):
            call = {**call, "num_inference_steps": info["steps"]}
        times = info["times"] if info["needs_loop"] else None
        return {
            **case,
            "how": "loop",
            "labels": LABELS,
            "shape": teacher.codec.shape,
            "call": call,
            "times": times,
            "patch": document.get("patch", 1),
        }
    size = teacher.codec.decode_size()
    call = {**call, "height": size, "width": size}
    call |= teacher.backbone.family.plain_call(document)
    where = {"base": str(base), "lora": info["lora"]} if info["lora"] else {}
    return {
        **case,
        "how": "pipeline",
        "pipeline": teacher.backbone.family.pipeline,
        "prompts": list(PROMPTS),
        "call": call,
        **where,
    }


def code_of(folder: Path) -> str:
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def replayed(tiny, tmp_path_factory):
    """Every case exported and sampled here, then all of them sampled by one process without fastgen."""
    root = tmp_path_factory.mktemp("exports")
    found, cases = SimpleNamespace(ours={}, reloaded={}, base={}, folder={}, cast={}), []
    for name in NAMES:
        family, kind, sampler, steps = name.split("-")
        key = (family, kind)
        if key not in found.cast:
            found.cast[key] = make_run(tiny(family), kind, root / name)
        run = found.cast[key]
        teacher, trained = run.cast.teacher, run.cast.student
        spec = StudentSpec(teacher.schedule.steps(int(steps)), sampler)
        student = run.cast.parts["student"] = Student(trained.backbone, trained.adapter, spec)
        results = {"student": {"nfe": int(steps), "fd_mini": 1.5}, "protocol": {"num_samples": 10}}
        folder = found.folder[name] = export_run(run, root / name / "export", results)
        condition = list(PROMPTS) if isinstance(teacher.codec, TextCodec) else LABELS
        found.ours[name] = ours(Loaded(student, teacher), condition)  # as trained, in memory
        found.reloaded[name] = ours(load_export(folder), condition)
        base = load_export(tiny(family))
        base.role, base.info = Student(base.role.backbone, None, spec), None
        found.base[name] = ours(base, condition)
        cases.append(replay_case(name, folder, teacher, tiny(family)))
        card = {"name": f"{name}/card", "how": "snippet", "code": code_of(folder)}
        cases.append({**card, "folder": str(folder)})
    plain = {"shift": 1.0, "shift_terminal": None}
    wrong = {
        "sd-lora-renoise-4": {"original_inference_steps": 50},
        "sana-full-renoise-4": plain,
        "flow-lora-renoise-4": plain,
        "vp-full-ode-4": {"timestep_spacing": "leading"},
    }
    by_name = {c["name"]: c for c in cases}
    cases += [{**by_name[n], "name": f"{n}/wrong", "override": o} for n, o in wrong.items()]
    (root / "cases.json").write_text(json.dumps(cases))
    files = [SUPPORT / "replay_cases.py", root / "cases.json", root / "images.safetensors"]
    done = run_plain(*files, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    found.plain, found.wrong = load_file(root / "images.safetensors"), list(wrong)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_plain_diffusers_gives_the_same_images(replayed, name):
    mine, plain = replayed.ours[name], replayed.plain[name]
    assert mine.shape == plain.shape and mine.std() > 0.05
    assert (mine - plain).abs().max() < 1e-3
    assert (mine - replayed.reloaded[name]).abs().max() < 1e-4
    assert (mine - replayed.base[name]).abs().max() > 0.05, "the student equals its base: nothing was tested"


@pytest.mark.parametrize("name", NAMES)
def test_the_card_s_snippet_draws_what_sample_py_draws(replayed, tmp_path, name):
    text = name.startswith(("sd", "sana"))
    ask = ["--prompt", snippet.PROMPT] if text else ["--labels", "3"]
    assert main(["--model", str(replayed.folder[name]), *ask, "--out", str(tmp_path / "out")]) == 0
    mine = np.atleast_3d(np.array(Image.open(tmp_path / "out/00000_0.png"))).astype(int)
    card = (replayed.plain[f"{name}/card"][0].permute(1, 2, 0) * 255).round().int().numpy()
    assert np.abs(mine - card).max() <= 1  # a rounding step of a PNG


FIRST = {"edm": 2.5, "flow": 0.9, "sd": 625.0}
"""a first time below pure noise, as SiD takes it"""


def test_the_card_s_snippet_starts_at_the_student_s_first_time(tiny, tmp_path):
    folders, cases = {}, []
    for family, first in FIRST.items():
        run = make_run(tiny(family), out=tmp_path / family, timesteps=[first])
        folder = folders[family] = export_run(run, tmp_path / family / "export", {})
        cases.append({"name": family, "how": "snippet", "code": code_of(folder), "folder": str(folder)})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    files = [SUPPORT / "replay_cases.py", tmp_path / "cases.json", tmp_path / "images.safetensors"]
    done = run_plain(*files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = load_file(tmp_path / "images.safetensors")
    for family, folder in folders.items():
        ask = ["--prompt", snippet.PROMPT] if family == "sd" else ["--labels", "3"]
        assert main(["--model", str(folder), *ask, "--out", str(tmp_path / family / "out")]) == 0
        mine = np.atleast_3d(np.array(Image.open(tmp_path / family / "out/00000_0.png"))).astype(int)
        card = (plain[family][0].permute(1, 2, 0) * 255).round().int().numpy()
        assert np.abs(mine - card).max() <= 1 and mine.std() > 5, family


def test_another_grid_gives_other_images(replayed):
    """Negative check: the scheduler config matters, so a wrong one must show."""
    for name in replayed.wrong:
        gap = (replayed.plain[name] - replayed.plain[f"{name}/wrong"]).abs().max()
        assert gap > 3e-3, name  # three times the tolerance above


def test_export_leaves_the_networks_alone(replayed):
    """The cast exports again and again; its student still draws the last export's images."""
    run = replayed.cast["sd", "lora"]
    again = export_run(run, run.folder / "again", {})
    assert torch.equal(ours(load_export(again), list(PROMPTS)), replayed.reloaded["sd-lora-renoise-4"])
    assert run.cast.parts["student"].backbone.adapter is None


def test_lora_file_carries_its_strength(replayed):
    """alpha != rank is folded: B A alone is the trained update, and the header says alpha = rank."""
    run, folder = replayed.cast["sd", "lora"], replayed.folder["sd-lora-renoise-4"]
    name = json.loads((folder / "fastgen.json").read_text())["export"]["lora"]
    assert name.endswith("-dmd2-4step-lora.safetensors")
    layers, info = lora.read_lora(folder / name)
    net = run.cast.teacher.backbone.net
    for path, module in net.named_modules():
        if "student" in getattr(module, "lora_A", {}):
            a, b = layers.pop(path)
            trained = module.get_delta_weight("student")
            torch.testing.assert_close(lora.delta(a, b), trained, rtol=1e-4, atol=1e-6)
    assert not layers
    with safe_open(folder / name, "pt") as file:
        header = file.metadata()
    packed = json.loads(header["lora_adapter_metadata"])
    assert packed["unet.r"] == packed["unet.lora_alpha"] == RANK
    assert info["steps"] == 4 and info["times"] == [999.0, 749.0, 499.0, 249.0] and info["guidance"] == 1.0
    assert info["scheduler"]["original_inference_steps"] == 4 and "4 steps" in header["modelspec.usage_hint"]


def test_kohya_twin_loads_in_diffusers_like_the_peft_file(replayed, tiny):
    from diffusers import StableDiffusionPipeline

    folder, found = replayed.folder["sd-lora-renoise-1"], []
    for file in sorted(folder.glob("*.safetensors")):
        pipe = StableDiffusionPipeline.from_pretrained(tiny("sd"), torch_dtype=torch.float32)
        pipe.load_lora_weights(folder, weight_name=file.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        found.append(pipe.unet.state_dict())
    assert len(found) == 2
    plain = StableDiffusionPipeline.from_pretrained(tiny("sd"), torch_dtype=torch.float32).unet.state_dict()
    for key in plain:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-5, atol=1e-6)
    assert any((found[0][k] - plain[k]).abs().max() > 0.01 for k in plain)


def test_a_lora_of_another_base_is_refused(replayed, tiny):
    folder = replayed.folder["flow-lora-renoise-4"]
    with pytest.raises(UserError, match="has no layer|updates"):
        load_export(folder, base=str(tiny("sd")))


def test_export_refuses_layers_its_base_lacks(replayed):
    layers = {"down_blocks.9.nothing": (torch.zeros(2, 4), torch.zeros(4, 2))}
    with pytest.raises(UserError, match="down_blocks.9.nothing"):
        lora.check_keys(replayed.cast["flow", "full"].cast.teacher.backbone.net, layers)


def test_load_lora_into_equals_the_merged_folder(replayed, tiny):
    from diffusers import UNet2DModel

    folder = replayed.folder["vp-lora-renoise-1"]
    merged = UNet2DModel.from_pretrained(folder / "merged", subfolder="unet")
    net = UNet2DModel.from_pretrained(tiny("vp"), subfolder="unet")
    load_lora_into(net, next(folder.glob("*-lora.safetensors")))
    x, t, c = torch.randn(2, 1, 8, 8), torch.tensor([999.0, 200.0]), torch.tensor([1, 10])
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, c).sample, merged(x, t, c).sample, rtol=1e-4, atol=1e-5)


def test_next_run_starts_from_an_export(replayed, tiny):
    """student.init: a LoRA into an adapter or merged into a copy; a folder into a copy; misfits refused."""
    lora_folder, full = replayed.folder["flow-lora-renoise-4"], replayed.folder["flow-full-renoise-4"]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.4]).double()
    cond, near = {"class_labels": torch.tensor([1, 2])}, {"rtol": 1e-4, "atol": 1e-4}

    def started(kind, path, **more):
        cast = make_run(tiny("flow"), kind, moved=False, init=str(path), **more).cast
        with torch.no_grad():
            return cast.parts["student"](x, t, cond)

    with torch.no_grad():
        expected = {p: load_export(p).role(x, t, cond) for p in (lora_folder, full)}
    torch.testing.assert_close(started("full", full), expected[full])
    for more in ({}, {"lora": {"rank": RANK + 3, "lora_alpha": 5}}):
        torch.testing.assert_close(started("lora", lora_folder, **more), expected[lora_folder], **near)
    torch.testing.assert_close(started("full", lora_folder), expected[lora_folder], **near)
    for kind, path, more in (
        ("lora", full, {}),
        ("full", tiny("vp"), {}),
        ("full", "nowhere/at/all", {}),
        ("lora", lora_folder, {"lora": {"rank": 2}}),
    ):
        with pytest.raises(UserError, match="student"):
            started(kind, path, **more)


def test_teacher_export_keeps_scheduler_and_guidance(tiny, tmp_path):
    """sft: fp16 weights, the teacher's own scheduler; load_export makes a teacher of it."""
    cfg = validate(
        {
            "output_dir": str(tmp_path),
            "teacher": {"path": str(tiny("sd")), "guidance": 3.0, "num_steps": 7},
            "objective": {"name": "sft"},
            "data": {"name": "tinted"},
        }
    )
    run = SimpleNamespace(
        cast=make_cast(cfg), train_cfg=cfg.train, step=5, example="", enlarges=0, folder=tmp_path
    )
    folder = export_run(run, tmp_path / "export", {})
    state = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float16}
    assert '"DDIMScheduler"' in (folder / "scheduler/scheduler_config.json").read_text()
    loaded = load_export(folder)
    assert not loaded.is_student and loaded.info.guidance == 3.0 and loaded.info.steps == 7
    assert "guidance_scale=3.0" in code_of(folder) and "num_inference_steps=7" in code_of(folder)


def test_export_replaces_an_older_one_whole(tiny, tmp_path):
    run = make_run(tiny("flow"), out=tmp_path)
    folder = export_run(run, tmp_path / "export", {})
    (folder / "stale.txt").write_text("old")
    export_run(run, folder, {})
    assert not (folder / "stale.txt").exists() and not (tmp_path / "export.tmp").exists()


def test_half_precision_leaves_the_student_alone(tiny, tmp_path):
    run = make_run(tiny("flow"), out=tmp_path)
    run.train_cfg = run.train_cfg.model_copy(update={"export_dtype": "bf16"})
    folder = export_run(run, tmp_path / "export", {})
    state = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in state.values()} == {torch.bfloat16}
    assert {p.dtype for p in run.cast.parts["student"].backbone.parameters()} == {torch.float32}


def test_card_holds_settings_numbers_and_command(replayed):
    card = (replayed.folder["sd-lora-renoise-4"] / "README.md").read_text()
    for piece in (
        "library_name: diffusers",
        "- lora",
        "- text-to-image",
        "| student | 4 | 1.5 |",
        "num_samples 10",
        "999, 749, 499, 249",
        "guidance_scale=1.0",
        "not comparable",
    ):
        assert piece in card, piece


def test_sample_command_names_the_export(replayed):
    flags = {"sd-lora-renoise-4": "--prompt", "sana-full-renoise-4": "--prompt", "flow-full-ode-4": "--num"}
    for name, ask in flags.items():
        command = sample_command(replayed.folder[name])
        assert str(replayed.folder[name]) in command and ask in command


def test_foreign_lora_with_metadata_alpha_is_read_at_its_strength(tmp_path):
    a, b = torch.randn(2, 3), torch.randn(3, 2)
    file = tmp_path / "x.safetensors"
    tensors = {"unet.q.lora_A.weight": a, "unet.q.lora_B.weight": b}
    metadata = json.dumps({"unet.lora_alpha": 8, "unet.r": 2})
    save_file(tensors, file, metadata={"lora_adapter_metadata": metadata})
    layers, _ = lora.read_lora(file)
    torch.testing.assert_close(lora.delta(*layers["q"]), 4 * b @ a)
    save_file({"lora_unet_q.lora_down.weight": a}, file)
    with pytest.raises(UserError, match="PEFT layout"):
        lora.read_lora(file)
