"""The public stages that come with the library, trained: `python -m cardiac_ldm.shipped` trains them (hours).

`weights/<stage>` holds what a run's folder holds. They are the `laptop` profile's, trained on simulated public patients
only, and stand in for a training with the same settings on the same cohort.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.anatomy import HeartFinder

WEIGHTS = Path(__file__).parents[1] / "weights"
SUMS = "SHA256SUMS"


def find(stage: str, wanted: Mapping[str, object], weights: Path | None = None) -> tuple[str, Path] | None:
    """The key and the folder of a shipped stage, or None where it was trained otherwise than `wanted`.

    Raises:
        ParameterError: a file of it isn't the one that was shipped.
    """
    folder = (weights or WEIGHTS) / stage
    if os.environ.get("CARDIAC_LDM_SHIPPED") == "0" or not (folder / "settings.yaml").exists():
        return None
    about = yaml.safe_load((folder / "settings.yaml").read_text())
    if any(about.get(name) != value for name, value in wanted.items()):
        return None
    _check(folder)
    return about["key"], folder


@cache
def _check(folder: Path) -> None:
    for line in (folder / SUMS).read_text().splitlines():
        digest, name = line.split()
        if not (folder / name).exists() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ParameterError(
                f"{folder / name}: isn't the file that was shipped; install the library afresh, "
                "or train anew with: python -m cardiac_ldm.shipped"
            )


class ShippedFinder:
    """The shipped segmenter, loaded only where a heart has no labels: what `cohort.prepare` takes as its localiser."""

    key = "shipped"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Labels of an image; see `HeartFinder`."""
        return HeartFinder(WEIGHTS / "anatomy/segmenter.safetensors", self.key)(image)


def ship(stage: str, key: str, wanted: Mapping[str, object], run: Path, weights: Path | None = None) -> None:
    """Copy a run's folder to where `find` looks, with its losses thinned and the files' hashes."""
    folder = (weights or WEIGHTS) / stage
    temporary = folder.with_name(f".{stage}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in run.glob("*.safetensors"):
        shutil.copy(path, temporary)
    shutil.copy(run / "privacy.json", temporary)
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    thinned = {name: _thinned(found) if isinstance(found, list) else found for name, found in metrics.items()}
    (temporary / "metrics.json").write_text(json.dumps(thinned) + "\n")
    about = {"command": "python -m cardiac_ldm.shipped", "key": key, **wanted}
    (temporary / "settings.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    files = sorted(temporary.iterdir())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (temporary / SUMS).write_text("".join(sums))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _thinned(losses: list[dict[str, float]]) -> list[dict[str, float]]:
    """From 500 to 1,000 of them: every second, fourth, eighth ... step, so that thinned ones can be thinned again."""
    stride = 1 << max(0, int(losses[-1]["step"] // 500).bit_length() - 1)
    return [row for row in losses if row["step"] % stride == 0]
