"""configs/: names that say what a recipe does, a catalogue that is whole, and resolved configs that can be
compared across revisions.
"""

import re
import subprocess

import pytest
import yaml

from eval import catalogue, evidence, resolved
from eval.__main__ import main
from fastgen.core.errors import UserError
from fastgen.core.paths import PACKAGE

ROOT = PACKAGE.parent
RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))


# -- names
@pytest.mark.parametrize("name", [f.stem for f in RECIPES if f.stem not in catalogue.UNNAMED])
def test_a_recipe_is_named_after_what_it_does(name):
    assert catalogue.misnamed(name, evidence.load_recipe(name)) == []


def test_names_are_taken_apart():
    assert catalogue.parse_name("tinted-sd_sana_sprint_lora") == ("tinted-sd", "sana_sprint", ("lora",))
    assert catalogue.parse_name("digits_sid") == ("digits", "sid", ())
    assert catalogue.parse_name("fashion_dmd2_4step_lora") == ("fashion", "dmd2", ("4step", "lora"))
    with pytest.raises(UserError, match="its name has no method; call it <teacher>_<method>"):
        catalogue.parse_name("digits_dmd3")
    with pytest.raises(UserError, match=r"unknown variant 'ful' \(did you mean 'full'\?\)"):
        catalogue.parse_name("tinted-sd_lcm_ful")
    with pytest.raises(UserError, match="has no method"):
        catalogue.parse_name("tinted-sd_lcm-full")


def test_a_wrong_name_is_noticed():
    cfg = evidence.load_recipe("tinted-sd_lcm")  # a LoRA in four steps
    assert catalogue.misnamed("digits_lcm", cfg) == ["digits_lcm distils tinted-sd"]
    assert catalogue.misnamed("tinted-sd_pcm", cfg) == ["tinted-sd_pcm ends with lcm"]
    full = "tinted-sd_lcm_full"
    assert catalogue.misnamed(full, cfg) == [f"{full} is not of the variant full"]
    assert catalogue.misnamed("tinted-sd_lcm_8step", cfg) == [
        "tinted-sd_lcm_8step is not of the variant 8step"
    ]
    assert catalogue.misnamed("tinted-sd_lcm_4step_lora", cfg) == []


def test_full_and_lora_differ_from_the_plain_recipe():
    """A variant of the student's kind only where the recipe without the word has the other kind."""
    words = {"full": "lora", "lora": "full"}
    found = [f.stem.rpartition("_") for f in RECIPES if f.stem.rpartition("_")[2] in words]
    assert found
    for plain, _, word in found:
        assert evidence.load_recipe(plain).student.kind == words[word], plain


def test_evidence_follows_the_names():
    documents = evidence.read_all()
    for document in documents:
        recipe, *more = document["recipe"].split("+")
        files = [f"configs/recipes/{recipe}.yaml", *(f"configs/ablations/{m}.yaml" for m in more)]
        assert " ".join(files) in document["command"], document["file"]
        suffix = f"-seed{document['seed']}" if document["seed"] else ""
        assert document["file"] == f"{document['teacher']}/{document['recipe']}{suffix}.json"
    assert {f.stem for f in RECIPES} <= {d["recipe"] for d in documents}, "every recipe was run"
    assert evidence.outdated(documents) == [], "and means what it meant when it was run"


# -- the page
def test_the_page_names_every_config_and_every_link_leads_somewhere():
    text = catalogue.PAGE.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("https:")]
    for link in links:
        assert (catalogue.PAGE.parent / link).exists(), link
    for kind in ("recipes", "bases", "teachers", "objectives", "ablations"):
        for file in (ROOT / "configs" / kind).glob("*.yaml"):
            assert f"{kind}/{file.name}" in links, file.name


def test_a_row_has_method_student_steps_and_result():
    text = catalogue.recipes(evidence.read_all())
    row = next(line for line in text.splitlines() if "recipes/tinted-sd_dmd2_hyper.yaml" in line)
    assert "| dmd2 | lora | 1 |" in row and "3 seeds" in row
    assert "none yet |" in catalogue.recipes([]), "without evidence there is no result"


def test_commands_on_real_teachers_are_in_the_page_and_not_in_comments():
    for file in (ROOT / "configs/teachers").glob("*.yaml"):
        assert "train.py" not in file.read_text(), file.name
    text = catalogue.PAGE.read_text()
    command = next(line for line in text.splitlines() if "--data.prompts FILE" in line)
    for path in re.findall(r"configs/\S+\.yaml", command):
        assert (ROOT / path).is_file(), path


# -- resolved configs across revisions
def write(folder, **texts):
    for name, text in texts.items():
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        (folder / "recipes" / f"{name}.yaml").write_text(text)
    return resolved.resolved(folder)


def test_the_same_config_in_other_words_is_the_same(tmp_path):
    toy = "teacher: {path: 'analytic:gmm2d-flow'}\nobjective: {name: sid, alpha: %s}\ntrain: {seed: %d}\n"
    old = write(tmp_path / "old", a=toy % (1.0, 0), b=toy % (1.0, 1), c=toy % (1.1, 2))
    on = "base: a.yaml\ntrain: {seed: 1}\noutput_dir: x"
    new = write(tmp_path / "new", a=toy % (1.0, 0), b=on, d=toy % (1.1, 2))
    assert resolved.changes(old, new) == (["recipes/c is now recipes/d"], [])
    other = write(tmp_path / "other", a=toy % (1.2, 0), b=toy % (1.0, 1), e=toy % (1.3, 2))
    renamed, changed = resolved.changes(old, other)
    assert renamed == []
    assert changed == ["recipes/a differs in objective.alpha", "recipes/c is gone", "recipes/e is new"]


def test_a_revision_is_read_from_git(tmp_path, capsys):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=tmp_path, check=True)

    toy = "teacher: {path: 'analytic:gmm2d-flow'}\nobjective: {name: sid}\n"
    write(tmp_path / "configs", a=toy)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    assert resolved.since("HEAD", tmp_path) == (1, [], [])
    write(tmp_path / "configs", a=toy + "train: {seed: 3}\n")
    assert resolved.since("HEAD", tmp_path) == (1, [], ["recipes/a differs in train.seed"])
    file = tmp_path / "configs/recipes/a.yaml"  # a key of then that is none today
    file.write_text(toy.replace("sid", "sid, omega: 2"))
    git("commit", "-qam", "two")
    file.write_text(toy)
    count, renamed, changed = resolved.since("HEAD", tmp_path)
    assert (count, renamed, len(changed)) == (1, [], 1) and "recipes/a was written otherwise" in changed[0]
    assert "objective.omega: unknown key" in changed[0]
    with pytest.raises(UserError, match="--since: none cannot be read"):
        resolved.since("none", tmp_path)
    assert main(["resolved", "--since", "no-such-revision"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_claims_and_bases_are_yaml_with_a_header():
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert file.read_text().startswith("# ") and yaml.safe_load(file.read_text()), file.name
