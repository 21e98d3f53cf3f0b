"""Validation during a run and everything after it: table, export, report."""

import torch

from fastgen.ema import swapped


class Validator:
    """Placeholder until measuring lands."""

    def __init__(self, cfg, cast, folder):
        self.cfg, self.cast, self.folder = cfg, cast, folder

    def __call__(self, trainer):
        from PIL import Image

        from fastgen.samplers import sample_teacher

        cast, folder = self.cast, self.folder
        codec = cast.teacher.codec
        role = cast.parts["student"]
        n = 40
        noise = torch.randn(n, *codec.shape, generator=torch.Generator().manual_seed(0))
        if hasattr(codec, "prompts"):
            from fastgen.datasets import all_captions

            caps = all_captions()
            cond = codec.prompts([caps[(i * 37) % len(caps)] for i in range(n)])
        else:
            cond = codec.labels(torch.arange(n) % codec.num_classes)
        with swapped(role.trainable(), trainer.ema.averages[trainer.ema.decays[0]]):
            w = self.cfg.teacher.guidance
            x = sample_teacher(role, noise, cond, {k: v for k, v in codec.null(n).items()}, 20, w)
        im = codec.decode(x)
        im = im.reshape(4, 10, *im.shape[1:]).permute(0, 3, 1, 4, 2).reshape(4 * im.shape[2], 10 * im.shape[3], im.shape[1])
        arr = (im * 255).byte().numpy()
        (folder / "samples").mkdir(exist_ok=True)
        Image.fromarray(arr[..., 0] if arr.shape[2] == 1 else arr).save(folder / f"samples/{trainer.step:06d}.png")


def finish(trainer):
    from fastgen.export import export_folder

    cast = trainer.cast
    role = cast.parts["student"]
    with swapped(role.trainable(), trainer.ema.averages[trainer.ema.decays[0]]):
        export_folder(cast.teacher, role.backbone.net, trainer.folder / "export", cast.teacher.scheduler, cast.teacher.info, torch.float16)
