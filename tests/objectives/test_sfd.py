"""SFD: the closed forms of forgetting, its reduction to SiD, what is drawn, a mixture, and mistakes."""

import json

import pytest
import torch
import yaml

from fastgen.cli.train import main
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.data.bundled import load_images
from fastgen.diffusion import divergences
from fastgen.evaluation.metrics.fd_mini import Measurer, held_out
from fastgen.evaluation.metrics.mixtures import component_log_likelihood
from fastgen.networks.codecs import LabelCodec
from fastgen.objectives.msd import MSDConfig
from fastgen.objectives.sfd import SFD
from fastgen.objectives.sid import SiD
from fastgen.roles.concepts import Concepts
from fastgen.sampling.solvers import sample_student
from tests.support import gaussians
from tests.support.replay import replay
from tests.support.spelled import FAR, NEAR, World, at_x, gradient
from tests.support.toys import energy_distance, run_mixture

SHORT = {"forget": ["0"], "train_guidance": 2.0}
"""settings of the contract battery: a prompt and a class of this name, a guided critic"""


# -- P1: the closed forms ------------------------------------------------------------------------------------
A, SIGMA, VAR = 0.6, 0.8, 0.5
GAIN = SIGMA**2 / (A**2 * VAR + SIGMA**2)


def forgetting(override, forget, alpha=1.2, detach=False, swapped=False):
    """(E[L], its derivative in the student's mean for c_f) with W = 1, teacher N(override, s^2) at c_o and an
    exact critic of the student's own N(forget, s^2), by quadrature.
    """
    u, w = gaussians.nodes(12)
    z, eps = (v.flatten() for v in torch.meshgrid(u, u, indexing="ij"))
    weight = (w[:, None] * w[None]).flatten()
    mean = torch.tensor(float(forget), dtype=torch.float64, requires_grad=True)
    x = mean + VAR**0.5 * z
    x_t = A * x + SIGMA * eps
    D = lambda m: m + A * VAR / (A**2 * VAR + SIGMA**2) * (x_t - A * m)  # noqa: E731
    real, fake = D(override), D(float(forget))
    if swapped:
        real, fake = fake, real
    if detach:
        real, fake = real.detach(), fake.detach()
    loss = (weight * divergences.score_identity(x[:, None], real[:, None], fake[:, None], alpha)).sum()
    return float(loss.detach()), float(torch.autograd.grad(loss, mean)[0])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_p1_known_values_of_a_forgotten_condition(alpha):
    """E[L] = (1 - alpha) gain^2 gap^2, and the mean is pulled towards c_o by gain^2 gap whatever alpha is."""
    value, pull = forgetting(1.3, 0.0, alpha)
    assert value == pytest.approx((1 - alpha) * GAIN**2 * 1.3**2, abs=1e-9)
    assert pull == pytest.approx(-0.79191, abs=1e-5)


def test_p1_negatives_of_a_forgotten_condition():
    """Fixed scores pull otherwise, the teacher at c_f not at all, exchanged roles away."""
    assert forgetting(1.3, 0.0)[0] == pytest.approx(-0.2059, abs=1e-4)
    assert forgetting(1.3, 0.0, detach=True)[1] == pytest.approx(-1.01463, abs=1e-5)
    assert abs(forgetting(0.0, 0.0)[1]) < 1e-12
    assert forgetting(1.3, 0.0, swapped=True)[1] > 0.5
    assert abs(forgetting(1.3, 1.3)[1]) < 1e-12, "at c_o it stands still"


def concepts(forget=("1",), override=("2",), classes=(2, 3, 3, 1)):
    """Classes 0 to 3, of which these samples are there; 0 is the null class of the closed-form networks."""
    codec = LabelCodec((3,), num_classes=4)
    found = Concepts(codec, forget, override)
    found.read(codec.labels(torch.arange(4)), torch.tensor(classes), None)
    return found


def world(method=SFD, **cfg):
    cfg = {"time": NEAR, "critic_time": FAR, **cfg}
    return World(method, parts={"concepts": concepts()}, **cfg)


def test_p1_step_is_the_formula():
    """Six rows to keep and two to forget: the teacher sees the override where student and critic see c_f."""
    guidance = {"score_guidance": 2.0, "train_guidance": 1.5}
    one = world(
        forget=["1"],
        override=["2"],
        forget_share=0.25,
        forget_weight=0.3,
        critic_forget_weight=0.2,
        **guidance,
    )
    critic, student = one.turns()
    x, fresh = one.student.calls
    assert not x.grad and fresh.grad and not torch.equal(x.x_t, fresh.x_t)
    asked, shown = x.cond["class_labels"], one.teacher.calls[0].cond["class_labels"][:8]
    assert set(asked[:6].tolist()) <= {2, 3} and asked[6:].tolist() == [1, 1]
    assert shown.tolist() == [*asked[:6].tolist(), 2, 2]
    assert torch.equal(fresh.cond["class_labels"], asked)
    x_t, t = one.shown(one.teacher)
    one.within(t, NEAR)
    eps = one.noise_in(x_t, t, fresh.out)

    def guided(role, x_t, t, labels, w):
        D, null = (role.backbone(x_t, t, {"class_labels": c}) for c in (labels, 0 * labels))
        return null + w * (D - null)

    W = (fresh.out - guided(one.teacher, x_t, t, shown, 3.0)).abs().mean(1).detach()
    rows = torch.tensor([1 / 6] * 6 + [0.3 / 2] * 2, dtype=torch.float64)

    def loss(x):
        x_t = one.schedule.noise(x, eps, t)
        real = guided(one.teacher, x_t, t, shown, 3.0)
        gap = real - guided(one.critic, x_t, t, asked, 2.0)
        return (rows * (gap * ((real - x) - 1.2 * gap)).mean(1) / W).sum()

    torch.testing.assert_close(gradient(student.loss, fresh.out), at_x(loss, fresh.out))
    call = one.critic.calls[0]
    x_t, t = call.x_t[:8], call.t[:8]
    one.within(t, FAR)
    one.noise_in(x_t, t, x.out)
    error = (guided(one.critic, x_t, t, asked, 1.5) - x.out).square().mean(1)
    rows = torch.tensor([1 / 6] * 6 + [0.2 / 2] * 2, dtype=torch.float64)
    torch.testing.assert_close(critic.loss, (rows * one.native(t) * error).sum())


def test_p1_nothing_overridden_is_sid():
    """c_o = c_f with equal shares and weights: twice the loss of SiD on the same conditions, in each turn."""
    asked = {"class_labels": torch.tensor([2, 3, 2, 3, 1, 1, 1, 1])}
    losses = {}
    for name, method, shown in (("sid", SiD, None), ("same", SFD, 1), ("other", SFD, 2)):
        one = world(method, **({} if shown is None else {"forget": ["1"]}))
        one.batch.cond = asked
        if shown is not None:
            labels = torch.where(asked["class_labels"] == 1, shown, asked["class_labels"])
            one.objective.concepts.draw = lambda *_, labels=labels: (asked, {"class_labels": labels})
        losses[name] = torch.stack([turn.loss.detach() for turn in one.turns()])
    torch.testing.assert_close(losses["same"], 2 * losses["sid"])
    assert (losses["other"] - losses["same"])[1].abs() > 1e-2


def test_p1_without_weight_the_forgotten_rows_do_not_count():
    """Both weights 0: plain fine-tuning; the critic's row weights count in its turn alone."""
    for share in (0.25, 0.5):
        one = world(forget=["1"], forget_share=share, forget_weight=0.0, critic_forget_weight=0.0)
        kept = 8 - round(8 * share)
        critic, student = one.turns()
        x, fresh = one.student.calls
        for turn, out in ((critic, one.critic.calls[0].out), (student, fresh.out)):
            moved = gradient(turn.loss, out).abs().sum(1) > 0
            assert moved[:kept].all() and not moved[kept:8].any()
    assert world(forget=["1"], forget_share=0.01).objective.num_gone(8) == 1
    assert world(forget=["1"], forget_share=0.99).objective.num_gone(8) == 7


def test_reads_no_image():
    one = world(forget=["1"])
    one.batch.x0 = None
    assert len(one.turns()) == 2 and not SFD.requirements(SFD.config()).real_data


# -- what is drawn -------------------------------------------------------------------------------------------
def test_conditions_are_drawn_as_often_as_the_data_have_them():
    asked, shown = concepts().draw(3000, 500, Rng(0), "cpu")
    kept = asked["class_labels"][:3000]
    assert set(kept.tolist()) == {2, 3} and abs(float((kept == 3).double().mean()) - 2 / 3) < 0.03
    assert (asked["class_labels"][3000:] == 1).all() and (shown["class_labels"][3000:] == 2).all()
    assert torch.equal(shown["class_labels"][:3000], kept)


def test_without_an_override_any_kept_class_stands_in():
    _, shown = concepts(override=()).draw(1, 600, Rng(0), "cpu")
    assert set(shown["class_labels"][1:].tolist()) == {2, 3}
    _, shown = concepts(("1", "3"), ("2", "2")).draw(1, 600, Rng(0), "cpu")
    assert set(shown["class_labels"].tolist()) == {2}


def test_words_of_prompts_are_replaced_or_left_out(tiny):
    from fastgen.networks.load import load_teacher

    codec = load_teacher(str(tiny("sd"))).codec
    texts = ["a red dress", "A Red bag", "a bored boot", "a green coat"]
    table, rows = codec.prompts(texts), torch.tensor([0, 1, 1, 2, 3])
    found = Concepts(codec, ["red", "coat"], ["dark blue", "shirt"])
    assert [found.overridden(t) for t in texts[:2]] == ["a dark blue dress", "A dark blue bag"]
    assert Concepts(codec, ["red"]).overridden("a red dress") == "a dress"
    found.read(table, rows, texts)
    key = "encoder_hidden_states"
    assert torch.equal(found.kept[key], table[key][2:3]), "bored is not red"
    assert torch.equal(found.gone[key], table[key][torch.tensor([0, 1, 1, 3])])
    wanted = codec.prompts(["a dark blue dress", "A dark blue bag", "A dark blue bag", "a green shirt"])[key]
    torch.testing.assert_close(found.instead[key], wanted)
    assert (found.instead[key] - found.gone[key]).abs().max() > 0.1


# -- measurement ---------------------------------------------------------------------------------------------
def test_distances_are_of_what_is_kept_and_forgotten_is_a_share():
    """Real images: those of class 3 show it, others do not; the reference has none of it."""
    held = load_images("digits", "heldout")
    three = held.labels == 3
    assert len(held_out("digits", (("class", 3),))) == int((~three).sum())
    one = Measurer("digits", without=(("class", 3),))
    assert "without class 3" in one.describe()["extractor"]
    images, asked = held.images.float() / 255, {"class": held.labels}
    kept = (images[~three], {"class": held.labels[~three]})
    found = one.unlearned(kept, (images[three], {"class": held.labels[three]}))
    assert found["forgotten"] > 0.9 and found["unlearning_accuracy"] == pytest.approx(1 - found["forgotten"])
    others = (images[~three][:100], {"class": torch.full((100,), 3)})
    gone = one.unlearned(kept, others)
    assert gone["forgotten"] < 0.05 and gone["retained_accuracy"] > 0.9 and gone["unlearning_h"] > 0.9
    whole, rest = Measurer("digits"), images[~three]
    assert one.compare(rest, {})["fd_mini"] < 1e-3 < 0.1 < whole.compare(rest, {})["fd_mini"]
    assert one.compare(images, asked)["fd_mini"] > 0.1


def test_a_run_is_measured_on_what_is_kept(tmp_path):
    """results.json of a smoke run: `forgotten` of teacher and student, the teacher's near 1."""
    values = {
        "base": "configs:bases/digits.yaml",
        "objective": {"name": "sfd", "forget": ["3"], "override": ["5"]},
        "train": {"max_train_steps": 1, "train_batch_size": 4},
        "eval": {"num_samples": 36, "grid": 9},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["teacher"]["forgotten"] > 0.8 and "forgotten" in results["student"]
    assert results["teacher"]["retained_accuracy"] > 0.8
    assert "without class 3" in results["protocol"]["extractor"]


# -- P2, P4 --------------------------------------------------------------------------------------------------
def of_classes(trainer, num=600):
    """Samples of each class, and the share of them that an exact classifier sees in each of the three."""
    codec, mixture, found = trainer.cast.teacher.codec, trainer.cast.teacher.backbone, []
    for label in range(3):
        cond = codec.labels(torch.full((num,), label))
        x = sample_student(trainer.cast.student, list(range(num)), codec.shape, cond)
        seen = mixture.labels[component_log_likelihood(x, mixture).argmax(1)]
        found.append((x, torch.bincount(seen, minlength=3) / num))
    return found


@pytest.mark.slow
def test_p2_forgets_a_class_of_the_mixture(tmp_path):
    """Class 0 gives class 1 and the others stay; with itself as the override class 0 stays too."""
    objective = {"name": "sfd", "forget": ["0"], "override": ["1"]}
    *_, trainer = run_mixture(tmp_path, objective, "analytic:gmm2d-edm", steps=260)
    mixture = trainer.cast.teacher.backbone
    points, labels = mixture.sample(3000, torch.Generator().manual_seed(7))
    for asked, shown in ((0, 1), (1, 1), (2, 2)):
        x, shares = of_classes(trainer)[asked]
        assert shares[shown] >= 0.99, (asked, shares)
        assert energy_distance(points[labels == shown], x) < 0.04, asked
    objective |= {"override": ["0"]}
    *_, trainer = run_mixture(tmp_path, objective, "analytic:gmm2d-edm", steps=60)
    assert of_classes(trainer)[0][1][0] > 0.9


def test_p4_sfd(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "sfd", "forget": ["0"], "override": ["1"]})


# -- mistakes ------------------------------------------------------------------------------------------------
BAD = {
    "nothing named": (["--objective.forget", "[]"], "objective.forget: none given"),
    "no such class": (["--objective.forget", "['9']"], "objective.forget: found '9'"),
    "nothing to retain": (["--objective.forget", "['0', '1', '2']"], "no class is left to keep"),
    "overrides": (["--objective.override", "['1', '2']"], "objective.override: found 2 for 1"),
    "a forgotten override": (
        ["--objective.forget", "['0', '1']", "--objective.override", "['1']"],
        "objective.override: '1' is to be forgotten too",
    ),
    "no classes": (["--teacher.path", "analytic:gaussian-edm"], "unconditional teacher"),
    "guidance": (
        ["--teacher.path", "analytic:gaussian-edm", "--objective.train_guidance", "2"],
        "objective.train_guidance",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case, capsys, tmp_path):
    argv, named = BAD[case]
    (tmp_path / "run.yaml").write_text(
        "{teacher: {path: 'analytic:gmm2d-edm'}, objective: {name: sfd, forget: ['0'], override: ['1']}, "
        "data: {name: ''}}"
    )
    if case == "nothing to retain":
        argv = [*argv, "--objective.override", "[]"]
    assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run"), *argv]) == 2
    message = capsys.readouterr().err
    assert named in message and len(message.strip().splitlines()) == 1, message
    assert not (tmp_path / "run").exists()


def test_concepts_that_no_prompt_has_are_named(tiny, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red dress\na red bag\n")
    for forget, named in (
        ("zebra", "'zebra' is in none of the 2 prompts"),
        ("red", "no prompt is left to keep"),
    ):
        values = {
            "teacher": {"path": str(tiny("sd"))},
            "objective": {"name": "sfd", "forget": [forget]},
            "data": {"name": "", "prompts": str(tmp_path / "prompts.txt")},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        assert main(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "run")]) == 2
        message = capsys.readouterr().err.strip()
        assert named in message and message.startswith("error: objective.forget"), message
        assert len(message.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_unread_conditions_and_other_hosts_are_refused():
    unread = Concepts(LabelCodec((3,), num_classes=4), ["1"])
    with pytest.raises(UserError, match="no conditions were read"):
        unread.draw(1, 1, Rng(0), "cpu")
    with pytest.raises(ValueError, match="use it without msd"):
        MSDConfig.model_validate({"host": {"name": "sfd", "forget": ["0"]}})
