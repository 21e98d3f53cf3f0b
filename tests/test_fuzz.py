"""Generated inputs: whatever is in a file or on the command line, fastgen ends in a value or in one line that
names the setting, within seconds and a gigabyte.

50 inputs by default, 2,000 with `-m slow`.
"""

import importlib.util
import json
import resource
import shutil
import struct
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen.cli.train import _flags
from fastgen.config.run import RunConfig, load
from fastgen.core.errors import UserError
from fastgen.core.yaml_text import dump_yaml

SECONDS, BYTES = 10, 2**30
SMALL, LARGE = 10, 400
"""inputs of each of the five tests below, by default and in the slow group"""


def budget(num: int):
    """Hypothesis' settings for `num` inputs, the same ones every time."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=num, deadline=None, derandomize=True, database=None, suppress_health_check=checks
    )


@contextmanager
def bounded():
    """UserErrors are fine; anything else, ten seconds of processor time or a gigabyte more memory is not."""
    usage = Path("/proc/self/statm")
    now = int(usage.read_text().split()[0]) * resource.getpagesize() if usage.exists() else 0
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if now:
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, limits[1]))
    start = time.process_time()
    try:
        yield
    except UserError as error:
        assert "MemoryError" not in str(error) and len(str(error)) < 3000
        assert "\ud800" not in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < SECONDS


# -- strategies
NAMES = [*RunConfig.model_fields, "name", "path", "lr", "seed", "kind", "base", "net", "blueprint", "<<"]
HOSTILE_TEXT = st.sampled_from(
    ["", "~", "no", "yes", "1e-4", "1e999", "-1", "nan", ".inf", "9" * 400, "010", "12:30:00", "2024-01-01"]
    + [
        "../..",
        "/",
        "\0",
        "\x1b[31m",
        "\u202e",
        "<script>",
        "assets:../x",
        "configs:../x",
        "analytic:",
        "a\nb",
    ]
    + ["*x", "&x [*x]", "!!python/name:os.system", "{", "[", "[[[", "- - -", "? ", "%YAML 9.9", "|", ">", "'"]
    + ["dmd2", "sft", "lora", "assets:teachers/digits", "[1, 2]", "{a: 1, a: 2}", "null"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE_TEXT | st.text(max_size=20)


def trees(keys):
    """JSON values with these keys in their objects."""
    return st.recursive(
        LEAVES, lambda t: st.lists(t, max_size=4) | st.dictionaries(keys, t, max_size=4), max_leaves=12
    )


KEYS = st.sampled_from(NAMES) | st.text(max_size=8)
YAML_WORDS = st.sampled_from(list("{}[]:,&*!?|>%@`'\"#-\n\t ") + [": ", "- ", "\n  ", "*a ", "&a ", "<<: "])
YAML_TEXT = st.one_of(
    st.binary(max_size=200),
    st.lists(YAML_WORDS | st.sampled_from(NAMES) | HOSTILE_TEXT, max_size=60).map(
        lambda words: "".join(words).encode("utf-8", "surrogatepass")
    ),
    st.dictionaries(KEYS, trees(KEYS), max_size=5).map(lambda t: json.dumps(t).encode()),
    st.integers(1, 40).flatmap(
        lambda n: st.just(
            ("a: &a0 [x]\n" + "".join(f"b{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(n))).encode()
        )
    ),
)


def yaml_files(num):
    @budget(num)
    @given(YAML_TEXT)
    def check(data):
        file = Path("fuzz.yaml")
        file.write_bytes(data)
        with bounded():
            cfg = load([str(file)], [])
            assert isinstance(cfg, RunConfig) and dump_yaml(cfg.model_dump(mode="json"))

    return check


def keys_of(model, prefix: str = "--") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and hasattr(inner, "model_fields")
        found += keys_of(inner, f"{prefix}{name}.") if nested else [prefix + name]
    return found


FLAGS = keys_of(RunConfig) + [
    "--objective.name",
    "--stages.0.name",
    "--resume",
    "--config",
    "--help",
    "--",
    "-",
]
WORDS = st.sampled_from(FLAGS) | HOSTILE_TEXT.filter(lambda t: "\0" not in t) | st.text(max_size=12)


def command_lines(num):
    @budget(num)
    @given(st.lists(WORDS, max_size=8))
    def check(words):
        from fastgen.cli import conditions, evaluate, sample

        with bounded():
            known, rest = _flags().parse_known_args(words)
            assert isinstance(load(known.config, rest), RunConfig)
        for command in (sample.flags(), evaluate.flags()):
            with bounded():
                try:
                    parsed = command.parse_args(
                        ["--model", "x", *words] if command.prog == "sample.py" else words
                    )
                except SystemExit as left:
                    assert left.code in (0, 2)
                    continue
                if getattr(parsed, "labels", "").count("-") == 0:
                    conditions.parse_labels(getattr(parsed, "labels", "") or "0")

    return check


MODEL_FILES = ("fastgen.json", "model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
MODEL_KEYS = st.sampled_from(
    [
        "_class_name",
        "export",
        "patch",
        "num_classes",
        "class_names",
        "unet",
        "vae",
        "scheduler",
        "lora",
        "times",
    ]
    + [
        "students",
        "sampler",
        "family",
        "measure",
        "height",
        "sample_size",
        "in_channels",
        "block_out_channels",
    ]
    + ["down_block_types", "num_train_timesteps", "prediction_type", "beta_schedule", "sigma_min", "shift"]
    + ["../x", "weight_map", "teacher_scheduler", "architectures", "text_encoder", "_name_or_path"]
)


def metadata(num, folder: Path):
    from fastgen.export.load import load_export

    kept = {name: (folder / name).read_bytes() for name in MODEL_FILES}

    @budget(num)
    @given(
        st.sampled_from(MODEL_FILES),
        st.dictionaries(MODEL_KEYS, trees(MODEL_KEYS), max_size=3),
        st.booleans(),
        st.none() | st.binary(max_size=60),
    )
    def check(name, changes, whole, raw):
        base = {} if whole else json.loads(kept[name])
        text = raw if raw is not None else json.dumps(base | changes).encode()
        (folder / name).write_bytes(text)
        try:
            with bounded():
                assert load_export(str(folder)).role is not None
        finally:
            (folder / name).write_bytes(kept[name])

    return check


def headers(num, folder: Path):
    """Headers of adapters: the JSON that a safetensors file carries about itself."""
    from safetensors.torch import save_file

    from fastgen.export.load import load_export

    layer = {f"unet.conv_in.lora_{m}.weight": torch.zeros(2, 2) for m in "AB"}
    values = trees(MODEL_KEYS).map(json.dumps) | HOSTILE_TEXT | st.just("[" * 100_000)

    @budget(num)
    @given(st.dictionaries(st.sampled_from(["fastgen", "lora_adapter_metadata"]), values), st.booleans())
    def check(header, cut):
        file = folder / "x-lora.safetensors"
        save_file(layer, file, metadata=header or None)
        if cut:
            file.write_bytes(file.read_bytes()[:-9])
        with bounded():
            load_export(str(file), str(folder))

    return check


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = st.builds(
    lambda w, h, depth, colour, body, more: (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
        + b"".join(chunk(k, d) for k, d in more)
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    ),
    st.sampled_from([0, 1, 3, 8, 20_000, 2**31 - 1, 2**32 - 1]),
    st.sampled_from([0, 1, 3, 8, 20_000, 2**31 - 1]),
    st.integers(0, 17),
    st.integers(0, 7),
    st.binary(max_size=40) | st.integers(0, 200_000).map(lambda n: zlib.compress(bytes(n))),
    st.lists(
        st.tuples(
            st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"iCCP"]),
            st.binary(max_size=40) | st.just(b"a\0\0" + zlib.compress(bytes(10_000_000))),
        ),
        max_size=2,
    ),
)
MAGIC = [
    b"\xff\xd8\xff\xe1",
    b"GIF89a",
    b"RIFF\x20\x00\x00\x00WEBPVP8 ",
    b"BM",
    b"II*\x00",
    b"\x00\x00\x00\x0cjP  ",
]
PICTURES = PNG | st.builds(lambda a, b: a + b, st.sampled_from(MAGIC), st.binary(max_size=120))


def pictures(num, folder: Path):
    from fastgen.data.media import read_image

    @budget(num)
    @given(PICTURES, st.sampled_from([".png", ".jpg", ".webp"]))
    def check(data, suffix):
        file = folder / f"fuzz{suffix}"
        file.write_bytes(data)
        with bounded(), suppress(OSError):  # named and skipped, or fatal, by data.on_bad_image
            assert read_image(file, (3, 16, 16)).shape == (3, 16, 16)

    return check


def run(kind: str, num: int, tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if kind in ("metadata", "headers"):
        shutil.copytree(tiny("flow"), tmp_path / "t")
        {"metadata": metadata, "headers": headers}[kind](num, tmp_path / "t")()
    elif kind == "pictures":
        if importlib.util.find_spec("fastgen.data.pictures") is None:
            pytest.skip("pictures are not read within bounds yet")
        pictures(num, tmp_path)()
    else:
        {"yaml": yaml_files, "command lines": command_lines}[kind](num)()


KINDS = ("yaml", "command lines", "metadata", "headers", "pictures")


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_inputs(kind, tiny, tmp_path, monkeypatch):
    run(kind, SMALL, tiny, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs(kind, tiny, tmp_path, monkeypatch):
    run(kind, LARGE, tiny, tmp_path, monkeypatch)
