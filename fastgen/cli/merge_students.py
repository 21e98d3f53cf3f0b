"""Put students that were trained in runs of their own (objective.only) into one export.

python -m fastgen.cli.merge_students runs/a/export runs/b/export --out joined
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from fastgen.core.copying import copy_inside
from fastgen.core.errors import UserError, warn
from fastgen.core.files import write_model_json
from fastgen.core.paths import expand, resolve
from fastgen.export.info import FILE as INFO_FILE
from fastgen.export.info import ExportInfo, read_document, read_info
from fastgen.roles.router import FILE


def join(exports: list[str], out: str) -> Path:
    """Copy the first export with, for each student, the folder of the run that trained it."""
    folders = [resolve(e) for e in exports]
    owner: dict[int, Path] = {}
    for folder in folders:
        if not (folder / FILE).is_file():
            raise UserError("exports", f"{folder} holds no {FILE}", "give exports of runs with objective msd")
        if (folder / FILE).read_bytes() != (folders[0] / FILE).read_bytes():
            found = f"{folder} divides the conditions differently from {folders[0]}"
            raise UserError("exports", found, "use the same data, teacher and num_students in every run")
        info = _info(folder)
        for j in info.trained_students:
            if j in owner:
                raise UserError(
                    "exports",
                    f"student {j} was trained in {owner[j]} and {folder}",
                    "give only one of the two",
                )
            owner[j] = folder
    missing = sorted(set(range(_info(folders[0]).num_students)) - set(owner))
    if missing:
        raise UserError(
            "exports",
            f"student {missing[0]} was trained in none",
            "add the run that trained it (objective.only)",
        )
    target = Path(expand(out))
    if target.exists():
        raise UserError("--out", f"{target} exists", "give a folder that does not exist")
    copies = [(folders[0], target)]
    copies += [(folder / f"student{j}", target / f"student{j}") for j, folder in owner.items()]
    for source, place in copies:
        shutil.rmtree(place, ignore_errors=True)
        for name in copy_inside(source, place, source):
            warn(f"not copied: {name}")
    joined = replace(_info(target), trained_students=tuple(sorted(owner)))
    document = read_document(target, "exports") | {"export": joined.to_json()}
    write_model_json(target / INFO_FILE, document)
    return target


def _info(folder: Path) -> ExportInfo:
    """What an export of several students says of itself."""
    info = read_info(folder, "exports")
    if info is None:
        raise UserError("exports", f"{folder} holds no {INFO_FILE}", "copy the whole export folder")
    if not info.num_students or not set(info.trained_students) <= set(range(info.num_students)):
        found = f"{folder / INFO_FILE} names no students"
        raise UserError("exports", found, "give exports of runs with objective msd")
    return info


def main(argv: list[str] | None = None) -> int:
    from fastgen.core.console import CommandFlags, fail

    program = "python -m fastgen.cli.merge_students"
    flags = CommandFlags(program, description=__doc__, allow_abbrev=False)
    flags.add_argument("exports", nargs="+", help="export folders")
    flags.add_argument("--out", required=True, help="folder to write")
    args = flags.parse_args(argv)
    try:
        print(join(args.exports, args.out))
    except UserError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
