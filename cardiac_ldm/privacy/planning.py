"""Before any training: what a cohort, a budget and hours allow. `python -m cardiac_ldm.privacy.planning --help`."""

import argparse
import math

import pandas as pd

from cardiac_ldm.errors import ParameterError
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
        ParameterError: the hours don't suffice for 30 steps of the smallest lot (16 patients).
    """
    visits, rows = int(hours * 3600 / seconds_per_patient), []
    for batch in (2**power for power in range(4, 20)):
        steps = visits // batch
        if batch > n_patients // 2 or steps < FEWEST_STEPS:
            break
        plan = PrivatePlan.for_budget(
            epsilon, delta, n_patients=n_patients, expected_batch=batch, steps=steps, clip=1.0, draws=1
        )
        signal = batch / (plan.noise_multiplier * math.sqrt(n_parameters))
        rows.append((batch, steps, plan.noise_multiplier, signal, signal * math.sqrt(steps)))
    if not rows:
        raise ParameterError(
            f"hours: {hours} hold {visits} gradients of {n_patients} patients; {FEWEST_STEPS} steps of 16 of at least "
            "32 patients are needed: give more hours or patients, or a smaller model"
        )
    columns = ["expected_batch", "steps", "noise_multiplier", "signal_to_noise", "of_run"]
    return pd.DataFrame(rows, columns=columns).sort_values("of_run", ignore_index=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Which lots, steps and noise a budget and some hours allow.")
    for name, kind in (("epsilon", float), ("n-patients", int), ("n-parameters", int), ("hours", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--seconds-per-patient", type=float, required=True, help="of one private gradient")
    parser.add_argument("--delta", type=float, default=1e-5)
    print(propose(**vars(parser.parse_args())).to_string(index=False, float_format="{:.4g}".format))
