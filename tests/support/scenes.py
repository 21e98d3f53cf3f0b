"""Exact teachers of scenes: for each camera the image of a scene, give or take Gaussian noise."""

from types import SimpleNamespace

import torch
import yaml

from fastgen.cli.train import main
from fastgen.core.batch import Batch
from fastgen.diffusion.schedules import VP, expand
from fastgen.networks.denoiser import Denoiser
from fastgen.roles.roles import Role, Student, StudentSpec
from fastgen.threed.cameras import Cameras, Ranges, random_cameras
from fastgen.threed.gaussians import SH, GaussianAsset
from fastgen.threed.student import AssetStudent


def blobs(seed=0):
    """An asset of three coloured Gaussians, as a scene."""
    scene = GaussianAsset(3, seed=seed)
    scene.put("means", torch.tensor([[0.35, 0, 0.1], [-0.3, 0.3, -0.2], [-0.2, -0.35, 0.25]]))
    scene.put("log_scales", torch.tensor([[0.25, 0.2, 0.3], [0.22] * 3, [0.3, 0.18, 0.2]]).log())
    scene.put("logits", torch.full((3,), 3.0))
    scene.put("sh", (torch.tensor([[[0.9, 0.2, 0.1]], [[0.1, 0.8, 0.3]], [[0.2, 0.3, 0.95]]]) - 0.5) / SH)
    return scene.requires_grad_(False)


class Solids:
    """A solid as a scene."""

    def __init__(self, solid):
        self.solid = solid

    def render(self, cameras, size, background):
        return SimpleNamespace(rgb=self.solid.render(cameras, size, background, samples=1))


SIZE, RED, BLUE = 24, (0.92, 0.18, 0.18), (0.2, 0.3, 0.94)


class SceneTeacher(Denoiser):
    """D of N(image of the scene from cond["camera"], std^2 I); with cond["prompt"] [B] the second scene where
    it is 1. Images in [-1, 1] over the grey that the student draws.
    """

    prediction = "x0"

    def __init__(self, schedule, scenes=None, std=0.05, grey=0.5):
        super().__init__()
        self.schedule, self.std, self.grey = schedule, std, grey
        self.scenes = [blobs()] if scenes is None else scenes

    def images(self, cond):
        cameras = Cameras.of(cond["camera"])
        which = cond.get("prompt", torch.zeros(len(cameras))).long()
        grey = torch.full((len(cameras), 3), self.grey)
        every = torch.stack([scene.render(cameras, SIZE, grey).rgb for scene in self.scenes])
        return 2 * every[which, torch.arange(len(cameras))] - 1

    def forward(self, x_t, t, cond):
        a, s = (expand(v, x_t) for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
        mean = self.images(cond)
        return (mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x_t - a * mean)).float()

    raw = forward


class GreyBehind(AssetStudent):
    """Assets over one grey, so that a teacher knows the background."""

    def behind(self, z):
        return torch.full((len(z), 3), 0.5)


def asset_student(assets, schedule=None):
    """A student over assets in pixels."""
    schedule = schedule or VP.scaled_linear()
    net = GreyBehind(assets, lambda images: images, schedule, SIZE)
    return Student(net, None, StudentSpec([schedule.steps(1)[0]]))


def seen_from(num, k, prompt=None):
    """A batch of random views, always the same for one k."""
    generator = torch.Generator().manual_seed(k)
    cameras = random_cameras(num, Ranges(), generator)
    cond = {"camera": cameras.rows()}
    null = dict(cond)
    if prompt is not None:
        cond["prompt"], null["prompt"] = torch.full((num,), prompt), torch.full((num,), 1 - prompt)
    noise = torch.randn(num, 3, SIZE, SIZE, generator=generator)
    return Batch(None, cond, null, noise, torch.arange(num), critic_cond={"c2w": cameras.c2w.flatten(1)})


def fitted(objective, steps, batch=4, lr=0.02, prompt=None):
    """The student's net after training on random views; the critic, if any, stays."""
    optimizer = torch.optim.Adam(objective.student.trainable().values(), lr, betas=(0.9, 0.99))
    for k in range(steps):
        objective.rng.reset(k)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 * (1 - k / steps))
        loss, _ = next(objective.step(seen_from(batch, k, prompt), k))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return objective.student.backbone


@torch.no_grad()
def psnr(net, teacher, prompt=None, num=8):
    """Of the assets' renders against the teacher's images, from cameras that nothing was trained on."""
    batch = seen_from(num, 10**6, prompt)
    t = torch.full((num,), net.schedule.steps(1)[0], dtype=torch.float64)
    x = net(batch.noise * net.schedule.prior_std(float(t[0])), t, batch.cond)
    error = (x - teacher.images(batch.cond)).square().mean() / 4
    return float(-10 * error.log10())


def role(net):
    return Role(net.requires_grad_(False))


def run_assets(tiny, folder, values, *more):
    """Exit code of a run of 3D assets into a folder, from a tiny text-to-image teacher."""
    teacher = {"path": str(tiny("sd")), "guidance": 2.0, "num_steps": 2}
    file = folder.parent / "one.yaml"
    file.write_text(yaml.safe_dump({"teacher": teacher, **values}))
    return main(["--config", str(file), "--output_dir", str(folder), *more])
