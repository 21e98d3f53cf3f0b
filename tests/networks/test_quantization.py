"""A quantised base under adapters: rounding, gradients, exports, memory and what is refused.

The first half needs no package; the rest runs where torchao and bitsandbytes are installed (`.[quant]`).
"""

import copy
import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.export.lora import shape_of
from fastgen.families.parts import Parts
from fastgen.networks import quantization
from fastgen.networks.load import load_teacher
from fastgen.networks.quantization import (
    LIBRARY,
    layers_to_quantize,
    quantize,
    quantized_bytes,
    stored_tensors,
)
from fastgen.networks.weights_digest import weights_digest
from fastgen.training.assembly import make_cast
from fastgen.training.memory import estimate

ERROR = {"int8": 0.01, "fp8": 0.04, "nf4": 0.3}
"""of one pass of the SANA mini, relative; measured .0027, .0114 and .24"""
there = {k: importlib.util.find_spec(lib) is not None for k, lib in LIBRARY.items()}
needs = [
    pytest.param(k, marks=pytest.mark.skipif(not there[k], reason=f"needs {LIBRARY[k]}")) for k in LIBRARY
]


def settings(kind: str | None = "int8", teacher: str = "tinted-sana", student: dict | None = None):
    values = {
        "teacher": {"path": f"assets:teachers/{teacher}", "guidance": 2.0, "quantization": kind},
        "student": {"kind": "lora", **(student or {})},
        "objective": {"name": "lcm"},
        "data": {"name": "tinted"},
    }
    return validate(values)


@pytest.fixture(autouse=True)
def installed(monkeypatch, request):
    """The checks of a config speak before the library is needed."""
    if "kind" not in request.fixturenames:
        monkeypatch.setattr(quantization, "check_library", lambda kind: None)
        monkeypatch.setattr("fastgen.training.checks.check_library", lambda kind: None)


def test_inner_linear_layers_and_no_others():
    teacher = load_teacher("assets:teachers/tinted-sana").network
    teacher.add_adapter("student", 4, 4, teacher.family.lora_targets)
    layers = layers_to_quantize(teacher.family, teacher.net)
    names = {n.replace(".base_layer", "") for n in layers}
    assert names and all(n.startswith("transformer_blocks.") for n in names)
    assert not any("lora_" in n or "norm" in n for n in layers)
    assert all(
        isinstance(v, nn.Linear) and v.weight.numel() >= quantization.SMALLEST for v in layers.values()
    )


def test_every_part_of_a_denoiser_of_several_networks():
    """Two experts hold layers of the same names."""
    base = load_teacher("assets:teachers/tinted-sana").network
    both = Parts(transformer=base.net, transformer_2=copy.deepcopy(base.net))
    layers = layers_to_quantize(base.family, both)
    assert len(layers) == 2 * len(layers_to_quantize(base.family, base.net))
    assert all(both.get_submodule(name) is layer for name, layer in layers.items())


def test_memory_of_a_base_that_is_still_to_be_quantised():
    totals = {k: estimate(make_cast(settings(k), "meta"), settings(k).train) for k in (None, "int8", "nf4")}
    base = load_teacher("assets:teachers/tinted-sana").network
    layers = layers_to_quantize(base.family, base.net).values()
    for kind in ("int8", "nf4"):
        saved = sum(v.weight.numel() * 4 - quantized_bytes(v, kind) for v in layers)
        assert totals[None].total - totals[kind].total == pytest.approx(saved)
    one = nn.Linear(128, 64)
    assert quantized_bytes(one, "int8") == 128 * 64 + 64 * 4
    assert quantized_bytes(one, "nf4") == 128 * 64 / 2 + 128 * 4


@pytest.mark.parametrize(
    ("teacher", "student", "text"),
    [
        ("tinted-sana", {"kind": "full"}, "with a full student, whose weights are trained"),
        ("tinted-sd", {"guidance_embedding": (1.0, 4.0)}, "with a student with a further input"),
    ],
)
def test_what_needs_full_weights_is_refused(teacher, student, text):
    with pytest.raises(UserError, match=f"teacher.quantization: found 'int8' {text}"):
        make_cast(settings(teacher=teacher, student=student), "meta")


def test_four_bits_are_refused_where_a_method_differentiates_forwards():
    cfg = settings("nf4").model_copy(update={"objective": validate({"objective": {"name": "scm"}}).objective})
    with pytest.raises(
        UserError, match="'nf4' with scm, which differentiates the network forwards; use int8"
    ):
        make_cast(cfg, "meta")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="int8 needs torchao, which is not installed; pip install"):
        quantization.check_library("int8")


@pytest.mark.parametrize("kind", needs)
def test_rounded_once_and_trained_through(kind):
    """The pass is near the full one, every adapter gets a gradient, and the base is as small as foretold."""
    torch.manual_seed(0)
    teacher = load_teacher("assets:teachers/tinted-sana")
    base, codec = teacher.network, teacher.codec
    base.requires_grad_(False)
    base.add_adapter("student", 4, 4, base.family.lora_targets)
    x, t, cond = torch.randn(2, *codec.shape), torch.full((2,), 0.5, dtype=torch.float64), codec.null(2)
    full, digest, layers = (
        base.raw(x, t, cond),
        weights_digest(teacher),
        layers_to_quantize(base.family, base.net),
    )
    foretold = sum(quantized_bytes(v, kind) for v in layers.values())
    quantize(base.family, base.net, kind, "cpu")
    rounded = base.raw(x, t, cond)
    assert 0 < (rounded - full).norm() < ERROR[kind] * full.norm()
    assert torch.equal(rounded, base.raw(x, t, cond))
    stored = [base.net.get_submodule(n).weight for n in layers]
    size = sum(s.numel() * s.element_size() for w in stored for s in stored_tensors(w.data))
    packed = sum(v.in_features * v.out_features for v in layers.values()) / 2
    assert size == packed if kind == "nf4" else size == pytest.approx(foretold, rel=0.02)
    assert weights_digest(teacher) != digest
    adapters = {n: p for n, p in base.net.named_parameters() if "lora_" in n}
    with base.using("student"):
        for p in adapters.values():
            p.requires_grad_(True)
        base.raw(x, t, cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapters.items() if "lora_B" in n)
    assert not any(p.requires_grad for n, p in base.net.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("kind", needs)
def test_a_run_exports_the_same_sort_of_file(kind, tmp_path):
    from fastgen.cli.train import main

    flags = [
        "--method",
        "lcm",
        "--teacher",
        "tinted-sana",
        "--teacher.quantization",
        kind,
        "--max_steps",
        "2",
    ]
    more = ["--eval.num_samples", "0", "--train.num_threads", "1", "--output_dir", str(tmp_path / "run")]
    assert main([*flags, *more]) == 0
    (file,) = (tmp_path / "run/export").glob("*-lora.safetensors")
    layers = {k.rpartition(".lora_")[0].partition(".")[2] for k in load_file(file)}
    names = {n for n, _ in shape_of(load_teacher("assets:teachers/tinted-sana").network.net).named_modules()}
    assert layers and layers <= names and all(v.dtype == torch.float32 for v in load_file(file).values())
