"""Evidence and the tables built from it: the page follows the files, and notices when either side moves."""

import json

import pytest
import yaml
from PIL import Image

from eval import evidence, ladder, leaderboard, orderings, results_table
from eval.__main__ import main
from fastgen.config.run import RunConfig, dump, validate
from fastgen.core.errors import UserError


def results(fd: float, teacher: float = 3.0) -> dict:
    return {
        "teacher": {"nfe": 20, "fd_mini": teacher, "agreement": 0.95, "seconds_per_sample": 0.2},
        "student": {"nfe": 1, "fd_mini": fd, "agreement": 0.91, "recall": 0.5, "seconds_per_sample": 0.01},
        "untrained_student": {"nfe": 1, "fd_mini": 90.0, "seconds_per_sample": 0.01},
        "protocol": {"num_samples": 100, "teacher_samples": 100, "seed": 1},
        "train": {"seconds": 600.0, "steps": 10, "peak_rss_mb": 1.0},
    }


@pytest.fixture
def finished(tmp_path):
    """A run folder of a recipe, without the hour it takes."""

    def make(recipe: str, fd: float, **train):
        cfg = evidence.load_recipe(recipe)
        cfg = cfg.model_copy(update={"output_dir": "elsewhere", "train": cfg.train.model_copy(update=train)})
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.yaml").write_text(dump(cfg))
        (folder / "results.json").write_text(json.dumps(results(fd)))
        return folder

    return make


# -- the hash
def test_hash_ignores_place_threads_seed_and_switches_that_are_off():
    cfg = evidence.load_recipe("digits_dmd2")
    base = evidence.config_sha256(cfg)
    values = cfg.model_dump(mode="json")

    def changed(section: str, **new) -> str:
        return evidence.config_sha256(validate({**values, section: {**values[section], **new}}))

    assert evidence.config_sha256(validate({**values, "output_dir": "x"})) == base
    assert changed("train", seed=5, num_threads=3) == base
    assert changed("train", max_train_steps=7) != base
    assert changed("optim", student={**values["optim"]["student"], "lr": 1.0}) != base
    assert changed("objective", gan_weight=0.0) != base != changed("eval", num_samples=3)
    assert evidence._without_off({"a": {"b": 0, "c": None}, "d": [], "e": [0.0, 1]}) == {"e": [0.0, 1]}
    assert evidence.config_sha256(validate(yaml.safe_load(dump(cfg)))) == base


def test_an_ablation_is_a_recipe_and_a_change(finished, tmp_path):
    plain, changed = (evidence.load_recipe(n) for n in ("fashion_dmd2", "fashion_dmd2+score_alone"))
    assert evidence.differing(plain, changed)  # the change reaches the config ...
    assert changed.objective.gan_weight == 0 < plain.objective.gan_weight
    assert changed.optim == plain.optim  # ... and nothing else does
    name = "fashion_dmd2+score_alone"
    document = json.loads(evidence.record(finished(name, 9.0), name, None, tmp_path / "r").read_text())
    files = "configs/recipes/fashion_dmd2.yaml configs/ablations/score_alone.yaml"
    assert document["command"].endswith(files)
    with pytest.raises(UserError, match="score_aline.*did you mean"):
        evidence.load_recipe("fashion_dmd2+score_aline")


def test_record_writes_the_schema(finished, tmp_path):
    path = evidence.record(
        finished("digits_dmd2", 2.5, seed=2, num_threads=1), "digits_dmd2", 2, tmp_path / "r"
    )
    assert path == tmp_path / "r" / "digits" / "digits_dmd2-seed2.json"
    document = json.loads(path.read_text())
    assert (
        tuple(document) == evidence.KEYS and document["objective"] == "dmd2" and document["student"] == "full"
    )
    assert document["command"] == "python train.py --config configs/recipes/digits_dmd2.yaml --train.seed 2"
    assert document["config_sha256"] == evidence.config_sha256(evidence.load_recipe("digits_dmd2"))
    assert document["results"]["student"]["fd_mini"] == 2.5
    plain = evidence.record(finished("digits_dmd2", 2.5), "digits_dmd2", None, tmp_path / "r")
    assert plain.name == "digits_dmd2.json"


def test_record_refuses_another_run(finished, tmp_path):
    with pytest.raises(UserError, match="differs from digits_dmd2 in train.max_train_steps"):
        evidence.record(finished("digits_dmd2", 1.0, max_train_steps=3), "digits_dmd2", None, tmp_path)
    with pytest.raises(UserError, match="the run's own seed is 1"):
        evidence.record(finished("digits_dmd2", 1.0, seed=1), "digits_dmd2", 4, tmp_path)
    with pytest.raises(UserError, match="did you mean 'digits_dmd2'"):
        evidence.record(finished("digits_dmd2", 1.0), "digit_dmd2", None, tmp_path)
    with pytest.raises(UserError, match=r"results.json does not exist|config.yaml does not exist"):
        evidence.record(tmp_path / "none", "digits_dmd2", None, tmp_path)


# -- the tables
def test_tables_follow_the_evidence(finished, tmp_path):
    store, readme = tmp_path / "store", tmp_path / "README.md"
    for seed, fd in ((0, 2.0), (1, 3.0)):
        evidence.record(finished("digits_dmd2", fd, seed=seed), "digits_dmd2", seed, store)
    readme.write_text("before\n" + leaderboard.SKELETON + "after\n")
    assert leaderboard.leaderboard(True, readme, store, guide=None, configs=None, picture=None)
    assert leaderboard.leaderboard(False, readme, store, guide=None, configs=None, picture=None) == []
    assert leaderboard.leaderboard(True, readme, store, guide=None, configs=None, picture=None) == []
    text = readme.read_text()
    assert text.startswith("before\n# Objectives") and text.endswith("after\n")
    row = next(line for line in text.splitlines() if line.startswith("| `digits_dmd2`"))
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert cells[:7] == ["`digits_dmd2`", "dmd2", "full", "1", "2.5 +- 0.71", "3 (20)", "0.83 +- 0.24"]
    assert cells[7:] == ["90", "91.0 of 95.0", "0.50", "", "100", "2", "10", "1800", "77"]
    assert "digits 2.5 at NFE 1, teacher 3" in text  # the mean over its seeds

    file = store / "digits" / "digits_dmd2.json"
    document = json.loads(file.read_text())
    document["results"]["student"]["fd_mini"] = 1.9
    file.write_text(json.dumps(document))
    assert (
        "differs from the evidence"
        in leaderboard.leaderboard(True, readme, store, guide=None, configs=None, picture=None)[0]
    )
    document["results"]["student"]["fd_mini"] = 2.0
    file.write_text(json.dumps({**document, "config_sha256": "0"}))
    assert (
        "has changed since; run it again"
        in leaderboard.leaderboard(True, readme, store, guide=None, configs=None, picture=None)[0]
    )
    file.write_text(json.dumps({**document, "recipe": "gone"}))
    assert (
        "no 'gone'" in leaderboard.leaderboard(True, readme, store, guide=None, configs=None, picture=None)[0]
    )
    del document["seed"]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="lacks seed"):
        leaderboard.leaderboard(True, readme, store, guide=None, configs=None, picture=None)


def test_a_row_for_every_step_count():
    found = results(4.0)
    found["student_by_steps"] = {"1": {"nfe": 1, "fd_mini": 4.0}, "4": {"nfe": 4, "fd_mini": 2.0}}
    document = {
        "teacher": "t",
        "recipe": "r",
        "objective": "dmd2",
        "student": "lora",
        "seed": 0,
        "results": found,
    }
    rows = [line for line in results_table.measured([document]).splitlines() if line.startswith("| `r`")]
    assert [row.split("|")[4].strip() for row in rows] == ["1", "4"]
    assert [row.split("|")[7].strip() for row in rows] == ["1.33", "0.67"]
    trained = {**found, "teacher": None}
    trained.pop("teacher")
    assert "| 4 |" in results_table.measured([{**document, "results": trained}])


def test_real_images_agreement_is_that_of_the_largest_count():
    few, many = (
        {**results(4.0), "floor": {"agreement": a}, "protocol": {"num_samples": n}}
        for a, n in ((0.9, 10), (0.925, 1000))
    )
    about = {"teacher": "t", "objective": "dmd2", "student": "lora", "seed": 0}
    documents = [{**about, "recipe": f"r{i}", "results": r} for i, r in enumerate((few, many))]
    assert "real images with their own labels: 92.5 %" in results_table.measured(documents)
    without = [{**about, "recipe": "r", "results": results(4.0)}]
    assert "their own labels" not in results_table.measured(without)


def test_the_ratio_is_to_a_teacher_of_as_many_samples():
    """Its own teacher was measured on fewer, which enlarges it: another run's is taken, or a mark set."""
    few = {
        "recipe": "a",
        "objective": "dmd2",
        "teacher": "digits",
        "student": "full",
        "results": results(2.0),
    }
    few["results"]["teacher"]["fd_mini"] = 8.0
    few["results"]["protocol"]["teacher_samples"] = 50
    fair = {**few, "recipe": "b", "results": results(3.0, 4.0)}
    other = {**fair, "recipe": "c", "results": results(3.0, 5.0)}
    other["results"]["protocol"]["seed"] = 2

    def row(*documents) -> str:
        return next(line for line in results_table.measured(list(documents)).splitlines() if "| `a`" in line)

    assert "| 8 (20) | ~0.25 |" in row(few) and "| 8 (20) | ~0.25 |" in row(few, other)
    assert "| 4 (20) | 0.50 |" in row(few, fair, other)
    assert ladder._best("dmd2", [few]).startswith("0.25")
    assert ladder._best("dmd2", [few, fair]).startswith("0.50")


def test_a_method_is_credited_with_the_recipes_that_end_in_it():
    def document(recipe, objective, value, teacher="digits"):
        return {"recipe": recipe, "objective": objective, "teacher": teacher, "results": results(value)}

    own, stages = document("a", "vsd", 4.0), document("b", "vsd+sds", 3.0)
    variant, elsewhere = document("b+no_geometry", "vsd", 2.0), document("c", "vsd+sds", 5.0, "fashion")
    shown = ladder._p3("vsd", [own, stages, variant, elsewhere])
    assert shown.startswith("digits 4 at NFE 1") and "; fashion 5 at NFE 1" in shown
    assert ladder._p3("vsd", [stages, variant]).startswith("digits 2 ")
    assert ladder._p3("sds", [own, stages]).startswith("digits 3 ")


def test_the_methods_of_a_run_end_with_that_of_its_last_stage():
    assert evidence.methods_of(evidence.load_recipe("solids-sd_vsd_stages")) == "sds+vsd"


def test_ladder_reads_the_tests_that_exist(tmp_path):
    (tmp_path / "objectives").mkdir()
    own = "import pytest\ndef test_p1_a(): ...\n@pytest.mark.skip\ndef test_p2_b(): ...\n"
    own += "def helper_p4_x(): ...\n"
    (tmp_path / "objectives" / "test_dmd2.py").write_text(own)
    where = ladder.proofs("dmd2", tmp_path)
    assert where == {"P1": "objectives/test_dmd2.py", "P2": "", "P4": ""}
    (tmp_path / "test_export.py").write_text("def test_p4_dmd2_full(): ...\ndef test_p4_sft(): ...\n")
    assert ladder.proofs("dmd2", tmp_path)["P4"] == "test_export.py"
    assert ladder.proofs("consistency", tmp_path) == {"P1": "", "P2": "", "P4": ""}
    row = next(line for line in ladder.ladder([], tmp_path).splitlines() if "`dmd2`" in line)
    assert "[2405.14867](https://arxiv.org/abs/2405.14867)" in row
    assert row.count("[tested](../../tests/") == 2


def test_the_repository_is_up_to_date():
    assert leaderboard.leaderboard(check=True) == []


def test_the_guide_names_needs_costs_and_the_best_ratio():
    document = {
        "teacher": "digits",
        "recipe": "r",
        "objective": "ode_pairs+dmd2",
        "results": results(2.0, 4.0),
    }
    rows = {line.split("`")[1]: line for line in ladder.choice([document]).splitlines() if "`" in line}
    assert set(rows) >= {"dmd2", "boot", "ode_pairs"} and rows["sft"].endswith("| - |")
    assert "| yes | student, critic, disc |" in rows["dmd2"] and "| no | student |" in rows["boot"]
    assert "0.50 at 1 (digits)" in rows["dmd2"] and "0.50 at 1 (digits)" in rows["ode_pairs"]


def test_orderings_say_what_the_seeds_say():
    def document(recipe, seed, fd, four):
        found = {"student": {"nfe": 1, "fd_mini": fd}, "student_by_steps": {"4": {"nfe": 4, "fd_mini": four}}}
        return {"recipe": recipe, "seed": seed, "results": found}

    documents = [document("a", i, 1.0 + i / 10, 5.0) for i in range(3)]
    documents += [document("b", i, 2.0 + i / 10, 4.0) for i in range(3)] + [document("c", 0, 1.15, 4.0)]
    claim = {"claim": "a beats b", "paper": "2405.14867", "better": "a", "worse": "b"}
    row = orderings.rows(documents, [claim])[0]
    assert row[2:4] == ["`a` 1.1 +- 0.1", "`b` 2.1 +- 0.1"] and row[5:] == ["3/3", "holds"]
    assert orderings.rows(documents, [claim | {"steps": 4}])[0][-1] == "**does not hold**"
    assert orderings.rows(documents, [claim | {"worse": "c"}])[0][-1] == "within the spread"
    assert orderings.rows(documents, [claim | {"worse": "d"}])[0][-1] == "not run yet"
    assert orderings.verdict([1.0, 1.4], [1.3, 1.4], False) == "within the spread"
    assert orderings.verdict([0.9, 0.91], [0.5, 0.51], True) == "holds"
    assert orderings.verdict([1.0, 1.4], [1.3], False) == "within the spread", "the side that has one counts"
    assert orderings.verdict([1.0, 1.1], [1.3], False) == "holds, one seed"
    curves = [
        {"recipe": r, "results": {"curve": c}}
        for r, c in (("a", {"0": 9, "50": 2.5, "100": 3}), ("b", {"0": 9}))
    ]
    curves.append({"recipe": "b", "results": {"curve": {"0": 9, "200": 2}}})
    row = orderings.rows(curves, [claim | {"reach": 3.0}])[0]
    assert row[2:4] == ["`a` 50", "`b` never in 1 of 2 seeds"] and row[5:] == ["1/2", "holds, one seed"]
    backward = claim | {"reach": 3.0, "better": "b", "worse": "a"}
    assert orderings.rows(curves, [backward])[0][-1] == "**does not hold**"
    row = orderings.rows(curves, [claim | {"steadier": True}])[0]
    assert row[2:4] == ["`a` 0.5", "`b` 0"]  # the largest rise above the best before it
    assert orderings.drifts([*curves, document("c", 0, 1.0, 1.0)]) == [
        ["`a`", "50 of 100", "2.5", "3", "1.20"],
        ["`b`", "0 of 0, 200 of 200", "5.5 +- 4.9", "5.5 +- 4.9", "1.00"],
    ]
    close, full = [1.05, 1.06], [1.0, 1.01]
    assert orderings.verdict(close, full, False) == "**does not hold**"
    assert orderings.verdict(close, full, False, within=0.1) == "holds"
    assert orderings.verdict([1.2, 1.21], full, False, within=0.1) == "**does not hold**"


def test_unequal_sample_counts_are_compared_through_the_teacher():
    def document(recipe, num, fd, teacher):
        protocol = {"num_samples": num, "teacher_samples": num}
        found = {"student": {"nfe": 1, "fd_mini": fd}, "teacher": {"fd_mini": teacher}, "protocol": protocol}
        return {"teacher": "t", "recipe": recipe, "results": found}

    claim = {"claim": "few", "paper": "2405.14867", "better": "few", "worse": "many"}
    few, many = document("few", 500, 6.0, 4.0), document("many", 1000, 5.0, 2.5)
    row = orderings.rows([few, many], [claim])[0]
    assert row[2:5] == ["`few` 1.5", "`many` 2", "fd_mini of teacher"] and row[-1] == "holds, one seed"
    many["results"]["protocol"]["teacher_samples"] = 500  # negative: its teacher is no scale
    assert orderings.rows([few, many], [claim])[0][-1] == "not run yet"
    many["results"]["protocol"]["num_samples"] = 500  # as many: the distances themselves
    assert orderings.rows([few, many], [claim])[0][-1] == "**does not hold**"


def test_every_claim_is_about_recipes_that_exist():
    for claim in orderings.load_claims():
        for side in ("better", "worse"):
            assert evidence.load_recipe(claim[side])


def test_missing_markers_are_named():
    with pytest.raises(UserError, match="ladder:begin"):
        leaderboard.render("no markers", [])


# -- the command line
def test_command_line_mistakes(capsys, tmp_path):
    pictures, prompts = tmp_path / "pictures", tmp_path / "a.txt"
    pictures.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png")
    prompts.write_text("0\n1\n")
    two = ["--images", str(pictures)]
    for argv, message in (
        ([], "either --run DIR or --images SOURCE"),
        (["--run", str(tmp_path)], "is not a run folder"),
        (["--images", str(tmp_path), "--against", "digits"], "holds no images"),
        (["--images", "none", "--against", "digits"], "is not a folder"),
        ([*two, "--metrics", "clip"], "--prompts: none given"),
        ([*two, "--metrics", "clip", "--prompts", str(prompts)], "--weights: none given for clip"),
        (two, "--against: none given"),
        (
            [*two, "--against", str(pictures), "--metrics", "fid", "--weights", "inception="],
            "--weights: found 'inception'",
        ),
        (["record", "--run", "x"], "needs --run DIR and --recipe NAME"),
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, (argv, error)


def test_defaults_of_a_run_are_hashable():
    assert len(evidence.config_sha256(RunConfig(objective={"name": "dmd2"}))) == 64
