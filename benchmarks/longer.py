"""What the second cycle of pre-training gave the shipped denoiser: `python -m benchmarks.longer` (minutes).

It went on from the weights of the first cycle, which this repository's history holds (a shallow clone doesn't), on
10,000 simulated public patients instead of 2,000: one hour on one core. Judged by the denoising loss of patients whom
nobody has met, public ones and those of the private cohort, with the same timesteps and noise before and after.
"""

import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks import RESULTS, keep
from cardiac_ldm.evaluation.intervals import bootstrap
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.study import Study
from cardiac_ldm.training.checkpoint import load_weights
from cardiac_ldm.training.pretrain import held_out_loss
from cardiac_ldm.training.shipped import WEIGHTS

FIRST_CYCLE = "cc68fed"
"""The commit whose shipped denoiser had the first cycle alone."""
N_PATIENTS = 100


def main() -> None:
    """Measure on public and on simulated private validation patients."""
    torch.set_num_threads(1)
    study = Study(Parameters(profile="laptop"))
    before, after = study.denoiser(study.pretrained), study.denoiser(study.pretrained)
    path = (WEIGHTS / "pretrain/weights.safetensors").relative_to(RESULTS.parents[1])
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        subprocess.run(["git", "show", f"{FIRST_CYCLE}:{path}"], check=True, stdout=file, cwd=RESULTS)
        load_weights(before, Path(file.name))
    rows = []
    for cohort in (study.public, study.private):
        patients = cohort.split("validation")[:N_PATIENTS]
        latents = study.latents(cohort.split("validation"), cohort)[: patients.offsets[-1]]
        losses = [held_out_loss(model.eval(), latents, patients) for model in (before, after)]
        change = 1000 * (losses[1] - losses[0])
        worth = bootstrap(
            lambda chosen, change=change: float(change[chosen].mean()), len(change), resamples=1000, seed=0
        )
        about = {"patients": patients.name, "n_patients": len(patients), "before": float(losses[0].mean())}
        rows.append(about | {"change": worth.value, "low": worth.low, "high": worth.high})
        print(rows[-1], flush=True)
    cycle = study.profile.pretrain.further[0].model_dump()
    keep("longer", start=FIRST_CYCLE, train=cycle.pop("patients"), **cycle, rows=rows)


if __name__ == "__main__":
    main()
