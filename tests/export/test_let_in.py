"""What a model's or a run's own files may not do: lead out of their folder, or end in a traceback."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fastgen.cli.merge_students import main as merge
from fastgen.core.errors import UserError
from fastgen.export.load import init_student, load_export
from fastgen.export.write import check_copied, export_folder
from fastgen.networks.files import library_class, load_part, named_class
from fastgen.networks.load import load_teacher
from fastgen.roles.roles import Role
from tests.export.test_info import written

FILES = ("fastgen.json", "model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
SHAPES = {
    "list": b"[]",
    "null": b"null",
    "binary": b"\xff\x80",
    "deep": b'{"a":' + b"[" * 100_000,
    "text for numbers": json.dumps(
        {"_class_name": "UNet2DModel", "patch": "2", "in_channels": "x", "num_train_timesteps": "x"}
    ).encode(),
    "lists for all": json.dumps(
        {"_class_name": ["x"], "export": [], "unet": "x", "num_classes": {}, "prediction_type": []}
    ).encode(),
    "class of another kind": json.dumps({"_class_name": "DiffusionPipeline", "export": "x"}).encode(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("file", FILES)
def test_json_of_another_shape_is_one_line(file, shape, tiny, tmp_path):
    shutil.copytree(tiny("flow"), tmp_path / "t")
    (tmp_path / "t" / file).write_bytes(SHAPES[shape])
    harmless = file == "model_index.json" and shape in ("text for numbers", "lists for all")
    try:
        load_export(str(tmp_path / "t"))
    except UserError as error:
        named = (str(tmp_path), "scheduler", "no family for")
        assert any(name in str(error) for name in named), error
        assert "\n" not in str(error) and len(str(error)) < 800
    else:
        assert harmless or (file, shape) == ("model_index.json", "class of another kind")


@pytest.mark.parametrize(
    "export", [None, [], "x", {}, {"lora": "../x.safetensors"}, {"lora": 3}, {"num_students": 2}]
)
def test_a_description_that_is_none(export, tiny, tmp_path):
    shutil.copytree(tiny("flow"), tmp_path / "t")
    save_file({}, tmp_path / "x.safetensors")
    if export:
        export = written() | export if isinstance(export, dict) else export
    (tmp_path / "t/fastgen.json").write_text(json.dumps({"export": export}))
    with pytest.raises(UserError, match="--model: "):
        load_export(str(tmp_path / "t"))
    if isinstance(export, dict) and export.get("lora"):
        message = "lora in .*valid string" if export["lora"] == 3 else ".*not inside of it"
        student = Role(load_teacher(str(tiny("flow"))).backbone)
        with pytest.raises(UserError, match=f"student.init: {message}"):
            init_student(student, str(tmp_path / "t"))


def test_an_index_of_weights_names_files_of_its_folder(tiny, tmp_path):
    from diffusers import UNet2DModel

    shutil.copytree(tiny("flow"), tmp_path / "t")
    unet = tmp_path / "t/unet"
    weights = unet / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    weights.rename(tmp_path / "outside.safetensors")
    save_file({}, unet / "other.safetensors")
    for wrong in ("../../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, wrong)}
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="teacher.path: .*not inside of it"):
            load_part(unet, "teacher.path", UNet2DModel)


def test_only_models_and_processors_are_called_by_name(tmp_path):
    import diffusers
    import transformers

    assert library_class(diffusers, "UNet2DModel", diffusers.ModelMixin) is diffusers.UNet2DModel
    assert named_class(tmp_path, "p", "transformers", "CLIPTextModel") is transformers.CLIPTextModel
    wrong = [("diffusers", "DiffusionPipeline"), ("os", "system"), ("diffusers", "utils"), (None, None)]
    wrong += [("stable_diffusion.pipeline_stable_diffusion", "os"), ("transformers", "pipeline"), (3, "x")]
    for library, name in wrong:
        with pytest.raises(UserError, match="teacher.path: .*as its component 'p'"):
            named_class(tmp_path, "p", library, name)


def hostile(tiny, tmp_path):
    """A text teacher whose index and links lead to a secret beside it, and the secret."""
    folder, secret = tmp_path / "in/teacher", tmp_path / "in/secret"
    shutil.copytree(tiny("sd"), folder)
    secret.mkdir()
    (secret / "id").write_text("SECRET")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"../secret": ["diffusers", "X"], "../../in/secret": ["diffusers", "X"], str(secret): ["a", "b"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "tokenizer/notes.txt").symlink_to(secret / "id")
    (folder / "tokenizer/more").symlink_to(secret)
    return folder


def test_an_export_copies_what_is_inside_of_the_teacher_only(tiny, tmp_path, capsys):
    teacher = load_teacher(str(hostile(tiny, tmp_path)))
    with pytest.raises(UserError, match="teacher.path: .*tokenizer/more is a link that leaves the folder"):
        check_copied(teacher)
    export_folder(teacher, teacher.backbone.net, tmp_path / "out/run/export", teacher.scheduler, {})
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert (tmp_path / "out/run/export/tokenizer/tokenizer_config.json") in files
    assert not [p for p in files if b"SECRET" in p.read_bytes()]
    assert all(p.is_relative_to(tmp_path / "out/run/export") for p in files)
    index = json.loads((tmp_path / "out/run/export/model_index.json").read_text())
    assert not [k for k in index if "/" in k]
    assert "not copied" in capsys.readouterr().err


def test_a_plain_teacher_is_copied_whole(tiny):
    check_copied(load_teacher(str(tiny("sd"))))


@pytest.mark.parametrize("trained", [["0/../../victim"], [7], "0", None])
def test_joined_students_are_numbers_of_the_export(trained, tmp_path, capsys):
    import torch

    for name in ("a/student0", "victim", "out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out").rmdir()
    (tmp_path / "victim/file").write_text("kept")
    save_file({"num": torch.tensor([1])}, tmp_path / "a/router.safetensors")
    document = {"export": written() | {"num_students": 1, "trained_students": trained}}
    (tmp_path / "a/fastgen.json").write_text(json.dumps(document))
    assert merge([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 2
    assert "exports" in capsys.readouterr().err and (tmp_path / "victim/file").read_text() == "kept"
    assert not (tmp_path / "out").exists()
