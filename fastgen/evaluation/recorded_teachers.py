"""What bundled teachers reached, on record: measuring a teacher of many steps takes longer than its student.

`measured.json` beside a teacher's weights has entries {"protocol", "teacher", "look", "measured"}, which
`python -m eval teacher --recipe NAME` writes. A run uses an entry whose protocol is its own in every detail:
the weights (by hash), the sampler's steps, guidance and seed, the number of samples, the measuring net.
"""

from pathlib import Path

from fastgen.core.paths import resolve
from fastgen.core.reading import read_json
from fastgen.networks.weights_digest import weights_digest


def protocol_of(evaluator, num: int) -> dict:
    """Everything that the numbers of `num` samples of the teacher depend on."""
    protocol, described = evaluator.protocol, evaluator.measurer.describe()
    return {
        "weights": weights_digest(evaluator.cast.teacher),
        "num_samples": num,
        "seed": protocol.seed,
        "guidance": protocol.guidance,
        "teacher_steps": protocol.teacher_steps,
        "extractor": described["extractor"],
        "reference": described["reference"],
    }


def find(evaluator, num: int) -> dict | None:
    """The entry of this run's teacher and protocol; None where it has to be measured."""
    teacher = evaluator.cast.teacher
    file = file_of(teacher.path)
    if evaluator.measurer is None or evaluator.metrics is not None or file is None or not file.is_file():
        return None
    protocol = protocol_of(evaluator, num)
    entries = read_json(file, "teacher.path")["entries"]
    return next((e for e in entries if e["protocol"] == protocol), None)


def file_of(path: str) -> Path | None:
    """The file of a bundled teacher; None for any other."""
    return Path(resolve(path)) / "measured.json" if path.startswith("assets:") else None
