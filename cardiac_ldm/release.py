"""The release: a synthetic cohort of as many patients as are wanted, in a folder to share that proves what it says.

Patients are drawn one by one, by as many processes as there are cores; a release that is killed goes on when it's asked
for again, and what it leaves is the same to the last byte. The folder appears whole, or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel as nib
import numpy as np
import torch
from filelock import FileLock

from cardiac_ldm.cohort import Volumes, load_manifest
from cardiac_ldm.cohort.prepare import ONE_THREAD, end_with_parent
from cardiac_ldm.cohort.requests import both_phases, completed, of_public, of_table, refuse_private, with_end_systole
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.candidates import CANDIDATES, choose
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.models.anatomy import PhaseClassifier, Segmenter
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.parameters import ReleaseParameters
from cardiac_ldm.privacy import Ledger
from cardiac_ldm.privacy.table import composed
from cardiac_ldm.progress import silence, tqdm
from cardiac_ldm.report import verify
from cardiac_ldm.report.card import About, row, standing, write_rest, write_volumes
from cardiac_ldm.runs import Run, place, plain
from cardiac_ldm.study import Study


def release(study: Study) -> Path:
    """Draw, measure and write the cohort that `study.parameters` (ReleaseParameters) ask for; give its folder.

    Raises:
        PrivacyError: the model has no guarantee or no sound ledger, the record doesn't cover it, or requests would
            tell of private patients.
        ParameterError: the folder is there already.
        CohortError: the table of requests isn't sound.
    """
    parameters = study.parameters
    assert isinstance(parameters, ReleaseParameters)
    tables = [study.tabulated(parameters.table_epsilon)] if parameters.table_epsilon else []
    if parameters.attributes not in ("public", "private"):
        _of_csv(study, parameters)  # before hours of training
    model = study.finetuned(study.beside_table(parameters.epsilon, parameters.table_epsilon))
    ledgers = [run.ledger for run in (*tables, model)]
    together = standing(*ledgers, together=study.together() if parameters.epsilon else None)
    ledger, wanted = composed(ledgers, parameters.epsilon), requests(study)
    run = place(study.runs, "release", _described(study, model, wanted))
    begun = run.folder / "begun.txt"
    date = begun.read_text() if begun.exists() else datetime.now(UTC).date().isoformat()
    about = _about(study, parameters, ledger, date)
    final = study.runs / "release" / about.name
    with FileLock(study.runs / f".{run.folder.name}.lock"):  # outside of the folder, which goes at the end
        if final.exists():
            raise ParameterError(f"{final} exists; move it away, or ask for another release")
        run.folder.mkdir(parents=True, exist_ok=True)
        if not begun.exists():
            (temporary := begun.with_suffix(".tmp")).write_text(about.date)
            temporary.replace(begun)
        unfinished = run.folder / "unfinished"
        networks = study.load_autoencoder(), study.denoiser(model), *study.anatomy_networks
        settings = study.profile.sampling.model_dump() | {"seed": study.seed}
        _draw_missing(_Sampler(*networks, settings, unfinished, run.folder / "rows"), wanted)
        measured = _measured(study, run, unfinished, wanted, plain(parameters.epsilon))
        if parameters.share_model:
            shared = {"denoiser": model, "autoencoder": study.autoencoder}
            _share(study, shared | {table.stage: table for table in tables}, unfinished / "model")
        rows = (json.loads(path.read_text()) for path in sorted((run.folder / "rows").glob("*.json")))
        write_rest(unfinished, about, ledgers, together, rows, study.evaluation(run).folder, measured)
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(final)
        shutil.rmtree(run.folder)
    return final


def requests(study: Study) -> np.ndarray:
    """What is requested, float32 (patients, 14), a row a synthetic patient, in an order that the seed tells."""
    parameters = study.parameters
    assert isinstance(parameters, ReleaseParameters)
    public, rng = of_public(study.public.split("train")), np.random.default_rng([study.seed, 8])
    if parameters.attributes == "public":
        n_turns = -(-parameters.patients // len(public))
        order = np.concatenate([rng.permutation(len(public)) for _ in range(n_turns)])
        return public[order[: parameters.patients]]
    if parameters.attributes == "private":
        drawn = study.table(parameters.table_epsilon).sample(parameters.patients, rng)
        return with_end_systole(completed(drawn, public, rng))  # a public patient's fraction may not fit the volume
    given = _of_csv(study, parameters)
    return completed(given[np.arange(parameters.patients) % len(given)], public, rng)


def _of_csv(study: Study, parameters: ReleaseParameters) -> np.ndarray:
    path, manifest = Path(parameters.attributes), load_manifest(parameters.cohort_private)
    given = of_table(path)
    if manifest.secret:
        root = manifest.data_root(Path(parameters.data_root_private) if parameters.data_root_private else None)
        for split in ("train", "validation", "test"):
            refuse_private(path, given, study.private.split(split), root)
    return given


def _described(study: Study, model: Run, wanted: np.ndarray) -> dict[str, object]:
    """What the files depend on."""
    needs = [model.key, study.autoencoder.key, study.anatomy.key, hashlib.sha256(wanted.tobytes()).hexdigest()]
    settings = [plain(study.profile.sampling), CANDIDATES, version("cardiac-ldm")]
    return {"parameters": study.parameters.model_dump(mode="json"), "upstream": needs, "settings": settings}


def _about(study: Study, parameters: ReleaseParameters, ledger: Ledger, date: str) -> About:
    """What the release says of itself; date: of the day on which it was begun, which a resumed one keeps."""
    private = load_manifest(parameters.cohort_private)
    cohort = private.name if ledger.mechanisms else parameters.manifest("public").name
    profile = Path(parameters.profile).stem
    public = f"public train patients of {parameters.manifest('public').name}"
    simulated = "simulated " if private.simulated else ""
    sources = {
        "public": public,
        "private": f"a table of attributes of {simulated}private patients of {private.name}, learnt under the same "
        f"guarantee, completed from {public}",
    }
    spent = f"epsilon{parameters.epsilon:g}"
    if parameters.attributes == "private":
        spent += f"-table{parameters.table_share:g}"
    return About(
        name=f"{cohort}-{spent}-{parameters.patients}patients-{profile}-{date}",
        cohort=cohort,
        simulated=ledger.simulated if ledger.mechanisms else parameters.manifest("public").simulated,
        epsilon=ledger.epsilon,
        delta=ledger.delta,
        patients=parameters.patients,
        attributes=sources.get(
            parameters.attributes, f"a table of the holder's, of no private patient, completed from {public}"
        ),
        learnt=tuple(mechanism.stage for mechanism in ledger.mechanisms),
        licence=parameters.licence,
        profile=profile,
        public_data=ledger.public_data,
        date=date,
        version=version("cardiac-ldm"),
        seed=study.seed,
    )


@dataclass(frozen=True)
class _Sampler:
    """What a process needs to draw patients: networks, the sampler's settings, and where files go."""

    autoencoder: Autoencoder
    denoiser: Denoiser
    segmenter: Segmenter
    classifier: PhaseClassifier
    settings: dict[str, Any]
    folder: Path
    rows: Path

    def patient(self, number: int, wanted: np.ndarray) -> None:
        """Draw patient `number`, counted from 0, whose row is written last, once the files are there."""
        name = f"sub-{number + 1:05d}"
        draw = partial(synthesise, self.autoencoder, self.denoiser, **self.settings)
        chosen = choose(draw, both_phases(wanted), number, self.segmenter, self.classifier)
        write_volumes(self.folder, name, chosen.volumes)
        drawn = {"candidates": chosen.drawn, "refused": chosen.refused, "distance": round(chosen.distance, 4)}
        said = row(name, wanted, chosen.measured, **drawn, plausible="yes" if chosen.plausible else "no")
        temporary = self.rows / f"{name}.tmp"
        temporary.write_text(json.dumps(said))
        temporary.replace(self.rows / f"{name}.json")


def _draw_missing(sampler: _Sampler, wanted: np.ndarray) -> None:
    """Draw the patients who aren't there yet, by spawned processes of one thread each."""
    sampler.rows.mkdir(exist_ok=True)
    left = [i for i in range(len(wanted)) if not (sampler.rows / f"sub-{i + 1:05d}.json").exists()]
    if not left:
        return
    workers = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, len(left))
    with (
        patch.dict(os.environ, ONE_THREAD),
        ProcessPoolExecutor(workers, get_context("spawn"), _begin, (sampler,)) as pool,
        tqdm(desc="release", total=len(wanted), initial=len(wanted) - len(left), unit="patient") as progress,
    ):
        for _ in pool.map(_draw, left, wanted[left]):
            progress.update()


_drawing: list[_Sampler] = []


def _begin(sampler: _Sampler) -> None:
    """Make a process ready: it dies with the one that spawned it, and shows no bars of its own."""
    if parent_process():
        end_with_parent()
        silence()
    torch.set_num_threads(1)
    _drawing[:] = [sampler]


def _draw(number: int, wanted: np.ndarray) -> None:
    _drawing[0].patient(number, wanted)


def _measured(study: Study, run: Run, folder: Path, wanted: np.ndarray, epsilon: object) -> Volumes:
    """As many of the released patients as there are held-out ones, left in the run for the study to measure."""
    n = min(len(wanted), len(study.reference))
    paths = [verify.image(folder, f"sub-{i + 1:05d}", phase) for i in range(n) for phase in verify.PHASES]
    images = np.stack([np.asarray(nib.load(path).dataobj).transpose(2, 1, 0) for path in paths])
    conditions = np.concatenate([both_phases(one) for one in wanted[:n]])
    drawn = Volumes("synthetic", images.astype(np.float32) / 255, conditions, np.repeat(np.arange(n), 2))
    run.leave(synthetic=drawn)
    (run.folder / "metrics.json").write_text(json.dumps({"epsilon": epsilon, "n_volumes": len(images)}))
    return drawn


def _share(study: Study, runs: Mapping[str, Run], folder: Path) -> None:
    """Copy what these runs left, with their ledgers, and the profile that builds the networks."""
    for name, run in runs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        run.ledger.save(folder / name / "privacy.json")
        for file in run.ledger.weights:
            shutil.copyfile(run.folder / file, folder / name / file)
    settings = study.profile.model_dump(mode="json", include={"autoencoder", "denoiser", "sampling"})
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
