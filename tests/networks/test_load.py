"""What surrounds a family: attention kernels, text encoders, caches, clips, errors of one line."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from fastgen.cli.train import main
from fastgen.config.data_section import DataConfig
from fastgen.config.run import validate
from fastgen.config.sections import StudentConfig, TeacherConfig
from fastgen.core.errors import UserError
from fastgen.data.loader import _text_rows, load_data
from fastgen.data.media import read_folder
from fastgen.export import lora
from fastgen.families.declared import declared
from fastgen.families.registry import FAMILIES, detect
from fastgen.networks.attention import check, dispatches, exact_attention, kernel, works
from fastgen.networks.codecs import switch_vae
from fastgen.networks.load import load_teacher
from fastgen.networks.lora_targets import adapter_layers
from fastgen.training.assembly import make_cast
from tests.families.cases import CASES
from tests.families.cases.declared import DECLARATION

FLAT = ["--config", str(Path(__file__).parents[1] / "support/flat.yaml")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny pipelines by case name, built once."""
    made = {}

    def build(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("teachers") / name
            CASES[name].build(made[name])
        return made[name]

    return build


def refused(capsys, *argv):
    """The one line a command ends with."""
    code = main([str(a) for a in argv])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1, errors
    return errors[0]


# -- attention ----------------------------------------------------------------------------------------------
def test_kernels_that_would_do_nothing_or_do_not_run_are_refused(folder):
    old, new = load_teacher(str(folder("sd"))).backbone.net, load_teacher(str(folder("wan"))).backbone.net
    assert dispatches(new) and not dispatches(old)
    assert check(old, "auto", "cpu") is None and check(old, "math", "cpu") == "math"
    with pytest.raises(UserError, match="'flex' has no effect on UNet2DConditionModel.*use one of auto"):
        check(old, "flex", "cpu")
    for name in ("cudnn", "sage", "xformers"):
        assert not works(name, "cpu")
    with pytest.raises(UserError, match="'sage' does not run on this machine; use one of .*math"):
        check(new, "sage", "cpu")


def test_a_kernel_acts_inside_its_network_only(folder):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    backbone = load_teacher(str(folder("wan"))).backbone
    seen = []

    def spy(*args, **kwargs):
        seen.append(_AttentionBackendRegistry.get_active_backend()[0].value)

    backbone.net.register_forward_hook(spy)
    case = load_teacher(str(folder("wan")))
    x, t = torch.randn(1, *case.codec.shape), torch.full((1,), 0.5, dtype=torch.float64)
    cond = case.codec.prompts(["a red dress"])
    with torch.no_grad():
        plain = backbone(x, t, cond)
        backbone.attention = "flex"
        torch.testing.assert_close(backbone(x, t, cond), plain, rtol=1e-4, atol=1e-5)
        with exact_attention():
            backbone(x, t, cond)
    assert seen == ["native", "flex", "native"]
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"


def test_tangents_pass_whatever_kernel_was_chosen(folder):
    teacher = load_teacher(str(folder("sd")))
    teacher.backbone.attention = "flash"
    x, t = torch.randn(1, 4, 8, 8), torch.full((1,), 500.0)
    cond = teacher.codec.prompts(["a red dress"])
    f = lambda x: teacher.backbone(x, t, cond)  # noqa: E731
    with torch.no_grad(), pytest.raises(NotImplementedError):
        torch.func.jvp(f, (x,), (x,))
    with torch.no_grad(), exact_attention():
        assert torch.func.jvp(f, (x,), (x,))[1].abs().max() > 0
    with kernel(None):
        pass


# -- text encoders and caches -------------------------------------------------------------------------------
def test_prompts_are_kept_on_disk_and_encoders_let_go(folder, tmp_path, monkeypatch):
    codec = load_teacher(str(folder("sdxl"))).codec
    captions = ["a red dress", "a bag", "a red dress"]
    table, rows, texts = _text_rows(codec, captions, "cpu", str(tmp_path), "key")
    assert texts == ["a bag", "a red dress"]
    assert rows.tolist() == [1, 0, 1] and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(codec, "prompts", lambda *_: pytest.fail("encoded again"))
    again, *_ = _text_rows(codec, captions, "cpu", str(tmp_path), "key")
    assert set(again) == set(table) and all(torch.equal(again[k], table[k]) for k in table)
    monkeypatch.undo()
    changed = load_teacher(str(folder("sdxl"))).codec
    next(changed.encoders.parameters()).data += 1
    _text_rows(changed, captions, "cpu", str(tmp_path), "key")
    assert len(list(tmp_path.iterdir())) == 2, "another encoder is another file"
    wanted = sum(p.numel() * 4 for p in codec.encoders.parameters())
    null = codec.null(2)
    assert codec.free() == wanted > 0 and codec.pipe.text_encoder is None
    assert all(torch.equal(v, null[k]) for k, v in codec.null(2).items())
    with pytest.raises(UserError, match="freed"):
        codec.prompts(["a bag"])
    assert not any("text_encoder" in n for n, _ in codec.named_parameters())


def test_null_conditions_are_the_pipelines_own(folder):
    """SDXL: zeros where the folder declares them, and the empty prompt where it does not."""
    zeros = load_teacher(str(folder("sdxl"))).codec.null(1)
    assert not zeros["encoder_hidden_states"].any() and not zeros["text_embeds"].any()
    other = folder("sdxl").with_name("sdxl-prompt")
    shutil.copytree(folder("sdxl"), other, dirs_exist_ok=True)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    codec = load_teacher(str(other)).codec
    for key, value in codec.prompts([""]).items():
        torch.testing.assert_close(codec.null(1)[key], value)


def test_tiling_and_slicing_reach_the_autoencoder_or_are_refused(folder):
    codec = load_teacher(str(folder("sd"))).codec
    settings = TeacherConfig(vae_tiling=True, vae_slicing=True)
    switch_vae(codec.vae, settings)
    assert codec.vae.use_tiling and codec.vae.use_slicing
    with pytest.raises(UserError, match="teacher.vae_tiling: this teacher has no autoencoder"):
        switch_vae(None, settings)


# -- pictures, clips and what a network is shown ------------------------------------------------------------
def test_clips_are_read_and_short_ones_named(tmp_path):
    frames = [Image.new("RGB", (20, 16), (20 * i, 0, 0)) for i in range(6)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "short.gif", save_all=True, append_images=frames[1:3])
    (tmp_path / "long.txt").write_text("getting red")
    clips, captions = read_folder(tmp_path, (3, 5, 16, 16), "skip")
    assert clips.shape == (1, 3, 5, 16, 16) and captions == ["getting red"]
    assert (clips[0, 0, :, 8, 8].diff() > 0).all()
    with pytest.raises(UserError, match=r"short.gif \(3 frames of the 5 needed\)"):
        read_folder(tmp_path, (3, 5, 16, 16), "error")


def test_control_images_go_with_their_pictures(folder, tmp_path):
    for kind in ("images", "control"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            shade = (80 * i, 0, 0) if kind == "images" else (0, 80 * i, 0)
            Image.new("RGB", (16, 16), shade).save(tmp_path / kind / f"{i}.png")
            (tmp_path / kind / f"{i}.txt").write_text("a dress")
    teacher = load_teacher(str(folder("controlnet")))
    given = DataConfig(images=str(tmp_path / "images"), control=str(tmp_path / "control"))
    data = load_data(given, teacher)
    green = data.cond(torch.tensor([0, 2]))["control"][:, 1].amax((1, 2))
    torch.testing.assert_close(green, torch.tensor([0.0, 160 / 255]), atol=0.01, rtol=0)
    assert torch.equal(data.null(torch.tensor([2]))["control"], data.cond(torch.tensor([2]))["control"])
    assert len(data.first(2).own["control"]) == 2
    with pytest.raises(
        UserError, match="takes an image beside the text, and none are given; set data.control"
    ):
        load_data(DataConfig(images=str(tmp_path / "images")), teacher)
    (tmp_path / "control/2.png").unlink()
    with pytest.raises(UserError, match="2 for 3 images"):
        load_data(given, teacher)


# -- adapters -----------------------------------------------------------------------------------------------
def test_rank_stabilised_adapters_keep_their_strength_in_the_file(folder, tmp_path):
    backbone = load_teacher(str(folder("sd"))).backbone
    backbone.add_adapter("student", 4, 6, backbone.family.lora_targets, rs=True)
    with torch.no_grad():
        for name, p in backbone.net.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.2)
    layers = lora.collect(backbone.net, "student")
    some = next(m for m in backbone.net.modules() if "student" in getattr(m, "lora_A", {}))
    assert some.scaling["student"] == 6 / 4**0.5
    file = lora.write_peft(tmp_path / "rs.safetensors", layers, "unet", {})
    fresh = load_teacher(str(folder("sd")))
    lora.load_lora_into(fresh.backbone.net, file)
    x, t, cond = torch.randn(1, 4, 8, 8), torch.full((1,), 500.0), fresh.codec.prompts(["a bag"])
    with torch.no_grad(), backbone.using("student"):
        wanted = backbone.raw(x, t, cond)
        torch.testing.assert_close(fresh.backbone.raw(x, t, cond), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "targets,message",
    [
        (["to_qqq"], "no layer of UNet2DConditionModel ends in 'to_qqq'; give endings of its layers' names"),
        (["linear_1"], "'linear_1' also matches 'time_embedding.linear_1'"),
        (["conv_out"], None),  # named whole, it is meant
    ],
)
def test_lora_endings_that_match_nothing_or_too_much(folder, targets, message, tmp_path, capsys):
    argv = [
        *FLAT,
        "--teacher.path",
        folder("sd"),
        "--student.kind",
        "lora",
        "--data.name",
        "tinted",
        "--dry_run",
    ]
    argv += ["--objective.name", "sft", "--student.lora.target_modules", *targets]
    if message is None:
        backbone = load_teacher(str(folder("sd"))).backbone
        assert adapter_layers(backbone.family, backbone.net, tuple(targets)) == targets
    else:
        assert message in refused(capsys, *argv)


# -- mistakes -----------------------------------------------------------------------------------------------
def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BAD = {
    "height": (
        "sd3",
        ["--teacher.height", "33"],
        "teacher.height: found 33; give a multiple of 4, as sd3 needs",
    ),
    "frames": (
        "wan",
        ["--teacher.num_frames", "8"],
        "teacher.num_frames: found 8; give 5 or 9: 1 plus a multiple of 4, as wan needs",
    ),
    "no size": ("shap-e", ["--teacher.width", "64"], "remove it: shap-e has no image size"),
    "frames of an image": ("sd", ["--teacher.num_frames", "9"], "remove it: sd generates images, not videos"),
    "guidance input": ("sd", ["--teacher.embedded_guidance", "3"], "takes no guidance scale as an input"),
    "kernel": ("sd", ["--teacher.attention", "flex"], "has no effect on UNet2DConditionModel"),
    "dora": ("sd", ["--student.lora.use_dora", "true"], "student.lora.use_dora"),
    "no null class": ("consistency", ["--teacher.guidance", "2"], "teacher.guidance: found 2.0"),
    "prediction": (
        "sd-v",
        ["--teacher.prediction", "eps"],
        "found 'eps', but the config of DDIMScheduler says 'v'; use auto",
    ),
    "tiling": ("unet2d-vp", ["--teacher.vae_tiling", "true"], "this teacher has no autoencoder"),
    "dropout": ("consistency", [], "objective.cond_dropout: found 0.1 for a teacher without a null class"),
    "recomputation": (
        "shap-e",
        ["--train.gradient_checkpointing", "true"],
        "PriorTransformer does not",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(name, folder, tmp_path, capsys):
    teacher, argv, message = BAD[name]
    run = tmp_path / "run"
    common = [*FLAT, "--teacher.path", folder(teacher), "--objective.name", "sft", "--data.name", "tinted"]
    line = refused(capsys, *common, *argv, "--dry_run", "--output_dir", run)
    assert message in line and not run.exists(), line


def test_a_scheduler_of_another_kind_is_told(folder, tmp_path):
    shutil.copytree(folder("flux"), tmp_path / "flux")
    shutil.copy(
        folder("sd") / "scheduler/scheduler_config.json", tmp_path / "flux/scheduler/scheduler_config.json"
    )
    with pytest.raises(UserError, match="noise schedule of DDIMScheduler is VP, flux is trained with Flow"):
        load_teacher(str(tmp_path / "flux"))


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "vae", "text_encoder"])
def test_a_missing_part_is_named(part, folder, tmp_path):
    shutil.copytree(folder("sdxl"), tmp_path / "sdxl")
    shutil.rmtree(tmp_path / "sdxl" / part)
    with pytest.raises(UserError, match=f"has no subfolder '{part}'"):
        load_teacher(str(tmp_path / "sdxl"))


def test_the_error_of_an_unknown_network_names_the_declaration(folder, tmp_path):
    with pytest.raises(UserError, match="no family for 'AuraFlowTransformer2DModel'.*teacher.family"):
        load_teacher(str(folder("declared")))
    for values, message in (
        ({"flow_tim": "unit"}, "flow_tim: unknown key .did you mean 'flow_time'"),
        ({"pipelines": ["AuraFlowPipeline"]}, "cond_shapes: not given"),
        (DECLARATION | {"divisor": "two"}, "divisor: found 'two'"),
        (DECLARATION | {"prompt_outputs": {"a": 9}}, "9.*AuraFlowPipeline.encode_prompt returns"),
        (
            DECLARATION | {"prompt_outputs": {"a": 1}, "taps": "blocks"},
            "no 'blocks'; choose from its lists of blocks: joint",
        ),
    ):
        with pytest.raises(UserError, match=message):
            teacher = load_teacher(str(folder("declared")), family=values)
            teacher.backbone.family.taps(teacher.backbone.net)
            teacher.codec.prompts(["a bag"])


def test_a_declaration_in_yaml_runs(folder, tmp_path, capsys):
    values = {
        "teacher": {"path": str(folder("declared")), "family": DECLARATION},
        "data": {"prompts": str(tmp_path / "p.txt")},
    }
    (tmp_path / "p.txt").write_text("a red dress\n")
    values |= {"objective": {"name": "dmd2", "gan_weight": 0.0}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "a.yaml"), "--dry_run"]) == 0
    assert "AuraFlow" in capsys.readouterr().out


def test_detection_is_by_index_and_config():
    sd = {"_class_name": "UNet2DConditionModel"}
    wanted = {
        "sd": ({}, sd),
        "lcm": ({}, sd | {"time_cond_proj_dim": 256}),
        "sdxl": ({}, sd | {"addition_embed_type": "text_time"}),
        "controlnet": ({"controlnet": ["diffusers", "ControlNetModel"]}, sd),
        "consistency": ({"_class_name": "ConsistencyModelPipeline"}, {"_class_name": "UNet2DModel"}),
        "unet2d": ({"_class_name": "DDPMPipeline"}, {"_class_name": "UNet2DModel"}),
    }
    for name, (index, net) in wanted.items():
        assert detect(index, net) is FAMILIES[name], name


def test_half_precision_stays_with_the_frozen(folder):
    cfg = validate(
        {
            "teacher": {"path": str(folder("sd")), "dtype": "bf16"},
            "student": {"kind": "lora"},
            "objective": {"name": "dmd2", "gan_weight": 0.0},
            "data": {"name": ""},
        }
    )
    cast = make_cast(cfg)
    assert {p.dtype for p in cast.parts["student"].trainable().values()} == {torch.float32}
    assert {p.dtype for n, p in cast.teacher.backbone.net.named_parameters() if "lora" not in n} == {
        torch.bfloat16
    }
    full = cfg.model_copy(update={"student": StudentConfig()})
    copied = make_cast(full).parts["student"]
    assert {p.dtype for p in copied.trainable().values()} == {torch.float32}
    assert declared(copy.deepcopy(DECLARATION), "X").name == "declared-X"
