"""The page of runs on many cards: what a process holds and receives."""

from pathlib import Path

import pytest

from fastgen.config.run import validate
from fastgen.training import scale
from fastgen.training.assembly import make_cast
from fastgen.training.memory import estimate, models

PAGE = (Path(__file__).resolve().parents[2] / "docs/scale.md").read_text()


def cast_of(kind, guidance=1.0):
    values = {
        "teacher": {"path": "assets:teachers/tinted-sd", "guidance": guidance},
        "objective": {"name": "dmd2", "gan_weight": 0.0, "student_every": 5},
        "student": {"kind": kind},
    }
    cast = make_cast(validate(values), "meta")
    return cast, estimate(cast, validate(values).train).rows


def test_one_process_holds_all_and_receives_nothing():
    cast, rows = cast_of("full")
    assert scale.share(cast, rows, 1, 1) == scale.Share(sum(rows.values()), 0.0)


def test_whole_networks_exchange_gradients_alone():
    """A ring sends and receives a mean twice: 2 (n - 1) / n of its bytes; a student's every fifth step."""
    cast, rows = cast_of("full")
    student = critic = rows["gradients"] / 2
    assert scale.share(cast, rows, 1, 4).received == pytest.approx(2 * 0.75 * (student / 5 + critic))


def test_parts_by_hand():
    """Student passes 1.2 of a step (one with a gradient in five), teacher .2, critic .2 and 1 with a
    gradient; one with a gradient gathers twice and scatters once.
    """
    cast, rows = cast_of("full")
    calls = scale._calls(cast)
    net = rows["gradients"] / 2
    size = {"student": net, "critic": net, "teacher": scale._spread(cast.teacher.backbone)}
    gathered = sum(size[n.split("+")[0]] * (2 if "+" in n else 1) * c for n, c in calls.items())
    scattered = net * sum(c for n, c in calls.items() if "+" in n)
    found = scale.share(cast, rows, 4, 4)
    assert found.received == pytest.approx(0.75 * (gathered + scattered))
    assert scale.share(cast, rows, 4, 8).received == pytest.approx(
        0.75 * (gathered + scattered) + 2 * 0.5 * scattered / 4
    )
    fixed = sum(list(rows.values())[:-1])
    vae = scale._spread(cast.teacher.codec.vae)
    block = max(scale._blocks(cast))
    assert found.held == pytest.approx((fixed - vae) / 4 + vae + 2 * block + list(rows.values())[-1])


def test_adapters_stay_whole():
    """Gradients, Adam's two states, the average and the adapters themselves: five times their size."""
    cast, rows = cast_of("lora")
    held = [scale.share(cast, rows, n, n).held for n in (2, 4)]
    base = scale._spread(cast.teacher.backbone)
    assert held[0] - held[1] == pytest.approx(base / 4, rel=0.02)
    assert min(held) > 2.5 * rows["gradients"]


def test_the_page_has_every_model_twice():
    lines = [x for x in PAGE.splitlines() if x.startswith("| [")]
    assert [x.partition("]")[0].removeprefix("| [") for x in lines] == [n for n in models() for _ in range(2)]
    assert scale.HEAD in PAGE


def test_the_page_is_current():
    assert scale.row("sd15", "full") in PAGE.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", models())
def test_the_whole_page_is_current(name, kind):
    assert scale.row(name, kind) in PAGE.splitlines()
