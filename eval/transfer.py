"""Whether control that was trained on a base model works on its student, and back, on Tinted Fashion.

python -m eval transfer --run runs/tinted-sd_tdm_full

A LoRA is trained on pictures of one colour whose captions name none (`sft`), once on the base model and once
on the student's own network. Each is then added to both (`sample.py --lora`), and the measuring net says how
many pictures of captions without a colour have it, and whether garment and background are still as asked for.
"""

import json
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import Tensor

from eval.evidence import run_name
from fastgen.cli.generator import Generator
from fastgen.cli.train import main as train
from fastgen.core.batch import select
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.data.bundled import BACKGROUNDS, COLOURS, GARMENTS, load_images
from fastgen.evaluation.metrics.agreement import right
from fastgen.evaluation.metrics.fd_mini import Measurer
from fastgen.export.adapters import add_to, lora_files
from fastgen.export.load import Loaded, load_export, locate
from fastgen.networks.codecs import TextCodec
from fastgen.networks.feature_net import measure

COLOUR, PICTURES, REPEATS = "purple", 600, 3
SCALES = (0.0, 0.5, 1.0)
SETTINGS = {
    "student": {"kind": "lora", "lora": {"rank": 8, "lora_alpha": 8}},
    "objective": {"name": "sft"},
    "optim": {"student": {"lr": 1.0e-3, "warmup_steps": 10, "schedule": "cosine"}},
    "train": {"max_train_steps": 80, "train_batch_size": 24, "ema_decay": [], "validation_steps": 0},
    "eval": {"num_samples": 0},
}


def pictures(folder: Path) -> Path:
    """Training pictures of the colour, with captions that do not name it."""
    folder.mkdir(parents=True, exist_ok=True)
    tinted, lines = load_images("tinted", "train"), []
    assert tinted.attributes is not None and tinted.captions is not None, "tinted images have both"
    chosen = (tinted.attributes["colour"] == list(COLOURS).index(COLOUR)).nonzero()[:, 0][:PICTURES]
    for i in chosen.tolist():
        Image.fromarray(tinted.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        text = tinted.captions[i].replace(f"{COLOUR} ", "")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return folder


def trained(teacher: str, data: Path, run: Path) -> Path:
    """The LoRA file of a short training on these pictures over a model."""
    values = {**SETTINGS, "teacher": {"path": teacher}, "data": {"name": "", "images": str(data)}}
    write_text(run.parent / f"{run.name}.yaml", yaml.safe_dump(values))
    flags = ["--config", str(run.parent / f"{run.name}.yaml"), "--output_dir", str(run), "--overwrite"]
    if train(flags):
        raise UserError("--run", f"no LoRA could be trained on {teacher}", "see the line above")
    return lora_files(run)[0]


def asked(codec: TextCodec) -> tuple[dict, dict[str, Tensor]]:
    """(conditions, garments and backgrounds) of captions that name no colour."""
    pairs = [(g, b) for g in range(len(GARMENTS)) for b in range(len(BACKGROUNDS))] * REPEATS
    texts = [f"a {GARMENTS[g]} on a {list(BACKGROUNDS)[b]} background" for g, b in pairs]
    ids = torch.tensor(pairs).T
    return codec.prompts(texts), {"garment": ids[0], "background": ids[1]}


@torch.no_grad()
def rates(loaded: Loaded, file: Path, scale: float, steps: int, guidance: float) -> dict[str, float]:
    """Shares, with the LoRA at this strength, of pictures in the colour and of those as asked for."""
    network = loaded.role.backbone
    add_to(network, loaded.teacher, file, scale, "--run")
    try:
        cond, ids = asked(loaded.codec)
        draw = Generator(loaded, steps, guidance, loaded.codec.null(1))
        num = len(ids["garment"])
        parts = torch.arange(num).split(60)
        images = torch.cat([draw(select(cond, part), part.tolist(), "cpu") for part in parts])
    finally:
        add_to(network, loaded.teacher, file, -scale, "--run")
    logits = measure(Measurer("tinted").net, images)["logits"]
    coloured = logits["colour"].argmax(1) == list(COLOURS).index(COLOUR)
    others = right(logits, ids)
    return {
        "coloured": float(coloured.double().mean()),
        "otherwise_as_asked": float((others["garment"] & others["background"]).double().mean()),
    }


def study(model: str, work: Path) -> dict:
    """Rates of both LoRA files on both models at every strength."""
    student = load_export(model, key="--run")
    info = student.info
    full = student.is_student and student.role.adapter is None and isinstance(student.codec, TextCodec)
    if not full or info is None:
        raise UserError("--run", f"{model} is no full text-to-image student", "give the run of one")
    data, found = pictures(work / "pictures"), {}
    files = {"base": trained(info.base, data, work / "control_of_base")}
    files["student"] = trained(str(locate(model, "--run")), data, work / "control_of_student")
    models = {"base": student.reference(), "student": student}
    for where, loaded in models.items():
        steps = info.teacher_steps if where == "base" else 0
        for origin, file in files.items():
            for scale in SCALES if (where, origin) != ("base", "student") else SCALES[1:]:
                name = f"{where} with the LoRA of the {origin}" if scale else f"{where} alone"
                row = rates(loaded, file, scale, steps, info.guidance)
                found.setdefault(name, {})[f"{scale:g}"] = row
                print(name, scale, row, flush=True)
    return {"colour": COLOUR, "pictures": PICTURES, "images": 30 * REPEATS, "rates": found}


def record(model: str, folder: Path) -> Path:
    """Train, measure, write assets/results/benchmarks/transfer_<run>.json."""
    name = run_name(model)
    found = study(model, Path("runs") / f"transfer_{name}")
    found = {"model": name, "command": f"python -m eval transfer --run runs/{name}"} | found
    file = folder / f"transfer_{name}.json"
    write_text(file, json.dumps(found, indent=1) + "\n")
    return file
