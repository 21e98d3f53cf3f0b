"""docs/data.md, "Your own images and prompts": every command of the page runs (dry) on the layout it is about
and says what it found; the Python of the page makes a run's data.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import fastgen
from fastgen.cli.train import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
SECTION = PAGE.split("## Your own images and prompts")[1].split("\n## ")[0]
COMMANDS = re.findall(r"^python train\.py (.*)$", SECTION, re.M)
README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (shade, 90, 90)).save(path)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The layouts of the page in a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "birds", "cars", "digits"):
        for i in range(10):
            picture(Path("my", name, f"{i}.png"), 20 * i)
    for i in range(10):
        if i not in (4, 9):
            Path(f"my/cats/{i}.txt").write_text(f"a cat number {i}")
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"bird {i}"}) for i in range(10)]
    Path("my/birds/metadata.jsonl").write_text("\n".join(rows))
    lines = [f"{i}.png,car {i}" for i in range(10)]
    Path("my/cars/metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    lines = [f"{i}.png,{i}" for i in range(10)]
    Path("my/digits/metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    for i in range(10):
        picture(Path(f"my/figures/{i}/a.png"), i)
    Path("my/prompts.txt").write_text("a red dress\na blue boot\na red dress\n")
    Path("my/figures/9/a.png").with_name("notes.pdf").write_bytes(b"x")
    return tmp_path


UNREAD = "of which no pixel is read"
FOUND = {
    "my/cats": f"8 files, {UNREAD}, 8 captions; 2 skipped: 4.png (no caption), 9.png (no caption)",
    "my/birds": f"10 files, {UNREAD}, 10 captions",
    "my/cars": f"10 files, {UNREAD}, 10 captions",
    "my/figures": f"10 files, {UNREAD}, 10 labels; 1 files of other kinds left out (.pdf)",
    "my/digits": f"10 files, {UNREAD}, 10 labels",
    "my/prompts.txt": "3 prompts, 2 of them different",
    "my/cats --data.limit 8": "8 files",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_finds_its_layout(command, own, capsys):
    assert main([*command.split(), "--dry_run"]) == 0
    out = capsys.readouterr().out
    source = next(s for s in sorted(FOUND, key=len, reverse=True) if s in command)
    counted = next(line for line in out.splitlines() if re.match(r"data: \d", line))
    assert counted.startswith(f"data: {FOUND[source]}")
    assert "nothing was started or written" in out
    assert sorted(p.name for p in own.iterdir()) == ["my"]


def test_the_page_has_every_layout_and_the_readme_two_of_its_commands():
    assert len(COMMANDS) == len(FOUND) == 7 and all(any(s in c for c in COMMANDS) for s in FOUND)
    short = re.findall(r"^python train\.py (--method .* my/.*?)(?: --dry_run.*)?$", README, re.M)
    assert len(short) == 2 and set(short) <= set(COMMANDS)


@pytest.mark.parametrize("flag", ["--data.images", "--data.prompts"])
@pytest.mark.parametrize("dry", [["--dry_run"], ["--output_dir", "run"]])
def test_what_is_not_there_ends_the_run_before_anything_is_loaded(flag, dry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgen.training.assembly.make_cast", None)
    method = "lcm" if flag == "--data.images" else "swiftbrush"
    assert main(["--method", method, "--teacher", "tinted-sd", flag, "my/nothing", *dry]) == 2
    err = capsys.readouterr().err
    assert flag[2:] in err and "my/nothing" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_pictures_without_captions_are_refused_by_a_dry_run_too(own, capsys):
    for file in Path("my/cats").glob("*.txt"):
        file.unlink()
    assert main(["--method", "lcm", "--teacher", "tinted-sd", "--data.images", "my/cats", "--dry_run"]) == 2
    assert "needs captions and the set has none" in capsys.readouterr().err


def test_the_python_of_the_page(monkeypatch):
    rows = [{"image": Image.new("RGB", (8, 8)), "text": "a cat"}]
    calls = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: rows))
    monkeypatch.setattr(fastgen, "distill", lambda **given: calls.append(given))
    exec(re.search(r"```python\n(.*?)```", SECTION, re.S)[1], {})
    assert [text for _, text in calls[0]["data"]()] == ["a cat"] and calls[0]["output_dir"] == "runs/mine"
