"""The guarantee outside the process: what an adversarial review did with real cohorts, each made impossible."""

import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from torch import nn

from cardiac_ldm.cohort import Cohort, load_manifest, prepare
from cardiac_ldm.cohort.readers import list_patients
from cardiac_ldm.errors import CohortError, ParameterError, PrivacyError
from cardiac_ldm.parameters import CompareParameters, ReleaseParameters
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness, Record, epsilon_pld, epsilon_prv, public_ledger
from cardiac_ldm.privacy.__main__ import main
from cardiac_ldm.privacy.accounting import merged
from cardiac_ldm.privacy.table import TablePlan, tabulate
from cardiac_ldm.release import release
from cardiac_ldm.report.card import standing
from cardiac_ldm.report.statement import joint_statement, privacy_statement
from cardiac_ldm.report.tables import cohorts_table
from cardiac_ldm.study import Study
from cardiac_ldm.trained import ROOT
from cardiac_ldm.training import private as loop
from cardiac_ldm.training.private import PrivateSettings, train_privately
from cardiac_ldm.training.subspace import SubspaceSettings
from tests import miniatures
from tests.conftest import TINY

pytestmark = pytest.mark.slow

Real = Callable[..., Study]
WORDS = {"stage": "denoiser", "tuned": "all", "private_data": "hospital (train)", "public_data": "phantom_public"}


@pytest.fixture
def real(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Real:
    """Studies of real private patients, as far as the library can tell, with a record that is empty at first."""
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "record"))
    for folder in study.runs.glob("finetune-*"):
        shutil.rmtree(folder)

    def made(epsilons: str = "1", spend: bool = True, without: Sequence[str] = (), **changes: Any) -> Study:
        return ward(study, tmp_path, epsilons, spend, without, **changes)

    return made


def ward(study: Study, folder: Path, epsilons: str, spend: bool, without: Sequence[str] = (), **changes: Any) -> Study:
    """A study whose real private patients are the simulated ones of `study`; some withdrawn."""
    name, recipe, seed = changes.pop("name", "hospital"), changes.pop("recipe", {}), changes.pop("seed", 0)
    splits = {split: list(study.private.split(split).ids) for split in ("train", "validation", "test")}
    splits["train"] = [patient for patient in splits["train"] if patient not in without]
    said = {"name": name, "role": "private", "simulated": False, "licence": "none", "citation": "none"}
    said |= {"reader": {"kind": "acdc"}, "splits": splits, "budget": {"epsilon": 10, "delta": 1e-5}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(said | changes))
    requested = {"profile": str(TINY), "cohort_private": str(path), "epsilons": epsilons, "spend": spend, "seed": seed}
    parameters = CompareParameters.model_validate(requested)
    there = Study(parameters)
    there.runs, there.public = study.runs, study.public
    there.autoencoder, there.pretrained = study.autoencoder, study.pretrained  # whatever the seed
    finetune = there.profile.finetune.model_copy(update=recipe)
    there.profile = there.profile.model_copy(update={"finetune": finetune})
    store = folder / f"store-{name}-{len(splits['train'])}"
    if not store.exists():
        _ = [list(study.private.split(split)) for split in splits]  # drawn before they're copied
        shutil.copytree(study.private.path, store)
        rows = [json.loads(line) for line in (store / "train.jsonl").read_text().splitlines()]
        kept = [row | {"voxels": [f"picture of {row['id']}"]} for row in rows if row["id"] not in without]
        (store / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    there.private = Cohort(load_manifest(path), store, name)
    return there


def spent(*studies: Study) -> float:
    """Epsilon of all finished models of these studies' first budgets, by their ledgers and one composition."""
    runs = [study.finetuned(study.parameters.budgets[0]) for study in studies]
    return epsilon_pld(merged(m for run in runs for m in run.ledger.mechanisms), 1e-5)


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads will do to prepare a few patients: processes would take longer to start."""
    room = sys.modules["cardiac_ldm.cohort.prepare"]
    monkeypatch.setattr(room, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))


def test_row_01_every_run_on_real_patients_is_counted_and_a_seed_is_no_new_one(real: Real, tmp_path: Path) -> None:
    tried = [real(), *(real(recipe={"learning_rate": rate}) for rate in (2e-3, 5e-3))]
    folders = {study.finetuned(1).folder for study in [*tried, real(seed=1, spend=False), real(seed=2, spend=False)]}
    assert len(folders) == 3  # on real patients a seed changes nothing
    together = tried[0].together()
    assert together is not None
    assert (together.runs, together.epsilon) == (3, pytest.approx(spent(*tried), rel=1e-3))
    best = tried[2].finetuned(1)
    assert standing(best.ledger) == together
    statement = privacy_statement(best.ledger, together)
    counted = (
        f"3, this one and those that only tried settings out included; together they spent ({together.epsilon:.4g}, 1e"
    )
    assert f"| models of these patients | {counted}" in statement
    assert joint_statement(together, best.ledger.private_data).startswith("**Together, 3 private model(s)")
    assert "tuning" not in best.ledger.model_dump_json()  # counted, never attested


def test_row_02_a_folder_that_is_gone_is_spent_all_the_same(real: Real) -> None:
    shutil.rmtree(real().finetuned(1).folder)
    for requested, runs in ((2, 2), (1, 3)):
        there = real(str(requested))
        there.finetuned(requested)
        together = there.together()
        assert together is not None
        assert together.runs == runs
        assert together.epsilon > requested
    with pytest.raises(PrivacyError, match=r"hospital: this spends \d.* are spent by 3 run.* ask for less"):
        real("9.99").finetuned(9.99)
    sources = "".join(path.read_text() for path in (ROOT / "cardiac_ldm").rglob("*.py"))
    assert not re.findall(r"[^\n]*\bdelete\b[^\n]*", sources)  # no message advises it


def test_row_02_a_run_goes_on_though_another_library_calibrates_the_noise_otherwise(
    real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path, **state: object) -> None:
        save(path, **state)
        raise KeyboardInterrupt

    save, planned = loop.save_state, PrivatePlan.for_budget
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", stop)
        patch.setattr("cardiac_ldm.trained.finetune", saving_always(patch))
        with pytest.raises(KeyboardInterrupt):
            real().finetuned(1)
    begun = Record().spends
    monkeypatch.setattr(
        PrivatePlan,
        "for_budget",
        lambda *given, **terms: replace(
            planned(*given, **terms), noise_multiplier=math.nextafter(planned(*given, **terms).noise_multiplier, 99)
        ),
    )
    noise, train = list[float](), train_privately

    def recorded(tuned: Any, loss: Any, plan: PrivatePlan, *rest: Any, **more: Any) -> None:
        noise.append(plan.noise_multiplier)
        train(tuned, loss, plan, *rest, **more)

    monkeypatch.setattr("cardiac_ldm.training.finetune.train_privately", recorded)
    run = real(spend=False).finetuned(1)
    assert Record().spends == begun
    assert run.ledger.mechanisms == begun[0].mechanisms
    assert noise == [begun[0].mechanisms[0].noise_multiplier]


def test_row_02_a_run_goes_on_though_others_were_charged_since(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, **state: object) -> None:
        save(path, **state)
        raise KeyboardInterrupt

    save = loop.save_state
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", stop)
        patch.setattr("cardiac_ldm.trained.finetune", saving_always(patch))
        with pytest.raises(KeyboardInterrupt):
            real().finetuned(1)
    real("2").finetuned(2)
    run = real(spend=False).finetuned(1)
    assert run.done
    assert len(Record().spends) == 2
    assert run.ledger.together is not None
    assert run.ledger.together.runs == 1  # what the record said when it began
    together = real().together()
    assert together is not None
    assert together.runs == 2


def test_no_table_of_real_patients_is_measured_off_their_record(real: Real, tmp_path: Path) -> None:
    there, folder = real(), tmp_path / "table"
    folder.mkdir()
    patients, public = there.private.split("train"), there.public.split("train")
    plan = TablePlan.for_budget(1.0, 1e-5, patients.places)
    for randomness, says in (
        (Randomness(None, simulated=False), "hospital weren't charged"),
        (Randomness(5, simulated=True), "hospital are real; their noise must be"),
    ):
        with pytest.raises(PrivacyError, match=says):
            tabulate(patients, public, plan, randomness, folder, "phantom_public")
        assert not [*folder.iterdir()]


@pytest.mark.parametrize("stage", ["trained_privately", "attributes"])
def test_no_stage_charges_what_nobody_agreed_to(stage: str, real: Real) -> None:
    there = real(spend=False)
    with pytest.raises(PrivacyError, match=r"of real patients only `(finetuned|tabulated)` gives it"):
        getattr(there, stage)(1.0)
    assert not Record().spends


def saving_always(patch: pytest.MonkeyPatch) -> Callable[..., Ledger]:
    """The fine-tuning that saves its state after every step."""
    from cardiac_ldm.training.finetune import finetune

    return lambda *given: finetune(*given, save_every=0)  # type: ignore[misc]


def test_row_03_neither_source_text_nor_a_cohorts_key_trains_on_real_patients_again(
    real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = real().finetuned(1), real(spend=False)
    monkeypatch.setattr("cardiac_ldm.trained.finetune", lambda *_: pytest.fail("trained again"))
    again.private = replace(again.private, key="of another version")
    again.pretrained = replace(again.pretrained, key="of another version")
    assert again.finetuned(1).folder == first.folder
    changed = real(spend=False, recipe={"learning_rate": 2e-3})
    with pytest.raises(PrivacyError, match=r"hospital: this spends 0.\d\d of \(10, 1e-05\); 1.00 are spent by 1 run"):
        changed.finetuned(1)
    assert len(Record().spends) == 1


@pytest.mark.parametrize(
    ("epsilons", "says"),
    [
        ("0, 1, 2, inf", "epsilon: inf on hospital would reveal real private patients"),
        ("1, 0.001", "epsilon: 0.001 protects nobody or teaches nothing; ask for 0.01 to 100"),
        ("1, 8, 9.9", r"hospital: this spends 1\d.* of \(10, 1e-05\); 0.00 are spent by 0 run.* ask for less"),
        ("1, 1000", "epsilon: 1000.0 protects nobody"),
    ],
)
def test_row_04_all_budgets_are_looked_at_before_one_is_spent(epsilons: str, says: str, real: Real) -> None:
    there = real(epsilons)
    for epsilon in (1.0, there.parameters.budgets[-1]):
        with pytest.raises((PrivacyError, ParameterError), match=says):
            there.finetuned(epsilon)
    assert not Record().spends
    assert there.finetuned(0) == there.pretrained


def test_row_04_nothing_is_charged_before_the_public_directions_are_there(real: Real) -> None:
    along = SubspaceSettings(dimensions=10**6, patients=10, draws=1, power=0.0)
    there = real(recipe={"tuned": "subspace", "subspace": along})
    with pytest.raises(ParameterError, match="1000000 directions need more than"):
        there.finetuned(1)
    assert not Record().spends


def test_row_05_models_for_other_deltas_and_of_a_renamed_cohort_are_charged_together(real: Real) -> None:
    there, other = real(), real(recipe={"delta": 1e-6}, name="clinic")
    there.finetuned(1)
    other.finetuned(1)  # the same pictures under another name, for another delta
    for study in (there, other):
        together = study.together()
        assert together is not None
        assert (together.runs, together.delta) == (2, 1e-5)
        assert together.epsilon == pytest.approx(spent(there, other), rel=1e-3)


def test_row_05_who_a_person_is_survives_export_cropping_and_renaming(tmp_path: Path) -> None:
    names = ("anna", "berta", "carl")
    miniatures.make_table(tmp_path / "data", names)
    once = prepare(miniatures.manifest(tmp_path, "table"), store=tmp_path / "store").split("train").people
    for table in ("patients.csv",):
        path = tmp_path / "data" / table
        path.write_text(re.sub(r"\banna,", "zoe,", path.read_text()))
    for file in (tmp_path / "data/anna").glob("E?.nii.gz"):
        reexported(file)
    splits = {"train": ["zoe"], "validation": ["berta"], "test": ["carl"]}
    renamed = miniatures.manifest(tmp_path, "table", name="elsewhere", splits=splits)
    again = prepare(renamed, store=tmp_path / "store").split("train").people
    assert not set(once[0][:1]) & set(again[0][:1])
    assert once[0][1:] == again[0][1:]
    record = Record(tmp_path / "record")
    ledger = charged(record, "mini", once)
    assert record.standing(record.hashes(again), 1e-5).epsilon == pytest.approx(ledger.epsilon_pld, rel=1e-2)
    assert record.standing(record.hashes((("dora", "another picture"),)), 1e-5).runs == 0
    assert not [key for person in once for key in person if key in record.path.read_text()]


def reexported(file: Path) -> None:
    """The same picture as another exporter writes it: floats for integers, other compression and header."""
    image = nib.load(file)
    voxels = np.asarray(image.dataobj).astype(np.float32)
    plain = nib.Nifti1Image(voxels, image.affine)
    plain.header["descrip"] = b"exported again"
    file.write_bytes(gzip.compress(plain.to_bytes(), 1))


def charged(
    record: Record, cohort: str, people: tuple[tuple[str, ...], ...], run: str = "r", noise: float = 4
) -> Ledger:
    """Charge people for a made-up run."""
    plan = PrivatePlan(12, 6, 4, 1.0, 1, 2.0, 1e-5, noise_multiplier=noise)
    ledger = plan.ledger(Randomness(None, simulated=False), **WORDS).model_copy(update={"run": run})
    budget: Any = SimpleNamespace(epsilon=10.0, delta=1e-5)
    record.charge(ledger, cohort, record.hashes(people), budget)
    return ledger


def test_row_05_what_counts_is_the_most_that_one_person_has(tmp_path: Path) -> None:
    record, anna, berta = Record(tmp_path), ("a/anna", "1", "2"), ("a/berta", "3")
    one = charged(record, "a", (anna, berta))
    charged(record, "a", (anna, berta), "r")  # a run that is resumed
    assert record.standing(record.hashes((berta,)), 1e-5).runs == 1
    charged(record, "b", (("b/ann", "2", "9"),), "s")  # anna, by one of her pictures
    charged(record, "c", (("c/x", "9"),), "t")  # who is anna too, as only the run before tells
    everyone = record.standing(record.hashes((("c/x", "9"), berta)), 1e-5)
    assert everyone.runs == 3
    assert everyone.epsilon == pytest.approx(epsilon_pld(merged(3 * one.mechanisms), 1e-5))
    left = record.standing(record.hashes((berta,)), 1e-5)  # without anna, who was in berta's run
    assert (left.runs, left.epsilon) == (1, everyone.epsilon)


def test_row_06_how_many_patients_there_are_shows_nowhere(tmp_path: Path) -> None:
    shares = {"train": 0.5, "validation": 0.25, "test": 0.25}
    for budget in ({"epsilon": 10, "delta": 1e-5}, {"epsilon": 10, "delta": 1e-5, "patients": 9}):
        path = tmp_path / "mini.yaml"
        miniatures.manifest(tmp_path, "table")
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"splits": shares, "budget": budget}))
        if "patients" not in budget:
            with pytest.raises(CohortError, match=r"budget.patients: is missing; with shares .* say how many places"):
                load_manifest(path)
    ledgers, shown = [], list[str]()
    for names in (tuple("abcdefghij"), tuple("abcdefghi"), tuple("bcdefghij")):
        folder = tmp_path / "".join(names)
        miniatures.make_table(folder / "data", names)
        shutil.copy(tmp_path / "mini.yaml", folder)
        cohort = prepare(load_manifest(folder / "mini.yaml"), store=folder / "store")
        shown.append(cohorts_table([cohort]).to_html())
        patients = cohort.split("train")
        plan = PrivatePlan(patients.places, 3, 4, 1.0, 1, 20.0, 1e-5, noise_multiplier=2.0)
        ledger = plan.ledger(Randomness(None, simulated=False), **WORDS)
        ledgers.append(ledger.model_copy(update={"run": "its name in the record"}))
        weight, settings, seen = nn.Parameter(torch.zeros(1)), recipe_of(plan), set[int]()
        train_privately(
            {"w": weight}, lambda unit, _, seen=seen: seen.add(unit), plan, settings,  # type: ignore[misc]
            Randomness(None, simulated=False), ledgers[-1], patients, folder / "run",
        )  # fmt: skip
        assert len(patients) < 9
        assert seen <= set(range(9))
    assert ledgers[0] == ledgers[1] == ledgers[2]
    assert shown[0] == shown[1] == shown[2]
    assert "9 places" in shown[0]
    statement = privacy_statement(ledgers[0])
    assert "zero-out: one patient with all volumes, or an empty place instead; there are 9 places" in statement
    assert "add" not in re.sub("[a-z]*add[a-z]+", "", statement)


def recipe_of(plan: PrivatePlan, **changes: object) -> PrivateSettings:
    """A recipe with a plan's steps."""
    terms = {"steps": plan.steps, "expected_batch": plan.expected_batch, "clip": plan.clip}
    rest = {"draws": 1, "learning_rate": 1e-3, "average_decay": 0.9, "precision": "fp32"}
    return PrivateSettings.model_validate(terms | rest | changes)


def test_row_07_a_limit_lets_nobody_move_up(tmp_path: Path) -> None:
    miniatures.make_table(tmp_path / "data", ("anna", "berta", "carl", "dora"))
    splits = {"train": ["anna", "dora"], "validation": ["berta"], "test": ["carl"]}
    for budget in ({}, {"patients": 2}):
        listed = miniatures.manifest(tmp_path, "table", splits=splits, budget={"epsilon": 9, "delta": 1e-5} | budget)
        with pytest.raises(CohortError, match="2 places are more than the 1 wanted; give fewer") as caught:
            prepare(listed, store=tmp_path / "store", limits={"train": 1})
        assert "list" not in str(caught.value)  # which would let the next one in, too
    assert len(prepare(listed, store=tmp_path / "store", limits={"train": 2, "test": 1}).split("train")) == 2


@pytest.mark.parametrize(
    "edit",
    [
        {"epsilon": 0.1},
        {"guarantee": "public data only"},
        {"n_units": 5000},
        {"delta": 1e-2, "epsilon": 0.2},
        {"mechanisms": []},
        {"run": "of real patients"},
        {"weights": {}},
        {"weights": {"weights.safetensors": 64 * "0"}},
    ],
    ids=str,
)
def test_row_08_a_ledger_that_was_edited_is_refused(edit: dict[str, Any], study: Study) -> None:
    run = study.finetuned(1)
    path = run.folder / "privacy.json"
    left = path.read_text()
    assert run.ledger.epsilon == 1
    try:
        path.write_text(json.dumps(json.loads(left) | edit))
        with pytest.raises(PrivacyError, match=r"privacy\.json: .*restore"):
            study.synthesised(1)
    finally:
        path.write_text(left)


def test_row_08_weights_beside_another_ones_ledger_are_refused(study: Study, tmp_path: Path) -> None:
    private, none = study.finetuned(1), study.finetuned(math.inf)
    for ledger in (private.ledger, public_ledger("acdc")):
        ledger.save(tmp_path / "privacy.json")
        assert Ledger.load(tmp_path / "privacy.json") == ledger
        shutil.copy(none.folder / "weights.safetensors", tmp_path)
        with pytest.raises(PrivacyError, match=r"weights\.safetensors isn't what it was written for"):
            Ledger.load(tmp_path / "privacy.json")
        (tmp_path / "weights.safetensors").unlink()


def test_row_08_a_release_of_real_patients_is_what_the_record_says(
    real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = real().finetuned(1).ledger
    louder = tuple(m.model_copy(update={"noise_multiplier": 9.0}) for m in ledger.mechanisms)
    others: list[dict[str, Any]] = [
        {"mechanisms": louder},
        {"weights": {"weights.safetensors": 64 * "0"}},
        {"run": "another"},
    ]
    for edit in others:
        with pytest.raises(PrivacyError, match="doesn't know this model; name the record that was charged for it"):
            standing(ledger.model_copy(update=edit))
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "lost"))
    with pytest.raises(PrivacyError, match="doesn't know this model"):
        real().finetuned(1)
    there = real()
    wanted: dict[str, Any] = {"cohort_private": there.parameters.cohort_private, "epsilon": 1, "patients": 8}
    there.parameters = ReleaseParameters(profile=str(TINY), spend=True, **wanted)
    with pytest.raises(PrivacyError, match="doesn't know this model"):
        release(there)
    assert not list(there.runs.glob("release*"))


@pytest.mark.parametrize("epsilon", [500.0, 1e6, 0.001, 0.0099, 100.5, 1e-9])
def test_row_09_a_budget_that_means_nothing_is_refused_in_words(epsilon: float, real: Real) -> None:
    terms: dict[str, Any] = {"n_patients": 100, "expected_batch": 10, "steps": 4, "clip": 1.0, "draws": 1}
    with pytest.raises(ParameterError, match=f"^epsilon: {epsilon} protects nobody or teaches nothing"):
        PrivatePlan.for_budget(epsilon, 1e-5, **terms)
    with pytest.raises(ParameterError, match=f"^epsilon: {epsilon} protects nobody or teaches nothing"):
        recipe_of(PrivatePlan(100, 10, 4, 1.0, 1, 1.0, 1e-5, 1.0)).require_reachable(epsilon, 1e-5, 100)
    with pytest.raises((ParameterError, PrivacyError)):
        real(str(epsilon)).finetuned(epsilon)
    assert not Record().spends


def test_row_09_above_20_the_manifest_must_say_so_and_the_statement_does(real: Real) -> None:
    with pytest.raises(PrivacyError, match="more than the manifest's budget"):
        real("25").finetuned(25)
    ledger = real("25", budget={"epsilon": 30, "delta": 1e-5}).finetuned(25).ledger
    assert "ε above 20 is a figure without a promise" in privacy_statement(ledger)
    began = time.monotonic()
    assert epsilon_prv(((400.0, 0.1, 4),), 1e-5, 1e-9) < 0.01
    assert time.monotonic() - began < 30  # and no gigabytes


def noise_of(folder: Path, study: Study, seed: int = 0, **changes: Any) -> np.ndarray:
    """The sum of all noise that a run's loop adds where nobody contributes."""
    given: dict[str, Any] = {"epsilon": 20.0, "stage": "denoiser", "run": "", "rate": 1e-3} | changes
    plan = PrivatePlan(24, 6, 2, 1.0, 1, given["epsilon"], 1e-5, noise_multiplier=2.0)
    randomness = Randomness(seed, simulated=True, run=given["run"])
    ledger, taken = plan.ledger(randomness, **(WORDS | {"stage": given["stage"]})), []
    step = PrivatePlan.gradient
    weight, patients = nn.Parameter(torch.zeros(4000)), study.private.split("train")

    def recorded(*given: Any) -> torch.Tensor:
        taken.append(step(*given))
        return taken[-1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivatePlan, "gradient", recorded)
        settings = recipe_of(plan, learning_rate=given["rate"])
        train_privately({"w": weight}, lambda *_: None, plan, settings, randomness, ledger, patients, folder)
    return torch.stack(taken).flatten().numpy()


def test_row_10_no_two_runs_of_a_seed_share_their_noise(study: Study, tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {},
        {"epsilon": 21.0},
        {"stage": "decoder"},
        {"rate": 2e-3},
        {"run": "finetune-1"},
        {"seed": 1},
    ]
    noise = [noise_of(tmp_path / str(number), study, **other) for number, other in enumerate(others)]
    correlated = np.corrcoef(noise) - np.eye(len(noise))
    assert abs(correlated).max() < 5 / math.sqrt(8000)
    again = noise_of(tmp_path / "again", study)
    assert np.array_equal(again, noise[0])  # and the seed repeats it


@pytest.mark.parametrize("change", ["compressed otherwise", "turned", "padded"])
def test_row_11_a_picture_has_one_owner_however_it_is_stored(change: str, tmp_path: Path) -> None:
    miniatures.make_table(tmp_path / "data", ("anna", "berta", "carl"))
    image, _ = miniatures.heart("ED", 0)
    if change == "turned":
        image = image[::-1, ::-1].copy()
    if change == "padded":
        image = np.pad(image, ((2, 2), (0, 3), (0, 0)), constant_values=image.min())
    for name in ("ED.nii.gz", "ES.nii.gz"):
        there = nib.load(tmp_path / "data/berta" / name)
        shape = there.shape if change != "padded" else image.shape
        other = image if name.startswith("ED") else np.random.default_rng(1).integers(0, 99, shape).astype(np.int16)
        miniatures.save(other, tmp_path / "data/berta" / name)
    table = tmp_path / "data/patients.csv"
    table.write_text(re.sub(r"berta/E._gt.nii.gz", "", table.read_text()))
    if change == "compressed otherwise":
        reexported(tmp_path / "data/berta/ED.nii.gz")
    with pytest.raises(CohortError, match="one person has two names"):
        prepare(miniatures.manifest(tmp_path, "table"), store=tmp_path / "store")


def test_row_11_visits_of_one_participant_are_one_person(tmp_path: Path) -> None:
    for visit in ("1000011_2_0", "1000011_3_0", "1000022_2_0", "1000033_3_0"):
        miniatures.make_ukbb(tmp_path / "data", visit)
    shares = {"train": 0.4, "validation": 0.3, "test": 0.3}
    manifest = miniatures.manifest(tmp_path, "ukbb", splits=shares)
    found = list_patients(manifest, tmp_path / "data")
    assert found == ("1000011_2_0", "1000022_2_0", "1000033_3_0")
    assert manifest._draw(manifest.person("1000011_2_0")) == manifest._draw(manifest.person("1000011_3_0"))
    splits = {"train": ["1000011_2_0"], "validation": ["1000022_2_0"], "test": ["1000011_3_0"]}
    with pytest.raises(CohortError, match="one person has two names"):
        prepare(miniatures.manifest(tmp_path, "ukbb", splits=splits), store=tmp_path / "store")


def test_row_12_who_has_left_is_counted_and_so_is_what_the_others_spent_before(real: Real) -> None:
    before = [real(recipe={"learning_rate": rate}) for rate in (1e-3, 2e-3, 3e-3)]
    for study in before:
        study.finetuned(1)
    after = real(without=["p000003"])
    assert after.private.split("train").places == 23
    with pytest.raises(PrivacyError, match=r"are spent by 3 run"):
        real(without=["p000003"], spend=False).finetuned(1)
    after.finetuned(1)
    together = after.together()
    assert together is not None
    assert together.runs == 4
    assert together.epsilon == pytest.approx(spent(*before, after), rel=1e-3)
    everyone = before[0].private.split("train")
    for run in "wxyz":  # elsewhere
        charged(Record(), "clinic", (everyone.people[everyone.ids.index("p000003")],), run)
    most = after.together()
    assert most is not None
    assert (most.runs, most.epsilon > 1.05 * together.epsilon) == (4, True)  # what the one who left has spent


@pytest.mark.parametrize("fault", ["damaged", "twin", "named twice", "public"])
def test_row_13_no_name_of_a_real_patient_is_shown(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("annamaria", "berta", "carl")
    miniatures.make_table(tmp_path / "data", names)
    splits = {"train": ["annamaria"], "validation": ["berta"], "test": ["carl"]}
    if fault == "damaged":
        (tmp_path / "data/annamaria/ED.nii.gz").write_bytes(b"no picture")
    if fault == "twin":
        shutil.copy(tmp_path / "data/annamaria/ED.nii.gz", tmp_path / "data/berta/ED.nii.gz")
    if fault == "named twice":
        splits["test"] = ["annamaria"]
    if fault == "public":
        prepare(miniatures.manifest(tmp_path, "table", splits=splits), store=tmp_path / "store")
        shutil.copytree(tmp_path / "data", tmp_path / "open")
        for patient in names:
            (tmp_path / "open" / patient).rename(tmp_path / "open" / f"open{patient[0]}")
        table = tmp_path / "open/patients.csv"
        table.write_text(re.sub("annamaria|berta|carl", lambda m: f"open{m[0][0]}", table.read_text()))
        splits = {split: [f"open{name[0]}" for name in members] for split, members in splits.items()}
        (tmp_path / "mini.yaml").rename(tmp_path / "elsewhere.yml.txt")
    changes = {"role": "public", "name": "school", "root": "open"} if fault == "public" else {}
    with pytest.raises((CohortError, PrivacyError)) as caught:
        prepare(miniatures.manifest(tmp_path, "table", splits=splits, **changes), store=tmp_path / "store")
    shown = "".join([str(caught.value), *capfd.readouterr()])
    assert "annamaria" not in shown
    if fault in ("damaged", "twin"):
        log = tmp_path / "store/.mini-problems.txt"
        assert "annamaria" in log.read_text()
        assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_row_13_too_few_places_and_an_empty_split_tell_neither_names_nor_how_many_there_are(tmp_path: Path) -> None:
    miniatures.make_table(tmp_path / "data", ("annamaria", "berta", "carl", "dora"))
    splits: Any = {"train": ["annamaria", "dora"], "validation": ["berta"], "test": ["carl"]}
    shares = {"train": 0.999998, "validation": 1e-6, "test": 1e-6}
    budget = {"epsilon": 9, "delta": 1e-5}
    for given, places, says in ((splits, 1, "1 places are too few for splits.train"), (shares, 9, "no patient falls")):
        manifest = miniatures.manifest(tmp_path, "table", splits=given, budget=budget | {"patients": places})
        with pytest.raises(CohortError, match=says) as caught:
            prepare(manifest, store=tmp_path / "store")
        assert not re.search(r"annamaria|dora|\b4\b", str(caught.value))


def test_row_14_a_delta_that_exposes_somebody_is_warned_of_and_every_patient_may_be_in_every_lot(
    study: Study,
) -> None:
    recipe = study.profile.finetune
    with pytest.warns(UserWarning, match=r"delta: 0.0099 is above N\^-1.1 = 0.0063 \(N = 100\)"):
        recipe.plan(1, 0.0099, 100)
    whole = recipe.model_copy(update={"expected_batch": 40, "steps": 3}).plan(1.0, 1e-5, 20)  # more than there are
    ledger = whole.ledger(Randomness(0, simulated=True), **WORDS)
    assert whole.sampling_rate == 1
    assert whole.sample_batch(np.random.default_rng(0)).all()
    gaussian = whole.noise_multiplier / math.sqrt(3)
    from dp_accounting import get_epsilon_gaussian

    assert ledger.epsilon == pytest.approx(get_epsilon_gaussian(gaussian, 1e-5), rel=0.01)


def test_row_15_what_is_of_real_patients_is_its_owners_alone(real: Real, tmp_path: Path) -> None:
    there = real()
    run = there.finetuned(1)
    (latents,) = (there.runs / "latents").glob("hospital-train-*.zarr")
    miniatures.make_table(tmp_path / "data", ("anna", "berta", "carl"))
    old = os.umask(0)
    try:
        prepared = prepare(miniatures.manifest(tmp_path, "table"), store=tmp_path / "store")
    finally:
        os.umask(old)
    record = Record().path
    for folder in (prepared.path, run.folder, latents, record.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for file in (tmp_path / "store/.salt", record):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


# --- The record ------------------------------------------------------------------------------------------------------


def test_a_line_whose_writing_was_killed_is_nothing_and_one_that_is_damaged_stops_everything(tmp_path: Path) -> None:
    record, anna = Record(tmp_path), (("anna",),)
    charged(record, "a", anna)
    with record.path.open("ab") as file:
        file.write(b'{"spend": {"run": "torn')
    assert len(record.spends) == 1
    charged(record, "a", anna, "s")
    assert [spend.run for spend in record.spends] == ["r", "s"]
    known = record.spends
    record.path.write_bytes(record.path.read_bytes().replace(b'"draws": 1', b'"clipping": "fixed", "draws": 1'))
    assert record.spends == known  # a term that an earlier version wrote
    damaged = record.path.read_bytes().replace(b'"run": "r"', b'"run: "r"')
    record.path.write_bytes(damaged)
    with pytest.raises(PrivacyError, match=r"record\.jsonl: line 2 can't be read; restore it from a backup"):
        charged(record, "a", anna, "t")
    assert record.path.read_bytes() == damaged


def test_a_record_that_would_be_another_in_every_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("record", "~/record"):
        monkeypatch.setenv("CARDIAC_LDM_RECORD", place)
        with pytest.raises(PrivacyError, match=f"CARDIAC_LDM_RECORD: {place} would be another record in every folder"):
            Record()


def test_nobody_is_charged_while_another_process_still_looks(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    charged_yet = list[int]()
    monkeypatch.setattr("cardiac_ldm.trained.wait_for_all", lambda: charged_yet.append(len(Record().spends)))
    real().finetuned(1)
    assert charged_yet == [0]


def test_one_charge_pays_for_one_model(real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, **state: object) -> None:
        save(path, **state)
        raise KeyboardInterrupt

    save, there = loop.save_state, real()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", stop)
        patch.setattr("cardiac_ldm.trained.finetune", saving_always(patch))
        with pytest.raises(KeyboardInterrupt):
            there.finetuned(1)
    (folder,) = there.runs.glob("finetune-*")
    shutil.copytree(folder, tmp_path / "copy")
    first = real(spend=False).finetuned(1)  # goes on, charged once
    assert len(Record().spends) == 1
    shutil.move(first.folder, tmp_path / "kept")
    shutil.copytree(tmp_path / "copy", first.folder)
    with pytest.raises(PrivacyError, match=r"this spends .*; 1.00 are spent by 1 run.*set the parameter spend to True"):
        real(spend=False).finetuned(1)
    assert real().finetuned(1).ledger.run != Ledger.load(tmp_path / "kept/privacy.json").run
    assert len(Record().spends) == len(Record().finished) == 2


def test_the_command_shows_the_record_and_says_what_would_be_spent(
    real: Real, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = real()
    there.finetuned(1)
    capsys.readouterr()
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert f"{Record().path}: 1 run(s) on real patients" in shown
    assert "hospital: 24 patients, epsilon 0.99" in shown
    assert "hospital: the most that one patient has spent is (0.99" in shown
    requested = real("1, 2", spend=False)
    monkeypatch.setattr(CompareParameters, "check", lambda self: None)  # their files are nowhere
    monkeypatch.setattr("cardiac_ldm.study.Study", lambda parameters: requested)
    arguments = ["--cohort-private", requested.parameters.cohort_private, "--profile", str(TINY)]
    for epsilons, code, says in (("1", 0, "nothing"), ("1,2", 0, "hospital: this spends"), ("1,inf", 1, "")):
        assert main(["would-spend", *arguments, "--epsilons", epsilons]) == code
        assert says in capsys.readouterr().out
    assert main(["would-spend"]) == 0
    assert "phantom_private: simulated patients spend nothing" in capsys.readouterr().out
    assert len(Record().spends) == 1


# --- Kills -----------------------------------------------------------------------------------------------------------

KILLS = 5
SERVER = """
import os, sys
import tests.test_guarantee as here
here.prepare_to_fork()
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            here.spend_once(*sys.argv[1:])
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def prepare_to_fork() -> None:
    """What would take every child seconds before its first step: accountants remember what they computed."""
    from cardiac_ldm.profile import Profile

    plan = Profile.load(str(TINY)).finetune.model_copy(update={"steps": 40}).plan(1.0, 1e-5, 24)
    ledger = plan.ledger(Randomness(None, simulated=False), **WORDS)
    for runs in (1, 2):
        epsilon_pld(merged(runs * ledger.mechanisms), 1e-5)


def spend_once(pickled: str, folder: str) -> None:
    """Have the model of epsilon 1 of the real-like cohort, saving after every step."""
    import pickle

    study = pickle.loads(Path(pickled).read_bytes())
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cardiac_ldm.trained.finetune", saving_always(patch))
        ward(study, Path(folder), "1", True, recipe={"steps": 40}).finetuned(1)


def test_a_kill_at_any_moment_leaves_the_record_at_or_above_what_was_spent(
    real: Real, study: Study, tmp_path: Path
) -> None:
    import pickle

    real(recipe={"steps": 40})  # its store, so that a child begins at once
    kept = SimpleNamespace(**{name: getattr(study, name) for name in ("runs", "autoencoder", "pretrained")})
    kept.private = replace(study.private, draw=None)
    kept.public = replace(study.public, draw=None)
    (tmp_path / "study.pkl").write_bytes(pickle.dumps(kept))
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tmp_path / "study.pkl"), str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT,
        )  # fmt: skip
    assert server.stdin
    assert server.stdout
    talk, listen = server.stdin, server.stdout
    while listen.readline() != "ready\n":
        assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
    rng, record, kills, longest, steps_of = random.Random(time.time_ns()), Record(), 0, 0.0, dict[str, int]()
    seen: list[int] = []
    while kills < KILLS:
        began = time.monotonic()
        talk.write("\n")
        talk.flush()
        while not (line := listen.readline()).strip().isdigit():
            assert line, (tmp_path / "log").read_text()[-2000:]
        if longest:
            time.sleep(rng.uniform(0, longest))
            os.kill(int(line), signal.SIGKILL)
        talk.write("\n")
        talk.flush()
        while not re.fullmatch(r"-?\d+\n", line := listen.readline()):
            assert line, (tmp_path / "log").read_text()[-2000:]
        assert int(line) in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-2000:]
        kills += int(line) == -signal.SIGKILL
        if int(line) == 0:  # the first one, which is left alone, and whoever is through before it's killed
            longest = time.monotonic() - began
        for folder in study.runs.glob("finetune-*"):
            state, weights = folder / "state.pt", folder / "weights.safetensors"
            if state.exists() or weights.exists():
                run = json.loads((folder / "privacy.json").read_text())["run"]
                done = 40 if weights.exists() else torch.load(state, weights_only=True)["step"]
                assert done >= steps_of.get(run, 0)
                steps_of[run] = done
                seen.append(done)
            if weights.exists() or rng.random() < 0.15:
                shutil.rmtree(folder)  # whatever is gone is spent
        mechanisms = {spend.run: spend.mechanisms for spend in record.spends}
        assert set(steps_of) <= set(mechanisms)
        taken = [m.model_copy(update={"steps": steps_of[r]}) for r in steps_of for m in mechanisms[r]]
        if taken:
            people = {person for spend in record.spends for person in spend.people}
            assert record.standing(tuple(people), 1e-5).epsilon >= epsilon_pld(merged(taken), 1e-5) - 1e-6
    talk.close()
    server.wait()
    between = sum(steps < 40 for steps in seen)
    print(f"{kills} kills, {between} of them between steps; {len(record.spends)} runs, {len(steps_of)} with steps")
