"""MSD: one student is the host, parts are equal and disjoint, students are independent, routing counts."""

import json
import shutil

import pytest
import torch
import yaml

from fastgen.cli.train import main
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.rng import Rng
from fastgen.diffusion.schedules import EDM
from fastgen.networks.denoiser import Denoiser
from fastgen.objectives.base import REGISTRY, requirements_of
from fastgen.objectives.msd import MSD, MSDConfig
from fastgen.roles.roles import Students, StudentSpec
from fastgen.roles.router import Router
from fastgen.training.assembly import make_cast
from tests.support import replay
from tests.support.spelled import NEAR, World, at_x, gradient
from tests.support.toys import AffineStudent, CountingRole, GaussianNet, batch_of, gaussian_role, run_mixture

HOST = {"name": "diff_instruct", "student_every": 1}
SHORT = {"num_students": 1, "host": HOST}
"""settings of the contract battery"""

S = EDM()


class Codec:
    def __init__(self, num_classes):
        self.num_classes = num_classes


def build(num, host=HOST, classes=4, **cfg):
    """MSD over affine students of a Gaussian teacher."""
    students = [AffineStudent(S, -1.0, 0.3) for _ in range(num)]
    critics = [CountingRole(GaussianNet(S, -1.0, 0.3)) for _ in range(num)]
    router = Router.for_codec(Codec(classes), num)
    made = {f"student{j}": s for j, s in enumerate(students)} | {
        f"critic{j}": c for j, c in enumerate(critics)
    }
    made |= {"student": Students(students, router), "teacher": gaussian_role(S, 0.5, 1.0)}
    return MSD(MSDConfig(num_students=num, host=host, **cfg), made, Rng(0))


def labelled(k, num=64, classes=4):
    generator = torch.Generator().manual_seed(k)
    noise = torch.randn(num, 1, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (num,), generator=generator)
    return batch_of(noise, noise, {"class_labels": labels})


def train(objective, steps=6):
    optimizers = {n: torch.optim.Adam(p.trainable().values(), 0.05) for n, p in objective.players.items()}
    seen = []
    for k in range(steps):
        objective.rng.reset(k)
        for loss, _ in objective.step(labelled(k), k):
            optimizer = optimizers[objective.active]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append((k, objective.active))
    return seen


def values(role):
    return [p.detach().clone() for p in role.trainable().values()]


def test_p1_one_student_is_the_host():
    objective = build(1)
    host = REGISTRY["diff_instruct"](
        MSDConfig(host=HOST).host,
        {
            "student": AffineStudent(S, -1.0, 0.3),
            "critic": CountingRole(GaussianNet(S, -1.0, 0.3)),
            "teacher": gaussian_role(S, 0.5, 1.0),
        },
        Rng(0),
    )
    train(objective)
    train(host)
    for a, b in zip(values(objective.hosts[0].student), values(host.student)):
        assert torch.equal(a, b)


def test_p1_students_do_not_see_each_other():
    """Trained alone (`only`) a student becomes what it becomes beside the others; the others stay put."""
    together = build(3)
    seen = train(together)
    assert {p for _, p in seen} == {f"{n}{j}" for n in ("student", "critic") for j in range(3)}
    for j in range(3):
        alone = build(3, only=[j])
        assert {p for _, p in train(alone)} == {f"student{j}", f"critic{j}"}
        for i, (one, other) in enumerate(zip(alone.student.members, together.student.members)):
            same = all(torch.equal(a, b) for a, b in zip(values(one), values(other)))
            assert same == (i == j)


def test_p1_step_hands_on_guidance_and_step_with_a_stream_for_each():
    objective = build(2)
    made = MSD(objective.cfg, objective.parts, Rng(0), 3.0)
    seen = []

    def step(batch, k):
        seen.append((k, float(made.rng.rand(1))))
        return iter(())

    for host in made.hosts.values():
        assert host.guidance == 3.0
        host.step = step
    list(made.step(labelled(0), 7))
    assert [k for k, _ in seen] == [7, 7] and seen[0][1] != seen[1][1]


def test_p1_step_of_score_matching_is_the_formula():
    """w(t) |D_k - D_real|^2 with the weight of the teacher's own prediction, without guidance."""
    host = {"host": HOST, "score_matching": True}
    plain = World(REGISTRY["diff_instruct"])
    student = plain.student
    parts = {"student": Students([student], Router.for_codec(Codec(4), 1)), "student0": student}
    world = World(MSD, num_students=1, time=NEAR, parts=parts, **host)
    (turn,), (call,) = world.turns(), student.calls
    world.within(call.t, NEAR)
    world.noise_in(call.x_t, call.t, world.batch.x0)
    real, weight = world.guided(call.x_t, call.t, 1.0), world.native(call.t)[:, None]
    wanted = at_x(lambda D: (weight * (D - real) ** 2).mean(), call.out)
    torch.testing.assert_close(gradient(turn.loss, call.out), wanted)


@pytest.mark.parametrize("num,classes", [(1, 10), (2, 10), (3, 10), (4, 10), (10, 10), (3, 7)])
def test_p1_every_class_has_one_student(num, classes):
    router = Router.for_codec(Codec(classes), num)
    part = router({"class_labels": torch.arange(classes)})
    sizes = torch.bincount(part, minlength=num)
    assert len(sizes) == num and sizes.max() - sizes.min() <= 1 and (part.diff() >= 0).all()


@pytest.mark.parametrize("num,rows", [(2, 9), (4, 30), (5, 5)])
def test_p1_prompts_are_cut_into_equal_parts(num, rows, tmp_path):
    generator = torch.Generator().manual_seed(num)
    table = {"encoder_hidden_states": torch.randn(rows, 6, 8, generator=generator)}
    table["encoder_attention_mask"] = (torch.arange(6) < 4).long().expand(rows, -1)
    router = Router(num)
    router.divide(table)
    part = router(table)
    sizes = torch.bincount(part, minlength=num)
    assert len(sizes) == num and sizes.max() - sizes.min() <= 1
    padded = {k: v.clone() for k, v in table.items()}
    padded["encoder_hidden_states"][:, 4:] += 10.0
    assert torch.equal(router(padded), part), "padding does not route"
    router.save(tmp_path)
    assert torch.equal(Router.load(tmp_path, "--model")(table), part)


def test_parts_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UserError, match="found 5 for 4 classes; a student would have none"):
        Router.for_codec(Codec(4), 5)
    with pytest.raises(UserError, match="unconditional teacher"):
        Router.for_codec(Codec(0), 2)
    with pytest.raises(UserError, match="found 3 for 2 distinct prompts"):
        Router(3).divide({"encoder_hidden_states": torch.randn(2, 4, 8)})
    with pytest.raises(UserError, match="no clusters"):
        Router(2)({"encoder_hidden_states": torch.randn(2, 4, 8)})
    with pytest.raises(UserError, match="no router.safetensors"):
        Router.load(tmp_path, "--model")
    with pytest.raises(ValueError, match="objective.only: found 4"):
        MSDConfig(num_students=4, only=[4])


def test_step_counts_that_the_students_would_not_read_are_refused():
    """Of a tdm host: behind a router no student has an input for the number of steps."""
    with pytest.raises(ValueError, match=r"objective.host.step_counts: found \[1, 2\]; .*leave it out"):
        MSDConfig(host={"name": "tdm", "step_counts": [1, 2]})
    assert MSDConfig(host={"name": "tdm"}).host.step_counts == ()


@pytest.mark.parametrize("wrapper", ["msd", "disback"])
def test_real_guidance_is_refused_where_the_host_does_not_follow_it(wrapper, tiny):
    """A wrapper declares what its host does: snoopi draws the scale, so a fixed one would do nothing."""

    def make(host):
        values = {
            "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
            "objective": {"name": wrapper, "host": host, "real_guidance": 3.0},
            "data": {"name": "tinted"},
        }
        cfg = validate(values)
        return make_cast(cfg).stage(cfg.all_stages()[0], Rng(0))

    with pytest.raises(UserError, match="objective.real_guidance: found 3"):
        make({"name": "snoopi"})
    assert make({"name": "swiftbrush"}).guidance == 3.0


def test_a_wrapper_declares_what_its_host_does():
    hosted = MSDConfig(
        num_students=2, host={"name": "snoopi", "nasa_scale": 0.7, "clip_weight": 0.1, "clip_steps": 5}
    )
    needs, own = requirements_of(hosted), requirements_of(hosted.host)
    assert needs.players == {f"{n}{j}": (f"{n}{j}",) for j in range(2) for n in ("student", "critic")}
    assert not needs.follows_guidance and needs.negative_prompt_scale == 0.7 and needs.num_students == 2
    assert needs.auxiliaries == own.auxiliaries and set(needs.parts) > {"student", "teacher", "clip"}
    assert needs.network_calls(2.0, 1) == own.network_calls(2.0, 1) and not needs.real_data
    assert needs.guidance_settings == {"host.min_guidance": 0.5, "host.max_guidance": 4.0}
    matched = requirements_of(MSDConfig(num_students=2, host=HOST, score_matching=True))
    assert matched.real_data and not matched.follows_guidance and matched.trained == ("student0", "student1")


def total_kl(num):
    """Best sum of KL(N(m_part, s_part) || N(m_c, 0.3)) over four classes when a part shares one Gaussian."""
    means = torch.tensor([-2.0, -0.5, 0.7, 2.2], dtype=torch.float64)
    part = Router.for_codec(Codec(4), num)({"class_labels": torch.arange(4)})
    total = 0.0
    for j in range(num):
        own = means[part == j]
        m, s = own.mean(), 0.3  # reverse KL's optimum of a shared Gaussian
        total += float((((m - own) ** 2) / (2 * s**2)).sum())
    return total


def test_p1_more_students_fit_more():
    """Students too poor for the condition: the total KL falls with K and is zero at one class each."""
    found = [total_kl(num) for num in (1, 2, 4)]
    assert found[0] > found[1] > found[2] and found[2] == 0


class Linear(Denoiser):
    """A denoiser linear in x_t whatever the time: too poor for the teacher, with a closed-form best fit."""

    prediction = "x0"

    def __init__(self):
        super().__init__()
        self.schedule, self.w = S, torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x_t, t, cond):
        return self.w[0] + self.w[1] * x_t


def test_p1_score_matching_ends_at_the_least_squares_projection():
    from fastgen.roles.roles import Student

    objective = build(1, score_matching=True, time={"low": 0.3, "high": 0.3001})
    net = Linear()
    objective.hosts[0].student = Student(net, None, StudentSpec([80.0]))
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for k in range(400):
        objective.rng.reset(k)
        batch = labelled(k, 512)
        batch.x0 = 0.5 + batch.x0
        for loss, _ in objective.step(batch, k):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - k / 400)
    t = float(objective.schedule.from_unit(torch.tensor(0.3)))
    exact = torch.tensor(
        [0.5 * t**2 / (1 + t**2), 1 / (1 + t**2)], dtype=torch.float64
    )  # D_real itself is linear
    torch.testing.assert_close(net.w.detach(), exact, rtol=0, atol=0.02)


def test_p2_distils_the_mixture_and_routing_counts(tmp_path):
    """Three students of two modes each; sent to the wrong student, a class comes out as another."""
    from fastgen.sampling.solvers import sample_student
    from tests.support.toys import energy_distance

    objective = {"name": "msd", "num_students": 3, "host": {"name": "diff_instruct", "student_every": 2}}
    before, after, _, trainer = run_mixture(tmp_path, objective, "analytic:gmm2d-edm", steps=250)
    assert after < 0.03 and after < before / 3, (before, after)
    student, teacher = trainer.student, trainer.cast.teacher
    real, labels = teacher.backbone.sample(900, torch.Generator().manual_seed(7))
    cond = teacher.codec.labels(labels)

    def distance():
        one = real[labels == 0], sample_student(student, list(range(900)), (2,), cond)[labels == 0]
        return energy_distance(*one)

    right = distance()
    student.router = Router(3, {"table": torch.tensor([1, 2, 0, 0])})
    assert distance() > max(0.2, 5 * right), "students know only their own conditions"


def run(tiny, folder, family="flow", **objective):
    values = {
        "teacher": {"path": str(tiny(family))},
        "student": {"kind": objective.pop("kind", "full"), "lora": {"rank": 2}},
        "critic": {"lora": {"rank": 2}},
        "data": {"name": "tinted" if family == "sd" else "fashion", "limit": 60},
        "objective": {"name": "msd", "num_students": 2, "host": HOST, **objective},
        "optim": {"student": {"lr": 1e-2}},
        "train": {"max_train_steps": 2, "train_batch_size": 8, "validation_steps": 0, "ema_decay": [0.5]},
        "eval": {"num_samples": 0},
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    code = main(["--config", str(folder / "run.yaml"), "--output_dir", str(folder / "run")])
    return code, folder / "run/export"


def test_p4_msd_each_student_in_plain_diffusers(tiny, tmp_path):
    """Two folders, each an ordinary export; class c drawn by its student equals our routed sample."""
    from fastgen.export.load import load_export

    code, export = run(tiny, tmp_path)
    assert code == 0 and "| 7 | `student1/` |" in (export / "README.md").read_text()
    x = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, cond = torch.ones(10, dtype=torch.float64), {"class_labels": torch.arange(10)}
    loaded = load_export(export)
    with torch.no_grad():
        ours = loaded.codec.decode(loaded.role(x, t, cond))
    plain = [replay.plainly(replay.STUDENT, export / f"student{j}") for j in range(2)]
    routed = torch.cat([plain[0][:5], plain[1][5:]])
    assert (routed - ours).abs().max() < 1e-3
    assert (plain[0][5:] - ours[5:]).abs().max() > 1e-3, "the other student draws something else"


def test_text_students_route_prompts_in_sample(tiny, tmp_path):
    from fastgen.cli.sample import main as sample

    code, export = run(tiny, tmp_path, "sd", kind="lora")
    assert code == 0
    prompts = ["--prompt", "a red dress on a grey background", "--prompt", "a blue bag on a white background"]
    assert sample(["--model", str(export), *prompts, "--out", str(tmp_path / "out")]) == 0
    (export / "router.safetensors").unlink()
    assert sample(["--model", str(export), *prompts, "--out", str(tmp_path / "none")]) == 2


def test_students_of_separate_runs_are_joined(tiny, tmp_path, capsys):
    from fastgen.cli.merge_students import main as join

    exports = []
    for j in range(2):
        code, export = run(tiny, tmp_path / f"only{j}", only=[j])
        assert code == 0
        exports.append(str(export))
    _, whole = run(tiny, tmp_path / "both")
    assert join([*exports, "--out", str(tmp_path / "joined")]) == 0
    for j in range(2):
        one = (tmp_path / f"joined/student{j}/unet/diffusion_pytorch_model.safetensors").read_bytes()
        assert one == (whole / f"student{j}/unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "joined/fastgen.json").read_text())["export"]["trained_students"] == [0, 1]
    capsys.readouterr()
    assert join([exports[0], "--out", str(tmp_path / "half")]) == 2
    assert "student 1 was trained in none" in capsys.readouterr().err
    assert join([exports[0], exports[0], "--out", str(tmp_path / "twice")]) == 2
    shutil.rmtree(tmp_path / "joined")


def test_smaller_students_start_from_score_matching(tiny, tmp_path):
    """`student.net`: an untrained network of other widths, matched to the teacher, then distilled."""
    cfg = validate(
        {
            "teacher": {"path": str(tiny("flow"))},
            "student": {"net": {"block_out_channels": [4, 8]}},
            "objective": {"name": "msd", "num_students": 2, "host": HOST, "score_matching": True},
            "data": {"name": "fashion"},
        }
    )
    cast = make_cast(cfg)
    sizes = [sum(p.numel() for p in b.parameters()) for b in cast.backbones()]
    assert len(sizes) == 3
    assert sizes[1] == sizes[2] < sizes[0]
    cast.teacher.network.net.config["_use_default_values"] = ["block_out_channels"]
    cast.student_cfg.net["block_out_channels"] = [4, 12]
    assert cast._other_net().net.config.block_out_channels == [4, 12], "a value no file named changes too"
    with pytest.raises(UserError, match="student.net"):
        make_cast(validate({**cfg.model_dump(), "student": {"net": {"block_channels": [4]}}}))
