"""The tiny teachers of the battery, each built once per process."""

import pytest

from tests.families.world import World

_WORLDS: dict[str, World] = {}


@pytest.fixture
def world(name, tmp_path_factory):
    if name not in _WORLDS:
        _WORLDS[name] = World(name, tmp_path_factory.mktemp(name) / "teacher")
    return _WORLDS[name]
