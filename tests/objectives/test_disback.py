"""DisBack: what recording learns, the order of the path, and hosts that it leaves as they are."""

import pytest
import torch

from fastgen.diffusion.schedules import EDM
from fastgen.objectives.base import REGISTRY
from fastgen.objectives.disback import DisBack, DisBackConfig
from tests.support.replay import replay
from tests.support.spelled import Classes, Heard, World
from tests.support.toys import (
    AffineStudent,
    CountingRole,
    GaussianNet,
    batch_of,
    gaussian_role,
    rng,
    run_mixture,
)

SHORT = {
    "record_steps": 1,
    "nodes": 1,
    "switch_every": 1,
    "host": {"name": "diff_instruct", "student_every": 1},
}
"""settings of the contract battery"""

S = EDM()
HOST = {"name": "diff_instruct", "student_every": 1}


def players(m=-1.0, s=0.3):
    return {
        "student": AffineStudent(S, m, s),
        "critic": CountingRole(GaussianNet(S, 0.5, 1.0)),  # the teacher's copy
        "path": CountingRole(GaussianNet(S, 0.0, 0.1)),
        "teacher": gaussian_role(S, 0.5, 1.0),
    }


def make(**cfg):
    objective = DisBack(DisBackConfig(**{"host": HOST, **cfg}), players(), rng())
    objective.prepare()
    return objective


def train(objective, steps, lrs, start=0, num=512):
    """Run steps with Adam at lrs by player; logs of every turn."""
    optimizers = {n: torch.optim.Adam(p.trainable().values(), lrs[n]) for n, p in objective.players.items()}
    return [t for k in range(start, start + steps) for t in train_one(objective, optimizers, k, num)]


def train_one(objective, optimizers, k, num):
    """One step; (k, player, logs) of every turn."""
    objective.rng.reset(k)
    noise = torch.randn(num, 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    records = []
    for loss, logs in objective.step(batch_of(noise, noise), k):
        records.append((k, objective.active, logs))
        for player in objective.players.values():
            player.requires_grad_(player.name == objective.active)
        optimizers[objective.active].zero_grad()
        loss.backward()
        optimizers[objective.active].step()
    return records


@pytest.fixture(scope="module")
def recorded():
    """400 steps of recording on a student at N(-1, 0.3^2), eight nodes."""
    objective = make(record_steps=400, nodes=8, switch_every=10)
    records = train(objective, 400, {"student": 0.1, "critic": 0.02})
    return objective, records


def test_p1_the_path_ends_at_the_students_own_score(recorded):
    """P_N is the closed-form denoiser of G_0; the nodes between lead there from the teacher."""
    objective, records = recorded
    assert {active for _, active, _ in records} == {"critic"}, "recording leaves the student alone"
    m, s = (float(p) for p in objective.nodes[-1])
    assert abs(m + 1.0) < 0.05 and abs(abs(s) - 0.3) < 0.05, (m, s)
    means = [float(node[0]) for node in objective.nodes]
    assert all(a > b - 0.05 for a, b in zip([0.5, *means], means)), means


def test_p1_no_gradient_against_the_last_node(recorded):
    """Student distribution == target: with P_N in the teacher's place the host's gradient is nearly none."""
    objective, _ = recorded
    gaps = []
    for j in (8, 0):
        batch = batch_of(torch.zeros(256, 1), torch.randn(256, 1).double())
        _, logs = next(objective.host.step(batch, 0, objective.node(j)))
        gaps.append(float(logs["real_fake_gap"]))
    assert gaps[0] < 0.05 * gaps[1], gaps


def test_p1_step_hands_on_guidance_and_the_hosts_own_count():
    """Guidance 3 is the host's too; its steps count from the end of the recording, whose nodes stay put."""
    path = {"path": Heard(Classes(S, 0.0, 0.1))}
    world = World(DisBack, S, parts=path, host=HOST, record_steps=2, nodes=1, switch_every=1)
    objective, shares, counts = world.objective, [], []
    assert objective.guidance == objective.host.guidance == 3.0
    objective.host.drop_batch_condition = lambda batch, share: shares.append(share) or batch.cond
    step = objective.host.step
    objective.host.step = lambda batch, k, teacher: (counts.append(k), step(batch, k, teacher))[1]
    for k in range(4):
        if k == 1:
            world.critic.backbone.m.data.fill_(0.8)
        for turn in world.turns(k):
            assert turn.player == "critic" or k >= 2
        world.critic.backbone.m.data.add_(1.0)
    assert counts == [0, 1] and shares == [0.1, 0.1]
    assert float(objective.nodes[0][0]) == pytest.approx(0.8), "recorded in the last step of its span"
    objective.guidance = 1.0
    list(objective.step(world.batch, 0))
    assert shares[-1] == 0, "no null condition where guidance is not used"


def test_p1_targets_descend_to_the_teacher():
    """Interval 3, four nodes: 3 3 3 2 2 2 1 1 1 0 0 ... and 0 is the teacher itself."""
    objective = make(record_steps=4, nodes=4, switch_every=3)
    assert [objective.index(4 + i) for i in range(12)] == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    train(objective, 4, {"student": 0.1, "critic": 0.1})
    seen, step = [], objective.host.step
    objective.host.step = lambda batch, k, teacher: (seen.append(teacher), step(batch, k, teacher))[1]
    for i in range(12):
        train(objective, 1, {"student": 1e-3, "critic": 1e-3}, start=4 + i)
        if objective.index(4 + i):
            loaded = [float(p.detach()) for p in objective.path.trainable().values()]
            assert loaded == [float(p) for p in objective.nodes[objective.index(4 + i) - 1]]
    assert [t is objective.teacher for t in seen] == [False] * 9 + [True] * 3


def test_p1_without_nodes_it_is_the_host():
    """N = 0: bit for bit the host method."""
    plain = REGISTRY["diff_instruct"](DisBackConfig(host=HOST).host, players(), rng())
    wrapped = make(record_steps=0, nodes=0)
    for objective in (plain, wrapped):
        train(objective, 12, {"student": 0.05, "critic": 0.05})
    for p, q in zip(plain.student.trainable().values(), wrapped.student.trainable().values()):
        assert torch.equal(p, q)


def test_p1_negative_forward_order_leaves_the_student_where_it_was():
    """The path walked from the teacher to where the student already is."""
    ends = {}
    for way in ("back", "forward"):
        objective = make(record_steps=150, nodes=4, switch_every=20)
        if way == "forward":
            objective.index = lambda k: min((k - 150) // 20, 4)
        train(objective, 150, {"student": 0.05, "critic": 0.04}, num=256)
        train(objective, 300, {"student": 0.02, "critic": 0.05}, start=150, num=256)
        ends[way] = objective.student.backbone.m.item()
    assert abs(ends["back"] - 0.5) < 0.3 and abs(ends["forward"] + 1.0) < 0.5, ends


def student_steps(start, nodes, record, switch):
    """Student updates until KL(student || teacher) < 0.05, from N(start, 0.2^2)."""
    objective = DisBack(
        DisBackConfig(host=HOST, nodes=nodes, record_steps=record, switch_every=switch),
        players(start, 0.2),
        rng(),
    )
    objective.prepare()
    rates = {"student": 0.03, "critic": 0.06}
    optimizers = {
        n: torch.optim.Adam(p.trainable().values(), rates[n], (0.0, 0.99))
        for n, p in objective.players.items()
    }
    for k in range(record + 800):
        train_one(objective, optimizers, k, 128)
        m, s = (p.detach() for p in objective.student.trainable().values())
        if 0.5 * (s**2 + (m - 0.5) ** 2 - 1 - 2 * s.abs().log()) < 0.05:
            return k + 1 - record
    return 800


def test_p1_the_path_saves_student_steps_from_afar_only():
    """Twelve deviations away the recorded path needs fewer student steps; close by it is a detour."""
    assert student_steps(-12.0, 6, 120, 30) < student_steps(-12.0, 0, 0, 1)
    assert student_steps(-1.0, 4, 60, 20) > student_steps(-1.0, 0, 0, 1)


def test_nodes_are_part_of_a_resumed_run():
    objective = make(record_steps=4, nodes=2, switch_every=3)
    train(objective, 4, {"student": 0.1, "critic": 0.1})
    again = make(record_steps=4, nodes=2, switch_every=3)
    for name, tensor in again.state().items():
        tensor.copy_(objective.state()[name])
    for one, other in zip(objective.nodes, again.nodes):
        assert all(torch.equal(p, q) for p, q in zip(one, other))


@pytest.mark.parametrize(
    "cfg,message",
    [
        ({"nodes": 5, "record_steps": 0}, "objective.nodes"),
        ({"nodes": 0, "record_steps": 5}, "objective.nodes"),
        ({"nodes": 9, "record_steps": 5}, "objective.nodes"),
        ({"host": {"name": "consistency"}}, "has no critic"),
        ({"host": {"name": "dmd3"}}, "objective.host.name"),
        ({"host": {"name": "rcm", "dm_weight": 0}}, "trains no critic"),
        ({"host": {"name": "dmd2", "student_every": 0}}, "objective.host.student_every"),
    ],
)
def test_settings_that_make_no_path_are_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        DisBackConfig(**cfg)


@pytest.mark.parametrize(
    "host",
    [
        {"name": "dmd2", "gan_weight": 0.1, "disc_weight": 0.1, "student_every": 1},
        {"name": "swiftbrush"},
        {"name": "dmd", "teacher_steps": 2},
    ],
    ids=lambda h: h["name"],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_around_any_score_distillation(tiny, host, kind):
    """Recording, backtracking and the teacher's turn with each host, on copies and on adapters."""
    from fastgen.config.run import validate
    from fastgen.training.assembly import make_cast
    from tests.objectives.test_contract import batch, play

    cfg = validate(
        {
            "teacher": {"path": str(tiny("sd")), "guidance": 2.0},
            "student": {"kind": kind, "lora": {"rank": 2}},
            "critic": {"lora": {"rank": 2}},
            "objective": {"name": "disback", "record_steps": 2, "nodes": 2, "switch_every": 1, "host": host},
            "data": {"name": "tinted"},
        }
    )
    cast = make_cast(cfg)
    objective = cast.stage(cfg.all_stages()[0], rng())
    objective.prepare()
    one = batch(cast)
    players = [{p for p, _ in play(objective, one, k, check=True)} for k in range(5)]
    assert players[:2] == [{"critic"}] * 2 and all(p == {"student", "critic"} for p in players[2:])
    assert not all(torch.equal(a, b) for a, b in zip(*objective.nodes)), "the nodes differ"


def test_p2_distils_the_mixture(tmp_path):
    objective = {"name": "disback", "record_steps": 40, "nodes": 3, "switch_every": 30}
    objective["host"] = {"name": "diff_instruct", "student_every": 2}
    before, after, *_ = run_mixture(tmp_path, objective, "analytic:gmm2d-edm", steps=300)
    assert after < 0.03 and after < before / 3, (before, after)


def test_p4_disback(tiny, tmp_path):
    replay(
        tiny, tmp_path, {"name": "disback", "record_steps": 1, "nodes": 1, "switch_every": 1, "host": HOST}
    )
