"""Whether a student's negative prompts (NASA) remove what they name, on Tinted Fashion.

Every caption is drawn as it is and again with one of its own words as the negative prompt; the measuring net
says how often the named attribute is still there, and how often the two others still are.
"""

import json
from pathlib import Path

import torch

from eval.evidence import run_name
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.data.bundled import VOCABULARY, all_captions, attributes_of
from fastgen.export.load import load_export
from fastgen.networks import negative_prompts
from fastgen.networks.codecs import TextCodec
from fastgen.sampling.solvers import sample_student


@torch.no_grad()
def removal(model: str, scales: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0), repeats: int = 1, seed: int = 0):
    """By attribute and scale: share of images that still show the named value, and the others' agreement."""
    from fastgen.evaluation.metrics.agreement import agreement
    from fastgen.evaluation.metrics.fd_mini import Measurer
    from fastgen.networks.feature_net import measure

    loaded = load_export(model, key="--model")
    if not loaded.is_student or not isinstance(loaded.codec, TextCodec):
        raise UserError("--model", f"{model} is no text-to-image student", "give an export of one")
    captions = all_captions() * repeats
    ids = {k: torch.tensor([attributes_of(c)[k] for c in captions]) for k in VOCABULARY}
    net, found = Measurer("tinted").net, {}
    for name, words in VOCABULARY.items():
        found[name] = {}
        for scale in scales:
            images = torch.empty(0)
            order = []
            for value, word in enumerate(words):
                rows = (ids[name] == value).nonzero()[:, 0]
                images = torch.cat(
                    [images, _draw(loaded, [captions[i] for i in rows], word, scale, rows, seed)]
                )
                order.append(rows)
            wanted = {k: v[torch.cat(order)] for k, v in ids.items()}
            shares = agreement(measure(net, images)["logits"], wanted)
            others = [shares[f"agreement_{k}"] for k in VOCABULARY if k != name]
            found[name][f"{scale:g}"] = {
                "still_there": shares[f"agreement_{name}"],
                "others_kept": sum(others) / len(others),
            }
    return {"model": run_name(model), "images": len(captions), "seed": seed, "removal": found}


def _draw(loaded, prompts: list[str], word: str, scale: float, rows, seed: int) -> torch.Tensor:
    """Images of these prompts under the negative prompt `word`."""
    negative, role = loaded.codec.prompts([word]), loaded.role
    cond, seeds = loaded.codec.prompts(prompts), [seed + int(i) for i in rows]
    states, mask = (negative.get(f"encoder_{k}") for k in ("hidden_states", "attention_mask"))
    if scale:
        negative_prompts.attach(role.backbone.net, states, scale, mask)
    try:
        return loaded.codec.decode(sample_student(role, seeds, loaded.codec.shape, cond))
    finally:
        negative_prompts.remove(role.backbone.net)


def record(model: str, folder: Path) -> Path:
    """Measure and write assets/results/benchmarks/negative_<run>.json."""
    measured = removal(model)
    measured["command"] = f"python -m eval negative --run runs/{measured['model']}"
    file = folder / f"negative_{measured['model']}.json"
    write_text(file, json.dumps(measured, indent=1) + "\n")
    return file
