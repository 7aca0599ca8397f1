"""What the public model draws for held-out public patients: `python -m benchmarks.pretraining`.

Asks the `laptop` profile's public model (the one that is shipped, where it is) for both volumes of 150 patients of the
public test split. Its distance from them stands beside that of their own reconstructions, which no model of these
latents can beat, and beside that of the patients from each other, all from parts of 75 patients. Volumes are read by
the segmenter and the phase classifier, trained on other public patients.
"""

import numpy as np

from benchmarks import keep
from cardiac_ldm.evaluation.metrics import compare, measure, measure_real
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.study import Parameters, Study
from cardiac_ldm.training.autoencoder import reconstruct

N_PATIENTS = 150


def main() -> None:
    """Sample, reconstruct, measure, keep one row a cohort and measure."""
    study = Study(Parameters(profile="laptop"))
    patients, sampling = study.public.split("test")[:N_PATIENTS], study.profile.sampling
    attributes, owners = patients.attributes, patients.owners
    real = patients.images(np.arange(len(owners)))
    autoencoder = study.load_autoencoder()
    drawn = synthesise(
        autoencoder,
        study.denoiser(study.pretrained),
        study.profile.denoiser.schedule,
        attributes,
        owners,
        steps=sampling.steps,
        guidance=sampling.guidance,
        seed=0,
    )
    cohorts = {"reconstructed": reconstruct(autoencoder, real, seed=0), "drawn": drawn.images}
    originals = measure_real(patients, *study.instruments, seed=0)
    rows: dict[str, dict[str, object]] = {}
    for name, images in cohorts.items():
        measured = measure(images, attributes, owners, *study.instruments, name=name, seed=0)
        found = compare(measured, originals, **study.profile.evaluation.model_dump(), seed=0)
        for row in (row for row in found.rows if None not in (row.value, row.low, row.high, row.reference)):
            title = " ".join(filter(None, (row.metric, row.attribute)))
            about = {"measure": title, "unit": row.unit, "n_patients": row.n_patients, "real": row.reference}
            rows.setdefault(title, about)
            rows[title] |= {name: row.value, f"{name}_low": row.low, f"{name}_high": row.high}
    keep(
        "pretraining", run=study.pretrained.key, n_patients=len(patients), n_volumes=len(real), rows=list(rows.values())
    )


if __name__ == "__main__":
    main()
