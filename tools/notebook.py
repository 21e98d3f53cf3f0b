"""Run docs/first_student.ipynb and keep what it showed.

  python -m tools.notebook    runs every cell in an empty folder, and writes the notebook with its outputs

Needs nbclient and ipykernel: pip install -e ".[docs]".
"""

import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/first_student.ipynb"
SECONDS = 1800
"""most that one cell may take"""


def run(file: Path = NOTEBOOK) -> None:
    """Execute all cells anew; nothing is written where one of them fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": folder}})
        client.execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of the machine that ran it
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
    nbformat.write(notebook, file)


def tidy(outputs: list) -> list:
    """What a reader wants to see: pictures, values, and what was printed in one piece, without the bars that
    moved meanwhile.
    """
    kept = [o for o in outputs if o.output_type != "stream"]
    for output in kept:
        output.get("data", {}).pop("image/jpeg", None)
    printed = [o for o in outputs if o.output_type == "stream" and o.name == "stdout"]
    if printed:
        printed[0].text = "".join(o.text for o in printed)
        kept.insert(0, printed[0])
    return kept


if __name__ == "__main__":
    run()
