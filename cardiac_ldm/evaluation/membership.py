"""Membership inference from losses: whom an attacker with the weights takes for a training patient.

Losses of real patients are private: what is computed from them has no noise and stays with the holder of the patients.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, rankdata

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.privacy.bounds import SIGNIFICANCE, check_finite


class Rate(NamedTuple):
    """A rate or an area under a curve, with its 95 % interval."""

    value: float
    low: float
    high: float


def calibrated(losses: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Scores (n,) of membership from losses, corrected for how hard each patient is to models that never saw them.

    (mean of references - loss) / their standard deviation: offline LiRA (Carlini et al., arXiv 2112.03570). Of one
    reference, such as the public model, the difference alone (Watson et al., arXiv 2111.08440). The attack without
    references is the score -loss.

    Args:
        losses: (n,) of the patients under the model that is attacked.
        references: (k, n) of the same patients under models that none of them trained.

    Raises:
        ParameterError: the shapes don't fit, a loss is not finite, or all references give a patient the same loss.
    """
    if losses.ndim != 1 or references.ndim != 2 or not len(references) or references.shape[1:] != losses.shape:
        raise ParameterError(f"references: {references.shape} must be (k, n) for the losses' (n,) = {losses.shape}")
    check_finite("losses", losses)
    check_finite("references", references)
    gap = references.mean(axis=0) - losses
    if len(references) == 1:
        return gap
    spread = references.std(axis=0, ddof=1)
    if not spread.all():
        raise ParameterError(f"references: {(spread == 0).sum()} patients have the same loss under all; give one model")
    return gap / spread


def auc(members: np.ndarray, others: np.ndarray) -> Rate:
    """The probability that a member scores above a non-member, ties counted half: the area under the ROC curve.

    Mann and Whitney's U over n m. The interval is Newcombe's (Stat. Med. 25:559, 2006, method 5), which also holds
    where the two separate. It assumes that patients are drawn independently and speaks of the one model attacked.

    Args:
        members: scores (n,), higher for those that are more probably members.
        others: scores (m,).

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
