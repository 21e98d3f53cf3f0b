"""python -m fastgen.families [--write FILE]: the table of families, from what the battery recorded."""

import argparse
import json
import sys
from pathlib import Path

from fastgen.core.console import fail
from fastgen.core.errors import UserError
from fastgen.core.files import write_text
from fastgen.core.paths import resolve
from fastgen.core.reading import read_text
from fastgen.families.registry import FAMILIES

RECORD = Path(__file__).with_name("contract.json")
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
# column -> the battery's checks that must all have passed
COLUMNS = {
    "D": ("x0_is_the_schedulers", "guidance_ends"),
    "full": ("objectives_step[full]", "gradient_reaches_everything"),
    "LoRA": ("objectives_step[lora]", "lora_file_in_a_fresh_pipeline"),
    "recompute": ("checkpointed_gradients_are_the_plain_ones",),
    "codec": ("latents_go_both_ways",),
    "features": ("features_have_the_declared_shapes",),
    "JVP": ("tangent_against_central_differences",),
    "= pipeline": ("our_sampler_is_the_exported_pipeline",),
}


def verdict(cases: list[dict], checks: tuple[str, ...], notes: list[str]) -> str:
    """yes (all that applies passed) or no, with the number of a note where a check was excused."""
    found = [case["checks"].get(check, "not run") for case in cases for check in checks]
    if all(f == "passed" for f in found):
        return "yes"
    excuses = list(dict.fromkeys(f.removeprefix("excused: ") for f in found if f.startswith("excused: ")))
    if not all(f == "passed" or f.startswith("excused: ") for f in found):
        return "no"
    notes += [e for e in excuses if e not in notes]
    word = "yes" if "passed" in found else "no"
    return f"{word} " + " ".join(f"({notes.index(e) + 1})" for e in excuses)


def table() -> str:
    """Markdown: one row per family, and the notes."""
    record = json.loads(RECORD.read_text())
    notes: list[str] = []
    heads = ["family", "network", "pipelines", *COLUMNS, "kohya", "LoRA loader", "scheduler"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for family in sorted(FAMILIES.values(), key=lambda f: f.name):
        cases = [c for c in record["cases"].values() if c["family"] == family.name]
        schedulers = sorted({f"{s} ({c['sampler']})" for c in cases for s in [c["scheduler"]] if s})
        cells = [family.name, f"`{family.net_class}`", ", ".join(family.pipelines)]
        cells += [verdict(cases, checks, notes) if cases else "no" for checks in COLUMNS.values()]
        cells += ["yes" if family.kohya_prefix else "-", "pipeline" if family.lora_loader else "fastgen"]
        lines.append("| " + " | ".join([*cells, ", ".join(schedulers)]) + " |")
    lines += ["", *(f"({i}) {note}." for i, note in enumerate(notes, 1)), ""]
    lines += ["Parameters that no gradient reaches, by family:", ""]
    for family in sorted(FAMILIES.values(), key=lambda f: f.name):
        lines += [f"- {family.name}: `{pattern}`, {why}" for pattern, why in family.unreached.items()]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return "\n".join([*lines, "", f"Recorded by `python -m tests.families` with {versions}."])


def written(text: str) -> str:
    """A document with its block of the table renewed."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in tail or END in head + tail:
        found = f"found no single block from {BEGIN} to {END}"
        raise UserError("--write", found, "put both marks into the file, once and in this order")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> None:
    flags = argparse.ArgumentParser("python -m fastgen.families", description=__doc__)
    flags.add_argument("--write", metavar="FILE", help="renew the table in this document")
    args = flags.parse_args()
    if not args.write:
        print(table())
        return
    file = resolve(args.write)
    try:
        write_text(file, written(read_text(file, "--write", "give a Markdown file")))
    except UserError as error:
        sys.exit(fail(error))
    except OSError as error:
        sys.exit(fail(UserError("--write", error, "give a file that can be written")))


if __name__ == "__main__":
    main()
