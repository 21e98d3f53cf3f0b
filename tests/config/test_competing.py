"""Of several data sources the later one wins, in one line; two in one place are an error that names both."""

import itertools

import pytest
import yaml

from fastgen.config.competing import COMPETING, SOURCES, spelled
from fastgen.config.parse import merge, model_in
from fastgen.config.run import RunConfig, load, validate, with_flags
from fastgen.core.errors import UserError

VALUES = {
    "name": "digits",
    "images": "my/pictures",
    "table": "my/table.csv",
    "dataset": "my/set",
    "shards": "my/train-*.tar",
    "latents": "my/latents",
    "scans": "my/scans",
    "prompts": "my/prompts.txt",
}
PAIRS = list(itertools.permutations(SOURCES, 2))


def file(path, *keys):
    # a method that needs no images, so that every source is enough
    values = {"objective": {"name": "swiftbrush"}, "data": {key: VALUES[key] for key in keys}}
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("old,new", PAIRS)
def test_a_flag_wins_over_a_file_and_says_so(tmp_path, capsys, old, new):
    cfg = load([file(tmp_path / "a.yaml", old)], [f"--data.{new}", VALUES[new]])
    assert (getattr(cfg.data, new), getattr(cfg.data, old)) == (VALUES[new], "")
    message = capsys.readouterr().out
    assert message == f"data.{old}: {VALUES[old]!r} is replaced by data.{new}, which was given later\n"


@pytest.mark.parametrize("old,new", PAIRS)
def test_a_later_file_wins_too(tmp_path, capsys, old, new):
    cfg = load([file(tmp_path / "a.yaml", old), file(tmp_path / "b.yaml", new)], [])
    assert (getattr(cfg.data, new), getattr(cfg.data, old)) == (VALUES[new], "")
    assert "is replaced by" in capsys.readouterr().out


@pytest.mark.parametrize("one,two", PAIRS)
def test_two_in_one_place_are_refused(tmp_path, one, two):
    flags = [f"--data.{one}", VALUES[one], f"--data.{two}", VALUES[two]]
    for files, argv in (([file(tmp_path / "a.yaml", one, two)], []), ([file(tmp_path / "b.yaml")], flags)):
        with pytest.raises(UserError) as error:
            load(files, argv)
        assert f"{one} {VALUES[one]!r}" in str(error.value) and f"{two} {VALUES[two]!r}" in str(error.value)


@pytest.mark.parametrize(
    "data,wrong",
    [
        ({"images": "a", "sources": [{"table": "b.csv", "images": "c"}]}, "images and table"),
        ({"images": "a", "sources": [{"weight": 2}]}, "data.sources.0: found none"),
        ({"name": "digits", "sources": [{"images": "b"}]}, "data.sources: found beside name"),
        ({"sources": [{"images": "b"}]}, "data.sources: found beside none"),
        ({"images": "a", "sources": [{"images": "b", "weight": 0}]}, "weight"),
    ],
)
def test_each_further_source_is_one_and_stands_beside_pictures(data, wrong):
    with pytest.raises(UserError, match=wrong):
        validate({"objective": {"name": "sft"}, "data": data})
    fine = {"images": "a", "sources": [{"table": "b.csv"}, {"shards": "c.tar", "weight": 2}]}
    assert validate({"objective": {"name": "sft"}, "data": fine}).data.sources[1].weight == 2


def test_an_emptied_source_says_nothing(tmp_path, capsys):
    cfg = load([file(tmp_path / "a.yaml", "name")], ["--data.name", "", "--data.images", "x"])
    assert cfg.data.images == "x" and not cfg.data.name and capsys.readouterr().out == ""
    assert load([file(tmp_path / "a.yaml", "name")], ["--data.limit", "3"]).data.name == "digits"


@pytest.mark.parametrize("key", ["num_samples", "teacher_samples"])
def test_one_sample_is_refused_before_anything_runs(key):
    for num, fine in ((0, True), (1, False), (2, True)):
        values = {"objective": {"name": "sft"}, "data": {"name": "digits"}, "eval": {key: num}}
        if fine:
            assert getattr(validate(values).eval, key) == num
            continue
        with pytest.raises(UserError, match=f"{key}: found 1; use 2 samples or more"):
            validate(values)


# -- every pair of the config --------------------------------------------------------------------------------
PLAIN = {
    "": "output_dir",
    "teacher": (
        "guidance num_steps prediction allow_download dtype quantization offload height width num_frames "
        "embedded_guidance attention vae_tiling vae_slicing family"
    ),
    "student": (
        "kind sampler gamma guidance_embedding guidance smooth_time sprint trained init fuse fuse_weight net "
        "fidelity"
    ),
    "student.lora": "rank lora_alpha use_rslora use_dora target_modules",
    "student.causal": "block window",
    "student.guidance_adapter": "form width heads multiplier",
    "student.asset": "kind num points degree move_every size surface separate samples background",
    "student.asset.generator": "width",
    "critic": "kind",
    "critic.lora": "rank lora_alpha use_rslora use_dora target_modules",
    "data": (
        "split image_column text_column label_column weight control fps dispreferred limit on_bad_image "
        "on_bad_shard stream buckets workers caption_dropout allow_download cache_dir"
    ),
    "data.views": "prompt held_out elevation distance fovy front back",
    "data.appearance": "images name contrast limit",
    "data.degradation": "factor teacher_factor kind",
    "data.sources": "images table dataset shards split image_column text_column label_column weight",
    "train": (
        "train_batch_size gradient_accumulation_steps seed mixed_precision gradient_checkpointing "
        "compile compile_blocks channels_last ema_decay log_steps validation_steps checkpointing_steps "
        "export_dtype checkpoints_total_limit sharding shard_group context_parallel sharded_checkpoints "
        "async_checkpoints num_threads report_to"
    ),
    "eval": (
        "num_samples teacher_samples remeasure_teacher student_steps validation_samples grid batch_size seed "
        "metrics weights against keep_by keep"
    ),
    "stages": "name limit",
    "stages.asset": "train view",
}
ALONE = [f"{section}.{key}".lstrip(".") for section, keys in PLAIN.items() for key in keys.split()]
"""keys that decide alone, or whose check names the key they need (student.gamma and student.sampler)"""


def leaves(model, prefix=""):
    """Dotted keys of a section; objective and optim are one each."""
    for name, info in model.model_fields.items():
        inner = model_in(info.annotation) if name not in ("objective", "optim") else None
        yield from leaves(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]


def test_every_key_is_classified():
    """A new key joins ALONE, or the group in COMPETING that says the same thing."""
    competing = {key for keys in COMPETING.values() for key in keys}
    assert set(leaves(RunConfig)) == competing | set(ALONE)
    assert not competing & set(ALONE) and len(ALONE) == len(set(ALONE))


STAGE = {"name": "a", "objective": {"name": "swiftbrush"}, "max_train_steps": 7, "num_steps": 1}
SAID = {
    **{f"data.{key}": value for key, value in VALUES.items()},
    "student.num_steps": 1,
    "student.timesteps": [900, 400],
    "teacher.path": "my/teacher",
    "teacher.blueprint": {"net": {}, "scheduler": {}},
    "teacher.layout": {"net": {}, "scheduler": {}},
    "objective": {"name": "boot"},
    "optim": {"student": {"lr": 1e-4}},  # the default: a flag all the same
    "train.max_train_steps": 300,
}


def nested(key):
    section, _, name = key.partition(".")
    if section == "stages":
        return {"stages": [STAGE | {"optim": {"student": {"lr": 1e-3}}}]}
    return {section: {name: SAID[key]} if name else SAID[key]}


def found_at(cfg, key):
    section, _, name = key.partition(".")
    value = getattr(cfg, section)
    return getattr(value, name) if name else value


FLAGS = [
    (old, new) for keys in COMPETING.values() for old, new in itertools.permutations(keys, 2) if new in SAID
]
AS_PATH = {("teacher.path", "teacher.blueprint"), ("teacher.path", "teacher.layout")}
SAME = {("teacher.blueprint", "teacher.layout"), ("teacher.layout", "teacher.blueprint")} | AS_PATH
SAME |= {("stages.num_steps", "student.timesteps")}
"""a blueprint or a layout (in files only) is of the model at teacher.path and stands beside it; the steps of
a stage begin where student.timesteps does
"""


@pytest.mark.parametrize("old,new", [p for p in FLAGS if p not in SAME])
def test_of_every_pair_the_later_wins_or_both_are_named(old, new, capsys):
    base = merge({"objective": {"name": "swiftbrush"}, "student": {"sampler": "renoise"}}, nested(old))
    if old.startswith("stages"):
        del base["objective"]
    over = nested(new)
    try:
        values = with_flags(base, over)
    except UserError as error:
        assert error.key == new and old.replace("stages.", "stages.N.") in error.found
        return
    said, cfg = capsys.readouterr().out, validate(values)
    wanted = SAID[new]
    if isinstance(wanted, dict):
        assert cfg.objective.name == wanted["name"]
    else:
        assert found_at(cfg, new) == (tuple(wanted) if isinstance(wanted, list) else wanted)
    if (old, new) != ("student.num_steps", "student.timesteps"):  # whose help text says that they win
        assert not found_at(cfg, old) and f"{old}:" in said and f"replaced by {new}" in said


def test_a_file_over_its_base_replaces_too(tmp_path, capsys):
    (tmp_path / "base.yaml").write_text("objective: {name: swiftbrush}\ndata: {name: digits}")
    (tmp_path / "own.yaml").write_text("base: base.yaml\ndata: {prompts: p.txt}")
    cfg = load([str(tmp_path / "own.yaml")], [])
    assert (cfg.data.name, cfg.data.prompts) == (
        "",
        "p.txt",
    ) and "replaced by data.prompts" in capsys.readouterr().out


def test_what_is_written_for_another_run_is_the_same_run(capsys):
    """recipe.yaml: the flags over a recipe that names another source, and sampling times."""
    base = {
        "objective": {"name": "swiftbrush"},
        "data": {"name": "digits"},
        "student": {"timesteps": [900, 400]},
    }
    over = {"data": {"images": "x"}, "student": {"num_steps": 1}}
    once = validate(with_flags(base, over))
    assert validate(merge(base, spelled(base, over))) == once and once.student.timesteps == ()
    assert spelled(base, {"train": {"seed": 1}}) == {"train": {"seed": 1}}
    assert "student.timesteps: [900, 400] is replaced by student.num_steps" in capsys.readouterr().out
