"""Evidence: one JSON per recipe and seed in assets/results/<teacher>/, written from a finished run of it.

The hash ties it to the recipe: sha256 over the canonical JSON of the validated config without output_dir,
train.num_threads and the seed. Values that mean "off" (0, false, null, empty) are left out, and so are later
settings of the data at their default: what nobody has set does not outdate every number.
"""

import hashlib
import json
from pathlib import Path

from eval.thumbnails import write_thumbnail
from fastgen.config.parse import read_files
from fastgen.config.run import RunConfig, validate
from fastgen.core.errors import UserError, suggest
from fastgen.core.files import write_text
from fastgen.core.paths import PACKAGE, config
from fastgen.training.fingerprint import data_settings

KEYS = ("recipe", "objective", "teacher", "student", "seed", "command", "config_sha256", "results")


def _without_off(value):
    """A nested value with everything falsy left out."""
    if isinstance(value, dict):
        kept = {k: _without_off(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v}
    return [_without_off(v) for v in value] if isinstance(value, list) else value


def config_sha256(cfg: RunConfig) -> str:
    """Hash of everything that decides a run's numbers but its seed."""
    values = cfg.model_dump(mode="json")
    values.pop("output_dir")
    values["train"] = {k: v for k, v in values["train"].items() if k not in ("num_threads", "seed")}
    values["data"] = data_settings(cfg.data)
    canonical = json.dumps(_without_off(values), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def recipe_files(recipe: str) -> list[Path]:
    """configs/recipes/<recipe>.yaml, or for a teacher's own training configs/teachers/<recipe>.yaml; what
    follows a + is a change to it: "fashion_dmd2+score_alone" adds configs/ablations/score_alone.yaml.
    """
    name, *changes = recipe.split("+")
    return [_find(name, ("recipes", "teachers")), *(_find(c, ("ablations",)) for c in changes)]


def _find(name: str, kinds: tuple[str, ...]) -> Path:
    for kind in kinds:
        try:
            return config(f"{kind}/{name}.yaml")
        except FileNotFoundError:
            continue
    known = [p.stem for kind in kinds for p in config(kind).glob("*.yaml")]
    raise UserError("--recipe", f"no {name!r}{suggest(name, known)}", f"known: {', '.join(sorted(known))}")


def load_recipe(recipe: str) -> RunConfig:
    return validate(read_files([str(f) for f in recipe_files(recipe)]))


def teacher_name(cfg: RunConfig, recipe: str) -> str:
    """The folder evidence goes to: the teacher's name, or the recipe's where a teacher itself is trained."""
    if cfg.teacher.blueprint is not None:
        return recipe
    return cfg.teacher.path.replace(":", "/").rstrip("/").rsplit("/", 1)[-1]


FIGURES = PACKAGE.parent / "docs" / "figures"
"""pictures of the guide, which studies draw"""


def run_name(model: str) -> str:
    """The name of a run, given by its folder or that of its export."""
    path = Path(model)
    return path.parent.name if path.name == "export" else path.name


def results_folder() -> Path:
    """assets/results of the checkout (or of the installed package)."""
    data = PACKAGE / "_data"
    return (data if data.is_dir() else PACKAGE.parent) / "assets" / "results"


def record(run_dir: str | Path, recipe: str, seed: int | None = None, folder: Path | None = None) -> Path:
    """Write the evidence of a finished run of `recipe`, and for the first seed a small picture beside it;
    refuses a run whose config is another.
    """
    run = Path(run_dir)
    for name in ("config.yaml", "results.json"):
        if not (run / name).is_file():
            raise UserError("--run", f"{run / name} does not exist", "the folder of a finished run")
    cfg, wanted = validate(read_files([str(run / "config.yaml")])), load_recipe(recipe)
    found = config_sha256(cfg)
    if found != config_sha256(wanted):
        what = ", ".join(differing(cfg, wanted)) or "config"
        raise UserError(
            "--run",
            f"{run} differs from {recipe} in {what}",
            "run the recipe as it is; only the seed may vary",
        )
    if seed is not None and seed != cfg.train.seed:
        raise UserError("--seed", f"found {seed}", f"the run's own seed is {cfg.train.seed}")
    sources = " ".join(f"configs/{f.parent.name}/{f.name}" for f in recipe_files(recipe))
    flag = f" --train.seed {cfg.train.seed}" if cfg.train.seed != wanted.train.seed else ""
    document = {
        "recipe": recipe,
        "objective": methods_of(cfg),
        "teacher": teacher_name(cfg, recipe),
        "student": cfg.student.kind,
        "seed": cfg.train.seed,
        "command": f"python train.py --config {sources}{flag}",
        "config_sha256": found,
        "results": json.loads((run / "results.json").read_text()),
    }
    suffix = f"-seed{cfg.train.seed}" if cfg.train.seed else ""
    target = (folder or results_folder()) / document["teacher"] / f"{recipe}{suffix}.json"
    write_text(target, json.dumps(document, indent=1) + "\n")
    if not suffix:  # one picture a recipe
        write_thumbnail(run, target.with_suffix(".webp"))
    return target


def methods_of(cfg: RunConfig) -> str:
    """The methods of a run's stages, each where it comes last: vsd, sds, vsd is "sds+vsd"."""
    backwards = dict.fromkeys(s.objective.name for s in reversed(cfg.all_stages()))
    return "+".join(reversed(backwards))


FREE = ("output_dir", "train.num_threads", "train.seed")
"""what a run may choose without being another one"""


def differing(a: RunConfig, b: RunConfig, free: tuple[str, ...] = FREE) -> list[str]:
    """Dotted keys in which two configs differ, but for those that are free."""

    def flat(value, prefix: str = "") -> dict:
        if not isinstance(value, dict):
            return {prefix: value}
        return {
            k: v for n, child in value.items() for k, v in flat(child, f"{prefix}.{n}".strip(".")).items()
        }

    left, right = (flat(c.model_dump(mode="json")) for c in (a, b))
    return sorted(k for k in left.keys() | right.keys() if k not in free and left.get(k) != right.get(k))


def read_all(folder: Path | None = None) -> list[dict]:
    """Every piece of evidence, checked for its keys, sorted by teacher, recipe and seed."""
    found = []
    for file in sorted((folder or results_folder()).glob("*/*.json")):
        if file.parent.name == "benchmarks":
            continue
        try:
            document = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise UserError("assets/results", f"{file.name} is not valid JSON ({error})", "") from None
        missing = [k for k in KEYS if k not in document]
        if missing:
            raise UserError(
                "assets/results",
                f"{file.name} lacks {', '.join(missing)}",
                "write it with `python -m eval record`",
            )
        found.append({**document, "file": f"{file.parent.name}/{file.name}"})
    return sorted(found, key=lambda d: (d["teacher"], d["recipe"], d["seed"]))


def outdated(evidence: list[dict]) -> list[str]:
    """What is wrong with evidence whose recipe is gone or has changed since."""
    problems = []
    for document in evidence:
        try:
            same = config_sha256(load_recipe(document["recipe"])) == document["config_sha256"]
        except UserError as error:
            problems.append(f"{document['file']}: {error}")
            continue
        if not same:
            problems.append(
                f"{document['file']}: the config of {document['recipe']} has changed since; run it again"
            )
    return problems
