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
def remembered_copies(request):
    """An exact teacher's trainable copy is fitted once and kept in pytest's cache, not fitted anew in every
    teacher object; a change of the code that fits makes it again.
    """
    from fastgen.networks.analytic import GaussianMixture

    fit, known = GaussianMixture._regressed, {}
    folder = request.config.cache.mkdir("trainable_copies") if hasattr(request.config, "cache") else None

    def remembered(self, steps: int):
        state = [t.numpy().tobytes() for t in (self.means, self.stds, self.weights, self.labels)]
        key = repr((vars(self.schedule), type(self.schedule), steps, state))
        if key not in known:
            known[key] = fit(self, steps) if folder is None else kept_fit(self, steps, key, fit, folder)
        return known[key]

    GaussianMixture._regressed = remembered
    yield
    GaussianMixture._regressed = fit


def kept_fit(teacher, steps, key, fit, folder):
    """fit(teacher, steps), read from the folder if an earlier session has left it there."""
    import inspect
    import sys
    from hashlib import sha256

    from safetensors.torch import load_file, save_file

    modules = [sys.modules[type(one).__module__] for one in (teacher, teacher.schedule)]
    made_by = "".join(map(inspect.getsource, modules)) + torch.__version__ + key
    file = folder / f"{sha256(made_by.encode()).hexdigest()}.safetensors"
    if not file.is_file():
        net = fit(teacher, steps)
        part = file.with_suffix(f".{os.getpid()}")
        save_file(net.state_dict(), part)
        part.replace(file)
        return net
    net = fit(teacher, 0)
    net.load_state_dict(load_file(file))
    return net


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
