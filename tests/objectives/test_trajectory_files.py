"""Teacher trajectories on disk: read again, resumed, and refused where they are of anything else."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.diffusion.schedules import Flow
from fastgen.objectives.accvideo import AccVideo, AccVideoConfig
from fastgen.objectives.shared.trajectory_files import marks
from fastgen.roles.heads import LevelHeads
from fastgen.roles.roles import Student, StudentSpec
from tests.objectives.test_accvideo import make
from tests.support.toys import CountingRole, GaussianNet, batch_of, gaussian_role, rng


def counting(S):
    return CountingRole(GaussianNet(S, 0.5, 0.3).requires_grad_(False))


def walked(folder, batch, teacher=None, guidance=1.0, **cfg):
    """(losses of a step, the teacher's calls) of an objective that keeps its trajectories in a folder."""
    S = Flow()
    teacher = teacher or counting(S)
    objective = make(S, teacher=teacher, guidance=guidance, trajectories=str(folder), **cfg)
    return [float(loss.detach()) for loss, _ in objective.step(batch, 0)], len(teacher.calls)


def labelled(num=4, offset=0, dim=2):
    batch = batch_of(torch.zeros(num, dim))
    batch.cond = {"class_labels": torch.arange(num) + offset}
    batch.uncond = {"class_labels": torch.zeros(num).long()}
    return batch


def test_trajectories_are_read_again_and_a_killed_run_lacks_only_its_last_batch(tmp_path):
    whole, first = labelled(8), labelled(4)
    assert walked(tmp_path, first)[1] == 8
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    again, calls = walked(tmp_path, first)
    assert calls == 0 and again == walked(tmp_path / "fresh", first)[0]
    assert walked(tmp_path, whole)[1] == 8, "four of eight were missing"
    losses, calls = walked(tmp_path, whole)
    assert calls == 0 and losses == pytest.approx(walked(tmp_path / "other", whole)[0], rel=1e-6)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": gaussian_role(Flow(), 0.5, 0.31)}, "teacher ("),
        ({"guidance": 2.0}, "guidance (1 there, 2 here)"),
        ({"teacher_steps": 12}, "teacher_steps (8 there, 12 here)"),
        ({"steps": 2}, "times (1, 0.75, 0.5, 0.25 there, 1, 0.5 here)"),
    ],
    ids=["teacher", "guidance", "teacher_steps", "times"],
)
def test_trajectories_of_something_else_are_refused_by_name(tmp_path, change, named):
    walked(tmp_path, labelled(), teacher_steps=8)
    with pytest.raises(UserError) as error:
        walked(tmp_path, labelled(), **{"teacher_steps": 8, **change})
    text = str(error.value)
    assert text.startswith("objective.trajectories: ") and named in text and "\n" not in text
    assert "name another folder" in text


def test_settings_are_compared_before_any_weight_is_there(tmp_path):
    walked(tmp_path, labelled())
    S = Flow()
    parts = {
        "student": Student(GaussianNet(S, 0.0, 1.0), None, StudentSpec(S.steps(4), "ode")),
        "heads": LevelHeads(),
    }
    parts["teacher"] = gaussian_role(S, 0.5, 0.3)
    AccVideo(AccVideoConfig(trajectories=str(tmp_path / "none"), teacher_steps=12), parts, rng())
    assert not (tmp_path / "none").exists(), "a dry run writes nothing"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="objective.trajectories: .*file is a file"):
        AccVideo(
            AccVideoConfig(trajectories=str(tmp_path / "file"), teacher_steps=12), parts, rng()
        ).prepare()
    with pytest.raises(UserError, match="teacher_steps"):
        AccVideo(AccVideoConfig(trajectories=str(tmp_path), teacher_steps=12), parts, rng())


@pytest.mark.parametrize(
    ("batch", "named"),
    [(labelled(offset=1), "another condition"), (labelled(dim=3), "x0 (2,), here it is (3,)")],
)
def test_trajectories_of_other_rows_are_refused(tmp_path, batch, named):
    walked(tmp_path, labelled())
    with pytest.raises(UserError) as error:
        walked(tmp_path, batch)
    assert named in str(error.value)


def test_conditions_are_told_apart_and_rounding_is_not():
    torch.manual_seed(0)
    text = torch.randn(3, 7, 16)
    text[1, 2] = torch.randn(16)
    one = marks({"text": text}, {}, 3)
    near = marks({"text": text.bfloat16().float()}, {}, 3)
    assert ((one - near).norm(dim=1) < 0.02 * one.norm(dim=1)).all()
    text[1, 2] = text[1, 2].flip(0)  # one token of seven
    other = marks({"text": text}, {}, 3)
    apart = (one - other).norm(dim=1) / one.norm(dim=1)
    assert apart[1] > 0.05 and apart[0] == apart[2] == 0
    classes = marks({"class_labels": torch.arange(1000)}, {}, 1000)
    gap = torch.cdist(classes.double(), classes.double()) + torch.eye(1000) * 10
    assert (gap.min(1).values > 0).all() and float((classes[100] - classes[101]).norm()) > 0.1


def test_a_damaged_file_is_collected_again(tmp_path, capsys):
    walked(tmp_path, labelled())
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    assert walked(tmp_path, labelled())[1] == 8
    assert "objective.trajectories: " in capsys.readouterr().err
    assert walked(tmp_path, labelled())[1] == 0
    (tmp_path / "trajectories.json").unlink()
    with pytest.raises(UserError, match="holds files and no trajectories.json"):
        walked(tmp_path, labelled())
