"""A release of the private patients' population: model and table spend one budget together, agreed to and counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, ATTRIBUTES
from cardiac_ldm.cohort.requests import both_phases
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.parameters import ReleaseParameters
from cardiac_ldm.privacy import Ledger, Record, epsilon_pld
from cardiac_ldm.privacy.accounting import terms_of
from cardiac_ldm.privacy.table import Table, composed
from cardiac_ldm.release import release, requests
from cardiac_ldm.report import verify
from cardiac_ldm.study import Study
from tests.conftest import TINY
from tests.test_guarantee import ward
from tests.test_release import asked, edit, resum
from tests.test_table import tables

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]

LEARNT = "a table of attributes of {}private patients of {}, learnt under the same guarantee"
TOLD = ("STATEMENT.md", "README", "DATASHEET.md", "MODEL_CARD.md", "croissant.json", "release.json")


@pytest.fixture(scope="module")
def released(study: Study, threads) -> Path:
    return release(asked(study, epsilon=1, attributes="private", share_model=True))


def told(folder: Path, name: str) -> str:
    """A file's text, however its lines are wrapped."""
    return " ".join((folder / name).read_text().split())


def test_table_and_training_spend_the_budget_together_and_the_folder_says_so(released: Path) -> None:
    assert released.name.startswith("phantom_private-epsilon1-table0.1-8patients-tiny-20")
    ledger = Ledger.load(released / "privacy.json")
    assert [m.stage for m in ledger.mechanisms] == ["attributes", "denoiser"]
    assert ledger.epsilon == 1
    assert 0.985 < epsilon_pld(terms_of(ledger.mechanisms), 1e-5) <= 1
    assert epsilon_pld(terms_of(ledger.mechanisms[:1]), 1e-5) == pytest.approx(0.1, rel=0.01)
    assert ledger.together is not None
    assert ledger.together.runs >= 2
    assert verify.main(released) == 0
    for name in TOLD:
        assert LEARNT.format("simulated ", "phantom_private") in told(released, name), name
    for name in ("README", "DATASHEET.md", "MODEL_CARD.md", "croissant.json"):
        assert "The model and the table of requested attributes learnt from" in told(released, name), name
    for mechanism in ("attributes", "denoiser"):
        assert f"| mechanism: {mechanism} |" in (released / "STATEMENT.md").read_text()
    assert Table.load(released / "model" / "attributes").missing.shape == (11,)


def taken_out(stage: str) -> Callable[[dict[str, Any]], object]:
    return lambda said: said.update(mechanisms=[m for m in said["mechanisms"] if m["stage"] != stage])


TAMPERINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "the table's mechanism is taken out": (taken_out("attributes"), "the ledger ['denoiser']"),
    "the training's mechanism is taken out": (taken_out("denoiser"), "the ledger ['attributes']"),
    "the table had less noise": (
        lambda said: said["mechanisms"][0].update(noise_multiplier=3.0),
        "more than the 1.0 that is stated",
    ),
    "the training's budget alone is stated": (
        lambda said: said.update(epsilon=0.9),
        "more than the 0.9 that is stated",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_verification_fails_where_one_of_the_two_is_hidden(
    copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = TAMPERINGS[name]
    edit(copy, "privacy.json", change)
    resum(copy)
    assert verify.main(copy) == 1
    assert says in capsys.readouterr().out


def test_verification_fails_on_another_table(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model/attributes/table.safetensors").write_bytes(b"other")
    resum(copy)
    assert verify.main(copy) == 1
    assert "model/attributes/table.safetensors isn't what the ledger was written for" in capsys.readouterr().out


def test_the_population_alone_is_drawn_by_the_public_model(study: Study) -> None:
    there = asked(study, epsilon=1, attributes="private", table_share=1, share_model=True)
    models = list(study.runs.glob("finetune-*"))
    folder = release(there)
    assert list(study.runs.glob("finetune-*")) == models
    ledger = Ledger.load(folder / "privacy.json")
    assert [m.stage for m in ledger.mechanisms] == ["attributes"]
    assert ledger.epsilon == 1
    assert ledger.weights.keys() == {"table.safetensors", "weights.safetensors"}
    assert ledger.weights["weights.safetensors"] == study.pretrained.ledger.weights["weights.safetensors"]
    assert verify.main(folder) == 0
    said = told(folder, "DATASHEET.md")
    assert "The table of requested attributes learnt from" in said
    assert "The model learnt from phantom_public alone." in said


@pytest.mark.parametrize("kind", ["noisy", "unknown", "edges", "half missing"])
def test_physics_holds_in_what_is_requested(study: Study, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tables()
    known["half missing"] = Table(known["edges"].densities, np.full(11, 0.5), known["edges"].correlation)
    monkeypatch.setattr(Study, "table", lambda self, epsilon: known[kind])
    there = asked(study, epsilon=1, attributes="private")
    there.parameters = there.parameters.model_copy(update={"patients": 2000})
    rows = requests(there)
    column = dict(zip(ATTRIBUTE_NAMES, rows.T, strict=True))
    for side in ("LV", "RV"):
        full, empty, fraction = (column[side + what] for what in ("EDV", "ESV", "EF"))
        assert (empty < full).all()
        np.testing.assert_allclose(fraction, 100 * (1 - empty / full), rtol=1e-4)
    for attribute in ATTRIBUTES:
        if attribute.name not in ("AGE", "SEX", "BMI", "ESED"):
            assert np.isfinite(column[attribute.name]).all()
        values = column[attribute.name][np.isfinite(column[attribute.name])]
        assert ((values >= attribute.low) & (values <= attribute.high)).all(), attribute.name
    diastole, systole = both_phases(rows[0])
    phase = ATTRIBUTE_NAMES.index("ESED")
    assert (diastole[phase], systole[phase]) == (1, 0)
    np.testing.assert_array_equal(np.delete(diastole, phase), np.delete(systole, phase))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epsilon": 0}, "table_share: 0.1 of epsilon 0 is too little for a table"),
        ({"epsilon": 0.09}, "table_share: 0.1 of epsilon 0.09 is too little for a table"),
        ({"epsilon": 1, "table_share": 0.005}, "0.005 of epsilon 1 is too little for a table"),
    ],
)
def test_a_share_that_teaches_nothing_is_refused_in_words(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        ReleaseParameters(profile=str(TINY), attributes="private", **given).check()


@pytest.mark.parametrize("share", [0, -1, 1.1, "half"])
def test_a_share_is_a_part(share: Any) -> None:
    with pytest.raises(ValueError, match=r"table_share\n.*must be above 0 and at most 1"):
        ReleaseParameters(profile=str(TINY), table_share=share)


def test_ledgers_of_other_patients_do_not_compose(study: Study) -> None:
    table, model = study.tabulated(0.1).ledger, study.finetuned(study.beside_table(1, 0.1)).ledger
    for other in ({"private_data": "others"}, {"n_units": 25}, {"delta": 1e-6}):
        with pytest.raises(PrivacyError, match="they don't compose"):
            composed([table, model.model_copy(update=other)], 1)
    with pytest.raises(PrivacyError, match=r"above the budget of 0\.9"):
        composed([table, model], 0.9)


# --- Real patients ---


@pytest.fixture
def real(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """A release of real private patients, as far as the library can tell, whose runs and record are empty."""
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "record"))

    def made(spend: bool = True, allowed: float = 1, **given: Any) -> Study:
        there = ward(study, tmp_path, "1", spend, budget={"epsilon": allowed, "delta": 1e-5})
        there.runs, there.anatomy = tmp_path / "runs", study.anatomy
        wanted: dict[str, Any] = {"epsilon": 1, "attributes": "private", "patients": 8, "spend": spend} | given
        there.parameters = ReleaseParameters(
            profile=str(TINY), cohort_private=there.parameters.cohort_private, **wanted
        )
        return there

    return made


def nothing_left(study: Study) -> bool:
    kinds = ("attributes-*", "finetune-*", "release*")
    return not Record().spends and not [path for kind in kinds for path in study.runs.glob(kind)]


def test_table_and_model_are_asked_for_in_one_sentence_before_either_is_charged(real: Callable[..., Study]) -> None:
    there = real(spend=False)
    says = r"^hospital \(model and table of attributes\): this spends (0\.9\d|1\.00) of \(1, 1e-05\); 0\.00 are spent "
    looked = says + r"by 0 run\(s\)\. Whether it.* Nothing is spent yet; to agree, set"
    for ask in (release, lambda study: study.tabulated(0.1), lambda study: study.finetuned(study.beside_table(1, 0.1))):
        with pytest.raises(PrivacyError, match=looked):
            ask(there)
        assert nothing_left(there)
    with pytest.raises(PrivacyError, match=r"together (0\.9\d|1\.00), more than the manifest's budget; ask for less"):
        release(real(allowed=0.9))  # either would fit
    assert nothing_left(there)
    alone = real(spend=False, table_share=1)
    with pytest.raises(PrivacyError, match=r"^hospital \(table of attributes\): this spends (0\.9\d|1\.00) of"):
        release(alone)
    assert nothing_left(there)


def test_a_kill_between_table_and_model_charges_neither_twice(
    real: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = real()
    with monkeypatch.context() as patch:
        patch.setattr(Study, "finetuned", lambda self, epsilon: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            release(there)
    assert [m.stage for spend in Record().spends for m in spend.mechanisms] == ["attributes"]
    with pytest.raises(PrivacyError, match=r"^hospital: this spends 0\.[89]\d of .*; (0\.09|0\.10) are spent by 1 run"):
        release(real(spend=False))  # the model alone is left to be asked for
    folder = release(real())
    assert [m.stage for spend in Record().spends for m in spend.mechanisms] == ["attributes", "denoiser"]
    together, ledger = there.together(), Ledger.load(folder / "privacy.json")
    assert together is not None
    assert together.runs == 2
    assert together.epsilon <= 1  # as much as the manifest allows
    assert ledger.together == together  # the ledger on disk says so
    assert ledger.epsilon == 1
    assert ledger.run == " ".join(spend.run for spend in Record().spends)
    said = told(folder, "STATEMENT.md")
    assert f"Together, 2 private model(s) of hospital (train) spent ({together.epsilon:.4g}, 1e-05) per patient" in said
    assert LEARNT.format("", "hospital") in said
    assert verify.main(folder) == 0
    again = real(spend=False)  # both are there: nothing to agree to
    assert again.tabulated(0.1).done
    assert again.finetuned(again.beside_table(1, 0.1)).done
    assert len(Record().spends) == 2


def test_where_the_model_is_there_the_table_alone_is_charged(real: Callable[..., Study]) -> None:
    there = real()
    there.finetuned(there.beside_table(1, 0.1))
    assert len(Record().spends) == 1
    with pytest.raises(PrivacyError, match=r"^hospital \(table of attributes\): this spends 0\.0\d of \(1, 1e-05\)"):
        release(real(spend=False))
    there.tabulated(0.1)
    assert [m.stage for spend in Record().spends for m in spend.mechanisms] == ["denoiser", "attributes"]


def test_a_release_that_the_record_does_not_know_leaves_no_folder(
    real: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = real(table_share=1)
    there.tabulated(1)
    monkeypatch.setenv("CARDIAC_LDM_RECORD", str(tmp_path / "lost"))
    with pytest.raises(PrivacyError, match="doesn't know this model"):
        release(there)
    assert not list(there.runs.glob("release*"))
