"""Bad inputs for whole commands: command lines and files that are wrong in every way we know."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import BaseModel

MODEL_FILES = ("fastgen.json", "model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
SHAPES = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "binary": b"\xff\x80\x00",
    "cut off": b'{"a": ',
    "deep": b'{"a": ' + b"[" * 100_000,
    "large": b'{"a": "' + b"x" * 20_000_000 + b'"}',
    "a class of another kind": b'{"_class_name": "DiffusionPipeline", "export": {"lora": "../../x"}}',
    "lists for all": b'{"_class_name": [], "export": [], "unet": 3, "patch": [], "num_classes": {}}',
}
MODEL_INDEX_MAY = ("a class of another kind", "lists for all")
"""what an index without other parts may hold: its class is looked up, not required"""
YAML = {
    "a key twice": "train: {seed: 1, seed: 2}",
    "a section twice": "train: {seed: 1}\ntrain: {log_steps: 2}",
    "alias bomb": "a0: &x0 [a,a,a,a,a,a,a,a,a]\n"
    + "\n".join(f"a{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 9)),
    "merge bomb": "a0: &x0 {a: 1}\n"
    + "\n".join(f"a{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 9)}]}}" for i in range(1, 9)),
    "alias in itself": "a: &a [*a]",
    "deep": "[" * 10_000,
    "code": "a: !!python/object/apply:os.system ['true']",
    "a list": "- 1",
    "a word": "words",
    "two documents": "train: {seed: 1}\n---\ntrain: {seed: 2}",
    "cut off": "train: {",
    "tab": "train:\n\tseed: 1",
    "a date for a number": "train: {seed: 2024-01-01}",
    "a time for a number": "train: {seed: 12:30:00}",
    "unknown key": "train: {sed: 1}",
    "unknown section": "trian: {seed: 1}",
    "text for a section": "train: 3",
    "null for a section": "train: null",
    "its own base": "base: bad.yaml",
    "a base that is missing": "base: nowhere.yaml",
}
BYTES = {
    "UTF-16": "train: {seed: 1}".encode("utf-16"),
    "binary": b"\x00\xff",
    "large": b"# " + b"x" * 2_000_000,
}
VALUES = (
    "nan",
    "inf",
    "-1",
    "1e999",
    "9" * 400,
    "x",
    "",
    "[",
    "[1, 2]",
    "null",
    "{a: 1, a: 2}",
    "../..",
    "0x10",
)
SAMPLE = {
    "device": ("foo", "cuda:99", "meta"),
    "seed": ("-1", "x", "18446744073709551616", "1.5"),
    "labels": ("x", "10", "-1", "1180591620717411303424", "0-99999999999", "3-1", "1,,2"),
    "num_images": ("-1", "x", "1000000000000"),
    "steps": ("-1", "x", "1000000000"),
    "batch_size": ("0", "-1", "x"),
    "guidance": ("nan", "inf", "x"),
    "dtype": ("fp64", ""),
    "prompts": ("{w}/nothing", "{w}"),
    "image": ("{w}/nothing",),
    "out": ("/proc/x", "{w}/file/x", "{w}/file"),
    "model": ("{w}/nothing", "{w}", "{w}/file", "assets:../x", "assets:teachers/x", "a/b", ""),
    "base": ("{w}/nothing",),
    "teacher_steps": ("-1", "x"),
    "nasa_scale": ("-1", "nan"),
}
HARMLESS = ("base", "nasa_scale", "teacher_steps", "num_images", "guidance", "device")
"""flags that a plain teacher may ignore, or values that another machine takes"""


@dataclass
class Attack:
    """One command; `prepare` makes its files. Unless `may_pass`, it must be refused."""

    name: str
    command: str
    argv: list[str]
    prepare: Callable[[], object] = dict
    may_pass: bool = False


def bad_inputs(folder: Path, teacher: Path) -> Iterator[Attack]:
    """Every attack, its files under `folder`; `teacher` is a small model folder that works."""
    (folder / "file").write_text("x")
    fast = ["--config", str(folder / "fast.yaml")]
    yield from _models(folder, teacher)
    for name, data in {**{k: v.encode() for k, v in YAML.items()}, **BYTES}.items():
        config = folder / "bad.yaml"
        argv = [*fast, str(config), "--output_dir", str(folder / "run")]
        yield Attack(f"YAML: {name}", "train", argv, partial(config.write_bytes, data))
    for key, value in ((k, v) for k in _numbers() for v in VALUES):
        argv = [*fast, key, value, "--dry_run", "--output_dir", str(folder / "run")]
        yield Attack(f"train {key} {value[:20]}", "train", argv, may_pass=True)
    base = {"--model": str(teacher), "--num_images": "1", "--steps": "1", "--out": str(folder / "out")}
    for flag, values in SAMPLE.items():
        for value in values:
            given = base | {f"--{flag}": value.format(w=folder)}
            argv = [f"{k}={v}" for k, v in given.items()]
            yield Attack(f"sample --{flag} {value[:30]}", "sample", argv, may_pass=flag in HARMLESS)


def _models(folder: Path, teacher: Path) -> Iterator[Attack]:
    for file in MODEL_FILES:
        for shape, data in SHAPES.items():
            broken = folder / "broken"

            def write(broken=broken, file=file, data=data) -> None:
                shutil.rmtree(broken, ignore_errors=True)
                shutil.copytree(teacher, broken)
                (broken / file).write_bytes(data)

            argv = ["--model", str(broken), "--num_images", "1", "--steps", "1", "--out", str(folder / "out")]
            passes = file == "model_index.json" and shape in MODEL_INDEX_MAY
            yield Attack(f"{file}: {shape}", "sample", argv, write, passes)


def _numbers() -> list[str]:
    """Flags of the config's numbers in the sections that every run has."""
    from fastgen.config.run import RunConfig

    found = []
    for name in ("teacher", "student", "train", "eval", "data"):
        section = RunConfig.model_fields[name].annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        for key, field in section.model_fields.items():
            if any(kind in str(field.annotation) for kind in ("int", "float")):
                found.append(f"--{name}.{key}")
    return found


CHECKPOINT_JSON = {name: SHAPES[name] for name in ("empty", "a list", "null", "a number", "binary", "deep")}


def damages(checkpoint: Path) -> dict[str, Callable[[], object]]:
    """Ways to damage a checkpoint: name -> what does it."""
    weights, meta = checkpoint / "state.safetensors", checkpoint / "state.json"
    whole = weights.read_bytes()
    size = len(whole)
    found: dict[str, Callable[[], object]] = {}
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        found[f"weights cut at {share:.1%}"] = partial(weights.write_bytes, whole[: int(size * share)])
    for share in (0.0, 0.0001, 0.2, 0.4, 0.6, 0.8, 0.9999):
        found[f"one bit at {share:.2%}"] = partial(weights.write_bytes, _flip(whole, share))
    found["weights missing"] = weights.unlink
    found["weights zero"] = partial(weights.write_bytes, bytes(size))
    found["weights longer"] = partial(weights.write_bytes, whole + bytes(100))
    for name, data in CHECKPOINT_JSON.items():
        found[f"state.json {name}"] = partial(meta.write_bytes, data)
    found["state.json missing"] = meta.unlink
    for key in json.loads(meta.read_text()):
        found[f"state.json without {key}"] = partial(_without, meta, key)
    for name in _names(whole)[:: max(1, len(_names(whole)) // 6)]:
        found[f"weights without {name}"] = partial(_without_tensor, weights, name)
    return found


def _flip(data: bytes, share: float) -> bytes:
    at = min(int(len(data) * share), len(data) - 1)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _without(meta: Path, key: str) -> None:
    document = json.loads(meta.read_text())
    document.pop(key)
    meta.write_text(json.dumps(document))


def _names(data: bytes) -> list[str]:
    length = int.from_bytes(data[:8], "little")
    return sorted(n for n in json.loads(data[8 : 8 + length]) if n != "__metadata__")


def _without_tensor(weights: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors.pop(name)
    save_file(tensors, weights)
