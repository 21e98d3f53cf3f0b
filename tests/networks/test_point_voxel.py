"""The network of scans: what it must not depend on, what it must, and its derivative."""

import pytest
import torch

from fastgen.networks.point_voxel import PointVoxelModel
from tests.support.clouds import NET, tiny_teacher


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return PointVoxelModel(**{k: v for k, v in NET.items() if k != "_class_name"}).eval()


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    scan = 2 * torch.randn(2, 12, 3, generator=generator)
    return torch.randn(2, 60, 3, generator=generator), torch.tensor([300.0, 900.0]), scan


@torch.no_grad()
def test_points_in_another_order_get_the_same_in_that_order(net, given):
    x, t, scan = given
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    copies = (order[:, None] * 5 + torch.arange(5)).flatten()
    plain = net(x, t, scan, scan).sample
    moved = net(x[:, copies], t, scan[:, order], scan[:, order.flip(0)]).sample
    torch.testing.assert_close(moved, plain[:, copies], rtol=1e-4, atol=1e-5)
    assert (moved - plain).abs().max() > 1e-3


@torch.no_grad()
def test_it_reads_where_points_are_the_time_and_the_scan(net, given):
    x, t, scan = given
    plain = net(x, t, scan, scan).sample
    shift = torch.tensor([0.3, 0.0, 0.0])
    others = {
        "offset": net(x + shift, t, scan, scan),
        "time": net(x, t - 200, scan, scan),
        "scan": net(x, t, scan, scan + shift),
        "nothing told": net(x, t, scan, 0 * scan),
    }
    for name, other in others.items():
        assert (other.sample - plain).abs().max() > 1e-4, name
    same = net(
        x - shift, t, scan + shift, scan
    ).sample  # where they start does not matter beside where they are
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    alone = net(x[1:], t[1:], scan[1:], scan[1:]).sample
    torch.testing.assert_close(alone, plain[1:], rtol=1e-4, atol=1e-5)


def test_sharing_out_and_reading_are_partitions(net):
    """The eight shares of a point add up to 1; what is linear in place is read back exactly."""
    x = torch.rand(1, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([8.0, 8.0, 2.5]) + torch.tensor([-4.0, -4.0, 0.1])  # within the outermost centres
    cells, weights = net._cells(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 50, dtype=torch.float64))
    assert float(net._share_out(torch.ones(1, 50, 1, dtype=torch.float64), cells, weights).sum()) == 50
    size = torch.tensor(net.config.grid)
    low, high = (torch.tensor(net.config[k], dtype=torch.float64) for k in ("low", "high"))
    centres = torch.stack(torch.meshgrid(*(torch.arange(int(n)) + 0.5 for n in size), indexing="ij"))
    centres = (
        low[:, None, None, None] + (high - low)[:, None, None, None] * centres / size[:, None, None, None]
    )
    torch.testing.assert_close(net._read(centres[None], cells, weights), x)


def test_derivative_between_the_places_where_the_nearest_changes(given):
    net = tiny_teacher().network.net.double()
    x, t, scan = (v.double() for v in given)
    dx, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 1e-6
    f = lambda x: net(x, t, scan, scan).sample  # noqa: E731
    with torch.no_grad():
        _, tangent = torch.func.jvp(f, (x,), (dx,))
        central = (f(x + h * dx) - f(x - h * dx)) / (2 * h)
    assert (tangent - central).norm() < 1e-4 * central.norm()


@pytest.mark.parametrize("wrong", [{"num_points": 61}, {"formulation": "other"}])
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="61 points of 12|other"):
        PointVoxelModel(**{k: v for k, v in NET.items() if k != "_class_name"} | wrong)
