"""A page of thumbnails, for whoever looks after a cohort's files: every patient's slices with what is wrong of them."""

import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from plotly.utils import image_array_to_data_uri

from cardiac_ldm.cohort.attributes import LV, MYOCARDIUM, RV
from cardiac_ldm.cohort.manifest import Manifest
from cardiac_ldm.cohort.volumes import Volume
from cardiac_ldm.errors import CohortError, PrivacyError

_COLOURS = {RV: (90, 160, 255), MYOCARDIUM: (255, 190, 60), LV: (255, 90, 90)}
_TILE, _MARGIN_MM = 96, 20.0


@dataclass(frozen=True)
class Entry:
    """A patient on the page: problems, doubts, and a picture for each phase, as data URIs."""

    patient: str
    problems: tuple[str, ...]
    doubts: tuple[str, ...]
    pictures: tuple[tuple[str, str], ...]


def thumbnail(v: Volume) -> str:
    """All slices of a volume in a row, round the heart where there are labels, these as outlines; a PNG data URI."""
    low, high = np.percentile(v.image, (1, 99))
    labels = np.zeros(v.image.shape, np.uint8) if v.labels is None else v.labels
    field = [slice(None), slice(None)]
    if labels.any():
        margins = [round(_MARGIN_MM / mm) for mm in v.spacing_mm[1:]]
        at = zip(np.nonzero(labels.any(axis=0)), margins, strict=True)
        field = [slice(max(int(where.min()) - m, 0), int(where.max()) + m) for where, m in at]
    rows, columns = field
    grey = np.clip((v.image[:, rows, columns] - low) / max(high - low, 1e-9), 0, 1)
    picture = np.repeat(np.round(255 * grey).astype(np.uint8)[..., None], 3, axis=-1)
    for structure, colour in _COLOURS.items():
        inside = labels[:, rows, columns] == structure
        inner = inside.copy()
        for axis in (1, 2):
            for step in (-1, 1):
                inner &= np.roll(inside, step, axis)
        picture[inside & ~inner] = colour
    every = max(1, round(max(picture.shape[1:3]) / _TILE))
    return str(image_array_to_data_uri(np.concatenate(picture[:, ::every, ::every], axis=1), "pypng", compression=6))


def refuse_release(path: Path, manifest: Manifest) -> None:
    """Refuse to put a private cohort's page where synthetic cohorts are released from. Raises PrivacyError."""
    if not path.absolute().parent.is_dir():
        raise CohortError(f"{path}: there's no folder {path.parent}; make it, or name another")
    if manifest.secret and "release" in path.resolve().parts:
        raise PrivacyError(
            f"{path}: shows private patients, and what lies under `release` is given away; keep it apart"
        )


def write_page(path: Path, manifest: Manifest, entries: Iterable[Entry]) -> None:
    """Write the page, patients with problems first, then those in doubt; nobody but its owner may read it."""
    order = sorted(entries, key=lambda entry: (not entry.problems, not entry.doubts, entry.patient))
    warning = "<p><b>It shows private patients: for their holder's eyes alone. Don't release or send it.</b></p>"
    body = "".join(map(_section, order))
    page = (
        f"<!doctype html><meta charset=utf-8><title>{manifest.name}</title>"
        "<style>body{font:15px sans-serif;margin:2em}img{max-width:100%;background:#000}.wrong{color:#b00}"
        ".doubt{color:#860}</style>"
        f"<h1>{manifest.name}: {len(order)} patients</h1>{warning if manifest.secret else ''}"
        "<p>Each row is a phase, base first; outlines are RV blue, wall yellow, LV red.</p>"
        f"{body}"
    )
    temporary = path.with_name(f".{path.name}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(page)
    temporary.replace(path)


def _section(entry: Entry) -> str:
    def lines(texts: Sequence[str], kind: str) -> str:
        return "".join(f"<p class={kind}>{html.escape(text)}</p>" for text in texts)

    pictures = "".join(f'<p>{phase}<br><img alt="{phase}" src="{uri}"></p>' for phase, uri in entry.pictures)
    said = lines(entry.problems, "wrong") + lines(entry.doubts, "doubt")
    return f"<h2>{html.escape(entry.patient)}</h2>{said}{pictures}"
