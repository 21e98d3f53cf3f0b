"""The studies of docs/methods.md: their tables follow from what was recorded, and other runs are refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from eval import diversity, forgetting, frontier, studies, transfer
from eval.__main__ import main
from fastgen.core.errors import UserError
from fastgen.core.paths import asset
from fastgen.data.bundled import VOCABULARY, all_captions
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.networks.codecs import LabelCodec


def document(recipe, forgotten, seed=0):
    student = {"forgotten": forgotten, "fd_mini": 2.0, "retained_accuracy": 0.9, "unlearning_h": 0.95}
    results = {"student": student, "teacher": {"forgotten": 0.99}}
    return {"recipe": recipe, "seed": seed, "results": results}


def test_the_table_of_forgetting_has_what_forgets_alone():
    documents = [document("a_sfd", 0.01), document("a_sfd", 0.03, 1), {"recipe": "b", "results": {}}]
    text = studies.forgetting(documents)
    assert "| `a_sfd` | 2.0 +- 1.4 | 99.0 | 2 | 90.0 | 0.950 | 2 |" in text and "`b`" not in text
    assert studies.forgetting(documents[2:]) == "No evidence yet."


def test_the_table_of_stages_follows_what_was_validated():
    row = {
        "fvd_mini": 28.0,
        "fd_mini": 24.0,
        "agreement": 0.3,
        "agreement_colour": 1.0,
        "dynamic_degree": 0.7,
    }
    start = {**row, "agreement_motion": 0.6, "stage": "start", "objective": "", "step": 0}
    ends = [start, {**start, "fvd_mini": 25.5, "stage": "a", "objective": "tscd", "step": 60}]
    results = {"teacher": {**row, "agreement_motion": 0.72, "fvd_mini": 21.6}, "stages": ends}
    text = studies.stages([{"recipe": "a_b", "seed": 0, "results": results}])
    assert "| `a_b` | before | 0 | 28 | 24 | 30.0 | 100.0 | 60.0 | 0.70 |" in text
    assert "| `a_b` | after `tscd` | 60 | 25.5 |" in text and "| the teacher |  | 21.6 |" in text
    assert studies.stages([{"recipe": "a_b", "seed": 0, "results": {}}]) == "No evidence yet."


def test_tables_of_studies_follow_their_files(tmp_path):
    row = {
        "nfe": 5,
        "seconds_per_sample": 0.03,
        "distance": 1.5,
        "vendi": 2.25,
        "fd_mini": 4.0,
        "agreement": 0.9,
    }
    alone = row | {"nfe": 4, "seconds_per_sample": 0.02}
    about = {"model": "m", "images": 90, "captions": 9, "contenders": {"student": alone, "hybrid": row}}
    rates = {"base alone": {"0": {"coloured": 0.2, "otherwise_as_asked": 0.5}}}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/diversity_m.json").write_text(json.dumps(about))
    moved = {"model": "m", "colour": "purple", "images": 120, "rates": rates}
    (tmp_path / "benchmarks/transfer_m.json").write_text(json.dumps(moved))
    assert "| hybrid | 5 | 1.50 | 1.500 | 2.25 | 4 | 90.0 |" in studies.diversity([], tmp_path)
    assert "| base alone | 20 (50) |" in studies.transfer([], tmp_path)
    assert studies.diversity([], tmp_path / "none") == "No study yet."


def test_the_table_of_the_frontier_has_every_contender(tmp_path):
    row = {"nfe": 1, "psnr": 24.5, "ssim": 0.75, "perceptual": 0.21, "fd_mini": 4.5, "variance": 0.98}
    about = {"model": "m", "images": 90, "set": "tinted", "factor": 4}
    (tmp_path / "benchmarks").mkdir()
    document = {**about, "contenders": {"bicubic": row | {"nfe": 0, "agreement": 0.5}}}
    (tmp_path / "benchmarks/frontier_m.json").write_text(json.dumps(document))
    text = studies.frontier([], tmp_path)
    assert (
        "| bicubic | 0 | 24.50 | 0.750 | 0.210 | 4.5 | 0.980 | 50.0 |" in text and "enlarged 4 times" in text
    )
    assert studies.frontier([], tmp_path / "none") == "No study yet."


def test_scores_of_the_frontier_know_an_original_from_a_copy_without_detail():
    originals = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = {k: torch.zeros(40, dtype=torch.long) for k in VOCABULARY}
    measurer = Measurer("tinted")
    same = frontier.scores(measurer, originals, originals, wanted)
    soft = torch.nn.functional.avg_pool2d(originals, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = frontier.scores(measurer, soft, originals, wanted)
    assert same["perceptual"] < 1e-6 and same["variance"] == pytest.approx(1)
    assert found["perceptual"] > 0.05 and found["variance"] < 0.3 and found["psnr"] < same["psnr"]


def test_scores_count_variety_within_a_caption():
    """Copies of one image have no distance and one effective image; ten different ones more of both."""
    wanted = {k: torch.zeros(20, dtype=torch.long) for k in VOCABULARY}
    images = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    measurer = Measurer("tinted")
    copies = diversity.scores(measurer, images[:2].repeat_interleave(10, 0), wanted)
    others = diversity.scores(measurer, images.repeat(2, 1, 1, 1), wanted)
    assert copies["distance"] < 1e-4 and copies["vendi"] == pytest.approx(1, abs=1e-3)
    assert others["distance"] > 0.1 and others["vendi"] > 1.001


def test_conditions_before_and_after_are_forgotten_and_kept_ones():
    codec = LabelCodec((1,), num_classes=10)
    rows = forgetting.conditions(codec, ("3", "7"))["class_labels"]
    assert set(rows[:6].tolist()) == {3, 7} and not {3, 7} & set(rows[6:].tolist()) and len(rows) == 12


def test_pictures_of_one_colour_do_not_name_it(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PICTURES", 5)
    folder = transfer.pictures(tmp_path / "p")
    lines = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 5 == len(list(folder.glob("*.png"))) and "purple" not in " ".join(lines)
    assert any(line.replace("a ", "a purple ", 1) in all_captions() for line in lines)


@pytest.mark.parametrize("command", ["diversity", "transfer", "forgetting", "frontier"])
def test_other_runs_are_refused(command, capsys):
    assert main([command]) == 2 and "--run: none given" in capsys.readouterr().err
    assert main([command, "--run", str(asset("teachers/digits"))]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(UserError):
        __import__("eval." + command, fromlist=["record"]).record(str(asset("teachers/digits")), None)


def test_the_table_of_longer_clips_has_both_halves(tmp_path):
    keys = ("fvd_mini", "fd_mini", "agreement", "agreement_colour", "agreement_motion", "dynamic_degree")
    first, second, real = (dict(zip(keys, values)) for values in (
        (2.0, 3.0, 0.8, 0.98, 0.9, 0.7), (4.5, 6.0, 0.5, 0.6, 0.25, 0.4), (0.5, 0.4, 0.95, 1, 1.0, 0.8)
    ))  # fmt: skip
    about = {"model": "m", "seconds_per_frame": 0.02, "first": first, "second": second, "floor": real}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/longer_m.json").write_text(json.dumps(about))
    text = studies.longer([], tmp_path)
    assert "| `m` | 1 | 2 | 3 | 80.0 | 98.0 | 90.0 | 0.70 | 50 |" in text
    assert (
        "| `m` | 2 | 4.5 | 6 | 50.0 | 60.0 | 25.0 | 0.40 | 50 |" in text and "| real clips |  | 0.5 |" in text
    )
    assert studies.longer([], tmp_path / "none") == "No study yet."


def test_the_table_of_relighting_has_both_ways(tmp_path):
    keys = ("albedo_rmse", "normal_degrees", "psnr_blended", "psnr_model")
    one = dict.fromkeys((*keys, "psnr_evening", "psnr_noon", "psnr_studio"), 20.0)
    about = {"model": "m", "measured": {"progressive": [one | {"albedo_rmse": 0.05}], "plain": [one, one]}}
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/relight_m.json").write_text(json.dumps(about))
    text = studies.relight([], tmp_path)
    assert "| progressive | 0.050 | 20.0 |" in text and "| plain | 20.000 |" in text
    assert studies.relight([], tmp_path / "none") == "No study yet."


def test_only_students_that_go_block_by_block_draw_longer_clips(tmp_path, monkeypatch):
    from eval import longer
    from fastgen.evaluation.metrics import fvd_mini
    from tests.support.causal import causal_export

    monkeypatch.setattr(fvd_mini, "HELD", 100)
    fvd_mini._reference.cache_clear()

    folder, cast = causal_export(tmp_path, {"name": "self_forcing"})
    found, clips = longer.study(str(folder), num=4)
    assert clips.shape == (4, 3, 18, 32, 32) and found["frames"] == 18 and found["seconds_per_frame"] > 0
    assert set(found["first"]) == set(found["second"]) == set(longer.KEPT)
    assert found["first"] != found["second"]
    with pytest.raises(UserError, match="is no student"):
        longer.drawer(cast.teacher_cfg.path)
    fvd_mini._reference.cache_clear()


def test_students_begun_by_a_frame_draw_windows(tmp_path, monkeypatch):
    """Each window is measured by itself, and the frame that two share in both."""
    from eval import longer
    from fastgen.config.run import validate
    from fastgen.evaluation.metrics import fvd_mini
    from fastgen.training.assembly import make_cast
    from fastgen.training.exporting import export_run
    from tests.support.clips import clip_teacher

    monkeypatch.setattr(fvd_mini, "HELD", 100)
    fvd_mini._reference.cache_clear()
    values = {
        "teacher": {"path": str(clip_teacher(tmp_path / "teacher", first_frame=True))},
        "student": {"num_steps": 2},
        "objective": {"name": "dmd2", "gan_weight": 0.0},
        "data": {"name": "moving", "limit": 4, "stream": "never"},
    }
    cfg = validate(values)
    run = SimpleNamespace(cast=make_cast(cfg), train_cfg=cfg.train, step=1, example="", enlarges=0)
    run.folder = tmp_path
    folder = export_run(run, tmp_path / "export", {})
    found, clips = longer.study(str(folder), num=4)
    assert clips.shape == (4, 3, 17, 32, 32) and found["frames"] == 17
    assert found["first"] != found["second"] and set(found["second"]) == set(longer.KEPT)
    fvd_mini._reference.cache_clear()
