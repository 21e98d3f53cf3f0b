"""What a run folder says of itself, also while the run still writes it: config, metrics, results, stages."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.core.reading import read_json, read_text
from fastgen.core.yaml_text import parse_yaml

REPAIR = "repair or delete it"


@dataclass(frozen=True)
class Stage:
    """One stage of a run: steps first + 1 to last."""

    name: str
    method: str
    first: int
    last: int


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder has it at this moment."""

    folder: Path
    config_text: str
    config: dict
    metrics: list[dict]
    results: dict
    environment: dict

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((r["step"] for r in self.metrics), default=0)

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return max((r["seconds"] for r in self.metrics if _is_number(r.get("seconds"))), default=0.0)

    @property
    def stages(self) -> list[Stage]:
        """From the config; of a folder without one, a single stage as long as its metrics."""
        found, done = [], 0
        for name, method, steps in _stages(self.config):
            found.append(Stage(name, method, done, done + steps))
            done += steps
        return found or ([Stage("training", "", 0, self.step)] if self.step else [])

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].last if self.stages else 0

    @property
    def validations(self) -> list[int]:
        """Steps at which the student was validated."""
        return [r["step"] for r in self.metrics if any(k.startswith("validation/") for k in r)]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values; where a resumed run wrote a step again, the later line counts."""
        points = {r["step"]: r[key] for r in self.metrics if _is_number(r.get(key))}
        return list(points), list(points.values())

    def curves(self) -> list[str]:
        """Names of all curves, as player/name."""
        return list(
            dict.fromkeys(k for r in self.metrics for k, v in r.items() if "/" in k and _is_number(v))
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stages(config: dict) -> list[tuple[str, str, int]]:
    """(name, method, steps) of each."""
    listed = config.get("stages") or []
    if listed:
        return [(s["name"], s["objective"]["name"], s.get("max_train_steps", 100)) for s in listed]
    steps = (config.get("train") or {}).get("max_train_steps")
    method = (config.get("objective") or {}).get("name")
    return [(method, method, steps)] if method and steps else []


def read_run(folder: Path) -> RunFiles:
    """A run folder; missing parts are empty. UserError of files that are broken."""
    text = _text(folder / "config.yaml")
    return RunFiles(
        folder,
        text,
        parse_yaml(text, "config.yaml", "report") or {},
        read_metrics(folder / "metrics.jsonl"),
        _json(folder / "results.json"),
        _json(folder / "environment.json"),
    )


def check_run(folder: Path, key: str) -> Path:
    """The folder, if a run was started in it."""
    if not (folder / "config.yaml").is_file():
        raise UserError(key, f"{folder} is not a run folder", "give the output_dir of a run")
    return folder


def read_metrics(path: Path) -> list[dict]:
    """Records of metrics.jsonl in step order; a line cut short by a kill is skipped."""
    records = []
    for line in _text(path).splitlines():
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    numbered = (r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int))
    return sorted(numbered, key=lambda r: r["step"])


def _text(path: Path) -> str:
    return read_text(path, "report", REPAIR, 2**30) if path.exists() else ""


def _json(path: Path) -> dict:
    return read_json(path, "report", REPAIR) if path.exists() else {}
