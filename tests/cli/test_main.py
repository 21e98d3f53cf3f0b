"""fastgen COMMAND: every command under one name, quick to say what there is; doctor and list."""

import os
import subprocess
import sys
import tomllib

import pytest

from fastgen.cli import doctor
from fastgen.cli.main import COMMANDS, main
from fastgen.config import catalogue
from fastgen.objectives import REGISTRY
from tests.cli.test_train import ROOT


def test_help_is_quick_and_imports_no_library():
    code = "import sys; from fastgen.cli.main import main; main(['--help']); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    text, modules = done.stdout.rsplit("\n", 2)[:2]
    assert not {"torch", "diffusers", "numpy", "pydantic", "yaml"} & set(modules.split())
    assert all(f"  {name} " in text for name in COMMANDS)


def test_no_command_loads_torch_before_it_has_read_its_flags():
    """So that --help and a misspelt flag are answered at once."""
    modules = ", ".join(command.module for command in COMMANDS.values())
    code = f"import sys, {modules}; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert not {"torch", "diffusers", "transformers"} & set(done.stdout.split())


def test_help_takes_no_third_of_a_second():
    """Of the processor's time, which others on the machine do not lengthen."""
    code = "import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'fastgen', '--help']);"
    code += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "usage: fastgen COMMAND" in done.stdout
    assert float(done.stdout.splitlines()[-1]) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastgen"])
    try:
        assert main([name, "--help"]) == 0
    except SystemExit as left:
        assert left.code == 0
    assert f"fastgen {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "found"),
    [(["trane"], "did you mean 'train'"), (["--prompt", "x"], "give one of train, sample")],
)
def test_a_wrong_command_is_one_line(argv, found, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert found in err and len(err.splitlines()) == 1


def test_the_script_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["fastgen"] == "fastgen.cli.main:main"


def test_list_names_everything_there_is(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastgen"])
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in REGISTRY:
        line = next(row for row in text.splitlines() if row.startswith(f"  {name} "))
        assert len(line.replace(name, "", 1).strip()) > 10, name
    for kind in ("teachers", "recipes"):
        for file in sorted((ROOT / "configs" / kind).glob("*.yaml")):
            named = catalogue.teacher_path(file) if kind == "teachers" else f"configs:recipes/{file.name}"
            assert named in text
    assert main(["list", "methods"]) == 0
    assert "assets:teachers" not in capsys.readouterr().out
    assert main(["list", "method"]) == 2
    assert "did you mean 'methods'" in capsys.readouterr().err


def test_doctor_sees_what_is_there_and_what_is_not(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", (doctor.Optional("no_such_module", "gpu", "nothing"),))
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert 'missing: nothing   pip install "fastgen-distill[gpu]"' in text
    assert "cores" in text and "math" in text and doctor.version_of("torch") in text
    monkeypatch.setattr(doctor, "OPTIONAL", (doctor.Optional("json", "gpu", "something"),))
    assert any("there: something" in line for line in doctor.extras())


def test_doctor_knows_every_extra_of_a_user():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {name for name in extras if name not in ("real", "test", "docs", "dev")}
    assert wanted == {optional.extra for optional in doctor.OPTIONAL}
