"""The benchmarks of published sizes: their settings are valid, and they end on a CPU with tiny networks."""

import json
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState

from benchmarks.gpu import STEPS, VARIANTS, tangents
from benchmarks.real_size import MODELS, ROOT, TRAINED, measured, settings
from fastgen.config.run import validate


@pytest.mark.parametrize(("name", "method"), [*((m, "dmd2") for m in MODELS), *STEPS])
def test_settings_are_a_valid_config(name, method):
    """At the size of configs/teachers, and reduced."""
    full, reduced = (validate(settings(name, method, False, whole)).teacher for whole in (True, False))
    assert full.height > reduced.height >= 128 and reduced.blueprint["net"] == full.blueprint["net"]


def test_variants_change_what_they_name():
    for change in VARIANTS.values():
        cfg = validate(settings("sdxl", "dmd2", False, True, **change))
        for key, value in change.items():
            assert getattr(cfg.train if key in TRAINED else cfg.teacher, key) == value


@pytest.fixture
def own_precision():
    """One process has one Accelerator state; that of the tests around is of another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_tiny_model_of_random_weights_trains_and_exports(own_precision):
    found = measured(settings("wan2.1-1.3b", "dmd2", True, False), "cpu", 1)
    assert found["finite"] and found["export_mib"] > 0 and found["seconds_per_step"] > 0
    assert found["x0"] == [16, 3, 8, 8] and 0.2 < found["overhead"] < 5


def test_tangents_agree_with_a_difference():
    found = tangents("cpu", 64)
    assert found["error_against_difference"] < 1e-4 and found["error_of_whole_matrices"] < 1e-4


@pytest.mark.slow
def test_the_script_for_a_card_runs_to_its_end_on_a_cpu():
    """Every check has figures; quantised bases have them where their package is installed."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    checks = json.loads(done.stdout[done.stdout.index("{\n") :])["checks"]
    assert len(checks) == 2 + len(STEPS) + len(VARIANTS) - 1
    failed = {name for name, found in checks.items() if "error" in found}
    assert failed <= {f"sdxl dmd2, {base} base" for base in ("nf4", "fp8")}, failed
