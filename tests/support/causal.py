"""Exact Gaussian chains, linear students that make them frame by frame, and small causal Wan students."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from fastgen.config.run import validate
from fastgen.diffusion.schedules import Flow, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.roles.causal import CausalStudent
from fastgen.roles.roles import StudentSpec
from fastgen.training.assembly import make_cast
from fastgen.training.exporting import export_run
from tests.support.clips import clip_teacher
from tests.support.replay import moved


class Chain(Denoiser):
    """Exact denoiser of a centred Gaussian over the frames of clips [B, 1, F], covariance L L^T learnable."""

    prediction = "x0"

    def __init__(self, covariance, schedule=None):
        super().__init__()
        self.schedule = schedule or Flow()
        self.L = nn.Parameter(torch.linalg.cholesky(covariance.double()))

    def forward(self, x_t, t, cond):
        a, s = (f(t).double()[:, None, None] for f in (self.schedule.alpha, self.schedule.sigma))
        covariance = self.L @ self.L.T
        noised = a**2 * covariance + s**2 * torch.eye(len(covariance), dtype=torch.float64)
        return a * torch.linalg.solve(noised, x_t.double().transpose(1, 2)).transpose(1, 2) @ covariance

    raw = forward


def chain_covariance(frames, phi):
    """Of the stationary AR(1) chain x_f = phi x_{f-1} + sqrt(1 - phi^2) z with unit variance."""
    f = torch.arange(frames).double()
    return phi ** (f[:, None] - f).abs()


class Linear(Denoiser):
    """A student of chains: D = (1 - t) x + t (own x + back x_prev), x_prev the frame before as the pass shows
    it, or the last one in the cache; the very first frame is (1 - t) x + t first x.
    """

    prediction = "x0"

    def __init__(self, first=1.0, own=1.0, back=0.0, schedule=None):
        super().__init__()
        self.schedule, self.now, self.seen = schedule or Flow(), None, []
        for name, value in (("first", first), ("own", own), ("back", back)):
            setattr(self, name, nn.Parameter(torch.tensor(float(value), dtype=torch.float64)))

    @contextmanager
    def causally(self, now):
        self.now = now
        try:
            yield
        finally:
            self.now = None

    def forward(self, x_t, t, cond):
        now, x = self.now, x_t.double()
        self.seen.append((x_t, t, torch.is_grad_enabled(), now))
        now.per_frame = 1
        frames = x.transpose(1, 2)[..., None]  # as keys are: [B, F, 1, 1]
        if now.write:
            now.written.append((frames.detach(), frames.detach()))
        held = now.past[0][0] if now.past else frames[:, :0]
        every = torch.cat([held, frames], 1)[..., 0].transpose(1, 2)
        made = self.own * every[..., 1:] + self.back * every[..., :-1]
        made = torch.cat([self.first * every[..., :1], made], 2)[..., -x.shape[2] :]
        t = expand(t, x).double()
        return (1 - t) * x + t * made

    raw = forward


def linear_student(times=(1.0,), window=0, **start):
    return CausalStudent(Linear(**start), None, StudentSpec(times, block=1, window=window))


def causal_cast(folder, objective, kind="full", patch=3, **student):
    """A cast over a tiny Wan teacher of 9 latent frames in 3 blocks, its student's weights moved."""
    values = {
        "teacher": {"path": str(clip_teacher(folder / "teacher", patch=patch)), "guidance": 2.0},
        "student": {"kind": kind, "num_steps": 2, "causal": {"block": 3}, "lora": {"rank": 2}, **student},
        "critic": {"lora": {"rank": 2}},
        "objective": objective,
        "data": {"name": "moving"},
    }
    cfg = validate(values)
    return cfg, moved(make_cast(cfg), 0.03)


def causal_export(folder, objective, kind="full"):
    """(the export of such a student, its cast)."""
    cfg, cast = causal_cast(folder, objective, kind)
    run = SimpleNamespace(cast=cast, train_cfg=cfg.train, step=1, example="", enlarges=0, folder=folder)
    return export_run(run, folder / "export", {}), cast


PLAIN = """
import json, torch, diffusers
from block_causal import generate
info = json.load(open("fastgen.json"))["export"]
pipe = diffusers.WanPipeline.from_pretrained(BASE or ".", torch_dtype=torch.float32)
if BASE:
    pipe.load_lora_weights(".", weight_name=info["lora"])
call = lambda **more: generate(pipe, PROMPTS, generator=[torch.Generator().manual_seed(s) for s in (11, 12)],
                               output_type="pt", **more).float().transpose(1, 2)
images = torch.cat([call(), call(num_frames=18), call(num_frames=18, window=2)], 2)
try:
    call(num_frames=10)
except ValueError as error:
    assert "whole blocks of 3" in str(error), error
else:
    raise AssertionError("ten frames are no whole blocks")
"""
"""9 frames, 18 with the window as trained, and 18 with a shorter one"""


def check_plain(folder, cast, kind):
    """Plain diffusers with the export's own loop against ours, at both lengths; the negatives too."""
    from fastgen.cli.sample import Generator, draw
    from fastgen.data import moving
    from fastgen.export.load import load_export
    from tests.support.replay import plainly

    prompts = moving.captions([0, 1], "heldout")
    base = cast.teacher_cfg.path if kind == "lora" else ""
    theirs = plainly(f"PROMPTS, BASE = {prompts!r}, {base!r}\n" + PLAIN, folder).split([9, 18, 18], 2)
    size = {"num_frames": 18}
    for asked, window, clip in zip(({}, size, size), (3, 3, 2), theirs):
        loaded = load_export(str(folder), size=asked)
        loaded.role = loaded.role.with_window(window)
        cond = loaded.codec.prompts(prompts)
        ours = draw(Generator(loaded, 0, 1.0, {}), cond, [11, 12], 2)[0]
        assert (clip - ours).abs().max() < 1e-3, (asked, window)
    assert (theirs[1] - theirs[2]).abs().max() > 1e-3, "the window does not show"
    untrained = load_export(cast.teacher_cfg.path)
    untrained.role = cast.student.with_network(untrained.role)
    other = draw(Generator(untrained, 0, 1.0, {}), cond, [11, 12], 2)[0]
    assert (theirs[0] - other).abs().max() > 1e-2, "the teacher's weights in the student's place"
