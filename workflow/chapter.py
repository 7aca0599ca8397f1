"""Run one chapter: `python workflow/chapter.py NOTEBOOK RAW EXECUTED [papermill's options]`.

papermill leaves RAW, and its log beside it; `book/publish.py` makes EXECUTED of that. Progress goes to the terminal a
line at a time, with the chapter's name; where the chapter fails, one sentence says why.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
from filelock import FileLock

PUBLISH = Path(__file__).resolve().parents[1] / "book" / "publish.py"


def run(notebook: Path, raw: Path, executed: Path, options: list[str]) -> None:
    """Execute and publish a notebook; ends this process with a sentence where it fails."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    log = raw.with_suffix(".log")
    with FileLock(raw.with_suffix(".lock")):  # a job that a killed workflow left on a cluster may still be at it
        say(raw.stem, "begins")
        command = [sys.executable, "-m", "papermill", str(notebook), str(raw), *options]
        command += ["--no-progress-bar", "--autosave-cell-every", "60", "--engine", "cardiac_ldm"]
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        papermill = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=pipe)
        threading.Thread(target=end_with_parent, args=(papermill, os.getppid()), daemon=True).start()
        last = pass_on(papermill, raw.stem, log)
        if papermill.wait():
            sys.exit(f"{raw.stem}: {reason(raw) or last}\n{raw.stem}: failed; {raw} and {log} tell more")
        subprocess.run([sys.executable, PUBLISH, raw, executed], check=True)
        say(raw.stem, "done")


def say(name: str, what: str) -> None:
    """Print a line on the terminal."""
    print(f"{name}: {what}", file=sys.stderr, flush=True)


def pass_on(papermill: subprocess.Popen[bytes], name: str, log: Path) -> str:
    """Write papermill's standard error to `log` and its lines about progress to the terminal; the last line."""
    last, silent = "", False
    assert papermill.stderr is not None
    with log.open("w") as file:
        for line in (line.decode(errors="replace").rstrip() for line in papermill.stderr):
            file.write(f"{line}\n")
            file.flush()
            last, silent = line or last, silent or line.startswith("Traceback")
            if not silent and "left" in line:
                say(name, line)
    return last


def reason(raw: Path) -> str:
    """What stopped a notebook, in a sentence; empty where no cell raised."""
    if not raw.exists():
        return ""
    outputs = (output for cell in nbformat.read(raw, 4).cells for output in cell.get("outputs", []))
    return next((f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"), "")


def end_with_parent(papermill: subprocess.Popen[bytes], parent: int) -> None:
    """End with the workflow: one that is killed can't stop its jobs, and the next one would meet them."""
    while os.getppid() == parent:
        time.sleep(0.5)
    papermill.kill()
    os._exit(1)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
