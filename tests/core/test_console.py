"""Libraries stay quiet below an error, also when they are imported after quiet()."""

import os
import subprocess
import sys

import pytest

LEVEL = """
from fastgen.core.console import quiet
quiet()
from {library}.utils import logging
print(logging.get_logger("{library}.pipelines").getEffectiveLevel())
"""


@pytest.mark.parametrize("wanted, level", [("", 40), ("info", 20)])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_libraries_are_quiet_unless_the_environment_names_a_level(library, wanted, level):
    name = f"{library.upper()}_VERBOSITY"
    env = {k: v for k, v in os.environ.items() if k != name} | ({name: wanted} if wanted else {})
    done = subprocess.run(
        [sys.executable, "-c", LEVEL.format(library=library)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == level
