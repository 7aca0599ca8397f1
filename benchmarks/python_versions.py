"""On which Pythons and systems the pinned versions can be installed: `python -m benchmarks.python_versions`.

Resolves what `make study` and `make test` install, with constraints.txt, as if for another Python and another system,
by `uv pip compile` (pip install uv): it reads the packages' metadata and downloads none of them. Wheels only; a package
that has none is allowed from its source and named, as it needs a compiler where it isn't pure Python. That they install
is no proof that the study runs there: the versions in constraints.txt were run on Python 3.11 on Linux.
"""

import os
import re
import shutil
import subprocess
import sys

from benchmarks import keep
from cardiac_ldm.trained import ROOT

PYTHONS = ("3.11.5", "3.12", "3.13", "3.14")
SYSTEMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux arm64": "aarch64-manylinux_2_28",
    "macOS 14 arm64": "aarch64-apple-darwin",
    "Windows x86-64": "x86_64-pc-windows-msvc",
}


def resolve(uv: str, python: str, platform: str) -> dict[str, object]:
    """Whether all resolves, which packages only have a source then, and why not otherwise."""
    from_source: list[str] = []
    while True:
        command = [uv, "pip", "compile", "--quiet", "--python-version", python, "--python-platform", platform]
        command += ["--only-binary", ":all:", *(part for name in from_source for part in ("--no-binary", name))]
        command += ["--constraint", "constraints.txt", "--extra", "book", "--extra", "dev", "pyproject.toml"]
        macos = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=macos)
        if finished.returncode == 0:
            return {"resolves": True, "from_source": sorted(from_source)}
        found = re.search(r"([\w.-]+)==\S+ has no usable wheels", finished.stderr)
        if found is None or found[1] in from_source:
            reason = re.search(r"cause: (.*)", finished.stderr)
            return {"resolves": False, "reason": reason[1] if reason else finished.stderr.strip()}
        from_source.append(found[1])


def main() -> None:
    """Resolve for every Python and system; keep one row each."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("uv: not found; install it for this (pip install uv), the study doesn't need it")
    rows = [
        {"python": python, "system": system, **resolve(uv, python, platform)}
        for python in PYTHONS
        for system, platform in SYSTEMS.items()
    ]
    keep("python_versions", rows=rows)


if __name__ == "__main__":
    main()
