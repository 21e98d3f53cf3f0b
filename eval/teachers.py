"""Measure a bundled teacher once for all runs of a recipe's protocol."""

from pathlib import Path

from fastgen.config.parse import read_files
from fastgen.config.run import validate
from fastgen.core.errors import UserError
from fastgen.core.files import to_json, write_text
from fastgen.core.paths import config
from fastgen.core.reading import read_json


def record_teacher(recipe: str) -> Path:
    """Draw and score the teacher as a run of the recipe would; the numbers are kept beside its weights, in
    the place of those of the same protocol.
    """
    from fastgen.data.loader import load_data
    from fastgen.evaluation.diagnostics import look
    from fastgen.evaluation.evaluator import scored
    from fastgen.evaluation.reconstruction import reconstructions
    from fastgen.evaluation.recorded_teachers import file_of, protocol_of
    from fastgen.training.assembly import make_cast, make_evaluator

    cfg = validate(read_files([str(config(f"recipes/{recipe}.yaml"))]))
    file = file_of(cfg.teacher.path)
    if file is None:
        raise UserError(
            "--recipe", f"{recipe} has the teacher {cfg.teacher.path}", "take the recipe of a bundled one"
        )
    cast = make_cast(cfg)
    evaluator = make_evaluator(cfg, cast, load_data(cfg.data, cast.teacher, cast.device))
    protocol, measurer = evaluator.protocol, evaluator.measurer
    num = protocol.teacher_samples or protocol.num_samples
    images = evaluator.images("teacher", num, protocol.seed)
    recon = reconstructions(measurer, cast.teacher.codec, cast.device, protocol.batch_size)
    entry = {
        "measured": f"python -m eval teacher --recipe {recipe}",
        "protocol": protocol_of(evaluator, num),
        "teacher": scored(evaluator, "teacher", images, 0, recon, {}),
        "look": look(images, len(evaluator.requests.rows)),
    }
    before = read_json(file, "--recipe")["entries"] if file.is_file() else []
    kept = [e for e in before if e["protocol"] != entry["protocol"]]
    write_text(file, to_json({"entries": [*kept, entry]}, 1) + "\n")
    return file
