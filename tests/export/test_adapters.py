"""fastgen adapters: what is in a LoRA file, merged into its base, under kohya's names and back."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.cli.adapters import main
from fastgen.export import lora
from fastgen.export.load import load_export
from fastgen.training.exporting import export_run
from tests.export.test_plain_diffusers import make_run, ours
from tests.support.replay import plainly
from tests.support.tiny import PROMPTS


@pytest.fixture(scope="module")
def export(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    return export_run(make_run(tiny("sd"), "lora", out, num_steps=2), out / "export", {})


def file_of(export, kohya=False):
    return next(f for f in export.glob("*.safetensors") if f.stem.endswith("-kohya") == kohya)


def test_list_says_what_a_file_is(export, tiny, capsys):
    assert main(["list", str(export)]) == 0
    text = capsys.readouterr().out
    assert text.count("layers of") == 2, "the PEFT file and its kohya twin"
    assert "rank 4, float32" in text and "peft names" in text and "kohya names" in text
    assert f"dmd2 student of {tiny('sd')}, 2 steps with LCMScheduler" in text
    assert len(load_file(file_of(export))) // 2 == int(text.split(" layers")[0].split()[-1])


def test_merge_is_the_student_without_an_adapter(export, tmp_path):
    assert main(["merge", str(export), "--out", str(tmp_path / "merged")]) == 0
    whole, adapted = load_export(tmp_path / "merged"), load_export(export)
    assert whole.role.adapter is None and whole.student.times == adapted.student.times
    prompts = list(PROMPTS)
    torch.testing.assert_close(ours(whole, prompts), ours(adapted, prompts), rtol=0, atol=2e-4)
    base = ours(adapted.reference(), prompts)
    assert (base - ours(whole, prompts)).abs().max() > 1e-2
    assert "from_pretrained" in (tmp_path / "merged/README.md").read_text()


def test_kohya_and_back_is_the_same_adapter(export, tiny, tmp_path):
    kohya, peft = tmp_path / "k.safetensors", tmp_path / "p.safetensors"
    assert main(["convert", str(export), "--to", "kohya", "--out", str(kohya)]) == 0
    twin, made = load_file(file_of(export, kohya=True)), load_file(kohya)
    assert made.keys() == twin.keys() and all(torch.equal(made[k], twin[k]) for k in made)
    back = ["convert", str(kohya), "--to", "peft", "--base", str(tiny("sd")), "--out", str(peft)]
    assert main(back) == 0
    first, again = (lora.read_lora(f)[0] for f in (file_of(export), peft))
    assert first.keys() == again.keys()
    for name in first:
        torch.testing.assert_close(lora.delta(*again[name]), lora.delta(*first[name]))


def test_kohya_s_alpha_is_its_strength(export, tiny, tmp_path):
    """alpha half the rank: half the update, merged and converted alike."""
    tensors = load_file(file_of(export, kohya=True))
    weak = {k: v / 2 if k.endswith(".alpha") else v for k, v in tensors.items()}
    save_file(weak, tmp_path / "weak.safetensors")
    base = ["--base", str(tiny("sd"))]
    assert main(["convert", str(tmp_path / "weak.safetensors"), "--to", "peft", *base,
                 "--out", str(tmp_path / "p.safetensors")]) == 0  # fmt: skip
    full, half = (lora.read_lora(f)[0] for f in (file_of(export), tmp_path / "p.safetensors"))
    for name in full:
        torch.testing.assert_close(2 * lora.delta(*half[name]), lora.delta(*full[name]))
    assert main(["merge", str(tmp_path / "weak.safetensors"), *base, "--out", str(tmp_path / "m")]) == 0
    merged, plain = (
        load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (tmp_path / "m", tiny("sd"))
    )
    name = next(iter(half))
    torch.testing.assert_close(merged[f"{name}.weight"] - plain[f"{name}.weight"], lora.delta(*half[name]),
                               rtol=1e-3, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("list", "nowhere"), "nowhere does not exist"),
        (("list", "{sd}"), "holds no LoRA file"),
        (("list", "{sd}/unet/diffusion_pytorch_model.safetensors"), "holds no LoRA"),
        (("merge", "{lora}"), "--out: none given"),
        (("merge", "{kohya}", "--out", "m"), "does not name its base"),
        (("merge", "{kohya}", "--base", "{sana}", "--out", "m"), "has no layer for 'lora_unet_"),
        (("convert", "{lora}", "--out", "x.safetensors"), "--to: none given"),
        (("convert", "{lora}", "--to", "peft", "--out", "x.safetensors"), "has peft names already"),
        (("convert", "{kohya}", "--to", "peft", "--out", "x.safetensors"), "--base: none given"),
        (("convert", "{lora}", "--to", "kohya", "--out", "x.bin"), "give a .safetensors file"),
        (("difference", "{lora}", "--out", "x.safetensors"), "give two"),
        (("difference", "{lora}", "{kohya}", "--out", "x.safetensors"), "has kohya names"),
    ],
)
def test_mistakes_are_one_line(export, tiny, argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"sd": tiny("sd"), "sana": tiny("sana"), "lora": file_of(export), "kohya": file_of(export, True)}
    assert main([a.format(**places) for a in argv]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


STACKED = """
import torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
images = []
both = ["start", "added"]
for names, weights in ((["tuned"], [1.0]), (both, [1.0, 1.0]), (both, [1.0, 0.5])):
    pipe.unload_lora_weights()
    for name in names:
        pipe.load_lora_weights(".", weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(names, weights)
    seed = torch.Generator().manual_seed(3)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "pt"}
    images.append(pipe("a red dress", generator=seed, **call).images.float())
images = torch.cat(images)
"""


def test_the_difference_stacked_on_the_start_is_the_tuned_adapter(export, tiny, tmp_path):
    """Of other ranks, with set_adapters as users stack a LoRA on a distilled one; at half weight half-way."""
    start = lora.read_lora(file_of(export))[0]
    tuned = {n: (torch.cat([a, a]), torch.cat([1.5 * b, 0.5 * b.flip(1)], 1)) for n, (a, b) in start.items()}
    lora.write_peft(tmp_path / "start.safetensors", start, "unet", {})
    lora.write_peft(tmp_path / "tuned.safetensors", tuned, "unet", {})
    names = [str(tmp_path / f"{n}.safetensors") for n in ("tuned", "start", "added")]
    assert main(["difference", *names[:2], "--out", names[2]]) == 0
    images = plainly(f"BASE = {str(tiny('sd'))!r}\n" + STACKED, tmp_path)
    assert (images[0] - images[1]).abs().max() < 1e-3
    assert (images[0] - images[2]).abs().max() > 1e-3, "the negative"


def style_lora(base, file):
    """A LoRA of two kinds of layers, as users make one with peft: plain denoising of one picture."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    unet, noising = pipe.unet.requires_grad_(False), DDPMScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_v"]))
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], 0.1)
    with torch.no_grad():
        cond, _ = pipe.encode_prompt(["a red dress"] * 4, "cpu", 1, False)
    x0 = torch.full((4, unet.config.in_channels, *2 * [unet.config.sample_size]), 0.8)
    for _ in range(8):
        noise, t = torch.randn_like(x0), torch.randint(1000, (4,))
        eps = unet(noising.add_noise(x0, noise, t), t, cond).sample
        optimizer.zero_grad()
        (eps - noise).square().mean().backward()
        optimizer.step()
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(file.parent, layers, weight_name=file.name)
    return lora.read_lora(file)[0]


def test_a_style_lora_stacks_on_the_distilled_one(export, tiny, tmp_path):
    """By set_adapters, a user's LoRA of the base at half weight is half its update beside the whole of ours;
    it has fewer layers and another rank.
    """
    distilled = lora.read_lora(file_of(export))[0]
    style = style_lora(tiny("sd"), tmp_path / "added.safetensors")
    assert style.keys() < distilled.keys()
    both = dict(distilled)
    for name, (a, b) in style.items():
        both[name] = torch.cat([both[name][0], a]), torch.cat([both[name][1], 0.5 * b], 1)
    lora.write_peft(tmp_path / "start.safetensors", distilled, "unet", {})
    lora.write_peft(tmp_path / "tuned.safetensors", both, "unet", {})
    images = plainly(f"BASE = {str(tiny('sd'))!r}\n" + STACKED, tmp_path)
    assert (images[0] - images[2]).abs().max() < 1e-3
    assert (images[0] - images[1]).abs().max() > 1e-3, "the negative: at whole weight"
