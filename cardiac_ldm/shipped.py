"""Train the public stages that come with the library as the `laptop` profile says: `python -m cardiac_ldm.shipped`.

What is shipped as the profile says it stays; pre-training goes on from the cycles that the shipped model had; the rest
is trained anew. `CARDIAC_LDM_SHIPPED=0` trains all of it, in hours. A killed one goes on.
"""

from cardiac_ldm.parameters import Parameters
from cardiac_ldm.study import Study
from cardiac_ldm.training.shipped import WEIGHTS, ship


def main() -> None:
    """Train what the `laptop` profile's public stages lack, and replace what is shipped."""
    study = Study(Parameters(profile="laptop"))
    for run in (study.anatomy, study.autoencoder, study.pretrained):
        if run.folder.parent != WEIGHTS:
            ship(run.stage, run.key, study.described(run.stage), run.folder)
        print(f"{run.stage}: shipped in {WEIGHTS / run.stage}")


if __name__ == "__main__":
    main()
