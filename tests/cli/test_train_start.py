"""train.py without a YAML file: --method on --teacher, --max_steps, --list, and help by section."""

import argparse

import pytest
import yaml

from fastgen.cli.pairs import working
from fastgen.cli.train import main
from fastgen.cli.train_start import recommended_config, refused
from fastgen.config import recommended
from fastgen.config.recommended import find_teacher, recommend
from fastgen.config.run import load, shortened, validate
from fastgen.core.errors import UserError
from tests.cli.test_train import FLAT, load_flat


# -- help ----------------------------------------------------------------------------------------------------
def helped(capsys, *argv):
    assert main([*argv]) == 0
    return capsys.readouterr().out


def test_help_is_short_and_says_where_to_read_on(capsys):
    text = helped(capsys, "--help")
    assert len(text.splitlines()) < 70
    for part in ("--method", "--max_steps", "--help all", "docs/commands.md", "  teacher ", "  stages.1 "):
        assert part in text
    assert "--teacher.path" not in text


def test_help_of_a_section_is_that_section(capsys):
    text = helped(capsys, "--help", "optim.critic")
    assert "--optim.critic.lr FLOAT" in text and "--optim.student.lr" not in text
    assert "--optim.student.lr" in helped(capsys, *FLAT, "--help", "optim")
    text = helped(capsys, "--help", "stages.0", "data")
    assert "--stages.0.optim.student.lr" in text and "--data.images" in text and "--stages.1" not in text


@pytest.mark.parametrize("method", ["lcm", "meanflow", "guidance_distillation", "boot"])
def test_help_of_a_method_is_its_settings(method, capsys):
    text = helped(capsys, "--help", method)
    assert "--objective.name {" + method + "}" in text and "--teacher.path" not in text


def test_help_of_something_else_is_one_line(capsys):
    assert main(["--help", "optimm"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'optim'" in err and len(err.splitlines()) == 1


def test_list(capsys):
    assert "\nrecipes\n" in helped(capsys, "--list")


# -- a smoke run ---------------------------------------------------------------------------------------------
def test_max_steps_shortens_every_stage():
    cfg = load(["configs:recipes/quickstart.yaml"], [])
    short = shortened(cfg, 5)
    assert [s.max_train_steps for s in short.stages] == [5, 5]
    assert all(s.limit == 5 * cfg.train.train_batch_size for s in short.stages)
    assert short.eval.num_samples == 100 and short.eval.teacher_samples == 0
    assert shortened(cfg, 10_000).stages[0].max_train_steps == 300, "never longer"
    flat = shortened(load_flat("--data.limit", "8", "--eval.num_samples", "0"), 2)
    assert (flat.train.max_train_steps, flat.data.limit, flat.eval.num_samples) == (2, 8, 0)


def test_max_steps_runs_to_the_end(tmp_path, capsys):
    argv = ["--method", "dmd2", "--teacher", "digits", "--max_steps", "2", "--eval.num_samples", "8"]
    argv += ["--teacher.num_steps", "2", "--eval.batch_size", "8", "--train.validation_steps", "0"]
    argv += ["--train.train_batch_size", "4", "--output_dir", str(tmp_path / "run"), "--eval.grid", "4"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "--max_steps 2: steps" in said and (tmp_path / "run/export/unet").is_dir()
    again = load([str(tmp_path / "run/recipe.yaml")], [])
    assert again.output_dir == str(tmp_path / "run") and again.train.train_batch_size == 4
    assert again.teacher.path == "assets:teachers/digits", "the recipe alone starts the run again"


# -- a method on a teacher -----------------------------------------------------------------------------------
def test_a_bundled_teacher_gets_its_own_recipe():
    for name in ("tinted-sd", "assets:teachers/tinted-sd"):
        assert recommend("lcm", name).files == ["configs:recipes/tinted-sd_lcm.yaml"]
    assert recommend("sid", "tinted-sd").files == ["configs:recipes/tinted-sd_sid_lsg.yaml"]


def test_a_released_model_gets_its_settings_under_the_method_s():
    found = recommend("lcm", "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert found.files == ["configs:teachers/sd15.yaml", "configs:objectives/lcm.yaml"]
    cfg = validate(found.values | {"data": {"images": "x"}})
    assert cfg.objective.name == "lcm" and cfg.student.kind == "lora" and cfg.teacher.height == 512
    assert find_teacher("sd15")[0] == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_a_name_that_is_a_folder_too_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sdxl").mkdir()
    with pytest.raises(UserError, match=r"write \./sdxl or stabilityai/stable-diffusion-xl-base-1\.0"):
        find_teacher("sdxl")
    assert find_teacher("./sdxl")[0] == "./sdxl"
    assert find_teacher("sd15")[0] == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_weights_that_are_missing_say_nothing_of_methods(tmp_path, capsys):
    argv = ["--method", "swiftbrush", "--teacher", "sdxl", "--data.prompts", str(tmp_path / "p.txt")]
    (tmp_path / "p.txt").write_text("a red dress\n")
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 2
    found = capsys.readouterr()
    error = next(line for line in found.err.splitlines() if line.startswith("error: "))
    assert error.startswith("error: teacher.path: ") and "methods that do" not in found.err
    assert "is replaced by" not in found.out


def test_a_folder_gets_the_settings_of_the_released_model_it_is_like(tiny):
    """Its own size, and nothing that its noise schedule or network cannot do."""
    found = recommend("tdm", str(tiny("sana")))
    cfg = validate(found.values | {"data": {"prompts": "x"}})
    assert found.files[0] == "configs:teachers/sana-0.6b.yaml" and cfg.teacher.path == str(tiny("sana"))
    assert cfg.teacher.height is None and cfg.teacher.layout is None
    assert cfg.student.timesteps == (), "TDM's times are of a VP schedule, SANA is a flow"
    assert any("sana-0.6b" in note for note in found.notes)
    assert recommend("tscd", str(tiny("sana"))).values["student"]["sampler"] == "ode"
    assert recommend("tscd", str(tiny("sd"))).values["student"]["sampler"] == "tcd"
    assert recommend("boot", str(tiny("sd"))).values["student"]["num_steps"] == 1


def test_the_written_recipe_is_the_run(tiny, tmp_path):
    found = recommend("tdm", str(tiny("sana")))
    (tmp_path / "r.yaml").write_text(found.text({"data": {"prompts": "p.txt"}}))
    values = found.values
    values["data"]["prompts"] = "p.txt"
    assert load([str(tmp_path / "r.yaml")], ["--output_dir", "runs/unnamed"]) == validate(values)
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["base"] == found.files


def test_half_precision_is_for_a_gpu(tiny, monkeypatch, capsys):
    """float32 where there is none, also in the written recipe; a dry run shows what a GPU would take."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = {}
    for dry in (False, True):
        known = argparse.Namespace(method="lcm", teacher=str(tiny("sd")), config=[], max_steps=None)
        known.dry_run = dry
        cfg = recommended_config(known, {"data": {"images": "x"}, "output_dir": "y"})
        found[dry] = cfg.teacher.dtype, cfg.train.mixed_precision
        written = yaml.safe_load(known.recipe)
        assert dry or (written["teacher"]["dtype"], written["train"]["mixed_precision"]) == (None, "no")
    assert found == {False: (None, "no"), True: ("fp16", "bf16")}
    assert capsys.readouterr().out.count("float32: these settings are of half precision") == 1


def test_halves_that_a_cpu_cannot_mix_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    halves = ["--teacher.dtype", "fp16", "--train.mixed_precision", "bf16"]
    assert main([*FLAT, *halves, "--output_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "teacher.dtype: found 'fp16' with train.mixed_precision 'bf16'" in err
    assert len(err.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_why_a_method_cannot_and_which_can(tiny, monkeypatch):
    """A teacher without guidance of its own cannot be followed at a random scale."""
    names = ["dmd2", "snoopi", "lcm"]
    monkeypatch.setattr("fastgen.cli.pairs.REGISTRY", {n: recommended.REGISTRY[n] for n in names})
    able = working(str(tiny("sd")))
    assert able == ["dmd2", "lcm", "snoopi"]
    known = argparse.Namespace(method="snoopi", teacher=str(tiny("sd")))
    error = refused(UserError("student.sampler", "found x", "use y"), known)
    assert "snoopi does not work on" in str(error) and str(error).endswith("methods that do: dmd2, lcm")
    about_the_folder = UserError("output_dir", "is a file", "give a folder")
    assert refused(about_the_folder, known) is about_the_folder
    assert working(str(tiny("sd")), without_images=True) == ["snoopi"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "lcmm"], "did you mean 'lcm'"),
        (["--method", "dmd2", "--teacher", "sd51"], "did you mean 'sd15'"),
        (["--teacher", "sd15"], "found without --method"),
        (["--method", "dmd2", *FLAT], "found with --config"),
        (["--method", "dmd2", "--teacher", "sd15", "--teacher.path", "x"], "found with --teacher.path"),
        (["--max_steps", "0"], "--max_steps: found 0"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_images_that_are_missing_are_asked_for(tiny, capsys, monkeypatch):
    names = ["dmd2", "tdm", "lcm"]
    monkeypatch.setattr("fastgen.cli.pairs.REGISTRY", {n: recommended.REGISTRY[n] for n in names})
    assert main(["--method", "dmd2", "--teacher", str(tiny("sd")), "--data.prompts", "x.txt"]) == 2
    err = capsys.readouterr().err
    assert "give --data.images FOLDER, or --objective.gan_weight 0" in err and "without any: tdm" in err
