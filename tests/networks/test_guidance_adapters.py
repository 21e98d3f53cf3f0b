"""One guidance adapter by itself: what it can represent, where it starts, what it reads."""

import pytest
import torch

from fastgen.networks.guidance_adapters import GuidanceAdapter


@pytest.mark.parametrize("form", ["attention", "offset"])
def test_p1_adapters_learn_the_gaussian_offset(form):
    """eps^w - eps_c = (w - 1) alpha sigma (mu_u - mu_c) / v: reached for all t and w; negative: without w a
    floor of its variance over w stays.
    """
    found = {}
    for told in (True, False):
        torch.manual_seed(1)
        adapter = GuidanceAdapter(form, 16, 4, states=3)
        optimizer = torch.optim.Adam(adapter.parameters(), 1e-2)
        states = torch.randn(1, 2, 3)
        for k in range(200):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 200)
            t, w = torch.rand(128), 1 + 5 * torch.rand(128)
            wanted = (w - 1) * t * (1 - t) / (0.25 * (1 - t) ** 2 + t**2)
            read = w / 4 if told else torch.ones(128)
            out = adapter(torch.ones(128, 1, 4), read, t, states.expand(128, -1, -1), None)
            loss = (out.mean((1, 2)) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[told] = float(loss.detach() / wanted.var())
    assert found[True] < 0.02 and found[False] > 0.2, found


def test_p1_an_adapter_starts_at_zero_and_reads_what_it_should():
    torch.manual_seed(0)
    h, states, mask = torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.tensor([[1, 1, 0], [1, 1, 1]])
    w, t = torch.tensor([1.0, 2.0]), torch.tensor([0.3, 0.6])
    for form in ("attention", "offset"):
        adapter = GuidanceAdapter(form, 8, 8, states=6)
        assert not adapter(h, w, t, states, mask).any()
        torch.nn.init.normal_(adapter.output.weight)
        plain = adapter(h, w, t, states, mask)
        masked = states.clone()
        masked[0, 2] = 9.0
        torch.testing.assert_close(adapter(h, w, t, masked, mask), plain)
        assert not torch.allclose(adapter(h, w, t, masked, None), plain)
        assert not torch.allclose(adapter(h, w + 1, t, states, mask), plain)
        assert not torch.allclose(adapter(h, w, t + 0.3, states, mask), plain)
        moved = adapter(h + 1, w, t, states, mask).expand(-1, 5, -1)
        assert torch.allclose(moved, plain.expand(-1, 5, -1)) == (form == "offset"), "an offset ignores h"
