"""How long the first commands take: `python -m benchmarks.first_contact [PART ...]`, or `make time`.

In a fresh clone of what is committed, in a temporary folder: the set-up, then each of the README's commands alone, with
no run of another one to use. Named parts are measured anew, the others keep what was measured before; the set-up always
is. Seconds are what the clock showed, core seconds what the processors did; the load is what else ran at the start of a
part, in processes: on a quiet machine it's near 0. The set-up downloads everything; how long that takes is the
network's doing. CARDIAC_LDM_ROOT_ACDC, where it's set, lets the tests on real hearts run.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, keep
from cardiac_ldm.trained import ROOT

SET_UP = "set-up"
COMMANDS = {
    SET_UP: "make .venv/installed",
    "papermill": "papermill notebooks/03_dp_finetune.ipynb -p epsilon 1",
    "book": "jupyter-book build book",
    "study": "make study",
    "test": "make test",
}
"""What is timed, as a person types it."""
LEFT = ("runs", ".snakemake", "book/_build")
VERSIONS = ("torch", "papermill", "snakemake", "jupyter-book")


def environment(clone: Path) -> dict[str, str]:
    """A new user's: nothing of this study is set, and the clone's `.venv` is activated."""
    own = ("CARDIAC_LDM_", "OMP_", "PYTHON", "VIRTUAL_ENV", "MAKE", "PROFILE", "EPSILONS", "PARTS")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(own) or n == "CARDIAC_LDM_ROOT_ACDC"}
    return kept | {"PATH": f"{clone / '.venv' / 'bin'}{os.pathsep}{kept['PATH']}", "PIP_NO_CACHE_DIR": "1"}


def timed(part: str, clone: Path, logs: Path) -> dict[str, object]:
    """Run a part's command, with its output in a file and nothing on standard input.

    Raises:
        RuntimeError: it fails, or changes what is committed.
    """
    for left in LEFT:
        shutil.rmtree(clone / left, ignore_errors=True)
    log, load = logs / f"{part}.log", os.getloadavg()[0]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("w") as output, Path(f"{log}.out").open("w") as out:
        command = COMMANDS[part].split()
        finished = subprocess.run(
            command, cwd=clone, env=environment(clone), stdin=subprocess.DEVNULL, stdout=out, stderr=output
        )
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if finished.returncode:
        raise RuntimeError(f"{COMMANDS[part]}: ended with {finished.returncode}; {log} and {log}.out say why")
    if changed := subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True).stdout:
        raise RuntimeError(f"{COMMANDS[part]}: changed what is committed:\n{changed}")
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": COMMANDS[part], "seconds": round(seconds), "core_seconds": round(cores), "load": round(load, 1)}


def sentence(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """What README says of these measurements."""
    cores = {part["cores"] for part in parts.values()}
    times = [f"`{part['command']}` {part['seconds'] / 60:.1f}" for name, part in parts.items() if name != SET_UP]
    set_up = parts[SET_UP]["seconds"] / 60
    return f"On {', '.join(map(str, cores))} cores, in minutes, the set-up's {set_up:.1f} apart: {', '.join(times)}."


def main() -> None:
    """Clone, set up, time; keep one entry a part, with the machine that it was measured on."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("parts", nargs="*", help=f"of {', '.join(COMMANDS)}; all unless told")
    wanted = arguments.parse_args().parts or list(COMMANDS)
    if unknown := [part for part in wanted if part not in COMMANDS]:
        sys.exit(f"{unknown[0]}: no such part; there are {', '.join(COMMANDS)}")
    logs = Path(tempfile.mkdtemp(prefix="first-contact-"))
    print(f"outputs are kept in {logs}", file=sys.stderr)
    clone = logs / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True).stdout
    results = RESULTS / "first_contact.json"
    parts = json.loads(results.read_text())["parts"] if results.exists() else {}
    where = {
        "commit": commit.strip()[:12],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONS},
    }
    failed: list[str] = []
    for part in dict.fromkeys([SET_UP, *wanted]):
        print(f"{part}: {COMMANDS[part]}", file=sys.stderr, flush=True)
        try:
            parts[part] = timed(part, clone, logs) | where
        except RuntimeError as failure:
            failed.append(str(failure))
            continue
        keep("first_contact", parts={part: parts[part] for part in COMMANDS if part in parts})
    shutil.rmtree(clone)
    print(*failed, sentence({part: parts[part] for part in COMMANDS if part in parts}), sep="\n", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
