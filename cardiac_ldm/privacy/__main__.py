"""What real patients have spent, what a command would spend of them, and what a budget and some hours allow."""

import argparse
import sys
from collections.abc import Sequence

from cardiac_ldm.cohort import load_manifest
from cardiac_ldm.errors import StudyError
from cardiac_ldm.parameters import CompareParameters
from cardiac_ldm.privacy.accounting import epsilon_pld, merged
from cardiac_ldm.privacy.budget import Record
from cardiac_ldm.privacy.planning import propose, tuning


def show() -> None:
    """Print the record: its place, every run in it, and by cohort what its patients have spent together."""
    record = Record()
    spends, finished = record.spends, record.finished
    print(f"{record.path}: {len(spends)} run(s) on real patients; for their holder's eyes")
    for spend in spends:
        epsilon = epsilon_pld(merged(spend.mechanisms), spend.delta)
        state = "finished" if spend.run in finished else "charged, not finished"
        who = f"{spend.cohort}: {len(spend.people)} patients"
        print(f"  {spend.date}  {who}, epsilon {epsilon:.4g}, {state}, {spend.run}")
    for spend in {spend.cohort: spend for spend in spends}.values():
        standing = record.standing(spend.people, spend.delta)
        together = f"({standing.epsilon:.4g}, {standing.delta:g}) by {standing.runs} run(s)"
        print(f"{spend.cohort}: the most that one patient has spent is {together}")


def would_spend(parameters: CompareParameters) -> None:
    """Print what the models of these budgets would spend; nothing is spent."""
    if not load_manifest(parameters.cohort_private).secret:
        print(f"{parameters.cohort_private}: simulated patients spend nothing")
        return
    from cardiac_ldm.study import Study

    print(Study(parameters).would_spend(parameters.budgets) or "nothing: these models are there")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 for what would be refused, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m cardiac_ldm.privacy", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("show", help="the record, as without a command")
    spend = commands.add_parser("would-spend", help="what the models of some budgets would spend; nothing is spent")
    for name, field in CompareParameters.model_fields.items():
        if name not in ("spend", "seed"):
            spend.add_argument(f"--{name.replace('_', '-')}", default=field.default)
    plan = commands.add_parser(
        "plan", help="batches, steps and noise that a budget and some hours allow; costs of tuning"
    )
    for name, kind in (("epsilon", float), ("n-patients", int), ("n-parameters", int), ("hours", float)):
        plan.add_argument(f"--{name}", type=kind, required=True)
    plan.add_argument("--seconds-per-patient", type=float, required=True, help="of one private gradient")
    plan.add_argument("--delta", type=float, default=1e-5)
    given = vars(parser.parse_args(arguments))
    try:
        match given.pop("command"):
            case "plan":
                plans = propose(**given)
                print(plans.to_string(index=False, float_format="{:.4g}".format))
                best = plans.iloc[-1]
                terms = best.noise_multiplier, best.expected_batch / given["n_patients"], int(best.steps)
                print("\nSeveral runs of the last line to choose from, in epsilon:")
                print(tuning(*terms, given["delta"]).to_string(index=False, float_format="{:.4g}".format))
            case "would-spend":
                would_spend(CompareParameters.read(given))
            case _:
                show()
    except StudyError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
