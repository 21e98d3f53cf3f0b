"""Pictures restored on the command line: what is measured, and every mistake in one line."""

import json

import pytest
from PIL import Image, ImageFilter

from fastgen.cli.sample import main as sample
from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.training.assembly import make_protocol
from tests.support.restorer import restorer_export, restorer_run


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return restorer_export(tmp_path_factory.mktemp("oftsr"))


def test_results_say_how_faithful_it_is(export):
    results = json.loads((export.parent / "results.json").read_text())
    assert {"psnr", "ssim"} <= set(results["student"]) and results["enlarged"]["psnr"] > 10


def test_the_teacher_is_measured_on_the_same_pictures(export):
    """Not on milder ones, as that of scale_distillation: at factor 4 none of its samples is a copy."""
    protocol = validate(read_files([str(export.parent / "config.yaml")]))
    assert not make_protocol(protocol).milder
    change = {"objective": {"name": "scale_distillation"}}
    assert make_protocol(validate({**protocol.model_dump(mode="json"), **change})).milder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fidelity", "0.001"], "--fidelity: found 0.001; give 0.01 to 0.99"),
        (["--fidelity", "1.5"], "--fidelity: found 1.5"),
        (["--scale", "2"], "--scale: found 2"),
        (["--prompt", "a dress"], "--prompt: this model takes an image alone"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(export, tmp_path, capsys, flags, message):
    given = ["--model", str(export), "--image", str(export / "image.png"), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert sample([*given, *flags]) == 2
    found = capsys.readouterr().err.strip()
    assert message in found and "\n" not in found


def test_a_picture_of_another_size_is_refused(export, tmp_path, capsys):
    Image.new("RGB", (2, 2)).save(tmp_path / "small.png")
    given = ["--model", str(export), "--image", str(tmp_path / "small.png"), "--out", str(tmp_path / "out")]
    assert sample(given) == 2 and "enlarges 4 x 4 to 16 x 16" in capsys.readouterr().err


def test_a_method_that_begins_at_noise_is_refused(tmp_path, capsys):
    assert restorer_run(tmp_path, objective={"name": "boot"})[0] == 2
    assert "objective.name: boot begins at noise" in capsys.readouterr().err


def test_a_restorer_without_its_share_of_noise_is_refused(tmp_path):
    from fastgen.networks.load import load_teacher
    from tests.families.cases.unets import restorer_folder

    restorer_folder(tmp_path)
    info = json.loads((tmp_path / "fastgen.json").read_text())
    for change in ({"start_noise": 1.5}, {"patch": 1}):
        (tmp_path / "fastgen.json").write_text(json.dumps(info | change))
        with pytest.raises(UserError, match=next(iter(change))):
            load_teacher(str(tmp_path))
    (tmp_path / "fastgen.json").write_text(json.dumps({"patch": 2}))
    with pytest.raises(UserError, match="start_noise None"):
        load_teacher(str(tmp_path))


def test_pictures_of_the_same_size_are_restored_from_their_controls(tmp_path):
    """Deblurring, grey: data.control has what is shown of each picture, and --image is taken as it is."""
    from tests.families.cases.unets import restorer_folder

    restorer_folder(tmp_path / "teacher", colours=1)
    info = json.loads((tmp_path / "teacher/fastgen.json").read_text())
    (tmp_path / "teacher/fastgen.json").write_text(
        json.dumps({k: v for k, v in info.items() if k != "enlarges"})
    )
    for i in range(6):
        sharp = Image.linear_gradient("L").resize((16, 16)).rotate(60 * i)
        for folder, picture in (("set", sharp), ("blurred", sharp.filter(ImageFilter.BoxBlur(2)))):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{i}.png")
    data = {"images": str(tmp_path / "set"), "control": str(tmp_path / "blurred")}
    done, export = restorer_run(tmp_path, data=data, eval={"num_samples": 0})
    assert done == 0
    given = [
        "--model",
        str(export),
        "--image",
        str(tmp_path / "blurred/1.png"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert sample(given) == 0 and Image.open(next((tmp_path / "out").glob("0*.png"))).size == (16, 16)
    assert sample([*given, "--scale", "4", "--overwrite"]) == 2
