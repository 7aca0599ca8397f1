"""Before any training: what a cohort, a budget and hours allow. `python -m cardiac_ldm.privacy plan --help`."""

import math

import dp_accounting
import numpy as np
import pandas as pd
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.privacy.accounting import epsilon_pld
from cardiac_ldm.privacy.dpsgd import PrivatePlan

FEWEST_STEPS = 30
"""Fewer updates than this teach a network little, however little noise they carry."""


def propose(
    epsilon: float, delta: float, *, n_patients: int, n_parameters: int, hours: float, seconds_per_patient: float
) -> pd.DataFrame:
    """Plans that fill `hours`, one a row, the best signal last.

    Args:
        n_parameters: how many are tuned: fewer carry less noise.
        seconds_per_patient: of one private gradient (all volumes and draws), measured on the machine that will train.

    Returns:
        expected_batch, steps, noise_multiplier; signal_to_noise of one step, B / (sigma sqrt(d)): the norm of the mean
        of clipped gradients that all point one way over that of the noise in d parameters (real gradients agree less);
        and of_run, sqrt(steps) times as much, if the gradient kept its direction.

    Raises:
        ParameterError: the hours don't suffice for 30 steps of the smallest batch, 16 patients or all of fewer than 32;
            or something isn't a positive number.
    """
    offered = {"n_patients": n_patients, "n_parameters": n_parameters, "hours": hours}
    for name, value in (offered | {"epsilon": epsilon, "seconds_per_patient": seconds_per_patient}).items():
        if not 0 < value < math.inf:
            raise ParameterError(f"{name}: {value} must be a positive number")
    visits, rows = int(hours * 3600 / seconds_per_patient), []
    drawn = [2**power for power in range(4, 20) if 2**power <= n_patients // 2]
    for batch in (*drawn, n_patients):  # or everybody in every step
        if (steps := visits // batch) < FEWEST_STEPS:
            continue
        plan = PrivatePlan.for_budget(
            epsilon, delta, n_patients=n_patients, expected_batch=batch, steps=steps, clip=1.0, draws=1
        )
        signal = batch / (plan.noise_multiplier * math.sqrt(n_parameters))
        rows.append((batch, steps, plan.noise_multiplier, signal, signal * math.sqrt(steps)))
    if not rows:
        raise ParameterError(
            f"hours: {hours} hold {visits} gradients of {n_patients} patients; {FEWEST_STEPS} steps of "
            f"{min([*drawn, n_patients])} are needed: give more hours, or a smaller model"
        )
    columns = ["expected_batch", "steps", "noise_multiplier", "signal_to_noise", "of_run"]
    return pd.DataFrame(rows, columns=columns).sort_values("of_run", ignore_index=True)


def tuning(noise_multiplier: float, rate: float, steps: int, delta: float) -> pd.DataFrame:
    """What it costs to train several times with other settings and to show the best model alone.

    Returns:
        runs; composed, epsilon of that many runs, all of which may be shown; selected, epsilon of the best of a number
        of runs that is drawn at random (geometric, with this mean), if nothing else is ever shown: no other model, nor
        how many there were, nor their scores (Papernot and Steinke, arXiv 2110.03620, by dp-accounting's Renyi
        accountant, in which one run costs `one_run`).
    """
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    run = dp_accounting.SelfComposedDpEvent(step, steps)
    orders = [*np.linspace(1.1, 10, 90), *range(11, 129), 256, 512, 1024]

    def renyi(event: dp_accounting.DpEvent) -> float:
        return float(RdpAccountant(orders=orders).compose(event).get_epsilon(delta))

    rows = [
        (
            runs,
            epsilon_pld(((noise_multiplier, rate, runs * steps),), delta),
            renyi(RepeatAndSelectDpEvent(run, runs, 1.0)),
            renyi(run),
        )
        for runs in (3, 10, 30, 100)
    ]
    return pd.DataFrame(rows, columns=["runs", "composed", "selected", "one_run"])
