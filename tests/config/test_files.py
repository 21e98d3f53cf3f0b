"""Config files: a base key, mistakes in it, and the run folder that follows from the names of the files."""

from pathlib import Path

import pytest
import yaml

from fastgen.cli.train import main
from fastgen.config.parse import merge, read_files
from fastgen.config.run import load, validate
from fastgen.core.errors import UserError
from fastgen.core.paths import config

TOY = "teacher: {path: 'analytic:gmm2d-flow'}\nobjective: {name: dmd2, gan_weight: 0.0}\n"


@pytest.fixture
def write(tmp_path):
    """Writes files below a folder; gives the path of the last."""

    def make(**texts: str) -> str:
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return str(path)

    return make


# -- what a base gives
def test_a_file_changes_the_base_that_it_names_beside_itself(write, tmp_path, monkeypatch):
    file = write(
        bases__common="train: {seed: 3, log_steps: 7}\noptim: {student: {betas: [0.5, 0.9], clip: 2.0}}",
        recipes__own="base: ../bases/common.yaml\ntrain: {seed: 4}\noptim: {student: {betas: [0.1, 0.2]}}",
    )
    monkeypatch.chdir(tmp_path.parent)  # the path is relative to the file, not to where the command runs
    found = read_files([file])
    assert found == {
        "train": {"seed": 4, "log_steps": 7},
        "optim": {"student": {"betas": [0.1, 0.2], "clip": 2.0}},
    }
    assert "base" not in found


def test_bases_of_bases_and_lists_of_bases_merge_in_order(write):
    file = write(
        ground="train: {seed: 1, log_steps: 1, num_threads: 1, train_batch_size: 1}",
        left="base: ground.yaml\ntrain: {seed: 2, log_steps: 2}",
        right="base: ground.yaml\ntrain: {log_steps: 3, num_threads: 3}",
        top="base: [left.yaml, right.yaml]\ntrain: {num_threads: 4}",
    )
    # right comes after left, and brings what it stands on with it: its ground sets the seed back to 1
    assert read_files([file])["train"] == {
        "seed": 1,
        "log_steps": 3,
        "num_threads": 4,
        "train_batch_size": 1,
    }


def test_files_of_the_command_line_merge_after_their_bases(write):
    one = write(ground="train: {seed: 1, log_steps: 1}", one="base: ground.yaml\ntrain: {seed: 2}")
    two = write(two="train: {seed: 5}")
    assert read_files([one, two])["train"] == {"seed": 5, "log_steps": 1}
    assert read_files([two, one])["train"] == {"seed": 2, "log_steps": 1}
    assert read_files([one, two]) == merge(read_files([one]), read_files([two]))


def test_another_objective_replaces_that_of_the_base(write):
    file = write(
        ground="objective: {name: dmd2, gan_weight: 0.5}", own="base: ground.yaml\nobjective: {name: sid}"
    )
    assert read_files([file]) == {"objective": {"name": "sid"}}
    same = write(own="base: ground.yaml\nobjective: {student_every: 2}")
    assert read_files([same])["objective"] == {"name": "dmd2", "gan_weight": 0.5, "student_every": 2}


def test_an_item_of_a_list_is_changed_or_left_out_by_its_number(write, capsys):
    stages = ", ".join(f"{{name: {n}, objective: {{name: dmd2, gan_weight: 0.0}}}}" for n in "abc")
    base = write(base="teacher: {path: 'analytic:gmm2d-flow'}\nstages: [" + stages + "]")
    names = lambda change: [  # noqa: E731
        (s.name, s.max_train_steps) for s in load([base, write(change=f"stages: {change}")], []).stages
    ]
    assert names("{1: null}") == [("a", 100), ("c", 100)]
    assert names("{0: null, 2: {max_train_steps: 9}}") == [("b", 100), ("c", 9)]
    assert main(["--config", base, write(change="stages: {3: null}"), "--dry_run"]) == 2, "there is no fourth"
    said = capsys.readouterr().err
    assert "stages.3: " in said and "found None" in said and said.count("\n") == 1


def test_a_file_anywhere_stands_on_a_bundled_config(write):
    file = write(own="base: configs:recipes/digits_dmd2.yaml\ntrain: {seed: 9}")
    bundled = load([str(config("recipes/digits_dmd2.yaml"))], [])
    own = load([file], [])
    assert own.train.seed == 9 and own.objective == bundled.objective and own.teacher == bundled.teacher
    assert load(["configs:recipes/digits_dmd2.yaml"], []) == bundled


def test_bundled_bases_stay_inside_configs():
    """An installed wheel holds configs/ and nothing around it."""
    root = config("").resolve()
    named = 0
    for file in root.rglob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        bases = values.get("base", []) if isinstance(values, dict) else []
        for base in [bases] if isinstance(bases, str) else bases:
            assert (file.parent / base).resolve().is_relative_to(root), file
            named += 1
    assert named > 100


# -- mistakes, each in one line
@pytest.mark.parametrize(
    "texts, message",
    [
        ({"a": "base: none.yaml"}, r"base: .*none.yaml \(the base of .*a.yaml\) does not exist; give the "),
        ({"a": "base: a.yaml"}, r"base: a.yaml -> a.yaml is a circle; remove one of these base keys"),
        (
            {"c": "base: b.yaml", "b": "base: a.yaml", "a": "base: c.yaml"},
            r"base: a.yaml -> c.yaml -> b.yaml -> a.yaml is a circle",
        ),
        ({"a": "base: 3"}, r"base: .*a.yaml has 3; give the path of one YAML file, or a list of paths"),
        ({"a": "base: {b.yaml: 1}"}, r"base: .*a.yaml has \{'b.yaml': 1\}; give the path"),
        ({"a": "base: [b.yaml, null]"}, r"base: .*a.yaml has \['b.yaml', None\]; give the path"),
        ({"a": "base:"}, r"base: .*a.yaml has None; give the path"),
        ({"a": "base: .."}, r"base: .*a.yaml has '\.\.'; give the path of a .yaml file"),
        ({"b": "[1]", "a": "base: b.yaml"}, r"base: .*b.yaml holds a list; expected a mapping of sections"),
        ({"b": "{", "a": "base: b.yaml"}, r"base: .*b.yaml is not valid YAML"),
        (
            {"a": "base: configs:bases/tinted-sdd.yaml"},
            r"base: configs:bases/tinted-sdd.yaml \(the base of .*a.yaml\) is no bundled config "
            r"\(did you mean 'configs:bases/tinted-sd.yaml'\?\); name a file of ",
        ),
        ({"a": "base: configs:../train.py"}, r"base: configs:../train.py .* is no bundled config"),
        ({"a": "train: {base: b.yaml}"}, r"config: train.base: unknown key"),
    ],
)  # fmt: skip
def test_a_bad_base_is_one_line(write, texts, message):
    file = write(**texts)
    with pytest.raises(UserError, match=message) as error:
        load([file], ["--objective.name", "dmd2"])
    assert "\n" not in str(error.value)


def test_a_base_is_a_yaml_file(write, tmp_path):
    (tmp_path / "notes.txt").write_text("train: {seed: 1}")
    with pytest.raises(UserError, match="base: .*a.yaml has 'notes.txt'; give the path of a .yaml file"):
        read_files([write(a="base: notes.txt")])


def test_a_bundled_name_that_is_none_exits_with_two(capsys):
    assert main(["--config", "configs:recipes/digit_dmd2.yaml", "--dry_run"]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'configs:recipes/digits_dmd2.yaml'?" in message and message.count("\n") == 1


# -- the run folder
def test_the_run_folder_follows_from_the_files(write):
    one, two = write(one=TOY), write(more="train: {seed: 1}")
    assert load([one], []).output_dir == "runs/one"
    assert load([one, two], []).output_dir == "runs/one+more"
    assert load([one, two], ["--output_dir", "elsewhere"]).output_dir == "elsewhere"
    own = write(own="base: one.yaml\noutput_dir: runs/mine")
    assert load([own, two], []).output_dir == "runs/mine"
    above = write(above="base: one.yaml")  # a base gives its settings, not its name
    assert load([above], []).output_dir == "runs/above"
    assert load(["configs:recipes/quickstart.yaml"], []).output_dir == "runs/quickstart"


def test_no_bundled_config_names_its_run_folder():
    for file in config("").rglob("*.yaml"):
        assert "output_dir" not in yaml.safe_load(file.read_text()), file


def test_the_resolved_config_records_the_run_folder(write, capsys):
    file = write(toy=TOY)
    assert main(["--config", file, "--dry_run"]) == 0
    text = capsys.readouterr().out
    resolved = yaml.safe_load(text[: text.index("\nrun  ")])
    assert resolved["output_dir"] == "runs/toy" and "base" not in resolved


def test_the_students_that_recipes_start_from_are_where_recipes_put_them():
    """student.init and student.fuse name run folders: those of other recipes, with a change or without."""
    found = set()
    for file in config("recipes").glob("*.yaml"):
        student = load([str(file)], []).student
        found |= {Path(p).parts[:3] for p in (student.init, student.fuse) if p}
    assert found
    for runs, name, export in found:
        recipe, *more = name.split("+")
        files = [config(f"recipes/{recipe}.yaml"), *(config(f"ablations/{m}.yaml") for m in more)]
        assert load([str(f) for f in files], []).output_dir == f"{runs}/{name}" and export == "export"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optim": {"student": {"lr": True}}}, "optim.student.lr: found true; give a number"),
        ({"eval": {"num_samples": False}}, "eval.num_samples: found false"),
        ({"train": {"ema_decay": [True]}}, "train.ema_decay"),
        (
            {"stages": [{"name": "one", "objective": {"name": "dmd2"}, "max_train_steps": True}]},
            "stages.0.max_train_steps: found true",
        ),
    ],
)
def test_yes_and_no_are_no_numbers(values, said):
    """YAML reads `lr: yes` as true, which Python takes for 1."""
    with pytest.raises(UserError, match=said):
        validate({"objective": {"name": "dmd2"}, **values} if "stages" not in values else values)


def test_a_switch_may_be_a_switch():
    """A key that is a switch or a word is given as either."""
    kept = validate({"objective": {"name": "dmd2"}, "train": {"gradient_checkpointing": True}})
    assert kept.train.gradient_checkpointing is True
