"""What an autoencoder loses: `python -m benchmarks.compression [--data DIR] [--profile P] [PART ...]` (hours).

Variants of an autoencoder, all trained for 250 steps and 200 of texture, are judged on public validation patients; so
nothing is chosen on a test split. The `laptop` profile's own (`chosen`; the one that is shipped, where it is) is judged
on test patients, public and simulated private, and on 20 real hearts of ACDC. Beside it stands, on the same 20, an
autoencoder that learnt from the other 60 of ACDC for a third of the profile's steps (`ACDC`).

FD-EffNet and KID are those between patients and their own reconstructions. Beside them stand the distance between two
halves of the patients (a floor at half their number) and that between public and private patients. A
segmenter reads originals and reconstructions alike; its errors are means over patients of absolute differences.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import PSNRMetric
from monai.metrics.regression import compute_ms_ssim

from benchmarks import RESULTS, keep, titled
from benchmarks.acdc import RUNS, parser
from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, Manifest, Patients, load_manifest, measure_attributes, prepare
from cardiac_ldm.evaluation.control import volume_dice
from cardiac_ldm.evaluation.diversity import SCALE_WEIGHTS
from cardiac_ldm.evaluation.features import N_SLICES, SLICES, slice_features
from cardiac_ldm.evaluation.fidelity import KernelDistance, frechet_distance
from cardiac_ldm.models.anatomy import Segmenter
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.device import device_of
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.study import Study
from cardiac_ldm.training.autoencoder import AutoencoderSettings, reconstruct, train_autoencoder
from cardiac_ldm.training.checkpoint import load_weights, save_weights

READ = ("LVEDV", "LVESV", "RVEDV", "RVESV", "MYOEDTHICK", "MYOESTHICK")
SHORT: dict[str, Any] = {"steps": 250, "heart": None}
EIGHT = SHORT | {"latent_channels": 4, "channels": [64, 96], "residual_blocks": 1}
"""The profile's, short."""
FOUR = SHORT | {"latent_channels": 1, "channels": [64], "residual_blocks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "8x with 4 channels": EIGHT,
    "4x with 1 channel, as in the paper": FOUR,
    "the heart weighs more in L1": EIGHT | {"heart": {"emphasis": 4.0, "labels": 0.0, "guide": 0.0, "guide_steps": 0}},
    "VQ, 1,024 codes": EIGHT | {"regularisation": {"kind": "vq", "codes": 1024, "weight": 0.25}},
    "KL weight / 100": EIGHT | {"regularisation": {"kind": "kl", "weight": 1e-5}},
    "KL weight x 10": EIGHT | {"regularisation": {"kind": "kl", "weight": 1e-2}},
    "pixel-unshuffle stem of 2": EIGHT | {"stem": 2, "channels": [32, 64, 96]},
    "pixel-unshuffle stem of 8": EIGHT | {"stem": 8, "channels": [128], "residual_blocks": 2},
    "no perceptual term": EIGHT | {"perceptual": 0.0},
    "no texture stage": EIGHT | {"texture": None},
    "no texture stage, no perceptual term": EIGHT | {"texture": None, "perceptual": 0.0},
    "no texture stage, critic of pixels": EIGHT | {"texture": None, "adversarial": 0.02},
    "texture without a critic": EIGHT | {"texture": {"adversarial": 0.0}},
}
"""All but the second are the first with what their names say."""
BANDS = {"coarse": (0.0, 1 / 8), "middle": (1 / 8, 1 / 4), "fine": (1 / 4, 1 / 2)}
"""Cycles per voxel, between which the power of reconstructions is held against that of originals."""


def varied(profile: AutoencoderSettings, changes: Mapping[str, Any]) -> AutoencoderSettings:
    """The profile's settings with some changes, and 200 steps of texture unless they say otherwise."""
    said, texture = profile.model_dump(mode="json"), changes.get("texture", {})
    textured = None if texture is None else said["texture"] | {"steps": 200} | texture
    return AutoencoderSettings.model_validate(said | changes | {"texture": textured})


def power(images: np.ndarray) -> dict[str, float]:
    """Power of the middle slices of volumes (n, 13, 96, 96) between the frequencies of each band."""
    spectrum = (np.abs(np.fft.fft2(images[:, SLICES])) ** 2).mean(axis=(0, 1))
    frequency = np.hypot(*np.meshgrid(*2 * (np.fft.fftfreq(GRID.size),)))
    return {name: float(spectrum[(low < frequency) & (frequency <= high)].sum()) for name, (low, high) in BANDS.items()}


def read(segmenter: Segmenter, images: np.ndarray, patients: Patients) -> dict[str, np.ndarray]:
    """Volumes (mL) and wall thickness (mm) of every patient, as the segmenter sees them in these images."""
    batches = torch.from_numpy(images).to(device_of(segmenter)).split(8)
    with torch.no_grad():
        labels = torch.cat([segmenter(batch).argmax(dim=1).to(torch.uint8) for batch in batches]).cpu().numpy()
    phase = patients.attributes[:, ATTRIBUTE_NAMES.index("ESED")]
    found = []
    for owner in range(len(patients)):
        own = np.flatnonzero(patients.patient_index == owner)
        found.append(measure_attributes({"ED" if phase[i] else "ES": labels[i] for i in own}, GRID.spacing_mm))
    return {name: np.array([row[name] for row in found]) for name in READ}


def judge(model: Autoencoder, patients: Patients, segmenter: Segmenter) -> dict[str, float]:
    """All that is measured on these patients and their reconstructions."""
    volumes = np.arange(len(patients.patient_index))
    real, drawn = (images := patients.images(volumes)), reconstruct(model, images, seed=0)
    x, y, patient_index = slice_features(real), slice_features(drawn), np.repeat(patients.patient_index, N_SLICES)
    everyone, half = np.arange(len(patients)), patient_index < len(patients) // 2
    before, after = power(real), power(drawn)
    a, b = (torch.from_numpy(z) for z in (drawn, real))
    similar = [compute_ms_ssim(p, q, 2, weights=SCALE_WEIGHTS) for p, q in zip(a.split(16), b.split(16), strict=True)]
    found = {
        "n_patients": len(patients),
        "fd": frechet_distance(x, y),
        "fd_floor": frechet_distance(x[half], x[~half]),
        "kid": KernelDistance(x, patient_index, y, patient_index)(everyone, everyone),
        "psnr": float(PSNRMetric(max_val=1.0, reduction="mean")(a, b).mean()),
        "ms_ssim": float(torch.cat(similar).mean()),
        **{f"power_{band}": after[band] / before[band] for band in BANDS},
    }
    dice = [volume_dice(segmenter, images, patients.labels(volumes)).mean() for images in (real, drawn)]
    found |= {f"dice_change_{name}": float(dice[1][name] - dice[0][name]) for name in dice[0].index}
    originals, copies = (read(segmenter, images, patients) for images in (real, drawn))
    for name in READ:
        change = 100 * (copies[name] - originals[name]) / originals[name]
        found |= {f"{name}_error": float(np.nanmean(np.abs(change))), f"{name}_bias": float(np.nanmean(change))}
    return found


def trained(settings: AutoencoderSettings, patients: Patients) -> Autoencoder:
    """An autoencoder with these settings, trained now or before."""
    key = hashlib.sha256((settings.model_dump_json() + patients.path.name).encode()).hexdigest()[:12]
    folder = RUNS / "compression" / key
    folder.mkdir(parents=True, exist_ok=True)
    weights, model = folder / "weights.safetensors", settings.build()
    if not weights.exists():
        trained, _ = train_autoencoder(patients, settings, 0, folder / "state.pt")
        save_weights(trained, weights)
        for state in folder.glob("*.pt"):
            state.unlink()
    load_weights(model, weights)
    return model.eval()


def _acdc(data: Path) -> tuple[Patients, Patients]:
    """60 patients of ACDC to learn from, and the 20 others."""
    said = load_manifest("acdc").model_dump()
    train, validation, test = (said["splits"][split] for split in ("train", "validation", "test"))
    said["splits"] = {"train": train[:-1], "validation": train[-1:], "test": [*validation, *test]}
    cohort = prepare(Manifest.model_validate(said), store=RUNS / "cohorts", data_root=data)
    return cohort.split("train"), cohort.split("test")


def judge_chosen(study: Study, data: Path | None) -> dict[str, object]:
    """The profile's autoencoder on patients of every cohort that is there, and how far public ones are from private."""
    public, private = study.public.split("test"), study.private.split("test")
    n = min(len(public), len(private))
    cohorts = {"public": public[:n], "private (simulated)": private[:n]}
    between = frechet_distance(*(slice_features(c.images(np.arange(len(c.patient_index)))) for c in cohorts.values()))
    if data:
        cohorts["ACDC"] = _acdc(data)[1]
    rows = [
        {"judged on": name, **judge(study.load_autoencoder(), patients, study.anatomy_networks[0])}
        for name, patients in cohorts.items()
    ]
    return {
        "run": study.autoencoder.key,
        "distances": {"public_to_private": between, "n_patients": n},
        "chosen": rows,
    }


def judge_on_acdc(study: Study, data: Path) -> dict[str, object]:
    """What learns from ACDC for a third of the profile's steps, on the others of ACDC."""
    ours, (train, test) = study.profile.autoencoder, _acdc(data)
    third = {"steps": ours.steps // 3, "texture": {"steps": ours.texture.steps // 3 if ours.texture else 0}}
    model = trained(varied(ours, third), train)
    return {"judged on": "ACDC, having learnt from ACDC", **judge(model, test, study.anatomy_networks[0])}


def main() -> None:
    """Train what has not been trained, judge, keep one row a variant and one for the profile's on each cohort."""
    arguments = parser(__doc__)
    arguments.add_argument("parts", nargs="*", choices=["chosen", "ACDC", *VARIANTS, []], help="all unless told")
    arguments.add_argument("--profile", default="laptop", help="a profile's name or file")
    given = arguments.parse_args()
    parts = given.parts or ["chosen", "ACDC", *VARIANTS]
    study, title = Study(Parameters(profile=given.profile)), titled("compression", given.profile)
    path = RESULTS / f"{title}.json"
    known = json.loads(path.read_text()) if path.exists() else {}  # what isn't asked for stays
    known.pop("benchmark", None)
    if "chosen" in parts:
        known |= judge_chosen(study, given.data)
        keep(title, **known)
    if "ACDC" in parts and given.data:
        known["chosen"] = [*known["chosen"][:3], judge_on_acdc(study, given.data)]
        keep(title, **known)
    rows = {row["variant"]: row for row in known.get("rows", [])}
    for variant in [name for name in VARIANTS if name in parts]:
        model = trained(varied(study.profile.autoencoder, VARIANTS[variant]), study.public.split("train"))
        side = GRID.size // model.reduction
        about = {"variant": variant, "latent": f"{model.latent_channels} x {GRID.n_slices} x {side} x {side}"}
        rows[variant] = about | judge(model, study.public.split("validation"), study.anatomy_networks[0])
        print(rows[variant], flush=True)
        keep(title, **known | {"rows": [rows[name] for name in VARIANTS if name in rows]})


if __name__ == "__main__":
    main()
