"""YAML of configs: bounded, no key twice, and no surprises of YAML 1.1."""

import os
import time

import pytest
import yaml

from fastgen.config.parse import overrides, read_files
from fastgen.config.run import RunConfig, dump, load, validate
from fastgen.core.errors import UserError
from fastgen.core.yaml_text import MAX_BYTES, MAX_NODES, dump_yaml, parse_yaml

SFT = {"objective": {"name": "sft"}}


def nested(first: str, template: str, levels: int = 8) -> str:
    """Each level names the one before nine times."""
    lines = [f"a0: &x0 {first}"]
    lines += [f"a{i}: &x{i} " + template.format(",".join([f"*x{i - 1}"] * 9)) for i in range(1, levels + 1)]
    return "\n".join(lines)


# text -> value: what YAML 1.1 takes for a truth value, a base-8 or base-60 number or a date stays text
READ = {
    "no": "no",
    "yes": "yes",
    "on": "on",
    "off": "off",
    "y": "y",
    "true": True,
    "False": False,
    "1e-4": 1e-4,
    "1.5e+3": 1500.0,
    ".5": 0.5,
    "-3": -3,
    "010": "010",
    "0x10": "0x10",
    "12:30:00": "12:30:00",
    "2024-01-01": "2024-01-01",
    "~": None,
    "~/runs": "~/runs",
    "1e999": "1e999",
    "'1'": "1",
    "!!str 1": "1",
}


@pytest.mark.parametrize("text", READ)
def test_a_plain_value(text):
    found = parse_yaml(f"a: {text}", "f", "--config")["a"]
    assert found == READ[text] and type(found) is type(READ[text])


# name -> (text, what the one line must hold)
REFUSED = {
    "key twice": ("train: {seed: 1}\neval: {seed: 3}\ntrain: {log_steps: 2}", "line 3: the key 'train'"),
    "key twice in flow": ("train: {seed: 1, seed: 2}", "'seed' is given twice, first on line 1"),
    "number and text are one key": ("a: {1: 2, '1': 3}", "'1' is given twice"),
    "alias bomb": (nested("[a,a,a,a,a,a,a,a,a]", "[{}]"), "aliases stand for more than"),
    "merge bomb": (nested("{a: 1}", "{{<<: [{}]}}"), "aliases stand for more than"),
    "alias in itself": ("a: &a [*a]", "an alias inside of what it stands for"),
    "too many": ("a: [" + "1," * (MAX_NODES + 1) + "]", f"more than {MAX_NODES} values"),
    "too deep": ("[" * 5000, "nested deeper"),
    "too deep in blocks": ("- " * 5000, "nested deeper"),
    "code": ("a: !!python/object/apply:os.system ['true']", "tag"),
    "tag with another value": ("a: !!timestamp x", "tag"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "list as a key": ("{[1]: 2}", "a key is a list"),
    "half a character": ('a: "\\uD800"', "no text"),
    "zero byte": ('a: "\\0"', "no text"),
    "no such character": ('a: "\\UFFFFFFFF"', "not valid YAML"),
    "yes where diffusers reads": (
        "teacher: {blueprint: {net: {use_bias: no}}}",
        "write true, false, or 'no'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_and_at_once(name):
    text, wanted = REFUSED[name]
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "a.yaml", "--config")
    assert wanted in str(caught.value) and str(caught.value).startswith("--config: a.yaml is not valid YAML")
    assert len(str(caught.value)) < 400 and time.process_time() - start < 5


def test_merge_keys_and_aliases_within_bounds_are_read():
    text = "base: &b {x: 1, y: [2]}\nown: {<<: *b, x: 3}\nfirst: {<<: [{a: 1}, {a: 2, b: 2}]}"
    assert parse_yaml(text, "f", "k") == {
        "base": {"x": 1, "y": [2]},
        "own": {"x": 3, "y": [2]},
        "first": {"a": 1, "b": 2},
    }


def test_what_is_written_reads_back_in_both_readers():
    values = {t: t for t in ("no", "1e-4", "010", "12:30", "2024-01-01", "~", "", "null", "<<", ".5", "1_0")}
    values |= {"float": 1e-5, "none": None, "list": [True, 2, -0.5]}
    assert parse_yaml(dump_yaml(values), "f", "k") == values == yaml.safe_load(dump_yaml(values))
    cfg = validate({**SFT, "output_dir": "1e-4"})
    assert validate(parse_yaml(dump(cfg), "f", "k")) == cfg


def test_the_schema_converts_words_and_whole_numbers():
    text = "objective: {name: sft}\noutput_dir: 2024\n"
    text += "train: {mixed_precision: no, export_dtype: no, gradient_checkpointing: yes, seed: 010}"
    cfg = validate(parse_yaml(text, "f", "k"))
    assert cfg.train.mixed_precision == cfg.train.export_dtype == "no" and cfg.output_dir == "2024"
    assert cfg.train.gradient_checkpointing is True and cfg.train.seed == 10


@pytest.mark.parametrize("kind", ["folder", "pipe", "binary", "utf-16", "huge", "latin-1"])
def test_what_is_no_text_file(kind, tmp_path):
    file = tmp_path / "a.yaml"
    data = {"binary": b"\x00\xff\xfe", "utf-16": "a: 1".encode("utf-16"), "latin-1": b"a: \xe9t\xe9"}
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(data.get(kind, b"a: " + b"x" * MAX_BYTES))
    with pytest.raises(UserError, match="--config: .*a.yaml"):
        read_files([str(file)])


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbftrain: {seed: 3}")
    assert read_files([str(tmp_path / "a.yaml")]) == {"train": {"seed": 3}}


def test_home_in_every_path_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FOLDER", "x")
    text = (
        "objective: {name: sft}\nteacher: {path: ~/t}\nstudent: {init: ~/i, fuse: ~/f}\noutput_dir: ~/run\n"
    )
    text += "data: {name: '', images: ~/im, control: ~/c, cache_dir: $FOLDER/~}"
    (tmp_path / "a.yaml").write_text(text)
    cfg = load(["~/a.yaml"], [])
    found = (cfg.teacher.path, cfg.student.init, cfg.student.fuse, cfg.output_dir)
    assert found == tuple(f"{tmp_path}/{n}" for n in ("t", "i", "f", "run"))
    assert (cfg.data.images, cfg.data.control) == (f"{tmp_path}/im", f"{tmp_path}/c")
    assert cfg.data.cache_dir == "$FOLDER/~", "environment variables, and a ~ elsewhere, stay as they are"


def test_a_flag_given_twice():
    with pytest.raises(UserError, match="--train.seed: given twice"):
        overrides(["--train.seed", "3", "--train.seed", "4"], RunConfig)
    with pytest.raises(UserError, match="'a' is given twice"):
        overrides(["--teacher.family", "{a: 1, a: 2}"], RunConfig)
