"""Membership inference from losses: whom an attacker with the weights takes for a training patient.

Losses of real patients are private: what is computed from them has no noise and stays with the holder of the patients.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, rankdata

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.intervals import records
from cardiac_ldm.privacy.bounds import SIGNIFICANCE, check_finite


class Rate(NamedTuple):
    """A rate or an area under a curve, with its 95 % interval."""

    value: float
    low: float
    high: float


def attacks(losses: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None) -> dict[str, Any]:
    """Membership from the losses (n,) of members and (m,) of others, and from what these are below a reference model's.

    The second takes off how hard each patient is for a model that none of them trained, such as the public one (Watson
    et al., arXiv 2111.08440). references: its losses of the same patients.

    Returns:
        n_members, n_others, and membership: a row an attack and measure, as JSON knows them.

    Raises:
        ParameterError: losses are missing or not finite, or the references are of others.
    """
    members, others = losses
    scores = {"loss": (-members, -others)}
    if references is not None:
        if (given := [side.shape for side in references]) != (expected := [members.shape, others.shape]):
            raise ParameterError(f"references: {given} must be of the same patients as the losses, {expected}")
        scores["loss below the public model's"] = references[0] - members, references[1] - others
    rows = [
        {"attack": attack, "measure": measure} | rate._asdict()
        for attack, sides in scores.items()
        for measure, rate in membership(*sides).items()
    ]
    return {"n_members": len(members), "n_others": len(others), "membership": records(pd.DataFrame(rows))}


def auc(members: np.ndarray, others: np.ndarray) -> Rate:
    """The probability that a member scores above a non-member, ties counted half: the area under the ROC curve.

    Mann and Whitney's U over n m. The interval is Newcombe's (Stat. Med. 25:559, 2006, method 5), which also holds
    where the two separate. It assumes that patients are drawn independently and speaks of the one model attacked.

    members, others: scores (n,) and (m,), higher for those that are more probably members.

    Raises:
        ParameterError: scores are missing or not finite.
    """
    n, m = _check_sides(members, others)
    area = float(rankdata(np.concatenate([members, others]))[:n].sum() - n * (n + 1) / 2) / (n * m)
    spare, z = (n + m) / 2 - 1, norm.ppf(1 - SIGNIFICANCE / 2)

    def outside(t: float) -> float:
        variance = t * (1 - t) * (1 + spare * (1 - t) / (2 - t) + spare * t / (1 + t)) / (n * m)
        return (area - t) ** 2 - z * z * variance

    low = brentq(outside, 0.0, min(area, 1 - 1e-9)) if area > 0 else 0.0
    high = brentq(outside, max(area, 1e-9), 1.0) if area < 1 else 1.0
    return Rate(area, low, high)


def true_positive_rate(members: np.ndarray, others: np.ndarray, at: float) -> Rate:
    """The part of the members that score above all but a part `at` of the non-members; higher scores are members'.

    The interval is Clopper and Pearson's, given the threshold: that others would have put it elsewhere is not in it.

    Raises:
        ParameterError: there are fewer than 1 / at non-members, or scores are missing or not finite.
    """
    n, m = _check_sides(members, others)
    if not 0 < at < 1:
        raise ParameterError(f"at: {at} must lie between 0 and 1: a false positive rate")
    if m < _needed(at):
        raise ParameterError(f"others: {m} non-members can't show a false positive rate of {at}; give {_needed(at)}")
    threshold = np.sort(others)[::-1][int(at * m + 1e-9)]
    found = int((members > threshold).sum())
    limits = binomtest(found, n).proportion_ci(1 - SIGNIFICANCE, "exact")
    return Rate(found / n, float(limits.low), float(limits.high))


def membership(members: np.ndarray, others: np.ndarray) -> dict[str, Rate]:
    """What an attack's scores of members (n,) and others (m,) tell: auc, tpr_at_fpr_0.01 and tpr_at_fpr_0.001.

    A rate is NaN where there are too few non-members to show it.
    """
    rates = {"auc": auc(members, others)}
    for at in (0.01, 0.001):
        enough = len(others) >= _needed(at)
        rates[f"tpr_at_fpr_{at}"] = true_positive_rate(members, others, at) if enough else Rate(*3 * [math.nan])
    return rates


def _needed(at: float) -> int:
    return math.ceil(1 / at - 1e-9)


def _check_sides(members: np.ndarray, others: np.ndarray) -> tuple[int, int]:
    for name, side in (("members", members), ("others", others)):
        if side.ndim != 1 or not len(side):
            raise ParameterError(f"{name}: shape {side.shape} must be (n,), one score a patient, of at least one")
        check_finite(name, side)
    return len(members), len(others)
