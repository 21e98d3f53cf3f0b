"""Networks that begin with the weights of another one (`teacher.blueprint.start`)."""

import pytest
import torch

from fastgen.core.errors import UserError
from fastgen.networks.load import load_teacher

MOTION: dict = {
    "start": "assets:teachers/tinted-sd",
    "index": {"_class_name": "AnimateDiffPipeline"},
    "net": {
        "_class_name": "UNetMotionModel",
        "sample_size": 8,
        "block_out_channels": [64, 80],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlockMotion"] * 2,
        "up_block_types": ["CrossAttnUpBlockMotion"] * 2,
        "cross_attention_dim": 64,
        "num_attention_heads": 4,
        "norm_num_groups": 8,
        "motion_num_attention_heads": 4,
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}


def test_a_motion_network_begins_as_the_image_network():
    """Added motion modules write nothing at first, so of each frame it makes what tinted-sd makes; once they
    do, frames depend on each other.
    """
    clips = load_teacher(MOTION["start"], blueprint=MOTION, num_frames=3).backbone
    images = load_teacher(MOTION["start"]).backbone
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 4, 3, 8, 8, generator=generator)
    cond = {"encoder_hidden_states": torch.randn(2, 16, 64, generator=generator)}
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        each = torch.stack([images(noise[:, :, f], t, cond) for f in range(3)], 2)
        torch.testing.assert_close(clips(noise, t, cond), each, rtol=1e-4, atol=1e-5)
        for name, p in clips.net.named_parameters():
            if "motion_modules" in name and ".proj_out." in name:
                p.normal_(std=0.1)
        assert not torch.allclose(clips(noise, t, cond), each, atol=1e-2)


@pytest.mark.parametrize("start", ["digits", "moving-wan"])
def test_a_start_without_other_layers_is_refused(start):
    with pytest.raises(UserError, match="teacher.blueprint.start: "):
        load_teacher("assets:teachers/tinted-sd", blueprint=MOTION | {"start": f"assets:teachers/{start}"})
