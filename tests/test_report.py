"""Tables, the privacy statement, and what a release holds."""

import base64
import csv
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, PatientRecord, Patients, Volumes
from cardiac_ldm.errors import PrivacyError
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness, public_ledger
from cardiac_ldm.report.card import About, row, standing, write_rest, write_volumes
from cardiac_ldm.report.figures import distance_by_size, tradeoff
from cardiac_ldm.report.statement import joint_statement, privacy_statement
from cardiac_ldm.report.tables import (
    METRICS,
    attributes_table,
    compared,
    groups_table,
    metrics_table,
    models_table,
    quality_table,
    source,
    tradeoff_table,
    utility_rows,
    utility_table,
)
from cardiac_ldm.training.selection import SelectionSettings

PLAN = {"delta": 1e-5, "n_patients": 100, "expected_batch": 10, "steps": 3, "clip": 0.5, "draws": 1}


def ledger(epsilon: float, *, simulated: bool = True) -> Ledger:
    randomness = Randomness(0 if simulated else None, simulated=simulated)
    plan = PrivatePlan.for_budget(epsilon, **PLAN)  # type: ignore[arg-type]
    return plan.ledger(randomness, stage="denoiser", tuned="all", private_data="hospital", public_data="acdc")


def write_release(drawn: Volumes, said: Ledger, folder: Path, evaluation: Path) -> Path:
    """Write a release of one patient anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_volumes(folder, "sub-00001", drawn)
    words = {"name": "r", "cohort": "hospital", "simulated": True, "profile": "tiny", "attributes": "public patients"}
    words |= {"licence": "CC0-1.0", "public_data": said.public_data, "date": "2026-01-31", "version": "0.1.0"}
    words |= {"learnt": tuple(m.stage for m in said.mechanisms)}
    about = About(epsilon=said.epsilon, delta=said.delta, patients=1, seed=0, **words)  # type: ignore[arg-type]
    drawn_by = {"candidates": 2, "refused": 1, "distance": 0.5, "plausible": "yes"}
    rows = [row("sub-00001", drawn.attributes[0], {"LVEDV": 140.0}, **drawn_by)]
    write_rest(folder, about, [said], None, rows, evaluation, drawn)
    return folder


class Records(Patients):
    """Patients that need no store."""

    def __init__(self, records: list[PatientRecord], role: str = "public") -> None:
        secret = role == "private"
        self._manifest = SimpleNamespace(name="few", role=role, simulated=False, secret=secret)  # type: ignore[assignment]
        self.records = records
        self.groups = tuple(record.group for record in records)
        self.attributes = np.concatenate([record.attributes for record in records])
        self.patient_index = np.repeat(np.arange(len(records)), 2)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[PatientRecord]:
        return iter(self.records)


def heart(**changes: Any) -> PatientRecord:
    """A patient about whom nothing is odd."""
    labels = np.zeros((2, *GRID.shape), np.uint8)
    labels[:, 3:11, 30:60, 30:60], labels[:, 3:11, 40:50, 10:30] = 2, 1
    labels[0, 3:11, 35:55, 35:55], labels[1, 3:11, 40:50, 40:50] = 3, 3
    images = 0.1 + 0.2 * labels.astype(np.float32)
    attributes = np.full((2, len(ATTRIBUTE_NAMES)), 60, np.float32)
    attributes[:, ATTRIBUTE_NAMES.index("ESED")] = 1, 0
    attributes[:, ATTRIBUTE_NAMES.index("BMI")] = np.nan
    return replace(PatientRecord("a", "NOR", images, labels, attributes), **changes)


def odd() -> dict[str, PatientRecord]:
    """A patient for every oddity."""
    sound = heart()

    def with_labels(change: Callable[[np.ndarray], None]) -> PatientRecord:
        labels = sound.labels.copy()
        change(labels)
        return heart(labels=labels)

    blank, phaseless = sound.images.copy(), sound.attributes.copy()
    blank[0, 5], phaseless[1] = 0, 1
    return {
        "nobody has labelled the heart": heart(labelled=False),
        "something was mended in reading or preparing": heart(repairs=("turned",)),
        "a phase is missing": heart(attributes=phaseless),
        "the heart reaches the edge of the field": with_labels(lambda a: a[0, 5, 45].__setitem__(slice(0, 10), 1)),
        "a slice within the heart is blank": heart(images=blank),
        "a slice within the heart is unlabelled": with_labels(lambda a: a[0, 5].fill(0)),
        "fewer than 6 slices show the ventricles": with_labels(lambda a: a[:, 7:].fill(0)),
        "the right ventricle is missing": with_labels(lambda a: np.copyto(a[1], 0, where=a[1] == 1)),
        "the left ventricle doesn't get smaller": heart(labels=sound.labels[::-1]),
        "blood is hardly brighter than muscle": heart(images=0.5 + 0 * sound.images),
        "a tenth of the voxels is saturated": heart(
            images=np.maximum(sound.images, np.arange(96) < 20).astype(np.float32)
        ),
    }


def test_nothing_is_odd_about_a_sound_heart_and_every_rule_finds_its_patient() -> None:
    sound = quality_table({"few": Records([heart(), heart()])})
    assert list(sound) == ["few (2 patients)"]
    assert not sound.to_numpy().any()
    assert set(sound.index) == set(odd())
    for rule, patient in odd().items():
        assert quality_table({"few": Records([heart(), patient])}).at[rule, "few (2 patients)"] == 1, rule


def test_attributes_are_told_by_group_with_what_is_missing() -> None:
    table = attributes_table({"few": Records([heart(), heart(), heart(group="DCM")])})
    assert list(table) == [("few", "DCM", "1 patients"), ("few", "NOR", "2 patients")]
    assert list(table.loc["LVEDV (mL)"]) == ["60 ± 0", "60 ± 0"]
    assert list(table.loc["BMI (kg/m2)"]) == ["missing", "missing"]
    half = heart()
    half.attributes[0, 0] = np.nan
    assert list(attributes_table({"few": Records([half])}).loc["LVEDV (mL)"]) == ["60 ± 0 (50% missing)"]


def test_tables_tell_nothing_of_real_private_patients() -> None:
    for table in (attributes_table, quality_table):
        with pytest.raises(PrivacyError):
            table({"hospital": Records([heart()], role="private")})


def metrics(epsilon: float | str, value: float | None) -> dict[str, Any]:
    row = {"metric": "correlation", "attribute": "LVEDV", "value": value, "low": value, "high": value}
    row |= {"n_patients": 9, "unit": "", "reference": 0.9, "reference_low": 0.8, "reference_high": 1.0}
    row |= {"grouping": None, "group": None}
    return {
        "epsilon": epsilon,
        "model": f"m{epsilon}",
        "rows": [row | {"reference_kind": "ceiling", "better": "higher"}],
    }


def test_the_statement_says_what_is_guaranteed_and_to_whom() -> None:
    real = privacy_statement(ledger(2, simulated=False))
    assert "(2, 1e-05)-differential privacy per patient" in real
    assert f"e^ε = {math.exp(2):.3g}" in real
    assert "simulated" not in real
    assert "These patients are simulated" in privacy_statement(ledger(2))
    assert privacy_statement(ledger(math.inf)).startswith("**No guarantee.**")
    assert privacy_statement(public_ledger("acdc")).startswith("**No private patient was used.**")


def test_the_statement_attests_no_tuning_that_nobody_has_counted() -> None:
    said = ledger(2, simulated=False)
    assert "tuning" not in privacy_statement(said) + said.model_dump_json()


def test_the_statement_lists_every_stage_that_spent() -> None:
    (second,) = ledger(2).mechanisms
    first = second.model_copy(update={"stage": "decoder", "steps": 5})
    said = privacy_statement(ledger(2).model_copy(update={"mechanisms": (first, second)}))
    assert said.startswith("**(2, 1e-05)-differential privacy per patient.**")
    assert said.count("| mechanism: ") == 2
    terms = "DP-SGD: each patient joins a step with probability 0.1, {} steps, clipping norm 0.5,"
    first_row, second_row = (
        f"| mechanism: {name} | {terms.format(n)}" for name, n in (("decoder", 5), ("denoiser", 3))
    )
    assert said.index(first_row) < said.index(second_row)


def test_the_statement_says_what_chose_public_patients() -> None:
    (training,) = ledger(2).mechanisms
    chosen = SelectionSettings(share=0.5, doubt=1, steps=2, learning_rate=1e-3).mechanism(2, 1e-5, ledger(2).n_units)
    said = privacy_statement(ledger(2).model_copy(update={"mechanisms": (chosen, training)}))
    assert "| mechanism: selection | Gaussian mechanism: 1 measurement of the mean of all patients' features, " in said
    assert f"noise multiplier {chosen.noise_multiplier:.4g} |" in said
    real = ledger(2, simulated=False).model_copy(update={"mechanisms": (chosen, training)})
    assert "(the study's chapter on attacks), selection by its noise alone. No attack" in privacy_statement(real)


def test_models_of_one_cohort_are_stated_together() -> None:
    both = [ledger(1), ledger(2)]
    together = Ledger.compose(both)
    assert together.runs == 2
    assert 2 < together.epsilon < 3
    said = joint_statement(together, both[0].private_data)
    assert f"2 private model(s) of {both[0].private_data} spent ({together.epsilon:.4g}, 1e-05) per patient" in said


def test_a_release_holds_volumes_attributes_ledger_and_statement(
    tmp_path: Path, drawn: Volumes, evaluation: Path
) -> None:
    folder = write_release(drawn, ledger(1), tmp_path / "release", evaluation)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".bidsignore",
        "DATASHEET.md",
        "MODEL_CARD.md",
        "README",
        "SHA256SUMS",
        "STATEMENT.md",
        "attributes.csv",
        "croissant.json",
        "dataset.json",
        "dataset_description.json",
        "derivatives",
        "metrics.json",
        "participants.json",
        "participants.tsv",
        "plotly.min.js",
        "privacy.json",
        "quality.html",
        "release.json",
        "sub-00001",
        "verify.py",
    ]
    rows = list(csv.DictReader((folder / "attributes.csv").open()))
    assert [row["path"] for row in rows] == [
        f"sub-00001/anat/sub-00001_acq-{phase}_T2w.nii.gz" for phase in ("ED", "ES")
    ]
    assert (rows[0]["LVEDV"], rows[0]["AGE"], rows[1]["phase"]) == ("150.5", "", "ES")
    image = nib.load(folder / rows[0]["path"])
    assert image.shape == (96, 96, 13)
    assert image.header.get_zooms() == pytest.approx((1.8269, 1.8269, 10), rel=1e-5)
    assert np.abs(image.get_fdata().transpose(2, 1, 0) / 255 - drawn.images[0]).max() < 0.003
    participant = next(csv.DictReader((folder / "participants.tsv").open(), delimiter="\t"))
    assert (participant["LVEDV"], participant["LVEDV_measured"], participant["sex"]) == ("150.5", "140", "n/a")
    assert set(participant) == set(json.loads((folder / "participants.json").read_text()))


def test_labels_are_released_with_their_volumes(tmp_path: Path, drawn: Volumes, evaluation: Path) -> None:
    labels = np.random.default_rng(0).integers(4, size=drawn.images.shape, dtype=np.uint8)
    folder = write_release(replace(drawn, labels=labels), ledger(1), tmp_path / "r", evaluation)
    for said, meant in zip(csv.DictReader((folder / "attributes.csv").open()), labels, strict=True):
        image, mask = (nib.load(folder / said[what]) for what in ("path", "labels"))
        assert np.array_equal(np.asarray(mask.dataobj).transpose(2, 1, 0), meant)
        assert np.array_equal(mask.affine, image.affine)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """What measuring the cohort `drawn` left."""
    said = metrics(1, 0.5) | {"reference_cohort": "<i>few", "n_requests": 1, "n_real_patients": 9}
    row = said["rows"][0]
    distance = {"metric": "KID", "attribute": None, "reference_kind": "floor", "better": "lower"}
    women = {"grouping": "sex", "group": "female", "metric": "distance of women"}
    folder = tmp_path / "evaluate-1"
    folder.mkdir()
    (folder / "metrics.json").write_text(
        json.dumps(said | {"rows": [row, row | distance, row | distance | women, row | {"value": None}]})
    )
    (folder / "anatomy.csv").write_text(
        "patient,attribute,requested,measured\n0,LVEDV,150.5,140\n0,LVESV,,60\n0,ESED,1,0.9\n"
    )
    return folder


@pytest.fixture
def drawn() -> Volumes:
    attributes = np.full((2, 14), np.nan, np.float32)
    attributes[:, ATTRIBUTE_NAMES.index("ESED")] = [1, 0]
    attributes[:, 0] = 150.5
    images = np.random.default_rng(0).random((2, *GRID.shape), np.float32)
    return Volumes("synthetic", images, attributes, np.zeros(2, int), np.zeros(images.shape, np.uint8))


def test_a_release_goes_with_what_was_measured_and_a_page_that_shows_it(
    tmp_path: Path, evaluation: Path, drawn: Volumes
) -> None:
    said = ledger(1).model_copy(update={"public_data": "<i>acdc"})
    folder = write_release(drawn, said, tmp_path / "release", evaluation)
    assert (folder / "metrics.json").read_bytes() == (evaluation / "metrics.json").read_bytes()
    page = (folder / "quality.html").read_text()
    assert "<strong>(1, 1e-05)-differential privacy per patient.</strong>" in page
    assert page.count("<table>") == 1
    for text in ("2 volumes of 1 synthetic patients", "ED 150 mL", "correlation LVEDV", "0.5 [0.5, 0.5]", "LVEDV (mL)"):
        assert text in page, text
    assert "LVESV (mL)" not in page  # nobody asked for it
    assert "distance of women" not in page
    assert "<i>" not in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    again = write_release(drawn, said, tmp_path / "release", evaluation)
    assert (again / "quality.html").read_text() == page


def test_the_page_says_so_where_nothing_could_be_measured(tmp_path: Path, evaluation: Path, drawn: Volumes) -> None:
    (evaluation / "anatomy.csv").write_text("patient,attribute,requested,measured\n0,LVEDV,150.5,\n")
    said = json.loads((evaluation / "metrics.json").read_text())
    unknown = [row | {"value": None, "low": None, "high": None} for row in said["rows"]]
    (evaluation / "metrics.json").write_text(json.dumps(said | {"rows": unknown}))
    page = (write_release(drawn, ledger(1), tmp_path / "release", evaluation) / "quality.html").read_text()
    assert "No heart could be measured." in page
    assert "No distance was measured." in page
    assert "not defined" in page


def test_the_page_draws_its_figures_from_disk_with_no_network(tmp_path: Path, evaluation: Path, drawn: Volumes) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop("no Chromium to read the page in: apt-get install chromium")
    page = write_release(drawn, ledger(1), tmp_path / "release", evaluation) / "quality.html"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += ["--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    shown = subprocess.run([browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=60).stdout
    for figure in ("wall", "distances", "control"):
        _, drawing = shown.split(f'id="{figure}"')
        assert 'class="main-svg"' in drawing.split("<h2>")[0], figure
    assert "modebar-btn" not in shown  # one of plotly's buttons uploads the plot


def test_a_model_that_does_not_protect_patients_is_not_released() -> None:
    with pytest.raises(PrivacyError, match="guarantee none, which does not protect patients; not released"):
        standing(ledger(math.inf))


def test_tables_hold_every_model_and_the_patients_once() -> None:
    table = tradeoff_table([metrics(0, 0.2), metrics(1, None), metrics("inf", 0.6)])
    assert table.epsilon.isna().sum() == 1
    assert sorted(table.epsilon.dropna()) == [0, math.inf]  # what is not defined is left out
    assert table.set_index("run").loc["minf", "value"] == 0.6
    shown = metrics_table(metrics(1, None))
    assert shown.loc["correlation LVEDV", "value [95 %]"] == "not defined"
    assert shown.loc["correlation LVEDV", "held-out patients"] == "0.9 [0.8, 1]"


@pytest.mark.parametrize(
    ("simulated", "called"),
    [(True, "held-out simulated patients"), (False, "held-out patients"), (None, "held-out patients")],
)
def test_nothing_that_is_shown_calls_simulated_patients_real(
    simulated: bool | None, called: str, tmp_path: Path, evaluation: Path, drawn: Volumes
) -> None:
    said = json.loads((evaluation / "metrics.json").read_text()) | {"reference_simulated": simulated}
    diverse = said["rows"][0] | {"metric": "MS-SSIM", "attribute": None, "reference_kind": "level"}
    said["rows"].append(diverse | {"better": "near real"})
    point = {"value": 1.0, "low": 0.5, "high": 1.5}
    said["sizes"] = [point | {"cohort": who, "n_patients": n} for who in ("synthetic", "real") for n in (8, 9)]
    (evaluation / "metrics.json").write_text(json.dumps(said))
    budgets = [said | {"epsilon": epsilon} for epsilon in (0, 1, "inf")]
    table = tradeoff_table(budgets)
    shown = {
        "metrics": metrics_table(said).to_html(),
        "models": models_table({"a": said}, ["correlation LVEDV", "MS-SSIM"]).to_html(),
        "groups": groups_table({"a": said}).to_html(),
        "trade-off": tradeoff(table, {"KID": METRICS["KID"], "MS-SSIM": METRICS["MS-SSIM"]}).to_html(
            include_plotlyjs=False
        ),
        "sizes": distance_by_size({"a": said}).to_html(include_plotlyjs=False),
        "page": (write_release(drawn, ledger(1), tmp_path / "r", evaluation) / "quality.html").read_text(),
    }
    for name, html in shown.items():
        assert not re.search(r"\breal\b", html), name
        assert called in html, name
        assert ("held-out simulated" in html) == bool(simulated), name
    assert not re.search(r"\breal\b", " ".join(METRICS.values()))


def test_a_source_line_carries_the_metrics_themselves() -> None:
    html = source("evaluate-1", metrics(1, 0.5)).data
    payload = html.split("base64,")[1].split('"')[0]
    assert json.loads(base64.b64decode(payload)) == metrics(1, 0.5)


def training_set(
    name: str, against: str, value: float | None, metric: str = "Dice", unit: str = ""
) -> dict[str, object]:
    ends = {"low": value and value - 0.1, "high": value and value + 0.1}
    about = {
        "training_set": name,
        "against": against,
        "metric": metric,
        "attribute": "LV",
        "n_patients": 9,
        "unit": unit,
    }
    return about | {"value": value} | ends


def test_arms_of_training_data_stand_beside_each_other_and_beyond_a_baseline() -> None:
    baselines = {
        "model": "useful-baselines-1",
        "rows": [training_set("public", "", 0.5), training_set("few private", "", 0.3)],
    }
    drawn: list[dict[str, object]] = [
        training_set("synthetic", "", None),
        training_set("few private + synthetic", "", 0.7),
    ]
    drawn += [
        training_set("few private + synthetic", "public", 0.2),
        training_set("synthetic", "", 12.5, "mean absolute error", "mL"),
    ]
    rows = utility_rows(baselines, [{"epsilon": 1.0, "model": "useful-2", "rows": drawn}])
    table = utility_table(rows)
    assert list(table.index) == ["public", "few private", "few private + synthetic (ε = 1)", "synthetic (ε = 1)"]
    assert table.loc["few private + synthetic (ε = 1)", "Dice LV"] == "0.7 [0.6, 0.8]"
    assert table.loc["synthetic (ε = 1)", "Dice LV"] == "not known"  # the decoder gave no labels
    assert table.loc["synthetic (ε = 1)", "mean absolute error LV (mL)"] == "12.5 [12.4, 12.6]"
    (beyond,) = rows[rows.against == "public"].to_dict("records")
    assert (beyond["training_set"], beyond["metric"], beyond["value"]) == (
        "few private + synthetic (ε = 1)",
        "Dice LV",
        0.2,
    )
    assert dict(zip(rows.training_set, rows.run, strict=True))["public"] == "useful-baselines-1"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-9, -1, "FD-EffNet at ε = 1 is below that of public data only: -5.0 [-9.0, -1.0], paired over 40 patients."),
        (1, 9, "FD-EffNet at ε = 1 is above that of public data only"),
        (-9, 1, "FD-EffNet at ε = 1 can't be told from that of public data only"),
        (0, 9, "FD-EffNet at ε = 1 can't be told from that of public data only"),
    ],
)
def test_only_a_paired_interval_without_zero_is_called_a_difference(low: float, high: float, said: str) -> None:
    rows = [("FD-EffNet", None, low), ("FD-EffNet", "LVEDV", 1), ("KID", None, 1)]
    table = pd.DataFrame(rows, columns=["metric", "attribute", "low"]).assign(high=high, n_patients=40)
    table["value"] = (table.low + table.high) / 2
    assert compared("ε = 1 less public data only", table).startswith(said)
