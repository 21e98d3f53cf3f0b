"""SANA-Sprint: what its two losses add up to, the form of its network, and SanaSprintPipeline itself."""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastgen.cli.sample import Generator, draw
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.export.load import load_export
from fastgen.networks.jvp import TangentConfig, tangent
from fastgen.networks.load import load_teacher
from fastgen.objectives import requirements_of
from fastgen.objectives.sana_sprint import SanaSprint, SanaSprintConfig
from fastgen.objectives.scm import SCM
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.roles.sana_sprint import SCHEDULE, make_sprint
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.objectives.test_ladd import LinearDisc
from tests.objectives.test_scm import SD, alg_1
from tests.support.plain import run_plain
from tests.support.replay import moved, replay
from tests.support.spelled import FAR, NEAR, World, at_x, gradient
from tests.support.tiny import PROMPTS
from tests.support.toys import GaussianNet, batch_of, gaussian_role, rng, run_mixture

SHORT = {"scm": {"warmup_steps": 2, "sigma_data": 1.0}, "gan": {"disc_depths": 2}}
"""settings of the contract battery"""


def parts():
    S = Flow()
    student = Student(GaussianNet(S, 0.3, 0.6), None, StudentSpec([1.0]))
    return {"student": student, "teacher": gaussian_role(S, 0.0, 1.0), "disc": LinearDisc(0.5)}


SCM_ONLY = {"adaptive": False, "warmup_steps": 0}


def test_p1_without_the_gan_it_is_scm_bit_for_bit():
    """And with it, the consistency part still is: the GAN draws after it."""
    batch = batch_of(torch.randn(32, 2, dtype=torch.float64))
    cfg = SanaSprintConfig(scm=SCM_ONLY, gan_weight=0.0)
    alone, _ = next(SCM(cfg.scm, parts(), rng()).step(batch, 0))
    both, _ = next(SanaSprint(cfg, parts(), rng()).step(batch, 0))
    assert torch.equal(alone, both)
    more, logs = next(SanaSprint(cfg.model_copy(update={"gan_weight": 0.25}), parts(), rng()).step(batch, 0))
    torch.testing.assert_close(more, alone + 0.25 * logs["gan"])
    assert requirements_of(cfg).players == {"student": ("student",)}


def test_p1_step_is_the_formula():
    """Both losses with their weights, told the scale: the gradients in F_theta's pass and in the sample."""
    mid = {"low": 0.5, "high": 0.6}
    scm = {"name": "scm", "sigma_data": SD, "adaptive": False, "warmup_steps": 10, "time": mid}
    world = World(
        SanaSprint, Flow(), [1.0, 0.5], span=(1.0, 5.0), num=64, scm=scm, gan={"disc_time": NEAR},
        student_time=FAR, scm_weight=0.7, gan_weight=0.3, max_time_prob=0.2,
    )  # fmt: skip
    student, heads = world.turns(5)
    F, sample = (call for call in world.student.calls if call.grad)
    w = F.cond["guidance"].double()
    assert w.std() > 0.5 and torch.equal(F.cond["guidance"], sample.cond["guidance"])
    world.within(F.t, mid)
    formula = alg_1(world.student.backbone, F.cond, F.x_t, F.t, world.guided(F.x_t, F.t, w), 0.5)
    wanted = 0.7 * at_x(formula, F.out)
    torch.testing.assert_close(gradient(student.loss, F.out), wanted, rtol=1e-3, atol=1e-6)
    first = sample.t == 1
    assert 0 < first.sum() < 24
    world.within(sample.t[~first], FAR)
    torch.testing.assert_close(sample.x_t, Flow().noise(world.batch.x0, world.batch.noise, sample.t))
    x_t, t, cond = world.disc.seen[0]
    world.within(t, NEAR)
    eps = world.noise_in(x_t, t, sample.out)
    wanted = at_x(lambda x: -0.3 * world.disc.logit(Flow().noise(x, eps, t), t, cond).mean(), sample.out)
    torch.testing.assert_close(gradient(student.loss, sample.out), wanted)
    assert heads.player == "disc" and set(heads.grads) == {"disc.a"}


def test_p1_max_time_weighting_starts_half_of_the_judged_samples_from_noise():
    seen = []

    class Net(GaussianNet):
        def forward(self, x_t, t, cond):
            seen.append((x_t.detach(), t))
            return super().forward(x_t, t, cond)

    found = parts() | {"student": Student(Net(Flow(), 0.0, 1.0), None, StudentSpec([1.0]))}
    batch = batch_of(torch.full((2000, 1), 40.0, dtype=torch.float64))
    next(SanaSprint(SanaSprintConfig(scm=SCM_ONLY), found, rng()).step(batch, 0))
    x_t, t = seen[-1]
    first = t == 1.0
    assert float(first.double().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(x_t[first], batch.noise[first])
    torch.testing.assert_close(
        x_t[~first], (1 - t[~first, None]) * 40 + t[~first, None] * batch.noise[~first]
    )
    level = (t[~first] / (1 - t[~first])).log()
    assert float(level.median()) == pytest.approx(0.9, abs=0.2)  # 0.2 + log 2: latents of unit scale


def test_p1_times_in_the_unit_interval_keep_the_teacher_and_bound_its_slope():
    """On the trained teacher: its output within 5 %, and a smaller slope than behind 1000 t."""
    teacher = load_teacher("assets:teachers/tinted-sana")
    sprint = make_sprint(copy.deepcopy(teacher.backbone), SCHEDULE)
    x = torch.randn(4, *teacher.codec.shape)
    cond = teacher.codec.prompts(["a red dress on a grey background"] * 4)
    with_w = {**cond, "guidance": torch.full((4,), 3.0)}
    slopes = []
    for u in (1.0, 0.6, 0.2, 0.02):
        t = torch.full((4,), u, dtype=torch.float64)
        with torch.no_grad():
            before, after = teacher.backbone.raw(x, t, cond), sprint.raw(x, t, with_w)
        assert (before - after).norm() < 0.05 * before.norm()
    for net, c in ((teacher.backbone, cond), (sprint, with_w)):
        t = torch.full((4,), 0.6, dtype=torch.float64)
        f = lambda x, t, net=net, c=c: net.raw(x, t, c)  # noqa: E731
        slopes.append(tangent(f, (x, t), (0 * x, torch.ones_like(t)), TangentConfig()).norm())
    assert slopes[1] < 0.75 * slopes[0], slopes


def cast_of(tiny, family="sana", **student):
    student = {"sprint": True, "guidance_embedding": [1.0, 5.0], "num_steps": 2, **student}
    cfg = validate(
        {
            "teacher": {"path": str(tiny(family)), "guidance": 2.0},
            "student": student,
            "objective": {"name": "sana_sprint", **SHORT},
            "data": {"name": "tinted"},
        }
    )
    return cfg, make_cast(cfg)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"family": "sd"}, "a teacher of family sd"),
        ({"kind": "lora"}, "needs kind full and student.guidance_embedding"),
        ({"guidance_embedding": None}, "needs kind full and student.guidance_embedding"),
    ],
)
def test_refusals(tiny, change, message):
    with pytest.raises(UserError, match=message) as error:
        cast_of(tiny, **change)
    assert "student.sprint" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_p2_distils_the_mixture(tmp_path):
    objective = {
        "name": "sana_sprint",
        "scm": {"sigma_data": 0.7, "warmup_steps": 50},
        "gan": {"loss": "softplus", "disc_time": {"low": 0.05, "high": 0.7}},
        "gan_weight": 0.1,
    }
    before, after, _, _ = run_mixture(tmp_path, objective, steps=250, batch=128)
    assert after < before / 4 and after < 0.03, (before, after)


PLAIN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastgen":
            raise ImportError("fastgen may not be imported here")
sys.meta_path.insert(0, Blocked())
import torch
from diffusers import SanaSprintPipeline
from safetensors.torch import save_file
pipe = SanaSprintPipeline.from_pretrained(".", torch_dtype=torch.float32)
assert type(pipe.scheduler).__name__ == "SCMScheduler"
found = {}
for w, call in ((2.0, {}), (4.0, {}), (2.0, {"num_inference_steps": 1, "intermediate_timesteps": None}),
                (2.0, {"num_inference_steps": 4, "intermediate_timesteps": None})):
    streams = [torch.Generator().manual_seed(s) for s in (5, 6)]
    call |= {"max_sequence_length": 48, "complex_human_instruction": None, "use_resolution_binning": False}
    images = pipe(PROMPTS, generator=streams, guidance_scale=w, height=32, width=32, output_type="pt", **call)
    found[f"{w} {call.get('num_inference_steps', 2)}"] = images.images.contiguous()
save_file(found, "images.safetensors")
"""


def test_p4_the_stock_pipeline_samples_one_model_in_one_two_and_four_steps(tiny, tmp_path):
    cfg, cast = cast_of(tiny)
    moved(cast, 0.02)
    ours = cast.parts["student"]
    assert ours.times == pytest.approx([1.0, 0.7827], abs=1e-4)
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", enlarges=0, folder=tmp_path)
    folder = export_run(run, tmp_path / "export", {})
    (folder / "plain.py").write_text(PLAIN.replace("PROMPTS", repr(list(PROMPTS))))
    done = run_plain("plain.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    plain = load_file(folder / "images.safetensors")
    loaded = load_export(folder)
    assert loaded.info.times == (torch.pi / 2, 1.3)
    cond, null = loaded.codec.prompts(list(PROMPTS)), loaded.codec.null(1)
    for key, images in plain.items():
        w, steps = float(key.split()[0]), int(key.split()[1])
        mine = draw(Generator(loaded, steps, w, null), cond, [5, 6], batch_size=2)[0]
        assert (mine - images).abs().max() < 1e-3, key
    assert (plain["2.0 2"] - plain["4.0 2"]).abs().max() > 1e-3, "w does nothing: nothing was tested"
    # what was trained, a flow network, is what is shipped
    flow = Generator(
        SimpleNamespace(role=ours, codec=cast.teacher.codec, is_student=True, teacher=cast.teacher),
        2,
        2.0,
        null,
    )
    mine = draw(flow, cast.teacher.codec.prompts(list(PROMPTS)), [5, 6], batch_size=2)[0]
    assert (mine - plain["2.0 2"]).abs().max() < 1e-3
    card = (folder / "README.md").read_text()
    assert "SanaSprintPipeline" in card and "In 4 steps: pass" in card and "guidance_scale=2.0" in card


def test_p4_without_sprint(tiny, tmp_path):
    replay(tiny, tmp_path, {"name": "sana_sprint", **SHORT})


def test_the_form_leaves_the_teacher_alone(tiny):
    _, cast = cast_of(tiny)
    assert cast.teacher.backbone.net.config.timestep_scale == 1.0
    assert cast.parts["student"].backbone.net.config.timestep_scale == 1e-3
    assert isinstance(cast.parts["teacher"], Role)
