"""Whole runs on data that are read as they go: bit-exact resume with any number of threads, captions encoded
on the way, latents without a text encoder.
"""

import json

import pytest
import torch

from fastgen.cli import precompute
from fastgen.cli.train import main
from fastgen.data import loader
from fastgen.networks.codecs import TextCodec
from tests.training.test_resume import Stop, losses, pictures, state, stop_after, write

TRAIN = {
    "max_train_steps": 4,
    "train_batch_size": 3,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 9,
    "log_steps": 1,
    "validation_steps": 0,
}


def config(tmp_path, teacher, **data):
    images = pictures(tmp_path)
    for i in range(10):
        (images / f"{i}.txt").write_text(f"a red dress {i}")
    (images / "4.png").write_bytes(b"no picture")
    values = {
        "teacher": {"path": str(teacher)},
        "data": {"images": str(images), **data},
        "objective": {"name": "lcm"},
        "train": TRAIN,
    }
    return write(tmp_path, values), images


def test_a_streamed_run_resumes_with_another_number_of_threads(tiny, tmp_path, monkeypatch, capfd, no_finish):
    """Half the captions dropped, more captions than are encoded before, one picture broken."""
    monkeypatch.setattr(loader, "MOST_CAPTIONS", 3)
    monkeypatch.setattr(loader, "FIRST_CAPTIONS", 4)
    argv, _ = config(tmp_path, tiny("sd"), stream="always", caption_dropout=0.5)
    assert main([*argv, str(tmp_path / "whole"), "--data.workers", "0"]) == 0
    out, err = capfd.readouterr()
    assert "10 different captions, encoded when a batch has them" in out and "encoders freed" not in out
    assert err.count("4.png cannot be read") == 1
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        main([*argv, str(tmp_path / "cut"), "--data.workers", "1"])
    assert main([*argv, str(tmp_path / "cut"), "--data.workers", "3", "--resume"]) == 0
    whole, cut = state(tmp_path / "whole", 4), state(tmp_path / "cut", 4)
    assert whole.keys() == cut.keys() and all(torch.equal(v, cut[k]) for k, v in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert main([*argv, str(tmp_path / "other"), "--data.caption_dropout", "0"]) == 0
    assert losses(tmp_path / "other") != losses(tmp_path / "whole"), "the negative"


def test_a_run_on_latents_loads_no_text_encoder(tiny, tmp_path, monkeypatch, capfd, no_finish):
    argv, images = config(tmp_path, tiny("sd"))
    out = str(tmp_path / "latents")
    made = ["--teacher", str(tiny("sd")), "--data.images", str(images), "--out", out, "--shard_size", "4"]
    assert precompute.main(made) == 0
    assert main([*argv, str(tmp_path / "plain")]) == 0
    monkeypatch.setattr(TextCodec, "_check_encoders", lambda self: pytest.fail("a prompt is encoded"))
    latents = ["--data.latents", out]
    assert main([*argv, str(tmp_path / "run"), *latents]) == 0
    said = capfd.readouterr().out
    assert "9 encoded images in 3 shards, none of them decoded" in said
    assert "data.images" in said and "is replaced by data.latents" in said
    for one, two in zip(losses(tmp_path / "run"), losses(tmp_path / "plain"), strict=True):
        assert one["student/loss"] == pytest.approx(two["student/loss"], rel=1e-4)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        main([*argv, str(tmp_path / "cut"), *latents, "--data.workers", "1"])
    assert main([*argv, str(tmp_path / "cut"), *latents, "--resume"]) == 0
    whole, cut = state(tmp_path / "run", 4), state(tmp_path / "cut", 4)
    assert all(torch.equal(v, cut[k]) for k, v in whole.items())
    manifest = tmp_path / "latents/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"model": "0" * 16}))
    assert main([*argv, str(tmp_path / "refused"), *latents]) == 2
    assert "is of another model or size" in capfd.readouterr().err
    assert not (tmp_path / "refused").exists()
