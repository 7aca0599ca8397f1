"""Whether synthetic volumes lie nearer to the patients a model was trained on than chance, and to whom.

A model that copied nobody can't tell its training patients from held-out ones of the same population, so those two may
be exchanged. That holds where a patient's part was drawn at random and the requests were written without regard to it:
requests that repeat the attributes of the held-out patients hide copies, those of the training patients feign them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange, reduce

from cardiac_ldm.cohort import Patients, Volumes, require_releasable
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.features import volume_features
from cardiac_ldm.evaluation.intervals import MIN_PATIENTS, bootstrap, records, rows_of
from cardiac_ldm.evaluation.measured import groups_of
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.device import device_of
from cardiac_ldm.progress import tqdm

_POOLING = 4
_BATCH = 32
_RESOLUTION = 1e-9
"""Of the largest distance: what is nearer is as good as equal, and has a logarithm."""


@dataclass(frozen=True)
class Embedded:
    """The volumes of a cohort as points in the spaces where Euclidean distances are taken.

    vectors: name of the space -> (n_volumes, d). patient_index: int64 (n_volumes,), each volume's patient or request,
    from 0 on, nobody without a volume. groups: a row per patient, a column per grouping ("sex", "disease"), missing
    where unknown; for patients only.
    """

    vectors: Mapping[str, np.ndarray]
    patient_index: np.ndarray
    groups: pd.DataFrame | None = None

    @property
    def n_patients(self) -> int:
        """Number of patients or requests."""
        return int(self.patient_index.max(initial=-1)) + 1


def embed_real(patients: Patients, autoencoder: Autoencoder) -> Embedded:
    """Embed real patients as `embed` does, some at a time, and tell the groups they belong to.

    Raises:
        PrivacyError: they are private and not simulated.
    """
    require_releasable(patients, "who among private patients resembles a synthetic volume")
    vectors = _vectors(patients.images, len(patients.patient_index), autoencoder)
    return Embedded(
        vectors, patients.patient_index, groups_of(patients.attributes, patients.patient_index, patients.groups)
    )


def embed(volumes: Volumes, autoencoder: Autoencoder) -> Embedded:
    """Embed volumes; guards nobody.

    "image": pooled 4 x 4 in-plane, centred and scaled to length 1, so that distance^2 = 2 (1 - correlation). "latent":
    the autoencoder's standardised means. "feature": mean of EfficientNet's features over slices 3..9, scaled to length
    1: distance^2 = 2 (1 - cosine).
    """
    images = volumes.images
    return Embedded(_vectors(lambda rows: images[rows], len(images), autoencoder), volumes.patient_index)


def memorised(
    volumes: Volumes, train: Embedded, held_out: Embedded, autoencoder: Autoencoder, *, resamples: int, seed: int
) -> dict[str, Any]:
    """`memorisation` of a synthetic cohort, as JSON knows it: its table, and the `suspicious` pairs."""
    synthetic = embed(volumes, autoencoder)
    table, pairs = memorisation(
        synthetic, train, held_out, permutations=999, resamples=resamples, suspicious=6, seed=seed
    )
    return {"memorisation": records(table), "suspicious": records(pairs)}


def patient_distances(
    first: np.ndarray, first_index: np.ndarray, second: np.ndarray, second_index: np.ndarray
) -> np.ndarray:
    """Smallest Euclidean distances over the pairs of volumes (n, d) and (m, d): float64 (patients, patients).

    patient_index: int64 (n,) and (m,), each volume's patient or request, from 0. A pure function: it guards nobody.
    """
    points = torch.from_numpy(first).double()
    blocks = [torch.cdist(points, some.double()).numpy() for some in torch.from_numpy(second).split(512)]
    distances = np.concatenate(blocks, axis=1)
    smallest = np.full((int(first_index.max()) + 1, int(second_index.max()) + 1), np.inf)
    np.minimum.at(smallest, (first_index[:, None], second_index[None]), distances)
    return smallest


def memorisation(
    synthetic: Embedded,
    train: Embedded,
    held_out: Embedded,
    *,
    permutations: int,
    resamples: int,
    suspicious: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare, for every request, the nearest training with the nearest held-out patient, equally many of both.

    The nearest of more patients is nearer, so the seed draws as many of the larger set as the smaller one has. A
    request has one vote, whatever its volumes: its distance to a patient is the smallest of their pairs of volumes.

    "nearer to training" is the share of requests whose nearest patient is a training one, a tie half; "log ratio" the
    mean of ln(distance to the nearest training / held-out patient). p_value: the share of exchanges of training and
    held-out patients that give as large a share, or as small a ratio, this one included: exact (Phipson and Smyth,
    Stat. Appl. Genet. Mol. Biol. 9:39, 2010) however many requests share a nearest patient. Groups are those of the
    nearest patients, whose privacy it is; for them, patients are exchanged within groups. Intervals come from the
    bootstrap over requests, those with the same nearest patient together, and say how large the effect is; p_value says
    whether there is one. Copies of k patients can't bring it much below 2^-k: where they are few, look at `pairs`.

    A pure function: it guards nobody, and what it gives tells of the training patients.

    Returns:
        A row for every space, group of patients and statistic, with value, 95 % interval (low, high), what is to be
        expected without memorisation (chance), one-sided p_value, n_requests, and the n_patients who are nearest to
        them. And the `suspicious` requests of smallest ratio in each space, the most suspicious first, with the
        training patient whom each is nearest to, among ALL patients: space, request, patient, ratio.

    Raises:
        ParameterError: fewer than 8 patients or requests, or arrays that don't fit or aren't finite.
    """
    _check(synthetic, train, held_out)
    rng, size = np.random.default_rng(seed), min(train.n_patients, held_out.n_patients)
    ours, others = rng.permutation(train.n_patients)[:size], rng.permutation(held_out.n_patients)[:size]
    pool = np.concatenate([ours, train.n_patients + others])
    is_train, rows, pairs = pool < train.n_patients, [], []
    for space, points in synthetic.vectors.items():
        distances = np.concatenate(
            [
                patient_distances(points, synthetic.patient_index, other.vectors[space], other.patient_index)
                for other in (train, held_out)
            ],
            axis=1,
        )
        distances = np.log(np.maximum(distances, _RESOLUTION * (distances.max() or 1.0)))
        pairs.append(_suspicious_pairs(distances, train.n_patients, suspicious).assign(space=space))
        order = distances[:, pool].argsort(axis=1, kind="stable")
        ranked, nearest = np.take_along_axis(distances[:, pool], order, axis=1), order[:, 0]
        for grouping, codes, names in _groupings(train, held_out, pool):
            parts = [is_train, *(_exchanged(is_train, codes, rng) for _ in range(permutations))]
            ratios = np.stack([_log_ratios(ranked, part[order]) for part in parts])
            for code, name in enumerate(names):
                requested = np.flatnonzero(codes[nearest] == code)
                about = {"space": space, "grouping": grouping, "group": name, "n_requests": len(requested)}
                votes = (1 - np.sign(ratios[:, requested])) / 2
                for statistic, values, sign in (
                    ("nearer to training", votes, 1),
                    ("log ratio", ratios[:, requested], -1),
                ):
                    tested = _tested(values, sign, nearest[requested], resamples, seed)
                    rows.append(about | {"statistic": statistic} | tested)
    columns = ["space", "grouping", "group", "statistic", "value", "low", "high", "chance", "p_value"]
    table = pd.DataFrame(rows)[[*columns, "n_requests", "n_patients"]]
    return table, pd.concat(pairs, ignore_index=True)[["space", "request", "patient", "ratio"]]


@torch.no_grad()
def _vectors(
    images: Callable[[np.ndarray], np.ndarray], n_volumes: int, autoencoder: Autoencoder
) -> dict[str, np.ndarray]:
    """The points (n_volumes, d) in every space; images: gives those of these rows."""
    parts: dict[str, list[np.ndarray]] = {"image": [], "latent": [], "feature": []}
    bar = tqdm(range(0, n_volumes, _BATCH), desc="embed", unit="batch", leave=False)
    for start in bar:
        some = images(np.arange(start, min(start + _BATCH, n_volumes)))
        pooled = reduce(some, "n d (h i) (w j) -> n (d h w)", "mean", i=_POOLING, j=_POOLING)
        parts["image"].append(_unit(pooled - pooled.mean(axis=1, keepdims=True)))
        latents = autoencoder.encode(torch.from_numpy(some).to(device_of(autoencoder))).cpu()
        parts["latent"].append(rearrange(latents, "n c d h w -> n (c d h w)").numpy())
        parts["feature"].append(_unit(volume_features(some)))
    return {space: np.concatenate(vectors) for space, vectors in parts.items()}


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scaled to length 1; what is 0 stays 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)


def _groupings(
    train: Embedded, held_out: Embedded, pool: np.ndarray
) -> list[tuple[str | None, np.ndarray, list[str | None]]]:
    """Name, group of every patient of the pool (-1 where unknown), and the groups' names; first, everybody."""
    groupings: list[tuple[str | None, np.ndarray, list[str | None]]] = [(None, np.zeros(len(pool), np.int64), [None])]
    if train.groups is not None and held_out.groups is not None:
        for name, column in pd.concat([train.groups, held_out.groups]).iloc[pool].items():
            codes, groups = pd.factorize(column.to_numpy(object), sort=True)
            groupings.append((str(name), codes, list(map(str, groups))))
    return groupings


def _exchanged(is_train: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The parts of the patients, exchanged at random within each group, the unknown being one."""
    exchanged = is_train.copy()
    for code in np.unique(codes):
        exchanged[codes == code] = rng.permutation(is_train[codes == code])
    return exchanged


def _log_ratios(ranked: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """ln(nearest training / nearest held-out distance) of requests, from log distances (m, n) in rising order."""
    to_train, to_held_out = (
        np.take_along_axis(ranked, side.argmax(axis=1)[:, None], axis=1)[:, 0] for side in (is_train, ~is_train)
    )
    return to_train - to_held_out


def _tested(values: np.ndarray, sign: int, nearest: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """The mean over requests of values (1 + permutations, m), as observed in row 0; `sign` of it is suspicious."""
    if not len(nearest):
        return dict.fromkeys(("value", "low", "high", "chance", "p_value"), math.nan) | {"n_patients": 0}
    observed, means = values[0], values.mean(axis=1)
    blocks = rows_of(np.unique(nearest, return_inverse=True)[1])

    def mean(chosen: np.ndarray) -> float:
        return float(observed[np.concatenate([blocks[i] for i in chosen])].mean())

    estimate = bootstrap(mean, len(blocks), resamples=resamples, seed=seed)
    p_value = float((sign * means >= sign * means[0]).mean())
    value = mean(np.arange(len(blocks)))  # given of fewer patients than an interval takes, too
    return asdict(estimate) | {"value": value, "chance": float(means[1:].mean()), "p_value": p_value}


def _suspicious_pairs(distances: np.ndarray, n_train: int, k: int) -> pd.DataFrame:
    ours, others = distances[:, :n_train], distances[:, n_train:]
    ratios = np.exp(ours.min(axis=1) - others.min(axis=1))
    conditions = ratios.argsort(kind="stable")[:k]
    return pd.DataFrame(
        {"request": conditions, "patient": ours.argmin(axis=1)[conditions], "ratio": ratios[conditions]}
    )


def _check(synthetic: Embedded, train: Embedded, held_out: Embedded) -> None:
    for name, cohort in (("synthetic", synthetic), ("train", train), ("held_out", held_out)):
        n_patients = len(np.unique(cohort.patient_index))
        if n_patients < MIN_PATIENTS:
            raise ParameterError(f"{name}: {n_patients} patients with volumes; give at least {MIN_PATIENTS}")
        if n_patients != cohort.n_patients:
            raise ParameterError(
                f"{name}.patient_index: {n_patients} patients, numbered {cohort.patient_index.min()} to "
                f"{cohort.patient_index.max()}; number them from 0 on, with no gap"
            )
        if set(cohort.vectors) != set(synthetic.vectors):
            raise ParameterError(
                f"{name}.vectors: spaces {sorted(cohort.vectors)}, expected {sorted(synthetic.vectors)} as in the "
                "synthetic cohort; embed all alike"
            )
        for space, vectors in cohort.vectors.items():
            expected = len(cohort.patient_index), synthetic.vectors[space].shape[1]
            if vectors.shape != expected:
                raise ParameterError(
                    f"{name}.vectors[{space!r}]: shape {vectors.shape}, expected {expected}: a row for each owner, as "
                    "wide as the synthetic cohort's; embed all alike"
                )
            if unfit := np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
                raise ParameterError(
                    f"{name}.vectors[{space!r}]: volumes {unfit} hold values that aren't finite; leave them out"
                )
        same = (cohort.groups is None) == (train.groups is None)
        if cohort is not synthetic and not (same and (cohort.groups is None or len(cohort.groups) == n_patients)):
            given = "none" if cohort.groups is None else f"{len(cohort.groups)} rows"
            raise ParameterError(
                f"{name}.groups: {given}, expected a row for each of {n_patients} patients, in train and held_out"
            )
    if train.groups is not None and held_out.groups is not None and set(train.groups) != set(held_out.groups):
        raise ParameterError(
            f"held_out.groups: columns {list(held_out.groups)}, expected {list(train.groups)} as in train"
        )
