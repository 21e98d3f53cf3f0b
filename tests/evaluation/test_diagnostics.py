"""Warnings of a run: silent on healthy ones, right on sick ones, and shown where people look."""

import json

import pytest
import torch

from fastgen.evaluation.diagnostics import fifths, look, warnings
from tests.support.toys import run_mixture


def curve(key, values):
    return [{"step": i, key: v} for i, v in enumerate(values)]


def warned(metrics, results=None):
    return " | ".join(seen for seen, _ in warnings(metrics, results or {}))


def test_look_measures_contrast_and_spread_per_request():
    """Image i answers request i mod 3; two requests vary between their images, the third never does."""
    images = torch.zeros(300, 1, 4, 4)
    images[:, :, :2] = 1.0
    images[0::3] += torch.randn(100, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    found = look(images, 3)
    assert found["contrast"] == pytest.approx(torch.tensor([0.0] * 8 + [1.0] * 8).std().item(), rel=1e-4)
    assert found["spread"] == pytest.approx(1 / 3, rel=0.15)
    assert "spread" not in look(images[:5], 3)


def test_fifths_need_ten_points():
    assert fifths(curve("a", range(9)), "a") == [] and fifths([], "a") == []
    assert fifths(curve("a", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]), "a") == [0, 1, 2, 3, 4]


def test_samples_beside_the_teachers():
    teacher = {"contrast": 0.2, "spread": 0.1}
    assert not warned([], {"look": {"teacher": teacher, "student": {"contrast": 0.22, "spread": 0.09}}})
    flat = {"contrast": 0.2, "spread": 0.02}
    assert "student collapsed" in warned([], {"look": {"teacher": teacher, "student": flat}})
    loud = {"contrast": 0.3, "spread": 0.1}
    assert "oversaturated" in warned([], {"look": {"teacher": teacher, "student": loud}})


def test_curves():
    falling, rising = [1.0 - 0.04 * i for i in range(20)], [0.2 + 0.04 * i for i in range(20)]
    assert not warned(curve("student/x_spread", rising)) and not warned(
        curve("student/real_fake_gap", falling)
    )
    assert "student collapsed" in warned(curve("student/x_spread", falling))
    assert "critic behind" in warned(curve("student/real_fake_gap", rising))
    assert "critic2 behind" in warned(curve("student2/real_fake_gap", rising))
    apart = [{"critic/logit_real": 6.0, "critic/logit_fake": -6.0}] * 10
    assert not warned(apart), "no student, no warning"
    assert "discriminator too strong" in warned([{**r, "student/loss": 1.0} for r in apart])
    ladd = [{"disc/logit_real": 6.0, "disc/logit_fake": -6.0, "student/loss": 1.0}] * 10
    assert "discriminator too strong" in warned(ladd)


def test_logits_that_weigh_the_score_keep_its_noise_levels():
    """What is advised against a strong discriminator is allowed by the method whose curves they are."""
    apart = {"critic/logit_real": 6.0, "critic/logit_fake": -6.0, "student/gan": 1.0}
    dmd2, f_distill = (warnings([r] * 10, {}) for r in (apart, {**apart, "student/log_ratio": 0.0}))
    assert "gan_time" in dmd2[0][1] and "gan_time" not in f_distill[0][1] and "critic_time" in f_distill[0][1]
    several = {k.replace("/", "1/"): v for k, v in {**apart, "student/log_ratio": 0.0}.items()}
    assert "gan_time" not in warnings([several] * 10, {})[0][1]


def test_a_drifting_student_is_told_from_a_noisy_curve():
    assert not warned([], {"curve": {"0": 7.0, "100": 3.0, "200": 3.9}})
    assert not warned([], {"curve": {"0": 3.0, "100": 9.0}}), "two points are no curve"
    seen = warned([], {"curve": {"0": 7.0, "100": 13.3, "200": 29.3}})
    assert "student drifts" in seen and "7 at step 0" in seen and "29.3 at step 200" in seen


def test_a_drift_is_not_cured_by_keeping_what_is_kept_already():
    rise = {"curve": {"100": 13.3, "200": 7.0, "300": 29.3}}
    cures = [
        c
        for kept in (200, 300)
        for _, c in warnings([], rise | {"protocol": {"weights": f"EMA 0.98, step {kept}"}})
    ]
    assert ["eval.keep best" in c for c in cures] == [False, True]


def test_p2_a_starved_critic_is_told_from_a_healthy_one(tmp_path):
    """The same run with a critic that hardly learns, against the critic error of the exact mixture."""
    found = {}
    for name, lr in (("healthy", None), ("starved", 1e-6)):
        folder = tmp_path / name
        folder.mkdir()
        objective = {"name": "dmd2", "gan_weight": 0.0, "student_every": 2}
        run_mixture(folder, objective, steps=200, critic_lr=lr, log_steps=5)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    assert fifths(found["healthy"], "critic/critic_error")[-1] < 0.15
    assert not warned(found["healthy"])
    assert "critic behind" in warned(found["starved"])
