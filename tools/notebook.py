"""Run docs/first_student.ipynb and keep what it showed.

  python -m tools.notebook    runs every cell in an empty folder, and writes the notebook with its outputs

Needs nbclient and ipykernel: pip install -e ".[docs]".
"""

import sys
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
    nbformat.write(notebook, file)


if __name__ == "__main__":
    sys.exit(run())
