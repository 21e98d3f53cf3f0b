"""LoRA files of others are read at the strength that PEFT gives them; ours bring their teacher's settings."""

import json
import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fastgen.core.errors import UserError
from fastgen.export import lora
from fastgen.export.load import load_export
from fastgen.networks.load import load_teacher
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "alpha_pattern": {"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 12, "to_v": 2}},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_v": 2}, "use_rslora": True},
    "regex": {"r": 4, "lora_alpha": 4, "alpha_pattern": {r"mid_block\..*": 20}},
}


def with_adapter(folder, config):
    """(network with an adapter of PEFT, its config)."""
    net = load_teacher(str(folder)).backbone.net
    torch.manual_seed(0)
    made = LoraConfig(init_lora_weights=False, target_modules=["to_q", "to_v"], **config)
    inject_adapter_in_model(made, net, adapter_name="default")
    return net.eval(), made


def output(net):
    generator = torch.Generator().manual_seed(1)
    x, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        return net(x, 500, states).sample


def plain(config: LoraConfig) -> dict:
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


@pytest.mark.parametrize("layout", ["diffusers", "adapter", "peft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_strength_is_peft_s(tiny, tmp_path, name, layout):
    net, config = with_adapter(tiny("sd"), CONFIGS[name])
    state = {k: v.contiguous() for k, v in get_peft_model_state_dict(net).items()}
    file = tmp_path / "adapter_model.safetensors"
    if layout == "diffusers":  # the pipeline's save_lora_weights
        packed = {f"unet.{k}": v for k, v in plain(config).items()}
        described = {"lora_adapter_metadata": json.dumps(packed, default=str)}
        save_file({f"unet.{k}": v for k, v in state.items()}, file, metadata=described)
    elif layout == "adapter":  # the network's save_lora_adapter
        save_file(state, file, metadata={"lora_adapter_metadata": json.dumps(plain(config), default=str)})
    else:  # PeftModel.save_pretrained
        save_file({f"base_model.model.{k}": v for k, v in state.items()}, file)
        (tmp_path / "adapter_config.json").write_text(json.dumps(plain(config), default=str))
        assert lora.find_lora(tmp_path) == file
    base = load_teacher(str(tiny("sd"))).backbone.net
    before = output(base)
    lora.merge(base, lora.read_lora(file)[0])
    torch.testing.assert_close(output(base), output(net), rtol=1e-4, atol=1e-5)
    assert (output(base) - before).abs().max() > 1e-2


def test_rslora_divides_by_the_root_of_the_rank(tiny, tmp_path):
    net, config = with_adapter(tiny("sd"), CONFIGS["rslora"])
    packed = json.dumps({f"unet.{k}": v for k, v in plain(config).items()}, default=str)
    state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(net).items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": packed})
    layers, _ = lora.read_lora(tmp_path / "a.safetensors")
    name, (_, b) = next(iter(layers.items()))
    torch.testing.assert_close(b, state[f"unet.{name}.lora_B.weight"] * 4 / math.sqrt(4))


@pytest.mark.parametrize("wrong", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_alpha": "x"}])
def test_an_adapter_that_is_more_than_b_a_is_refused(tiny, tmp_path, wrong):
    net, config = with_adapter(tiny("sd"), CONFIGS["plain"])
    packed = json.dumps({f"unet.{k}": v for k, v in (plain(config) | wrong).items()}, default=str)
    state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(net).items()}
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": packed})
    with pytest.raises(UserError):
        lora.read_lora(tmp_path / "a.safetensors")


def test_a_file_for_the_text_encoder_too_is_refused(tiny, tmp_path):
    net, _ = with_adapter(tiny("sd"), CONFIGS["plain"])
    state = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(net).items()}
    state |= {k.replace("unet.", "text_encoder."): v.clone() for k, v in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="also adapts a text encoder"):
        lora.read_lora(tmp_path / "a.safetensors")


# -- what our own files remember ----------------------------------------------------------------------------
SIZE = {"height": 24, "width": 40}


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_export_is_sampled_as_it_was_trained(tiny, tmp_path, kind, rslora):
    """Size and strength come back from the folder, from the file alone, and for the teacher compared with."""
    run = make_run(
        tiny("sd"), kind, tmp_path, lora={"rank": 4, "lora_alpha": 4, "use_rslora": rslora}, teacher=SIZE
    )
    folder = export_run(run, tmp_path / "export", {})
    student = run.cast.parts["student"]
    paths = [folder]
    if kind == "lora":
        paths.append(tmp_path / "moved.safetensors")
        paths[1].write_bytes(next(folder.glob("*-lora.safetensors")).read_bytes())
    x, t = torch.randn(1, 4, 12, 20), torch.tensor([500.0], dtype=torch.float64)
    for path in paths:
        loaded = load_export(path)
        assert loaded.codec.pixels == (24, 40) and loaded.reference().codec.pixels == (24, 40)
        cond = loaded.codec.prompts(["a red dress"])
        with torch.no_grad():
            torch.testing.assert_close(loaded.role.raw(x, t, cond), student.raw(x, t, cond))


def test_an_export_remembers_the_embedded_guidance(tmp_path):
    from tests.families.cases import CASES

    CASES["lcm"].build(tmp_path / "lcm")
    run = make_run(tmp_path / "lcm", "lora", tmp_path, teacher={"embedded_guidance": 3.0})
    folder = export_run(run, tmp_path / "export", {})
    assert load_export(folder).codec.guidance == 3.0
    assert load_teacher(str(tmp_path / "lcm")).codec.guidance == 8.0


def test_recorded_settings_are_known_ones(tiny, tmp_path):
    folder = export_run(make_run(tiny("sd"), "lora", tmp_path), tmp_path / "export", {})
    file = next(folder.glob("*-lora.safetensors"))
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        header = dict(handle.metadata())
    info = json.loads(header["fastgen"]) | {"teacher_settings": {"path": "elsewhere"}}
    save_file(load_file(file), file, metadata=header | {"fastgen": json.dumps(info)})
    with pytest.raises(UserError, match="teacher_settings"):
        load_export(file)
