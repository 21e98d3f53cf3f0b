"""The table that a run begins with: what it trains, on what, where. Its first rows need the config alone and
are printed before anything heavy is loaded; the rows of the networks come from parts without weights.
"""

import os
import textwrap
from collections.abc import Iterable

from fastgen.config.run import RunConfig
from fastgen.data.kinds import OWN, own_source

Row = tuple[str, str]
LABEL, WIDTH = 10, 96
KINDS = {
    "images": "images in",
    "table": "images named in",
    "dataset": "the data set",
    "shards": "the archives",
    "latents": "what is encoded in",
    "scans": "scans and truth in",
    "prompts": "prompts in",
    "": "none: the teacher's own conditions",
}
"""what an own source of data is, before its path"""
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


def table(rows: Iterable[Row]) -> str:
    """Rows of a label and a text as lines of at most WIDTH characters; a repeated label is left out."""
    lines: list[str] = []
    before = ""
    for label, text in rows:
        first = "" if label == before else label
        wrapped = textwrap.wrap(text, WIDTH - LABEL, break_on_hyphens=False) or [""]
        lines.append(f"{first:<{LABEL}}{wrapped[0]}".rstrip())
        lines += [" " * LABEL + more for more in wrapped[1:]]
        before = label
    return "\n".join(lines).replace("\xa0", " ")


def settings_rows(cfg: RunConfig) -> list[Row]:
    """What the config alone says: method, stages, data, device and precision, output folder."""
    stages = cfg.all_stages()
    rows = [("run", cfg.output_dir)]
    for i, stage in enumerate(stages, 1):
        named = "" if stage.name == stage.objective.name else f" ({stage.objective.name})"
        place = f"{i}/{len(stages)} " if len(stages) > 1 else ""
        rows.append(("stages", f"{place}{stage.name}{named}: {stage.max_train_steps:,} steps{_batch(cfg)}"))
    return [*rows, ("data", _data(cfg)), ("device", _device(cfg)), ("measures", _measures(cfg))]


def _batch(cfg: RunConfig) -> str:
    train = cfg.train
    micro = train.gradient_accumulation_steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    times = [str(train.train_batch_size), *(f"{micro} micro-batches" for _ in range(micro > 1))]
    return f", batch {' x '.join([*times, *(f'{world} processes' for _ in range(world > 1))])}"


def _data(cfg: RunConfig) -> str:
    data = cfg.data
    read = "" if cfg.reads_data() else ", of which no image is read"
    kind = own_source(data)
    if data.views is not None:
        low, high = data.views.distance
        return f"views of {data.views.prompt!r} from distances of {low:g} to {high:g}"
    source = f"{data.name} (bundled){read}" if data.name else f"{KINDS[kind]} {getattr(data, kind, '')}"
    if kind in OWN:
        source += read
    more = [f"{len(data.sources)} further sources"] * bool(data.sources)
    more += [f"control images in {data.control}"] * bool(data.control)
    more += [f"each preferred to its namesake in {data.dispreferred}"] * bool(data.dispreferred)
    if data.appearance is not None:
        more += [f"the look of {data.appearance.images or data.appearance.name + ' (bundled)'}"]
    more += [f"the first {data.limit:,}"] * bool(data.limit)
    return ", ".join([source, *more])


def _device(cfg: RunConfig) -> str:
    import torch

    from fastgen.core.threads import threads_per_process

    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        threads = threads_per_process(cfg.train.num_threads, torch.get_num_threads())
        where = f"cpu, {threads} thread{'s' * (threads > 1)}"
    frozen = {"bf16": ", frozen weights bfloat16", "fp16": ", frozen weights float16"}
    return f"{where}; {PRECISIONS[cfg.train.mixed_precision]}{frozen.get(cfg.teacher.dtype or '', '')}"


def _measures(cfg: RunConfig) -> str:
    every = cfg.train.validation_steps
    during = f"every {every:,} steps, then " if every else ""
    return during + ("at the end" if cfg.eval.num_samples else "the speed alone at the end")


def network_rows(cast, train, details: bool = False) -> list[Row]:
    """Teacher, students and critic with their parameters, and the memory that training needs; `cast` may be
    without weights. details: network calls of a step, and the memory by purpose.
    """
    from fastgen.core.rng import Rng
    from fastgen.training.memory import estimate, network_calls

    teacher = cast.teacher.backbone
    itself = any(m.backbone is teacher and m.adapter is None for m in cast.student.members)  # sft
    rows = [] if itself else [("teacher", f"{_count(teacher):>13,} frozen     {cast.teacher_cfg.path}")]
    players: dict[str, str] = {}
    steps: list[Row] = []
    for i, stage in enumerate(cast.stages, 1):
        objective = cast.stage(stage, Rng(train.seed))
        players = {n: _player(p, teacher) for n, p in objective.players.items()} | players
        calls = network_calls(cast, stage, len(cast.student.times)).items()
        spelled = ", ".join(f"{n} {v:g}".replace(" ", "\xa0") for n, v in calls)  # wrapped between items
        steps.append((f"stage {i}", f"network calls a step (+grad carries a backward): {spelled}"))
        times = ", ".join(f"{t:g}" for t in cast.student.times)
        steps.append((f"stage {i}", f"student times: {times} ({cast.student.sampler})"))
    rows += [*players.items(), *(steps if details else [])]
    if cast.teacher.is_analytic and not details:  # a formula and a small network
        return rows
    found = estimate(cast, train)
    beside = f"; text and image encoders until prompts are encoded: {_size(found.encoders)}"
    rows.append(("memory", f"{_size(found.total)} estimated" + beside * bool(found.encoders)))
    if details:
        rows += [("memory", f"{_size(size):>10}  {name}") for name, size in found.rows.items()]
    return rows


def _player(player, teacher) -> str:
    """Trained parameters of one player, their share of what computes, and what they are."""
    from fastgen.roles.roles import Role

    trained = sum(p.numel() for p in player.trainable().values())
    roles = [p for p in player.parts.values() if isinstance(p, Role)]
    shared = any(p.backbone is teacher and p.adapter is not None for p in roles)
    whole = trained + (_count(teacher) if shared else 0)
    share = trained / whole if whole else 0.0
    kind = f"adapter on the teacher, {share:.1%} of it" if shared else "network of its own, all of it"
    return f"{trained:>13,} trained    {kind}"


def _count(backbone) -> int:
    from fastgen.families.parts import of_adapter

    return sum(p.numel() for n, p in backbone.named_parameters() if not of_adapter(n))


def _size(num: float) -> str:
    return f"{num / 2**30:.1f} GB" if num >= 2**30 else f"{num / 2**20:.1f} MB"
