"""Walls of slices: what patients' and synthetic volumes look like, on one picture."""

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from einops import rearrange
from numpy.typing import ArrayLike, NDArray
from plotly.utils import image_array_to_data_uri
from scipy import ndimage

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, Patients, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.report.figures import GREEN, SKY, VERMILLION

SYNTHETIC = "synthetic"
"""What is said on every picture of samples."""


def mosaic(volumes: ArrayLike, columns: int) -> NDArray[np.uint8]:
    """Lay the middle slices of volumes out as tiles.

    volumes: (n, slices, height, width), intensities in [0, 1]; slices that are all zero are padding and don't count.
    columns: tiles in a row. Returns one grey image (rows * (height + 2), columns * (width + 2)).
    """
    slices = []
    for volume in np.asarray(volumes):
        filled = np.flatnonzero(volume.any(axis=(1, 2)))
        slices.append(volume[filled[len(filled) // 2] if len(filled) else len(volume) // 2])
    tiles = np.pad(np.stack(slices), [(0, -len(slices) % columns), (0, 2), (0, 2)], constant_values=1.0)
    grey = rearrange(tiles, "(r c) h w -> (r h) (c w)", c=columns)
    return np.round(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def png(picture: NDArray[np.uint8]) -> str:
    """Return an image, grey (height, width) or in colours (height, width, 3), as a PNG data URI."""
    return image_array_to_data_uri(np.asarray(picture), backend="pypng", compression=9)


def shown_as(patients: Patients) -> str:
    """What is said on every picture of patients: that they're simulated, or real."""
    return "simulated patients" if patients.simulated else "real patients"


def _match(captions: Sequence[str], n_volumes: int) -> None:
    if len(captions) != n_volumes or n_volumes == 0:
        raise ParameterError(f"a wall needs one caption per volume: {len(captions)} captions, {n_volumes} volumes")


def _captioned(
    picture: NDArray[np.uint8], corners: Sequence[tuple[int, int]], captions: Sequence[str], badge: str
) -> go.Figure:
    """Return a picture as wide as the book's text, a caption in each of these corners (column, row).

    badge: whom it shows; it stands on the picture and in its alternative text.
    """
    height, width = picture.shape[:2]
    figure = go.Figure(go.Image(source=png(picture), hoverinfo="skip", zsmooth="fast"))
    column, row = np.transpose(corners)
    figure.add_scatter(
        x=column + 3,
        y=row + 3,
        text=list(captions),
        mode="text",
        textposition="bottom right",
        textfont={"color": "white", "size": 11, "shadow": "1px 1px 2px black"},
        hoverinfo="skip",
    )
    scale = 682 / width  # the book's text column leaves about that many pixels
    figure.update_xaxes(visible=False, range=[0, width], constrain="domain")
    figure.update_yaxes(visible=False, range=[height, 0], scaleanchor="x", constrain="domain")
    told = ", ".join(dict.fromkeys(filter(None, captions)))
    places = [
        (round(100 * x / width, 2), round(100 * y / height, 2), text)
        for (x, y), text in zip(corners, captions, strict=True)
    ]
    alt = f"Slices of {badge}" + (f": {told}" if told else "")
    figure.update_layout(meta={"badge": badge, "alt": alt, "captions": places})
    figure.add_annotation(
        text=badge, x=1, y=0, xref="paper", yref="paper", xanchor="right", yanchor="bottom", showarrow=False
    )
    figure.update_annotations(font={"color": "#ffd166", "size": 11}, bgcolor="black")
    return figure.update_layout(height=round(height * scale) + 20, margin={"l": 10, "r": 10, "t": 10, "b": 10})


def patient_wall(patients: Patients, volumes: Sequence[int], captions: Sequence[str]) -> go.Figure:
    """Return a wall of the middle slices of patients' volumes.

    volumes: indices, as `patients.images` takes them. captions: one per volume. Raises PrivacyError when the patients
    are private and not simulated.
    """
    require_releasable(patients, "what a patient's heart looks like")
    return synthetic_wall(patients.images(volumes), captions, badge=shown_as(patients))


def stack_wall(patients: Patients, volumes: Sequence[int], captions: Sequence[str]) -> go.Figure:
    """Return whole stacks, a row each from base to apex, with the labels outlined: LV, myocardium and RV.

    volumes: indices, as `patients.images` takes them. captions: one per volume. Raises PrivacyError when the patients
    are private and not simulated.
    """
    require_releasable(patients, "what a patient's heart looks like")
    _match(captions, len(volumes))
    images, labels = patients.images(volumes), patients.labels(volumes)
    shown = np.flatnonzero(images.any(axis=(0, 2, 3)))
    rows = rearrange(np.repeat(images[:, shown, :, :, None], 3, axis=4), "n d h w c -> (n h) (d w) c")
    picture = np.round(255 * np.clip(rows, 0, 1)).astype(np.uint8)
    for label, colour in ((1, SKY), (2, GREEN), (3, VERMILLION)):
        inside = labels[:, shown] == label
        edge = inside & ~ndimage.binary_erosion(inside, np.ones((1, 1, 3, 3), bool))
        picture[rearrange(edge, "n d h w -> (n h) (d w)")] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return _captioned(picture, [(0, i * images.shape[2]) for i in range(len(images))], captions, shown_as(patients))


def synthetic_wall(
    volumes: NDArray[np.float32], captions: Sequence[str], columns: int = 6, badge: str = SYNTHETIC
) -> go.Figure:
    """Return a wall of the middle slices of synthetic volumes.

    volumes: (n, slices, height, width) in [0, 1]. captions: one per volume. columns: slices in a row. badge: what they
    are, where not all are samples.
    """
    _match(captions, len(volumes))
    columns = min(columns, len(volumes))
    height, width = volumes.shape[2] + 2, volumes.shape[3] + 2
    corners = [(i % columns * width, i // columns * height) for i in range(len(volumes))]
    return _captioned(mosaic(volumes, columns), corners, captions, badge)


def captions(attributes: NDArray[np.float32]) -> list[str]:
    """Return the phase and LV volume of each row of attributes (n, 14), as far as they're known: "ED 142 mL"."""
    texts = []
    for row in attributes:
        phase = {1.0: "ED", 0.0: "ES"}.get(float(row[ATTRIBUTE_NAMES.index("ESED")]), "")
        volume = row[ATTRIBUTE_NAMES.index(f"LV{phase}V")] if phase else math.nan
        texts.append(f"{phase} {volume:.0f} mL" if math.isfinite(volume) else phase)
    return texts
