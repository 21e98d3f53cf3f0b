"""Measure a finished run again from its export, and write results.json and the report anew."""

from pathlib import Path
from typing import Any

from fastgen.config.data_section import DegradationConfig
from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.files import to_json, write_json, write_text
from fastgen.core.paths import is_analytic
from fastgen.core.reading import read_json
from fastgen.data.kinds import own_source
from fastgen.evaluation.run_files import check_run
from fastgen.networks.device import open_device


class _Players:
    """What the evaluator needs of a cast: the teacher, and the student as it was exported."""

    def __init__(self, teacher, parts: dict, device):
        self.teacher, self.parts, self.device = teacher, parts, device

    def untrained(self):
        """The teacher, which is sampled in the student's few steps."""
        return self.parts["teacher"]


def remeasure(run: Path, num_samples: int = 0, device: str = "") -> dict:
    """Same protocol as at the end of the run (or another number of samples); prints the table."""
    from fastgen.data.loader import load_data
    from fastgen.evaluation.evaluator import measure
    from fastgen.evaluation.final_table import table
    from fastgen.evaluation.report import write_report
    from fastgen.evaluation.requests import of_bundled_set
    from fastgen.training.assembly import make_evaluator

    check_run(run, "--run")
    cfg = validate(read_files([str(run / "config.yaml")]))
    if is_analytic(cfg.teacher.path):
        raise UserError(
            "--run", f"{run} has no export", "students of exact teachers are measured at the end of the run"
        )
    if num_samples:
        cfg = cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"num_samples": num_samples})})
    cast = _cast(run, cfg, open_device(device))
    data: Any
    if (cast.teacher.info or {}).get("measure") and not own_source(cfg.data):
        data = of_bundled_set(cast.teacher.codec, cfg.data.degradation)
    else:  # unknown images: the run's own requests
        data = load_data(cfg.data, cast.teacher, cast.device)
    results = measure(make_evaluator(cfg, cast, data))
    file = run / "results.json"
    before = read_json(file, "--run") if file.is_file() else {}
    results["protocol"]["weights"] = "export"
    results |= {k: before[k] for k in ("train", "curve") if k in before}
    write_json(file, results)
    print(table(results))
    print(f"wrote {file} and {write_report(run)}")
    return results


def measure_teacher(path: str, guidance: float, num_samples: int, device: str = "") -> dict:
    """A teacher at 1, 4, 20 and 50 steps beside the floor; written to card.json where the folder is local."""
    from fastgen.core.paths import resolve
    from fastgen.evaluation.evaluator import Evaluator, measure
    from fastgen.evaluation.final_table import table, teacher_card
    from fastgen.evaluation.requests import of_bundled_set
    from fastgen.export.load import load_export
    from fastgen.training.assembly import make_protocol

    values = {
        "teacher": {"path": path, "guidance": guidance},
        "objective": {"name": "sft"},
        "data": {"name": "fashion"},
        "eval": {"num_samples": num_samples},
    }
    cfg = validate(values)
    where = open_device(device)
    loaded = load_export(path, key="--teacher").to(where)
    if not (loaded.teacher.info or {}).get("measure"):
        raise UserError("--teacher", f"{path} names no measuring net", "use one of assets:teachers/*")
    factor = loaded.codec.enlarges
    data = of_bundled_set(loaded.codec, DegradationConfig(factor=factor) if factor else None)
    cast = _Players(loaded.teacher, {"teacher": loaded.role, "student": loaded.role}, where)
    results = measure(Evaluator(make_protocol(cfg), cast, data))
    print(table(results))
    card = {
        "command": f"python -m eval card --teacher {path} --guidance {guidance:g} --num_samples {num_samples}"
    }
    card |= teacher_card(results)
    file = Path(resolve(path)) / "card.json"
    write_text(file, to_json(card, 1) + "\n")
    print(f"wrote {file}")
    return card


def _cast(run: Path, cfg, device) -> _Players:
    """Teacher and exported student; the two share one network where the student is an adapter."""
    from fastgen.export.load import load_export
    from fastgen.networks.load import load_teacher
    from fastgen.roles.roles import Role

    exported = load_export(run, key="--run").to(device)
    parts = {"student": exported.role}
    if exported.role.adapter is not None:
        teacher = exported.teacher
    elif cfg.teacher.blueprint is None and exported.is_student:
        teacher = load_teacher(cfg.teacher.path, cfg.teacher.prediction).to(device)
        teacher.backbone.requires_grad_(False).eval()
    else:
        teacher = exported.teacher
    return _Players(teacher, {"teacher": Role(teacher.backbone), **parts}, device)
