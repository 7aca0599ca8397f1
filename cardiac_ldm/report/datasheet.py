"""What a release says in prose: README, a datasheet and a model card.

After Gebru et al., CACM 64(12), 2021, and Mitchell et al., FAT* 2019.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cardiac_ldm.privacy import Ledger
from cardiac_ldm.report.tables import metrics_table

if TYPE_CHECKING:
    from cardiac_ldm.report.card import About

_LOADING = """from pathlib import Path
from monai.data import CacheDataset
from monai.transforms import LoadImaged
masks = {p: f"derivatives/segmentation/{p}".replace("T2w", "desc-heart_dseg") for p in Path().glob("sub-*/anat/*.gz")}
pairs = [{"image": str(picture), "label": mask} for picture, mask in masks.items()]
data = CacheDataset(pairs, LoadImaged(["image", "label"], ensure_channel_first=True), progress=False)
"""


_NAMES = {"denoiser": "model", "attributes": "table of requested attributes"}
"""What the stages of a ledger's mechanisms leave."""


def whose(about: "About") -> str:
    """Whose patients were learnt from, and by what."""
    if not about.epsilon:
        return f"No private patient was used: the model learnt from {about.public_data} alone."
    kind = "simulated private patients" if about.simulated else "private patients"
    learners = " and the ".join(name for stage, name in _NAMES.items() if stage in about.learnt)
    alone = "" if "denoiser" in about.learnt else f" The model learnt from {about.public_data} alone."
    data = f"from {about.public_data} and, under {about.guarantee}, from {kind} of {about.cohort}"
    return f"The {learners} learnt {data}.{alone}"


def readme(about: "About") -> str:
    """What this folder is, and how it's loaded."""
    return f"""# {about.name}

Synthetic short-axis cardiac MRI of {about.patients} patients whom nobody is: end-diastole (`acq-ED`) and end-systole
(`acq-ES`), 13 slices of 10 mm, 96 x 96 pixels of 1.8269 mm, base first, with segmentations (1 right ventricle, 2
myocardium, 3 left ventricle) in `derivatives/segmentation`. Of BIDS' suffixes, T2w is the nearest to balanced SSFP.

{whose(about)} Attributes were requested from: {about.attributes}. Profile `{about.profile}`,
cardiac_ldm {about.version}, {about.date}, seed {about.seed}. Licence: {about.licence}.

- `python verify.py` recomputes epsilon, checks every file and says what must be trusted (needs numpy, dp-accounting).
- `STATEMENT.md`: the guarantee; `privacy.json`: its ledger; `DATASHEET.md`, `MODEL_CARD.md`, `croissant.json`.
- `quality.html`, `metrics.json`: what was measured. The segmenter that measured control also chose among candidates.
- `participants.tsv`: attributes as requested and as measured, described in `participants.json`; `attributes.csv`: the
  same requests, a row a volume.
- `dataset.json`: nnU-Net (v2) takes this folder as a raw dataset, linked as `$nnUNet_raw/Dataset501_Synthetic`.

In MONAI, from this folder:

```python
{_LOADING}```
"""


def datasheet(about: "About", counts: Mapping[str, int]) -> str:
    """The questions of a datasheet, answered."""
    refused = counts["refused"] / max(counts["candidates"], 1)
    return f"""# Datasheet

**Motivation.** To share a population without showing its patients. Made by the holder of {about.cohort}.

**Composition.** {about.patients} synthetic patients, two volumes and two segmentations each. {whose(about)}
No instance is a person's; none is missing. Attributes that aren't known are `n/a`. Requests come from:
{about.attributes}.

**Collection.** Drawn on {about.date} by cardiac_ldm {about.version}, profile `{about.profile}`. Of
{counts["candidates"]} candidates the anatomy check called {counts["refused"]} ({refused:.0%}) implausible; of each
request the candidate stayed that public networks read nearest to it. {counts["implausible"]} patients of the release
have no plausible candidate; `participants.tsv` names them.

**Preprocessing.** Intensities are 8 bits, scaled volume by volume. Slices beyond the requested DEPTH are empty.

**Uses.** Development and teaching of methods. Not for clinical decisions; not for conclusions about frequencies of
disease beyond what the requested attributes hold. Segmentations are what the decoder meant; nobody checked them.

**Distribution.** Licence: {about.licence}.

**Maintenance.** None is promised. A release that was given away can't be called back; every further model of the same
patients adds to what `STATEMENT.md` says of all together.
"""


def model_card(about: "About", ledger: Ledger, metrics: Mapping[str, Any]) -> str:
    """Which model drew this, on what it learnt, and how good it is."""
    table = metrics_table(metrics).reset_index()
    head = [f"| {' | '.join(map(str, table.columns))} |", f"| {' | '.join('---' for _ in table.columns)} |"]
    lines = [f"| {' | '.join(map(str, values))} |" for values in table.to_numpy().tolist()]
    digests = ", ".join(f"`{name}` {digest}" for name, digest in ledger.weights.items()) or "not there"
    return f"""# Model card

A conditional latent diffusion model of short-axis cardiac MRI after Daum et al. (arXiv 2407.16405): an autoencoder,
trained on public data, and a denoiser. {whose(about)}
Attributes were requested from: {about.attributes}. SHA-256: {digests}.

**Intended use.** To draw hearts for fourteen attributes. **Not** for diagnosis.

**Evaluation.** {metrics["n_requests"]} of the synthetic patients beside {metrics["n_real_patients"]} held-out patients
of {metrics["reference_cohort"]}; intervals are over patients.

{chr(10).join(head + lines)}
"""
