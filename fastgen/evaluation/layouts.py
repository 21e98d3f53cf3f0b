"""Benchmarks with tools of their own: images go out as the tool wants them, its results are read back.

GenEval:  NNNNN/metadata.jsonl and NNNNN/samples/0000.png for each line of evaluation_metadata.jsonl; results
          are a JSON line an image; overall = mean over the six tasks              (arXiv 2310.11513)
DPG:      ITEM.png, the four images of a prompt two by two, ITEM the name of its text file  (arXiv 2403.05135)
VBench:   PROMPT-I.gif (or .mp4); sixteen dimensions, each scaled by fixed bounds, quality and semantic means
          weighted four to one                                                     (arXiv 2311.17982)
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

from fastgen.core.errors import UserError
from fastgen.core.files import placed, write_text
from fastgen.core.paths import inside
from fastgen.core.reading import read_json
from fastgen.data.text import read_text, split_lines
from fastgen.evaluation.prompts import MOST_BYTES, SAMPLES

BOUNDS = {
    "subject consistency": (0.1462, 1.0),
    "background consistency": (0.2615, 1.0),
    "temporal flickering": (0.6293, 1.0),
    "motion smoothness": (0.706, 0.9975),
    "dynamic degree": (0.0, 1.0),
    "aesthetic quality": (0.0, 1.0),
    "imaging quality": (0.0, 1.0),
    "object class": (0.0, 1.0),
    "multiple objects": (0.0, 1.0),
    "human action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance style": (0.0009, 0.2855),
    "temporal style": (0.0, 0.364),
    "overall consistency": (0.0, 0.364),
}
"""lowest and highest score of each dimension, by which VBench scales; the first seven are quality"""
QUALITY = tuple(BOUNDS)[:7]
KEY = "--prompts"


def read_items(layout: str, path: Path) -> list[tuple[str, dict]]:
    """(prompt, what the tool knows it by) in the tool's order."""
    if layout == "geneval":
        lines = [line for line in split_lines(read_text(path, KEY, "give evaluation_metadata.jsonl")) if line]
        items = [_object(line, path) for line in lines]
        return [(_prompt(item, "prompt", path), item) for item in items]
    if layout == "dpg":
        files = sorted(path.glob("*.txt")) if path.is_dir() else []
        if not files:
            raise UserError(KEY, f"{path} holds no .txt files", "give the tool's folder of prompts")
        return [(read_text(f, KEY, "repair it").strip(), {"item": f.stem}) for f in files]
    try:
        entries = json.loads(read_text(path, KEY, "give VBench_full_info.json"))
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not entries:
        raise UserError(KEY, f"{path} is no list of prompts", "give VBench_full_info.json")
    return [(_prompt(e, "prompt_en", path), e) for e in entries]


def _object(line: str, path: Path) -> dict:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(KEY, f"{path}: {line[:60]!r} is no JSON object", "give the file of the tool")
    return found


def _prompt(item: object, key: str, path: Path) -> str:
    text = item.get(key) if isinstance(item, dict) else None
    if not isinstance(text, str):
        raise UserError(KEY, f"{path} has an entry without {key}", "give the file of the tool")
    return text


def export(layout: str, folder: Path, items: list[tuple[str, dict]], out: Path, group_size: int = 1) -> int:
    """Lay out the samples of a folder (with its samples.json) for the tool; how many samples were placed.

    Samples are taken by their prompt, in order; a UserError of a prompt that has none. A prompt that stands
    several times has `group_size` samples each time, where so many were drawn.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError("--out", f"{out} is not empty", "give another folder")
    by_prompt: dict[str, list[Path]] = {}
    for prompt, file in _samples(folder):
        by_prompt.setdefault(prompt, []).append(file)
    missing = [prompt for prompt, _ in items if prompt not in by_prompt]
    if missing:
        found = f"{folder} has no sample of {missing[0][:60]!r} and {len(missing) - 1} more"
        raise UserError("--images", found, "draw them with --prompts of the same file")
    if layout == "vbench":  # which finds clips by their prompt alone
        items = list({prompt: (prompt, item) for prompt, item in items}.values())
    place = {"geneval": _geneval, "dpg": _dpg, "vbench": _vbench}[layout]
    times, before = Counter(prompt for prompt, _ in items), Counter[str]()
    num = 0
    for i, (prompt, item) in enumerate(items):
        samples, k = by_prompt[prompt], before[prompt]
        if times[prompt] > 1 and len(samples) >= times[prompt] * group_size:
            samples = samples[k * group_size : (k + 1) * group_size]
        before[prompt] += 1
        num += place(out, i, item, samples, prompt)
    return num


def _samples(folder: Path) -> list[tuple[str, Path]]:
    """(prompt, file) of each sample, as samples.json says; a UserError where it does not."""
    images = read_json(folder / SAMPLES, "--images", limit=MOST_BYTES).get("images")
    found = []
    for entry in images if isinstance(images, list) else [None]:
        prompt, file = (entry.get(k) if isinstance(entry, dict) else None for k in ("condition", "file"))
        path = inside(folder, file, "--images")
        if not (isinstance(prompt, str) and path.is_file()):
            said = f"{SAMPLES} has {str(entry)[:60]}" if images else f"{SAMPLES} names no images"
            raise UserError("--images", said, "give a folder that sample.py or `generate` has written")
        found.append((prompt, path))
    return found


def _geneval(out: Path, i: int, item: dict, samples: list[Path], prompt: str) -> int:
    folder = out / f"{i:05d}"
    (folder / "samples").mkdir(parents=True)
    write_text(folder / "metadata.jsonl", json.dumps(item))
    for k, path in enumerate(samples):
        shutil.copyfile(path, folder / "samples" / f"{k:04d}.png")
    return len(samples)


def _dpg(out: Path, i: int, item: dict, samples: list[Path], prompt: str) -> int:
    from PIL import Image

    if len(samples) < 4:
        found = f"{len(samples)} samples of {prompt[:60]!r}"
        raise UserError("--images", found, "draw four of each prompt, which the tool looks at")
    tiles = [Image.open(path).convert("RGB") for path in samples[:4]]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (2 * width, 2 * height))
    for k, tile in enumerate(tiles):
        sheet.paste(tile, (k % 2 * width, k // 2 * height))
    with placed(out / f"{item['item']}.png") as temporary:
        sheet.save(temporary)
    return len(tiles)


def _vbench(out: Path, i: int, item: dict, samples: list[Path], prompt: str) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for k, path in enumerate(samples):
        shutil.copyfile(path, out / f"{prompt.replace('/', ' ')}-{k}{path.suffix}")
    return len(samples)


# -- results
def read_results(layout: str, path: Path) -> dict[str, float]:
    """Scores that the tool wrote, with its overall one; a UserError of a file that is not its."""
    text = read_text(path, "--results", "give the results file of the tool")
    found = {"geneval": _read_geneval, "dpg": _read_dpg, "vbench": _read_vbench}[layout](text)
    if not found:
        raise UserError("--results", f"{path} holds no results of {layout}", "give the file of the tool")
    return found


def _read_geneval(text: str) -> dict[str, float]:
    """Share of right images by task, and the mean over tasks."""
    tasks: dict[str, list[bool]] = {}
    for line in filter(None, split_lines(text)):
        try:
            entry = json.loads(line)
            tasks.setdefault(str(entry["tag"]), []).append(bool(entry["correct"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}
    shares = {task: sum(right) / len(right) for task, right in tasks.items()}
    return {**shares, "overall": sum(shares.values()) / len(shares)} if shares else {}


def _read_dpg(text: str) -> dict[str, float]:
    """The categories and the score, 0 to 100, of the summary at the end."""
    found = {m[1]: float(m[2]) for m in re.finditer(r"^\t([^:\n]+): ([\d.]+)$", text, re.M)}
    score = re.search(r"^DPG-Bench score: ([\d.]+)", text, re.M)
    return {**found, "overall": float(score[1])} if score else {}


def _read_vbench(text: str) -> dict[str, float]:
    """The dimensions as they are; with all sixteen quality, semantic and total."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    raw = {}
    for key, value in document.items():
        score = value[0] if isinstance(value, list) and value else value
        name = key.replace("_", " ")
        if name in BOUNDS and isinstance(score, (int, float)) and not isinstance(score, bool):
            raw[name] = float(score)
    if set(raw) != set(BOUNDS):
        return raw
    scaled = {k: (v - BOUNDS[k][0]) / (BOUNDS[k][1] - BOUNDS[k][0]) for k, v in raw.items()}
    weights = {k: 0.5 if k == "dynamic degree" else 1.0 for k in QUALITY}
    quality = sum(scaled[k] * w for k, w in weights.items()) / sum(weights.values())
    semantic = [v for k, v in scaled.items() if k not in QUALITY]
    mean = sum(semantic) / len(semantic)
    return {**raw, "quality": quality, "semantic": mean, "overall": (4 * quality + mean) / 5}
