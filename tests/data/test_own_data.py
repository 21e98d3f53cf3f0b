"""docs/data.md, "Your own images and prompts": every command of the page runs (dry) on the layout it is about
and says what it found; the Python of the page makes a run's data.
"""

import json
import re
import shlex
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

import fastgen
from benchmarks.data import table
from fastgen.cli.train import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/data.md").read_text()
SECTION = PAGE.split("## Your own images and prompts")[1].split("\n## ")[0]
COMMANDS = re.findall(r"^python train\.py (.*)$", SECTION, re.M)
BIG = PAGE.split("## A million pictures")[1].split("\n## ")[0]
README = (ROOT / "README.md").read_text()


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
    rows = [f"cats/{i}.png,a cat {i}" for i in range(10)]
    Path("my/table.csv").write_text("\n".join(["image,caption", *rows]))
    Path("my/shots.csv").write_text("\n".join(["shot,words", *rows]))
    for s in range(2):
        with tarfile.open(f"my/train-00{s}.tar", "w") as tar:
            for i in range(5 * s, 5 * s + 5):
                tar.add(f"my/cats/{i}.png", f"{i:05d}.png")
                tar.add("my/prompts.txt", f"{i:05d}.txt")
    Path("my/figures/9/a.png").with_name("notes.pdf").write_bytes(b"x")
    return tmp_path


UNREAD = "of which no pixel is read"
FOUND = {
    "my/cats": f"8 files, {UNREAD}, 8 captions; 2 skipped: 4.png (no caption), 9.png (no caption)",
    "my/birds": f"10 files, {UNREAD}, 10 captions",
    "my/cars": f"10 files, {UNREAD}, 10 captions",
    "my/figures": f"10 files, {UNREAD}, 10 labels; 1 files of other kinds left out (.pdf)",
    "my/digits": f"10 files, {UNREAD}, 10 labels",
    "my/table.csv": f"10 files, {UNREAD}, 10 captions",
    "my/shots.csv": f"10 files, {UNREAD}, 10 captions",
    "my/train-*.tar": f"10 files, {UNREAD}, 10 captions",
    "my/saved": f"10 files, {UNREAD}, 10 captions",
    "OWNER/NAME": f"10 files, {UNREAD}, 10 captions",
    "my/prompts.txt": "3 prompts, 2 of them different",
    "my/cats --data.limit 8": "8 files",
}


def save_set(monkeypatch):
    """my/saved, and a hub that holds the same by the name of the page."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    pictures = [f"my/cats/{i}.png" for i in range(10)]
    one = datasets.Dataset.from_dict({"image": pictures, "text": [f"a cat {i}" for i in range(10)]})
    one = one.cast_column("image", datasets.Image())
    one.save_to_disk("my/saved")

    def load_dataset(name, split, download_config):
        assert (name, split, download_config.local_files_only) == ("OWNER/NAME", "train", False)
        return one

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_finds_its_layout(command, own, capsys, monkeypatch):
    if "--data.dataset" in command:
        save_set(monkeypatch)
    assert main([*shlex.split(command), "--dry_run"]) == 0
    out = capsys.readouterr().out
    source = next(s for s in sorted(FOUND, key=len, reverse=True) if s in command)
    counted = next(line for line in out.splitlines() if re.match(r"data: \d", line))
    assert counted.startswith(f"data: {FOUND[source]}")
    assert "nothing was started or written" in out
    assert sorted(p.name for p in own.iterdir()) == ["my"]


def test_the_page_has_every_layout_and_the_readme_two_of_its_commands():
    assert len(COMMANDS) == len(FOUND) == 12 and all(any(s in c for c in COMMANDS) for s in FOUND)
    short = re.findall(r"^python train\.py (--method .* my/.*?)(?: --dry_run.*)?$", README, re.M)
    assert len(short) == 2 and set(short) <= set(COMMANDS)


def test_latents_are_made_and_read_by_the_commands_of_the_page(own, capsys):
    from fastgen.cli.main import main as fastgen

    (made,) = re.findall(r"^fastgen (precompute .*)$", BIG, re.M)
    (train,) = [c for c in re.findall(r"^python train\.py (.*)$", BIG, re.M) if "latents" in c]
    assert fastgen(shlex.split(made)) == 0
    assert main([*shlex.split(train), "--dry_run"]) == 0
    assert "data: 8 encoded images in 1 shards, none of them decoded" in capsys.readouterr().out


def test_the_buckets_of_the_page_are_filled(own, capsys):
    (train,) = [c for c in re.findall(r"^python train\.py (.*)$", BIG, re.M) if "buckets" in c]
    assert main([*shlex.split(train), "--dry_run"]) == 2
    assert "data.buckets: no picture is of the shape of 64x96, 96x64" in capsys.readouterr().err
    for i, size in enumerate([(30, 20), (20, 30)]):
        Image.new("RGB", size).save(f"my/cats/{i}.png")
    assert main([*shlex.split(train), "--dry_run"]) == 0
    assert "6 of 64x64, 1 of 64x96, 1 of 96x64" in capsys.readouterr().out


def test_the_sources_of_the_page_are_mixed(own):
    from fastgen.config.run import validate
    from fastgen.data.sources import read_source
    from fastgen.networks.load import load_teacher

    data = yaml.safe_load(re.search(r"```yaml\n(.*?)```", SECTION, re.S)[1])["data"]
    cfg = validate({"objective": {"name": "sft"}, "data": {"name": "", **data}}).data
    found = read_source(cfg, load_teacher("assets:teachers/tinted-sd", weights=False).codec, "cpu", False)
    assert found.num == 18 and found.order.slots == [14, 4], "three quarters from the eight cats"


def test_the_measured_table_of_the_page_is_the_recorded_one():
    """200,000 pictures in less than 1.5 GB, the first step in 20 CPU seconds, hardly any wait for a batch."""
    found = json.loads((ROOT / "assets/results/benchmarks/data.json").read_text())
    assert PAGE.split("<!-- bench:begin -->\n")[1].split("\n<!-- bench:end -->")[0] == table(found)
    streamed = found["streamed"]
    assert found["num_images"] == 200_000 and streamed["peak_megabytes"] < 1500
    assert streamed["first_step_cpu_seconds"] < 20 and streamed["wait_share"] < 0.05


NOT_THERE = ["--data.images", "--data.table", "--data.shards", "--data.latents", "--data.prompts"]


@pytest.mark.parametrize("flag", NOT_THERE)
@pytest.mark.parametrize("dry", [["--dry_run"], ["--output_dir", "run"]])
def test_what_is_not_there_ends_the_run_before_anything_is_loaded(flag, dry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgen.training.assembly.make_cast", None)
    method = "swiftbrush" if flag == "--data.prompts" else "lcm"
    name = "my/nothing.csv" if flag == "--data.table" else "my/nothing-*.tar"
    name = name if flag in ("--data.table", "--data.shards") else "my/nothing"
    assert main(["--method", method, "--teacher", "tinted-sd", flag, name, *dry]) == 2
    err = capsys.readouterr().err
    assert flag[2:] in err and name in err and len(err.splitlines()) == 1
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
