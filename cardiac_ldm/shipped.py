"""Train the public stages that come with the library anew: `python -m cardiac_ldm.shipped` (hours)."""

import os

from cardiac_ldm.parameters import Parameters
from cardiac_ldm.study import Study
from cardiac_ldm.training.shipped import WEIGHTS, ship


def main() -> None:
    """Train the public stages of the `laptop` profile, or read what has been trained, and replace what is shipped."""
    os.environ["CARDIAC_LDM_SHIPPED"] = "0"
    study = Study(Parameters(profile="laptop"))
    for run in (study.anatomy, study.autoencoder, study.pretrained):
        ship(run.stage, run.key, study.described(run.stage), run.folder)
        print(f"{run.stage}: {run.folder} shipped to {WEIGHTS / run.stage}")


if __name__ == "__main__":
    main()
