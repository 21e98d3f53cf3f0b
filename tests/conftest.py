"""One thread, fixed seeds, no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

if os.environ.get("FASTGEN_TEST_PLUGIN"):  # see test_plugin.py; before fastgen.config.run is imported
    from fastgen.cli.train import _import_plugin

    _import_plugin(os.environ["FASTGEN_TEST_PLUGIN"])


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same global seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def remembered_copies():
    """An exact teacher's trainable copy is fitted once in a process, not once in every teacher object."""
    from fastgen.networks.analytic import GaussianMixture

    fit, known = GaussianMixture._regressed, {}

    def remembered(self, steps: int):
        state = [t.numpy().tobytes() for t in (self.means, self.stds, self.weights, self.labels)]
        key = repr((vars(self.schedule), type(self.schedule), steps, state))
        if key not in known:
            known[key] = fit(self, steps)
        return known[key]

    GaussianMixture._regressed = remembered
    yield
    GaussianMixture._regressed = fit


@pytest.fixture
def no_finish(monkeypatch):
    """Leave out the final table, export and report, for tests that look at training only."""
    from fastgen.training import validation

    monkeypatch.setattr(validation, "finish", lambda trainer, validator: None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of tiny random teachers by family name: tiny("flow"), "edm", "vp", "sd", "sana"."""
    from tests.support.tiny import FOLDERS

    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = FOLDERS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder
