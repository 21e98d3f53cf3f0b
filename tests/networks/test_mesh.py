"""Groups of processes that do not come out even are refused, by the key that says so."""

import pytest

from fastgen.core.errors import UserError
from fastgen.networks import mesh
from fastgen.networks.mesh import Layout, make_mesh


@pytest.mark.parametrize(
    ("world", "layout", "message"),
    [
        (1, Layout(True), "train.sharding: found fsdp for one process"),
        (1, Layout(False, None, 2), "train.context_parallel: found 2 for 1 process;"),
        (6, Layout(False, None, 4), "train.context_parallel: found 4 for 6 processes"),
        (6, Layout(True, 4), "train.shard_group: groups of 4 do not divide 6 processes"),
        (8, Layout(True, 2, 4), "train.shard_group: groups of 2 do not divide into those of .* 4"),
    ],
)
def test_what_does_not_multiply_is_refused(world, layout, message, monkeypatch):
    monkeypatch.setattr(mesh, "processes", lambda: world)
    with pytest.raises(UserError, match=message):
        make_mesh(layout, "cpu")


@pytest.mark.parametrize(
    ("layout", "ring", "shape"),
    [
        (Layout(True), 1, (1, 8, 1, 1)),
        (Layout(True, 4), 1, (2, 4, 1, 1)),
        (Layout(False, None, 2), 1, (1, 4, 1, 2)),
        (Layout(True, 4, 2), 1, (2, 2, 1, 2)),
        (Layout(True, None, 4), 2, (1, 2, 2, 2)),
    ],
)
def test_dimensions_multiply_to_the_processes(layout, ring, shape, monkeypatch):
    monkeypatch.setattr(mesh, "processes", lambda: 8)
    monkeypatch.setattr(mesh, "init_device_mesh", lambda device, shape, mesh_dim_names: (device, shape))
    assert make_mesh(layout, "cuda:0", ring) == ("cuda", shape)
