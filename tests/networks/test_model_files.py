"""What a model folder's files say beyond their weights: variants, shards, quantisation, the autoencoder's
statistics and precision, schedules without signal at their end.
"""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.core.errors import UserError
from fastgen.export.load import load_export
from fastgen.families.parts import cast_network, compute_dtype
from fastgen.networks.load import load_teacher
from fastgen.networks.schedulers import load_scheduler, schedule_of
from fastgen.networks.weight_files import check_indexes, component_dtype, drop_variant, variants
from tests.families.cases import CASES

MEAN, STD = [-1.6, 1.9, -1.4, 2.5], [8.5, 5.9, 6.5, 5.2]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of a tiny teacher, by name, or of a case of the battery."""

    def copied(name: str):
        if name in ("sd", "flow", "sana"):
            return shutil.copytree(tiny(name), tmp_path / name)
        CASES[name].build(tmp_path / name)
        return tmp_path / name

    return copied


def to_variant(folder, variant: str = "fp16", keep: bool = False) -> None:
    """Store every weight file as a half-precision variant."""
    for file in list(folder.rglob("*.safetensors")):
        state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(state, file.with_name(f"{file.stem}.{variant}.safetensors"), metadata={"format": "pt"})
        if not keep:
            file.unlink()


# -- weight files -------------------------------------------------------------------------------------------
def test_a_variant_is_read_where_it_is_all_there_is(folder):
    path = folder("sd")
    full = load_teacher(str(path)).backbone.net.state_dict()
    to_variant(path)
    found = load_teacher(str(path)).backbone.net.state_dict()
    assert all(torch.equal(found[k], v.half().float()) for k, v in full.items())
    load_teacher(str(path), weights=False)


def test_full_weights_are_preferred_to_a_variant(folder):
    path = folder("sd")
    full = load_teacher(str(path)).backbone.net.state_dict()
    to_variant(path, keep=True)
    found = load_teacher(str(path)).backbone.net.state_dict()
    assert all(torch.equal(found[k], v) for k, v in full.items())


def test_of_unknown_variants_none_is_guessed(folder):
    path = folder("sd")
    to_variant(path, "ema", keep=True)
    to_variant(path / "unet", "non_ema", keep=True)
    for file in (path / "unet").glob("diffusion_pytorch_model.safetensors"):
        file.unlink()
    for file in (path / "unet").glob("*.ema.non_ema.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="variants ema, non_ema"):
        load_teacher(str(path))


def test_names_of_variants_and_shards():
    base = "diffusion_pytorch_model"
    names = [
        f"{base}.safetensors",
        f"{base}.fp16.safetensors",
        f"{base}.safetensors.index.fp16.json",
        f"{base}.fp16-00001-of-00002.safetensors",
        f"{base}-00002-of-00002.fp16.safetensors",
        f"{base}-00001-of-00003.safetensors",
        "config.json",
    ]
    found = variants(names)
    assert set(found) == {None, "fp16"}
    assert len(found["fp16"]) == 4 and len(found[None]) == 2


def test_an_index_must_name_files_of_its_own_folder(folder):
    path = folder("sd")
    file = path / "unet/diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(load_file(file), shard)
    file.rename(file.with_name(shard))
    index = file.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    load_teacher(str(path))
    gone = "diffusion_pytorch_model-00002-of-00002.safetensors"
    for name, message in (("../" + shard, "is not inside of it"), (gone, "has no file")):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weight_map, name)}))
        for weights in (True, False):
            with pytest.raises(UserError, match=message):
                load_teacher(str(path), weights=weights)


def test_every_index_is_checked_and_read_within_bounds(folder):
    """Also the one of a variant that is not read, and of its name a second spelling."""
    part = folder("sd") / "unet"
    for name in ("x.safetensors.index.fp16.json", "x.safetensors.index.json", "pytorch_model.bin.index.json"):
        for text, said in (("[]", "no JSON object"), ("{}", "has no weight_map"), ("[" * 9999, "too deeply")):
            (part / name).write_text(text)
            with pytest.raises(UserError, match=said):
                check_indexes(part, None, "key")
        (part / name).write_text(json.dumps({"weight_map": {"a": "../x"}}))
        with pytest.raises(UserError, match="is not inside of it"):
            check_indexes(part, None, "key")
        (part / name).unlink()
    (part / "x.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": {"a": "x"}}))
    check_indexes(part, None, "key")
    with pytest.raises(UserError, match="has no file 'x'"):
        check_indexes(part, "fp16", "key")


def test_an_exported_component_needs_no_variant(folder):
    path = folder("sd") / "vae"
    to_variant(path)
    drop_variant(path)
    assert (path / "diffusion_pytorch_model.safetensors").is_file()
    diffusers.AutoencoderKL.from_pretrained(path)


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_quantised_weights_are_refused_by_name(folder, part):
    path = folder("sd")
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(path / part / "config.json", quantization_config=quantised)
    with pytest.raises(UserError, match=f"{part} is stored quantised \\(bitsandbytes\\)"):
        load_teacher(str(path))


def test_a_single_file_is_told_how_to_convert(folder, tmp_path, monkeypatch):
    path = folder("sd")
    (tmp_path / "models").mkdir()
    shutil.copy(path / "unet/diffusion_pytorch_model.safetensors", tmp_path / "models/a.safetensors")
    monkeypatch.chdir(tmp_path)
    for name in ("models/a.safetensors", str(tmp_path / "models/a.safetensors")):
        with pytest.raises(UserError, match="single-file checkpoint.*from_single_file"):
            load_teacher(name)
    with pytest.raises(UserError, match="does not exist"):
        load_teacher("models/b.safetensors")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "unet", "scheduler"])
def test_a_missing_component_is_named(folder, part):
    path = folder("sd")
    shutil.rmtree(path / part)
    with pytest.raises(UserError, match=part):
        load_teacher(str(path))


def test_a_class_conditional_teacher_needs_its_autoencoder(folder):
    path = folder("dit")
    shutil.rmtree(path / "vae")
    with pytest.raises(UserError, match="no subfolder 'vae'"):
        load_teacher(str(path))


# -- the autoencoder ----------------------------------------------------------------------------------------
def test_sdxl_latents_are_normalised_per_channel(folder):
    path = folder("sdxl")
    edit(path / "vae/config.json", latents_mean=MEAN, latents_std=STD, scaling_factor=0.5, shift_factor=3.0)
    codec = load_teacher(str(path)).codec
    x = torch.randn(2, *codec.shape)
    mean, std = (torch.tensor(v).reshape(1, 4, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(codec.family.denormalise(codec.vae, x), x * std / 0.5 + mean)
    torch.testing.assert_close(codec.family.normalise(codec.vae, x), (x - mean) * 0.5 / std)


def test_sd_and_sd3_apply_what_their_pipelines_do(folder):
    """StableDiffusionPipeline reads scaling_factor alone, StableDiffusion3Pipeline the shift too."""
    sd, sd3 = folder("sd"), folder("sd3")
    for path in (sd, sd3):
        edit(path / "vae/config.json", scaling_factor=0.5, shift_factor=3.0)
    for path, shift in ((sd, 0.0), (sd3, 3.0)):
        codec = load_teacher(str(path)).codec
        x = torch.randn(2, *codec.shape)
        torch.testing.assert_close(codec.family.denormalise(codec.vae, x), x / 0.5 + shift)
        torch.testing.assert_close(codec.family.normalise(codec.vae, x), (x - shift) * 0.5)


def test_an_autoencoder_that_overflows_float16_stays_in_float32(folder):
    path = folder("sdxl")
    file = path / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for side in ("encoder", "decoder"):
        for name in ("weight", "bias"):
            state[f"{side}.conv_in.{name}"] *= 2e5
    save_file(state, file, metadata={"format": "pt"})
    for dtype in ("fp16", None):
        codec = load_teacher(str(path), dtype=dtype).codec
        assert codec.vae.dtype == torch.float32
        with torch.autocast("cpu", torch.float16):
            decoded = codec.decode(torch.randn(1, *codec.shape))
            assert decoded.isfinite().all() and codec.encode(decoded * 2 - 1).isfinite().all()
    assert load_teacher(str(path), dtype="bf16").codec.vae.dtype == torch.bfloat16
    half = load_teacher(str(path), dtype="fp16")
    assert compute_dtype(half.backbone.net) == torch.float16
    kinds = diffusers.AutoencoderKL, diffusers.AutoencoderDC
    assert component_dtype({"force_upcast": False}, kinds[0], torch.float16) == torch.float16
    assert [component_dtype({}, kind, torch.float16) for kind in kinds] == [torch.float32, torch.float16]


# -- precision ----------------------------------------------------------------------------------------------
def test_what_a_class_keeps_in_float32_does_not_tell_the_dtype(folder):
    net = load_teacher(str(folder("wan")), dtype="bf16").backbone.net
    first = next(net.parameters())
    assert first.dtype == torch.float32 and compute_dtype(net) == torch.bfloat16
    assert cast_network(net, torch.float16) is net and compute_dtype(net) == torch.float16
    assert next(net.parameters()).dtype == torch.float32


def test_an_export_is_sampled_in_the_precision_asked_for(folder):
    loaded = load_export(str(folder("wan"))).to("cpu", torch.bfloat16)
    net = loaded.role.backbone.net
    assert compute_dtype(net) == torch.bfloat16 and next(net.parameters()).dtype == torch.float32


# -- schedules ----------------------------------------------------------------------------------------------
ZERO = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}


def test_noise_prediction_at_zero_snr_is_read_without_it(capsys):
    scheduler = load_scheduler({**ZERO, "prediction_type": "epsilon"})
    schedule, kind = schedule_of(scheduler)
    assert "rescale_betas_zero_snr is left out" in capsys.readouterr().err
    assert not scheduler.config.rescale_betas_zero_snr and float(scheduler.alphas_cumprod[-1]) > 1e-6
    last = torch.tensor([schedule.t_max], dtype=torch.float64)
    x0 = schedule.to_x0(kind, torch.randn(1, 4), torch.randn(1, 4), last)
    assert x0.isfinite().all() and x0.abs().max() < 1e4


def test_velocity_prediction_keeps_zero_snr(capsys):
    schedule, kind = schedule_of(load_scheduler({**ZERO, "prediction_type": "v_prediction"}))
    assert not capsys.readouterr().err
    last = torch.tensor([schedule.t_max], dtype=torch.float64)
    v, x = torch.randn(1, 4), torch.randn(1, 4)
    torch.testing.assert_close(schedule.to_x0(kind, v, x, last), -v, rtol=1e-3, atol=1e-3)


def test_noise_prediction_without_any_signal_is_refused(capsys):
    betas = [0.1, 0.5, 1.0]
    scheduler = diffusers.DDPMScheduler(trained_betas=betas, num_train_timesteps=3)
    with pytest.raises(UserError, match="terminal SNR of zero"):
        schedule_of(scheduler)
    schedule_of(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    assert "terminal SNR nearly zero" in capsys.readouterr().err
