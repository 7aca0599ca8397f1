"""Canaries: made-up patients in a plan's batches, by whose scores an attacker guesses who was in.

Audits with canaries alone touch no patient. Losses and scores of real patients are private: what is computed from them
has no noise and stays with the holder of the patients.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.privacy.dpsgd import PrivatePlan, Randomness, UnitLoss
from cardiac_ldm.privacy.ledger import Ledger

EXCESS = 1e3
"""A canary's gradient is this many times as long as the clip, so that a clip that is missing or too large shows."""

BatchLoss = Callable[[Sequence[int]], UnitLoss]


def draw_canaries(
    n_canaries: int, parameters: Sequence[Tensor], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Who is in, bool (m,) by fair coins, and along what: +-1, float64 (m, s), each row in its own s parameters.

    The parameters, end to end, are cut into m blocks. Canaries share none, so they don't hide each other; all but the
    last few parameters are in one, so that noise which doesn't reach them all shows.

    Raises:
        ParameterError: there are fewer parameters than canaries, or no canaries.
    """
    size = sum(p.numel() for p in parameters)
    if not 0 < n_canaries <= size:
        raise ParameterError(f"n_canaries: {n_canaries} don't fit into {size} parameters; take 1 to {size}")
    return rng.random(n_canaries) < 0.5, rng.choice([-1.0, 1.0], (n_canaries, size // n_canaries))


def with_canaries(
    unit_loss: UnitLoss, included: np.ndarray, signs: np.ndarray, plan: PrivatePlan, parameters: Sequence[Tensor]
) -> UnitLoss:
    """A `unit_loss` for `PrivatePlan.gradient` in which the last m of the plan's units are canaries.

    A canary that is in has a gradient along its signs, `EXCESS` times as long as the clip. One that was left out
    contributes nothing, though batches are drawn with it as with everyone: the plan stays what it is.

    Args:
        unit_loss: of the other units; not called for canaries.
        included: bool (m,), and signs: (m, s), as `draw_canaries` gives them for `parameters`.

    Raises:
        ParameterError: there are more canaries than units.
    """
    first, block = plan.n_patients - len(included), signs.shape[1]
    if first < 0:
        raise ParameterError(f"n_canaries: {len(included)} exceed the plan's {plan.n_patients} units; take fewer")
    length = EXCESS * max(plan.clip, 1.0) if math.isfinite(plan.clip) else 1.0
    directions = torch.from_numpy(signs / math.sqrt(block))

    def loss(unit: int, generator: torch.Generator) -> Tensor | None:
        canary = unit - first
        if canary < 0:
            return unit_loss(unit, generator)
        if not included[canary]:
            return None
        own = torch.cat([p.flatten() for p in parameters])[canary * block : (canary + 1) * block]
        return length * own @ directions[canary].to(own)

    return loss


def evidence(gradient: Tensor, signs: np.ndarray, plan: PrivatePlan) -> np.ndarray:
    """How much likelier a private gradient (d,) is if each canary is in than if it was left out: float64 (m,).

    The log-likelihood ratio log(1 - q + q exp((x - 1/2) / sigma^2)) of its component x along the canary's direction,
    in clips: summed over steps, no score finds canaries more surely (Neyman and Pearson). With much noise the sum is
    as good as that of x; at noise multipliers below 1 and small batches it shows twice the epsilon. Without noise, x.
    """
    clip = plan.clip if math.isfinite(plan.clip) else 1.0
    blocks = gradient[: signs.size].cpu().double().numpy().reshape(signs.shape)
    x = (blocks * signs).sum(axis=1) * plan.expected_batch / (clip * math.sqrt(signs.shape[1]))
    if plan.noise_multiplier == 0:
        return x
    rate = plan.sampling_rate
    with np.errstate(divide="ignore"):  # of a rate of 1, where everybody joins, the first is -inf, and right
        return np.logaddexp(np.log1p(-rate), np.log(rate) + (x - 0.5) / plan.noise_multiplier**2)


def canary_scores(
    plan: PrivatePlan,
    parameters: Sequence[Tensor],
    randomness: Randomness,
    rng: np.random.Generator,
    *,
    n_canaries: int,
    unit_loss: UnitLoss = lambda unit, generator: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run all steps of a plan with canaries and score each by the evidence of all private gradients.

    The gradients are those of `PrivatePlan.gradient`, unchanged, at parameters that stay where they are: an optimiser
    would see nothing else. With the `unit_loss` of patients this spends the plan's budget, as training does.

    Args:
        parameters: for an audit without a model, `[torch.zeros(n_canaries, requires_grad=True)]`.
        rng: draws the coins and directions, before the first step.
        n_canaries: m; `plan.n_patients` where there is nobody else.
        unit_loss: of the plan's other units; nobody's unless given.

    Returns:
        scores: float64 (m,).
        included: bool (m,).

    Raises:
        ParameterError: there are fewer units or parameters than canaries, or no canaries.
    """
    included, signs = draw_canaries(n_canaries, parameters, rng)
    loss, scores = with_canaries(unit_loss, included, signs, plan, parameters), np.zeros(n_canaries)
    for step in range(plan.steps):
        scores += evidence(plan.gradient(step, parameters, loss, randomness), signs, plan)
    return scores, included


def weights_scores(before: Sequence[Tensor], after: Sequence[Tensor], signs: np.ndarray) -> np.ndarray:
    """Scores of canaries from final weights alone: how far each block (m, s) went against its canary's signs; (m,)."""
    moved = torch.cat([(old - new).flatten() for old, new in zip(before, after, strict=True)])
    return (moved[: signs.size].cpu().double().numpy().reshape(signs.shape) * signs).sum(axis=1)


def ledger_scores(
    ledger: Ledger, seed: int, *, n_canaries: int = 2000, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of canaries who are alone in the mechanisms that a ledger states, in all of them or in none.

    Every unit is a canary; where a cohort has fewer than `n_canaries`, the run is repeated with new ones until they
    are as many. No patient is touched, so the seed may be known.

    Args:
        noise: factor of the noise multiplier; below 1 the ledger states too little, which an audit should show.

    Returns:
        scores: float64 (m,), m at least `n_canaries`; the evidence of all mechanisms together.
        included: bool (m,).

    Raises:
        ParameterError: no private patient trained the model.
    """
    if not ledger.mechanisms:
        raise ParameterError("epsilon: 0 is the public model, which met no private patient; audit one above 0")
    rng, n, runs = np.random.default_rng(seed), ledger.n_units, []
    for _ in range(math.ceil(n_canaries / n)):
        coins, total = int(rng.integers(2**63)), np.zeros(n)
        for m in ledger.mechanisms:
            terms = (n, m.expected_batch, m.steps, m.clip, m.draws, ledger.epsilon, ledger.delta)
            plan = PrivatePlan(*terms, noise_multiplier=noise * m.noise_multiplier)
            fresh = Randomness(int(rng.integers(2**63)), simulated=True)
            weights = torch.zeros(n, requires_grad=True)
            scores, included = canary_scores(plan, [weights], fresh, np.random.default_rng(coins), n_canaries=n)
            total += scores
        runs.append((total, included))
    joined, coins_of_all = map(np.concatenate, zip(*runs, strict=True))
    return joined, coins_of_all


def sensitivity(
    plan: PrivatePlan,
    parameters: Sequence[Tensor],
    batch_loss: BatchLoss,
    batch: Sequence[int],
    added: int,
    seed: int = 0,
) -> float:
    """How far one more unit moves the sum of a batch's clipped gradients, in clips: what must not exceed 1.

    |sum over batch and added - sum over batch| / C. Where a unit's loss depends on nobody else, it's the norm of
    what the added one contributes, which is clipped. Where it does, the others' move too, each by up to 2.

    Args:
        batch_loss: gives the `unit_loss` of a batch; the mechanism's own is the same for every batch.
        seed: of the units' noise draws, the same with and without the added one.
    """
    randomness = Randomness(seed, simulated=True)

    def total(units: Sequence[int]) -> Tensor:
        loss, summed = batch_loss(units), torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for unit in units:
            found = loss(unit, randomness.draws(0, unit))
            if found is not None:
                summed += plan.clipped(found, parameters)
        return summed

    return float(torch.linalg.vector_norm(total([*batch, added]) - total(batch))) / plan.clip
