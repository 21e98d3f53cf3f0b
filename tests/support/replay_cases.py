"""Sample exports with diffusers alone: python replay_cases.py CASES.json OUT.safetensors (no fastgen)."""

import json
import os
import sys

import torch


class Blocked:
    """Import hook: this script must work on a machine that has never heard of fastgen."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastgen":
            raise ImportError("fastgen may not be imported here")
        return None


sys.meta_path.insert(0, Blocked())


def generators(seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def pipeline_images(case):
    """Text to image: from_pretrained, load_lora_weights, one call."""
    import diffusers

    kind = getattr(diffusers, case["pipeline"])
    pipe = kind.from_pretrained(case.get("base") or case["folder"], torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if case.get("lora"):
        cls = getattr(diffusers, case["scheduler"])
        override = case.get("override", {})
        pipe.scheduler = cls.from_pretrained(case["folder"], subfolder="scheduler", **override)
        pipe.load_lora_weights(case["folder"], weight_name=case["lora"])
    elif case.get("override"):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **case["override"])
    images = pipe(
        case["prompts"],
        generator=generators(case["seeds"]),
        guidance_scale=1.0,
        output_type="pt",
        **case["call"],
        **case.get("step", {}),
    ).images
    return images.float()


def loop_images(case):
    """UNet2DModel: what its pipeline lacks, written out."""
    import diffusers

    net = diffusers.UNet2DModel.from_pretrained(case["folder"], subfolder="unet", torch_dtype=torch.float32)
    cls = getattr(diffusers, case["scheduler"])
    scheduler = cls.from_pretrained(case["folder"], subfolder="scheduler", **case.get("override", {}))
    streams = generators(case["seeds"])

    def randn():
        return torch.stack([torch.randn(case["shape"], generator=g) for g in streams])

    labels = torch.tensor(case["labels"])
    edm = case["scheduler"].startswith("EDM")
    x = randn() * (scheduler.config.sigma_max if edm else 1.0)
    with torch.no_grad():
        if case.get("times"):  # EDM with fresh noise between steps
            for i, sigma in enumerate(case["times"]):
                c_noise = scheduler.precondition_noise(sigma)
                out = net(scheduler.precondition_inputs(x, sigma), c_noise, class_labels=labels).sample
                x = scheduler.precondition_outputs(x, out, sigma)
                if i + 1 < len(case["times"]):
                    x = x + case["times"][i + 1] * randn()
        else:
            call = dict(case["call"])
            if edm and "sigmas" in call:
                call["sigmas"] = torch.tensor(call["sigmas"])
            scheduler.set_timesteps(**call)
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(x, t) if edm else x
                out = net(scaled, t, class_labels=labels).sample
                x = scheduler.step(out, t, x, generator=streams, **case.get("step", {})).prev_sample
    x = torch.pixel_shuffle(x, case["patch"]) if case["patch"] > 1 else x
    return (x / 2 + 0.5).clamp(0, 1)


def snippet_image(case):
    """The model card's own code, run where a reader would run it."""
    import numpy

    here = os.getcwd()
    os.chdir(case["folder"])
    try:
        names = {}
        exec(compile(case["code"], "README.md", "exec"), names)  # noqa: S102
    finally:
        os.chdir(here)
    pixels = numpy.atleast_3d(numpy.array(names["image"]))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255.0


def main():
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    runs = {"pipeline": pipeline_images, "loop": loop_images, "snippet": snippet_image}
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    save_file({c["name"]: runs[c["how"]](c).contiguous() for c in cases}, sys.argv[2])
    assert "fastgen" not in sys.modules


if __name__ == "__main__":
    main()
