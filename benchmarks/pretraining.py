"""What the public model draws for held-out patients: `python -m benchmarks.pretraining [--profile P] [PART ...]`.

Asks the `laptop` profile's public model (the one that is shipped, where it is) for both volumes of 150 patients of the
public test split. Its distance from them stands beside that of their own reconstructions, which no model of these
latents can beat, and beside that of the patients from each other, all from parts of 75 patients. Volumes are read by
the segmenter and the phase classifier, trained on other public patients.

Variants of its training, all for a twenty-fourth of the profile's steps, and other ways to sample it draw for 100
public validation patients, so nothing is chosen on a test split. Name those to measure, `chosen` for the model itself
(minutes each; resumable).
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import RESULTS, keep, titled
from benchmarks.acdc import RUNS
from cardiac_ldm.cohort import Patients, Volumes
from cardiac_ldm.evaluation.measured import measure, measure_real
from cardiac_ldm.evaluation.metrics import compare, estimate
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.profile import Profile
from cardiac_ldm.study import Study
from cardiac_ldm.training.autoencoder import reconstruct
from cardiac_ldm.training.checkpoint import load_weights, save_weights
from cardiac_ldm.training.pretrain import pretrain

N_PATIENTS = 150
SHARE = 24
"""Variants are trained for a twenty-fourth of the profile's steps."""
VARIANTS: dict[str, dict[str, Any]] = {
    "the profile's": {},
    "the paper's schedule, noise predicted": {"denoiser": {"schedule": "paper"}},
    "min-SNR weights, ceiling 5": {"pretrain": {"min_snr": 5.0}},
    "no moving average": {"pretrain": {"average_decay": 0.0}},
    "no attention": {"denoiser": {"attention": [False, False]}},
    "attention at both levels": {"denoiser": {"attention": [True, True]}},
    "the paper's linear attributes": {"denoiser": {"frequencies": 0}},
    "half as wide again": {"denoiser": {"channels": [48, 96]}},
    "a third level": {"denoiser": {"channels": [32, 64, 64], "attention": [False, True, True]}},
}
SAMPLERS: dict[str, dict[str, float]] = {
    "8 steps": {"steps": 8, "guidance": 0.0},
    "15 steps": {"steps": 15, "guidance": 0.0},
    "30 steps": {"steps": 30, "guidance": 0.0},
    "15 steps, guidance 0.5": {"steps": 15, "guidance": 0.5},
    "15 steps, guidance 1": {"steps": 15, "guidance": 1.0},
    "15 steps, guidance 2": {"steps": 15, "guidance": 2.0},
}
SHOWN = (
    "FD-EffNet",
    "phase accuracy",
    *(f"correlation {name}" for name in ("LVEDV", "LVEF", "RVEDV", "MYOEDTHICK", "ANGLE")),
)


def varied(variant: str, profile: Profile) -> Profile:
    """The profile with what a variant changes, and its share of steps."""
    said, changes = profile.model_dump(mode="json"), VARIANTS[variant]
    steps = {"steps": profile.pretrain.steps // SHARE, "further": ()}
    said["denoiser"] |= changes.get("denoiser", {})
    said["pretrain"] |= steps | changes.get("pretrain", {})
    return Profile.model_validate(said)


def trained(study: Study, profile: Profile, patients: Patients) -> Denoiser:
    """The denoiser of a profile, trained now or before on the study's latents."""
    said = profile.denoiser.model_dump_json() + profile.pretrain.model_dump_json() + study.autoencoder.key
    folder = RUNS / "pretraining" / hashlib.sha256((said + patients.path.name).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    weights, model = folder / "weights.safetensors", profile.denoiser.build(profile.autoencoder.latent_channels)
    if not weights.exists():
        latents = study.latents(patients, study.public)[:]
        model, _ = pretrain(patients, latents, profile.denoiser, profile.pretrain, 0, folder / "state.pt")
        save_weights(model, weights)
        (folder / "state.pt").unlink(missing_ok=True)
    load_weights(model, weights)
    return model.eval()


def judge(study: Study, model: Denoiser, patients: Patients, **sampling: float) -> dict[str, Any]:
    """All that is measured on what a model draws for these patients."""
    sampled = study.profile.sampling.model_dump() | sampling
    drawn = synthesise(study.load_autoencoder(), model, patients.attributes, patients.patient_index, seed=0, **sampled)
    return measured(study, drawn.images, patients)


def measured(study: Study, images: np.ndarray, patients: Patients) -> dict[str, Any]:
    """All that is measured on volumes that stand for those of these patients."""
    originals = measure_real(patients, *study.anatomy_networks, seed=0)
    drawn = Volumes("drawn", images, patients.attributes, patients.patient_index)
    seen = measure(drawn, *study.anatomy_networks, seed=0)
    settings, n = study.profile.evaluation.model_dump(exclude={"inception"}), len(patients)
    ours, theirs = (estimate(cohort, originals, size=n // 2, seed=0, **settings) for cohort in (seen, originals))
    return compare(ours, theirs, seen, originals, epsilon=0)


def shown(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The measures by which variants are compared."""
    rows = [row for row in found["rows"] if row["grouping"] is None]
    titled = {" ".join(filter(None, (row["metric"], row["attribute"]))): row["value"] for row in rows}
    return {title: titled[title] for title in SHOWN}


def judge_chosen(study: Study) -> dict[str, object]:
    """One row a measure, of what the profile's model draws and of reconstructions."""
    patients = study.public.split("test")[:N_PATIENTS]
    real = patients.images(np.arange(len(patients.patient_index)))
    cohorts = {
        "reconstructed": measured(study, reconstruct(study.load_autoencoder(), real, seed=0), patients),
        "drawn": judge(study, study.denoiser(study.pretrained), patients),
    }
    rows: dict[str, dict[str, object]] = {}
    for name, found in cohorts.items():
        for row in found["rows"]:
            if row["grouping"] is not None or None in (row["value"], row["low"], row["high"], row["reference"]):
                continue
            title = " ".join(filter(None, (row["metric"], row["attribute"])))
            about = {"measure": title, "unit": row["unit"], "n_patients": row["n_patients"], "real": row["reference"]}
            rows.setdefault(title, about)
            rows[title] |= {name: row["value"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    about = {"run": study.pretrained.key, "n_patients": len(patients), "n_volumes": len(real)}
    return about | {"rows": list(rows.values())}


def main() -> None:
    """Sample, reconstruct, measure; keep one row a measure, one a variant, one a sampler."""
    arguments = argparse.ArgumentParser(description=__doc__)
    parts = ["chosen", *SAMPLERS, *VARIANTS]
    arguments.add_argument("parts", nargs="*", choices=[*parts, []], help="all unless told")
    arguments.add_argument("--profile", default="laptop", help="a profile's name or file")
    given = arguments.parse_args()
    requested = given.parts or parts
    study, title = Study(Parameters(profile=given.profile)), titled("pretraining", given.profile)
    path = RESULTS / f"{title}.json"
    known = json.loads(path.read_text()) if path.exists() else {}  # what isn't asked for stays
    known.pop("benchmark", None)
    if "chosen" in requested:
        known |= judge_chosen(study)
        keep(title, **known)
    validation = study.public.split("validation")
    known["validation_patients"] = len(validation)
    samplers = {row["sampler"]: row for row in known.get("samplers", [])}
    for name in tqdm([name for name in SAMPLERS if name in requested], desc="samplers"):
        model = study.denoiser(study.pretrained)
        samplers[name] = {"sampler": name, **shown(judge(study, model, validation, **SAMPLERS[name]))}
        known["samplers"] = [samplers[name] for name in SAMPLERS if name in samplers]
        keep(title, **known)
    variants = {row["variant"]: row for row in known.get("variants", [])}
    for name in tqdm([name for name in VARIANTS if name in requested], desc="variants"):
        profile = varied(name, study.profile)
        other = trained(study, profile, study.public.split("train"))
        about = {"variant": name, "parameters": sum(p.numel() for p in other.parameters())}
        variants[name] = about | shown(judge(study, other, validation))
        known["variants"] = [variants[name] for name in VARIANTS if name in variants]
        keep(title, **known)


if __name__ == "__main__":
    main()
