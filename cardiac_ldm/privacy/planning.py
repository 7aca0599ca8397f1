"""Planning before any training: what a cohort, a budget and some hours of computing allow.

`python -m cardiac_ldm.privacy.planning --help`
"""

import argparse
import math
from dataclasses import dataclass

import pandas as pd

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.privacy.dpsgd import PrivatePlan

FEWEST_STEPS = 30
"""Fewer updates than this teach a network little, however little noise they carry."""


@dataclass(frozen=True)
class Proposal:
    """One way to spend the budget and the hours: its plan, and the signal-to-noise ratio to expect.

    signal_to_noise: of one step, B / (sigma sqrt(d)): the norm of the mean of clipped gradients that all point one way
    over the norm of the noise in d parameters; real gradients agree less. of_run: after all steps, sqrt(steps) times as
    much, if the gradient kept its direction.
    """

    plan: PrivatePlan
    signal_to_noise: float

    @property
    def of_run(self) -> float:
        """Signal-to-noise ratio after all steps."""
        return self.signal_to_noise * math.sqrt(self.plan.steps)


def propose(
    epsilon: float, delta: float, *, n_patients: int, n_parameters: int, hours: float, seconds_per_patient: float
) -> list[Proposal]:
    """Plans that fill `hours`, from small lots and many steps to large lots and few, the best signal last.

    Args:
        n_parameters: how many are tuned: fewer carry less noise.
        seconds_per_patient: of one private gradient (all volumes and draws), measured on the machine that will train.

    Raises:
        ParameterError: the hours don't suffice for 30 steps of the smallest lot (16 patients).
    """
    visits = int(hours * 3600 / seconds_per_patient)
    proposals = []
    for batch in (2**power for power in range(4, 20)):
        if batch > n_patients // 2 or visits // batch < FEWEST_STEPS:
            break
        settings = {"n_patients": n_patients, "expected_batch": batch, "steps": visits // batch}
        plan = PrivatePlan.for_budget(epsilon, delta, **settings, clip=1.0, draws=1)
        proposals.append(Proposal(plan, batch / (plan.noise_multiplier * math.sqrt(n_parameters))))
    if not proposals:
        raise ParameterError(
            f"hours: {hours} hold {visits} gradients of {n_patients} patients; {FEWEST_STEPS} steps of 16 of at least "
            "32 patients are needed: give more hours or patients, or a smaller model"
        )
    return sorted(proposals, key=lambda proposal: proposal.of_run)


def table(proposals: list[Proposal]) -> pd.DataFrame:
    """One row a proposal: lot, steps, noise multiplier, and signal-to-noise of a step and of the run."""
    rows = [
        {
            "expected batch": p.plan.expected_batch,
            "steps": p.plan.steps,
            "noise multiplier": p.plan.noise_multiplier,
            "signal-to-noise of a step": p.signal_to_noise,
            "of the run": p.of_run,
        }
        for p in proposals
    ]
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table for the settings on the command line."""
    parser = argparse.ArgumentParser(description="Which lots, steps and noise a budget and some hours allow.")
    for name, kind in (("epsilon", float), ("patients", int), ("parameters", int), ("hours", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seconds-per-patient", type=float, required=True, help="of one private gradient")
    given = parser.parse_args()
    proposals = propose(
        given.epsilon,
        given.delta,
        n_patients=given.patients,
        n_parameters=given.parameters,
        hours=given.hours,
        seconds_per_patient=given.seconds_per_patient,
    )
    print(table(proposals).to_string(index=False, float_format="{:.4g}".format))


if __name__ == "__main__":
    main()
