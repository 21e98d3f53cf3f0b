"""Samples drawn by several processes: the same and in order for any number, and none waits for one that
stopped. The processes are threads here; tests/training/test_two_process.py has real ones.
"""

import threading

import pytest
import torch

from fastgen.core.errors import NotFinite
from fastgen.core.interrupt import Stopped
from fastgen.evaluation.spread import Spread


class Together:
    """What `world` processes share: gather joins what each brings."""

    def __init__(self, world: int):
        self.world, self.brought = world, [None] * world
        self.meet = threading.Barrier(world, timeout=20)

    def gather(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        self.brought[rank] = x.clone()
        self.meet.wait()
        assert len({b.shape for b in self.brought}) == 1, "all bring one shape"
        found = torch.cat(self.brought)
        self.meet.wait()
        return found


class Process:
    device = "cpu"

    def __init__(self, together: Together, rank: int):
        self.together, self.process_index, self.num_processes = together, rank, together.world
        self.is_main_process = rank == 0

    def gather(self, x):
        return self.together.gather(self.process_index, x)


def spread(world: int, call) -> list:
    """call(Spread, rank) on every process: what it returns or raises."""
    together, found = Together(world), [None] * world

    def work(rank):
        try:
            found[rank] = call(Spread(Process(together, rank)), rank)
        except (Stopped, Exception) as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def drawn(first, num, size=4):
    return torch.arange(first, min(first + size, num)).float()[:, None].expand(-1, 3)


@pytest.mark.parametrize("num", [1, 4, 10, 17])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_samples_come_in_order_whatever_the_number_of_processes(world, num):
    first, *others = spread(world, lambda s, rank: s.samples(lambda i: drawn(i, num), num, 4, "drawing"))
    assert first.tolist() == [[float(i)] * 3 for i in range(num)]
    assert others == [None] * (world - 1)


@pytest.mark.parametrize("error", [Stopped("SIGTERM"), NotFinite("x0"), OSError("disk")], ids=["s", "n", "o"])
def test_what_stops_one_stops_all(error):
    """The second process fails in its second batch."""

    def call(s, rank):
        def draw(first):
            if rank == 1 and first > 4:
                raise error
            return drawn(first, 16)

        return s.samples(draw, 16, 4, "drawing")

    main, second = spread(2, call)
    assert second is error
    assert type(main) is (RuntimeError if isinstance(error, OSError) else type(error))


def test_the_main_process_decides():
    assert spread(3, lambda s, rank: s.decided(rank == 0)) == [True] * 3
    assert spread(3, lambda s, rank: s.decided(rank == 1)) == [False] * 3
