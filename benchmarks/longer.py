"""What longer training would give the shipped denoiser: `python -m benchmarks.longer` (two hours on one core).

A second cycle of the learning rate, from the shipped weights, on 10,000 simulated public patients instead of 2,000. It
goes on after a kill. Judged by the denoising loss of patients whom nobody has met, public ones and those of the private
cohort, each against the shipped model with the same timesteps and noise. The weights lie beside the results.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks import RESULTS, keep
from cardiac_ldm.cohort import Patients, load_manifest, prepare
from cardiac_ldm.cohort.manifest import MANIFEST_FOLDER
from cardiac_ldm.evaluation.intervals import bootstrap
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.study import Study
from cardiac_ldm.training.checkpoint import load_weights, save_weights
from cardiac_ldm.training.pretrain import Latents, held_out_loss, pretrain

PATIENTS = 10_000
CYCLE = {"steps": 6000, "learning_rate": 1.2e-3}
SEED = 1
WEIGHTS = RESULTS / "longer.safetensors"


def main() -> None:
    """Train, unless the weights are there, and measure."""
    torch.set_num_threads(1)
    study = Study(Parameters(profile="laptop"))
    manifest = yaml.safe_load((MANIFEST_FOLDER / "phantom_public.yaml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "phantom_public.yaml"
        path.write_text(yaml.safe_dump(manifest | {"splits": manifest["splits"] | {"train": PATIENTS}}))
        cohort = prepare(load_manifest(path), store=study.runs / "cohorts", limits={}, on_demand=True)
    train, others = cohort.split("train"), cohort.split("validation")
    autoencoder, longer = study.load_autoencoder(), study.denoiser(study.pretrained)

    def latents(patients: Patients, key: str) -> Latents:
        name = f"{patients.name}-{patients.split}-{key}-{study.autoencoder.key}.zarr"
        return Latents(autoencoder, patients, study.runs / "latents" / name)

    if WEIGHTS.exists():
        load_weights(longer, WEIGHTS)
    else:
        settings = study.profile.pretrain.model_copy(update=CYCLE)
        state = study.runs / "longer.pt"
        encoded = latents(train, cohort.key)
        _, losses = pretrain(train, encoded, study.profile.denoiser, settings, SEED, state, start=longer)
        save_weights(longer, WEIGHTS)
        print(f"training loss of the last 500 steps: {np.mean([row['loss'] for row in losses[-500:]]):.4f}")
    shipped, rows = study.denoiser(study.pretrained), []
    of_private = study.private.split("validation")[: len(others)]
    for patients, key in ((others, cohort.key), (of_private, study.private.key)):
        encoded = latents(patients, key)
        row: dict[str, object] = {"patients": patients.name, "n_patients": len(patients)}
        rows.append(row | _change(shipped, longer, encoded, patients))
        print(rows[-1], flush=True)
    keep("longer", start=study.pretrained.key, train=PATIENTS, seed=SEED, **CYCLE, rows=rows)


def _change(shipped: Denoiser, longer: Denoiser, latents: Latents, patients: Patients) -> dict[str, float]:
    before, after = (held_out_loss(model, latents[:], patients) for model in (shipped, longer))
    change = bootstrap(lambda chosen: float((after - before)[chosen].mean()), len(patients), resamples=1000, seed=0)
    change_of = {"change": change.value, "low": change.low, "high": change.high}
    return {"shipped": float(before.mean()), **{name: 1000 * value for name, value in change_of.items()}}


if __name__ == "__main__":
    main()
