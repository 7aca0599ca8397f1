"""Copy an executed notebook without times and without what went to stderr: `python book/publish.py FROM TO`.

How long a private run took tells how large its lots were, which no guarantee covers. Progress bars and warnings tell
that too, and where things lie on this machine. Besides, a rerun's diff is smaller.
"""

import sys
from pathlib import Path

import nbformat

TIMES = ("duration", "start_time", "end_time")


def publish(source: Path, target: Path) -> None:
    """Write `target`, complete or not at all."""
    notebook = nbformat.read(source, 4)
    for metadata in (notebook.metadata, *(cell.metadata for cell in notebook.cells)):
        metadata.pop("execution", None)
        for name in TIMES:
            metadata.get("papermill", {}).pop(name, None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    temporary = target.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(target)


if __name__ == "__main__":
    publish(*map(Path, sys.argv[1:]))
