"""The record of an export: it comes back as it was written, and nothing else is read."""

import dataclasses
import json

import pytest

from fastgen.cli.merge_students import main as merge
from fastgen.cli.sample import main as sample
from fastgen.core.errors import UserError
from fastgen.export.info import FORMAT, ExportInfo, read_info

INFO = ExportInfo(
    fastgen_version="1.2",
    name="shop-dmd2-2step",
    objective="dmd2",
    student_kind="full",
    base="a/teacher",
    training_steps=5,
    steps=2,
    times=(999.0, 499.0),
    sampler="renoise",
    gamma=0.0,
    grid=0,
    scheduler={"_class_name": "LCMScheduler", "trained_betas": [0.1, 0.2]},
    timestep_arguments={"timesteps": [999, 499]},
    step_arguments={},
    needs_loop=False,
    set_on_scheduler=True,
    other_step_counts={"1": {"scheduler": {}, "arguments": {"sigmas": [1.0]}}},
    step_lengths=None,
    guidance=3.0,
    guidance_range=(1.0, 8.0),
    steps_as_guidance=False,
    embedded_guidance=None,
    nasa_scale=0.5,
    teacher_steps=20,
    teacher_scheduler={"_class_name": "DDIMScheduler"},
)


def written(info=INFO) -> dict:
    """What a file holds."""
    return json.loads(json.dumps(info.to_json()))


@pytest.mark.parametrize(
    "info",
    [
        INFO,
        dataclasses.replace(INFO, times=None, guidance_range=None, step_lengths=(0.5, 0.25)),
        dataclasses.replace(INFO, lora="a.safetensors", kohya="b.safetensors", embedded_guidance=3.5),
        dataclasses.replace(INFO, num_students=3, trained_students=(0, 2)),
    ],
    ids=["student", "teacher", "lora", "members"],
)
def test_a_record_comes_back_as_it_was(info):
    assert ExportInfo.from_json(written(info), "fastgen.json", "--model") == info
    assert written(info)["format"] == FORMAT


def test_a_record_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        INFO.steps = 3


BROKEN = {
    "newer format": (
        {**written(), "format": FORMAT + 1},
        f"export format {FORMAT + 1}, and this fastgen reads",
    ),
    "no format": ({k: v for k, v in written().items() if k != "format"}, "export format None"),
    "missing key": ({k: v for k, v in written().items() if k != "times"}, "times is missing in"),
    "text for a number": ({**written(), "steps": "2"}, "steps in"),
    "a fraction of a step": ({**written(), "steps": 2.5}, "steps in"),
    "list of texts": ({**written(), "times": ["999"]}, "times.0 in"),
    "scheduler is a list": ({**written(), "scheduler": []}, "scheduler in"),
    "list": ([written()], "is a list"),
    "null": (None, "is null"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_anything_else_is_refused_in_one_line(name, tmp_path):
    values, wanted = BROKEN[name]
    (tmp_path / "fastgen.json").write_text(json.dumps({"export": values}))
    with pytest.raises(UserError) as error:
        read_info(tmp_path, "--model")
    message = str(error.value)
    assert wanted in message and message.startswith("--model: ") and "\n" not in message, message


FILES = {
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "cut": b'{"export": {',
    "binary": b"\x89PNG\xff\xfe\x00",
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_line(name, tiny, tmp_path, capsys):
    """As export, as one of several students, and as teacher."""
    import shutil

    from fastgen.networks.load import load_teacher
    from fastgen.roles.router import Router

    folder = tmp_path / "export"
    shutil.copytree(tiny("flow"), folder)
    (folder / "fastgen.json").write_bytes(FILES[name])
    Router(1).save(folder)
    for main, argv in ((sample, ["--model", str(folder)]), (merge, [str(folder)])):
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert "fastgen.json" in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    with pytest.raises(UserError, match="fastgen.json"):
        load_teacher(str(folder))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_others_wrote_has_no_record(tmp_path):
    assert read_info(tmp_path, "--model") is None
    (tmp_path / "fastgen.json").write_text('{"patch": 2}')
    assert read_info(tmp_path, "--model") is None
