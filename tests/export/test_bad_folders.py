"""Teacher folders and blueprints that are broken: one line naming what is wrong, exit code 2, nothing
left behind.
"""

import json
import shutil

import pytest
import yaml

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.export.load import load_export


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def to_pickle(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"x")


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


WEIGHTS, SCHEDULER = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
# name -> (teacher, what is done to a copy of it, what the line must hold)
BROKEN = {
    "truncated": ("flow", lambda f: cut(f / WEIGHTS), "unet cannot be read"),
    "no weights": ("flow", lambda f: (f / WEIGHTS).unlink(), "unet has no weights"),
    "pickle": ("flow", to_pickle, "only pickled weights"),
    "no scheduler": ("flow", lambda f: (f / SCHEDULER).unlink(), "scheduler_config.json does not exist"),
    "scheduler not JSON": ("flow", lambda f: (f / SCHEDULER).write_text("{"), "not valid JSON"),
    "scheduler unknown": ("flow", lambda f: edit(f / SCHEDULER, _class_name="NoScheduler"), "NoScheduler"),
    "prediction unknown": ("vp", lambda f: edit(f / SCHEDULER, prediction_type="velocity"), "'velocity'"),
    "network unknown": (
        "flow",
        lambda f: edit(f / "unet/config.json", _class_name="UNet2DModell"),
        "did you mean 'UNet2DModel'",
    ),
    "weights of another size": (
        "flow",
        lambda f: edit(f / "unet/config.json", block_out_channels=[16, 32]),
        "unet cannot be read",
    ),
    "no network": ("flow", lambda f: shutil.rmtree(f / "unet"), "config.json does not exist"),
    "no tokenizer": ("sd", lambda f: shutil.rmtree(f / "tokenizer"), "has no subfolder 'tokenizer'"),
    "no autoencoder": ("sd", lambda f: shutil.rmtree(f / "vae"), "has no subfolder 'vae'"),
    "text encoder unknown": (
        "sd",
        lambda f: edit(f / "text_encoder/config.json", architectures=["ClipTextModell"]),
        "ClipTextModell",
    ),
    "text encoder truncated": (
        "sd",
        lambda f: cut(f / "text_encoder/model.safetensors"),
        "text_encoder cannot be read",
    ),
}


def refused(argv, run, capsys):
    """The one line a run ends with."""
    code = main([str(a) for a in [*argv, "--output_dir", run]])
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err
    assert not run.exists()
    return errors[0]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_teacher_folder(name, tiny, tmp_path, capsys):
    teacher, damage, wanted = BROKEN[name]
    shutil.copytree(tiny(teacher), tmp_path / "teacher")
    damage(tmp_path / "teacher")
    argv = ["--teacher.path", tmp_path / "teacher"]
    for switch in ([], ["--dry_run"]):
        if switch and name == "weights of another size":
            continue  # a dry run reads no shapes
        line = refused([*argv, *switch], tmp_path / "run", capsys)
        assert wanted in line and "teacher" in line.replace(str(tmp_path), "") or "scheduler" in line, line
        assert wanted in line, line


NET = {"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [8, 16]}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize(
    "blueprint,wanted",
    [
        ({"net": NET}, "teacher.blueprint.scheduler: not given"),
        ({"scheduler": FLOW}, "teacher.blueprint.net: not given"),
        ({"net": NET, "scheduler": FLOW}, "teacher.blueprint.net: UNet2DModel cannot be built from it"),
        ({"net": NET | {"_class_name": "UNet3D"}, "scheduler": FLOW}, "no family for 'UNet3D'"),
    ],
)
def test_broken_blueprint(blueprint, wanted, tmp_path, capsys):
    values = {"teacher": {"path": "", "blueprint": blueprint}, "objective": {"name": "sft"}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert wanted in refused(["--config", tmp_path / "a.yaml"], tmp_path / "run", capsys)


def test_no_teacher_at_all(tmp_path, capsys):
    assert "teacher.path: found ''" in refused(["--teacher.path", ""], tmp_path / "run", capsys)


@pytest.mark.parametrize("missing", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_an_export_with_a_missing_part_is_named(missing, tiny, tmp_path):
    shutil.copytree(tiny("flow"), tmp_path / "broken")
    (tmp_path / "broken" / missing).unlink()
    with pytest.raises(UserError, match=missing.rsplit("/", 1)[1]):
        load_export(str(tmp_path / "broken"))
