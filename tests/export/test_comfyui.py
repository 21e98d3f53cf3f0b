"""comfyui.json and the LoRA file it names, through a reader of ComfyUI's rules (tests/support/comfyui.py)."""

import dataclasses
import json

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file

from fastgen.export import lora
from fastgen.export.comfyui import FILE, unfit
from fastgen.export.info import read_info
from fastgen.export.load import load_export
from fastgen.sampling.solvers import ImageNoise
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run
from tests.families.cases.image_transformers import flux_folder, sd3_folder
from tests.families.cases.unets import sdxl_folder
from tests.support import comfyui
from tests.support.tiny import PROMPTS, sd_folder

BUILD = {"sd": sd_folder, "sdxl": sdxl_folder, "sd3": sd3_folder, "flux": flux_folder}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            BUILD[name](made[name])
        return made[name]

    return folder


def export(base, out, kind="lora", **student):
    return export_run(make_run(base, kind, out, **student), out / "export", {})


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_reader_knows_every_weight_of_a_unet(name, base):
    """Its names, converted back by diffusers, are the network's own."""
    net = load_export(base(name)).teacher.network.net
    state = comfyui.original_state(net)
    assert len(state) == len(net.state_dict())
    back = convert_ldm_unet_checkpoint(state, dict(net.config))
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_lora_in_comfyui_is_the_student(name, base, tmp_path):
    """Every key is read, and the patched checkpoint is the merged network."""
    folder = export(base(name), tmp_path, num_steps=4)
    nodes = json.loads((folder / FILE).read_text())
    assert comfyui.problems(nodes) == []
    file = folder / nodes["2"]["inputs"]["lora_name"]
    assert file.stem.endswith("-kohya")
    net = load_export(base(name)).teacher.network.net
    names = comfyui.unet_names(net)
    state, dropped = comfyui.patched(comfyui.original_state(net), names, load_file(file))
    assert dropped == []
    lora.merge(net, lora.read_lora(next(folder.glob("*-lora.safetensors")))[0])
    back = convert_ldm_unet_checkpoint(state, dict(net.config))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=1e-4, atol=1e-5)
    peft = load_file(next(folder.glob("*-lora.safetensors")))
    assert len(comfyui.patched(state, names, peft)[1]) == len(peft), "PEFT's names are not read"


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_lora_of_a_transformer_is_read_whole(name, base, tmp_path):
    folder = export(base(name), tmp_path, num_steps=4)
    nodes = json.loads((folder / FILE).read_text())
    assert comfyui.problems(nodes) == []
    keys = load_file(folder / nodes["2"]["inputs"]["lora_name"]).keys()
    assert keys and comfyui.unread_of_transformer(keys) == []
    assert comfyui.unread_of_transformer(["transformer.x_embedder.lora_A.weight"])
    whole = dataclasses.replace(read_info(folder, "test"), student_kind="full")
    assert "never tried" in unfit(load_export(folder).teacher, whole)
    kinds = [node["class_type"] for node in nodes.values()]
    assert ("FluxGuidance" in kinds) == (name == "flux") and "EmptySD3LatentImage" in kinds


@pytest.mark.parametrize("sampler, steps", [("renoise", 4), ("ode", 4), ("renoise", 1)])
@pytest.mark.parametrize("name, kind", [("sd", "lora"), ("sd", "full"), ("sd3", "lora")])
def test_the_workflow_samples_what_fastgen_samples(name, kind, sampler, steps, base, tmp_path):
    """The same noise through ComfyUI's steps at the workflow's levels ends in the student's sample."""
    folder = export(base(name), tmp_path, kind, num_steps=steps, sampler=sampler)
    nodes = json.loads((folder / FILE).read_text())
    assert comfyui.problems(nodes) == []
    loaded = load_export(folder)
    shape, flow = loaded.codec.shape, name == "sd3"
    cond = loaded.codec.prompts(list(PROMPTS))
    num = len(next(iter(cond.values())))
    noise = ImageNoise(list(range(num)), shape)
    wanted = loaded.student.generate(noise.first, cond, noise)
    again = ImageNoise(list(range(num)), shape)
    schedule = loaded.teacher.schedule
    bar = None if flow else loaded.teacher.scheduler.alphas_cumprod.double()
    table = torch.zeros(0) if bar is None else ((1 - bar) / bar).sqrt()

    def network(x, sigma):
        t = sigma if flow else float((table.log() - torch.tensor(sigma).log()).abs().argmin())
        times = torch.full((num,), t, dtype=torch.float64)
        x0 = loaded.role(x, times, cond)
        return schedule.from_x0("flow" if flow else "eps", x0, x, times)

    last = 1.0 if flow else float(table[-1])
    found = comfyui.sample(nodes, network, last, again.first, again, flow)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-3, atol=2e-3)
    wrong = {**nodes, "9": {"class_type": "ManualSigmas", "inputs": {"sigmas": "3.0, 0"}}}
    again = ImageNoise(list(range(num)), shape)
    other = comfyui.sample(wrong, network, last, again.first, again, flow)
    assert (other - wanted).abs().max() > 0.02


@pytest.mark.parametrize("student", [{"timesteps": [625]}, {"sampler": "tcd", "num_steps": 4, "gamma": 0.3}])
def test_no_workflow_that_would_sample_something_else(student, base, tmp_path):
    folder = export(base("sd"), tmp_path, "full", **student)
    assert not (folder / FILE).exists() and FILE not in (folder / "README.md").read_text()


def test_why_there_is_no_workflow(base, tmp_path):
    folder = export(base("sd"), tmp_path, "full", num_steps=2)
    teacher, info = load_export(folder).teacher, read_info(folder, "test")
    assert unfit(teacher, info) == ""
    for change, why in (
        ({"guidance_range": (1.0, 4.0)}, "extra input"),
        ({"times": None}, "no nodes for a teacher"),
        ({"num_students": 2}, "several students"),
        ({"nasa_scale": 1.0}, "negative prompt"),
        ({"teacher_scheduler": {**info.teacher_scheduler, "beta_end": 0.02}}, "noise levels"),
        ({"student_kind": "lora"}, "all adapted layers"),
    ):
        assert why in unfit(teacher, dataclasses.replace(info, **change))


def test_the_card_says_where_the_files_go(base, tmp_path):
    folder = export(base("sd"), tmp_path, num_steps=2)
    info, card = read_info(folder, "test"), (folder / "README.md").read_text()
    assert f"put `{info.kohya}` into its `models/loras`" in card
    whole = export(base("sd"), tmp_path / "full", "full", num_steps=2)
    assert f"`models/diffusion_models` as `{info.name}.safetensors`" in (whole / "README.md").read_text()
    nodes = json.loads((whole / FILE).read_text())
    assert nodes["2"] == {
        "class_type": "UNETLoader",
        "inputs": {"unet_name": f"{info.name}.safetensors", "weight_dtype": "default"},
    }


def test_broken_workflows_are_found(base, tmp_path):
    nodes = json.loads((export(base("sd"), tmp_path, num_steps=2) / FILE).read_text())
    for change in (
        {"10": {"class_type": "SamplerCustom", "inputs": {}}},
        {"11": {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0], "vae": ["1", 2]}}},
        {"12": {"class_type": "NoSuchNode", "inputs": {}}},
    ):
        assert comfyui.problems({**nodes, **change})
