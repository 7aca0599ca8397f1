"""Scripts that measure: each prints one JSON object last and keeps it in `benchmarks/results/`, for the book."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def titled(benchmark: str, profile: str) -> str:
    """The name under which a benchmark of a profile keeps its results: its own for `laptop`."""
    return benchmark if profile == "laptop" else f"{benchmark}_{Path(profile).stem}"


def keep(benchmark: str, **measured: object) -> None:
    """Write results/<benchmark>.json and print it on one line."""
    result = {"benchmark": benchmark, **measured}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    print(json.dumps(result))
