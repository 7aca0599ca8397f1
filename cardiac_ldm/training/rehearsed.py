"""What a private fine-tuning is expected to be worth, from rehearsals on public patients who played private ones.

`python -m benchmarks.cohort_sizes` rehearses the profiles' recipes for cohorts of several sizes; nothing here looks at
a private patient.
"""

import json
from functools import cache
from pathlib import Path

from cardiac_ldm.settings import Settings
from cardiac_ldm.training.finetune import FinetuneSettings

REHEARSED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cohort_sizes.json"


class Rehearsal(Settings):
    """What one was worth: the change of the held-out denoising loss × 1000, below 0 where it helped, with its interval.

    recipe: the profile's `finetune`. places: patients who trained. n_patients: held-out ones who were asked.
    """

    recipe: FinetuneSettings
    epsilon: float
    places: int
    change: float
    low: float
    high: float
    n_patients: int


@cache
def rehearsals(path: Path = REHEARSED) -> tuple[Rehearsal, ...]:
    """All that were kept; none where there is no such file."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return tuple(Rehearsal.model_validate({name: row[name] for name in Rehearsal.model_fields}) for row in rows)


def verdict(recipe: FinetuneSettings, epsilon: float, places: int) -> str:
    """What is to be expected of fine-tuning so many patients, in words: of the nearest rehearsal that had no more.

    Its budget may have been a tenth larger, for that is what a private table takes from a training's.
    """
    known = [r for r in rehearsals() if r.recipe == recipe and r.epsilon <= 1.1 * epsilon and r.places <= places]
    if not known:
        return f"Whether it helps isn't known: no rehearsal had this recipe and at most {places} patients"
    nearest = max(known, key=lambda r: (r.places, r.epsilon))
    said = (
        f"In a rehearsal with {nearest.places} simulated public patients and epsilon {nearest.epsilon:g}, the loss on "
        f"{nearest.n_patients} others changed by {nearest.change:+.2f} [{nearest.low:+.2f}, {nearest.high:+.2f}] / 1000"
    )
    if nearest.high < 0:
        return f"{said}: it's expected to help"
    found = "to harm" if nearest.low > 0 else "to change nothing that could be told"
    return (
        f"{said}: it's expected {found}. Consider the public model with your population's table of attributes "
        "(notebook 08, attributes private, table_share 1)"
    )
