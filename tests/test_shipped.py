"""The weights that come with the library: found where they're what is asked for, and only whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cardiac_ldm import trained
from cardiac_ldm.cohort import Patients
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.parameters import Parameters
from cardiac_ldm.privacy import Ledger
from cardiac_ldm.study import Study
from cardiac_ldm.training import shipped
from cardiac_ldm.training.pretrain import pretrain

STAGES = ("anatomy", "autoencoder", "pretrain")
WANTED = {"settings": [{"steps": 3}], "cohort": {"name": "made_up"}, "seed": 0}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A shipped stage, made up."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "weights.safetensors").write_bytes(b"made up")
    (run / "state.pt").write_bytes(b"not for others")
    (run / "privacy.json").write_text("{}")
    (run / "metrics.json").write_text(json.dumps({"losses": [{"step": step} for step in range(5000)]}))
    shipped.ship("autoencoder", "abc", WANTED, run, tmp_path / "weights")
    return tmp_path / "weights"


def test_what_is_asked_for_is_found(weights: Path) -> None:
    assert shipped.find("autoencoder", WANTED, weights) == ("abc", weights / "autoencoder")
    names = {"SHA256SUMS", "metrics.json", "privacy.json", "settings.yaml", "weights.safetensors"}
    assert {path.name for path in (weights / "autoencoder").iterdir()} == names
    losses = json.loads((weights / "autoencoder" / "metrics.json").read_text())["losses"]
    assert (losses[0]["step"], losses[1]["step"], len(losses)) == (0, 8, 625)


@pytest.mark.parametrize(
    "other",
    [{"settings": [{"steps": 4}]}, {"cohort": {"name": "acdc"}}, {"seed": 1}],
    ids=lambda other: next(iter(other)),
)
def test_what_was_trained_otherwise_is_not_found(weights: Path, other: dict[str, object]) -> None:
    assert shipped.find("autoencoder", WANTED | other, weights) is None


def test_no_stage_is_found_where_none_is_shipped_or_none_is_wanted(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shipped.find("pretrain", WANTED, weights) is None
    monkeypatch.setenv("CARDIAC_LDM_SHIPPED", "0")
    assert shipped.find("autoencoder", WANTED, weights) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "privacy.json", "settings.yaml", "metrics.json"])
def test_a_file_that_is_not_the_one_that_was_shipped_is_named(weights: Path, name: str) -> None:
    path = weights / "autoencoder" / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ParameterError, match=f"autoencoder/{name}: isn't the file that was shipped"):
        shipped.find("autoencoder", WANTED, weights)


def test_a_missing_file_is_named(weights: Path) -> None:
    (weights / "autoencoder" / "privacy.json").unlink()
    with pytest.raises(ParameterError, match=r"autoencoder/privacy\.json: isn't the file"):
        shipped.find("autoencoder", WANTED, weights)


def test_shipping_again_replaces_the_whole_stage(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "weights.safetensors").write_bytes(b"better")
    shipped.ship("autoencoder", "def", WANTED, tmp_path / "run", weights)
    assert shipped.find("autoencoder", WANTED, weights) == ("def", weights / "autoencoder")
    assert [path.name for path in weights.iterdir()] == ["autoencoder"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_laptop_profile_finds_what_is_shipped_and_nobody_private_made_it(stage: str) -> None:
    study = Study(Parameters(profile="laptop"))
    found = shipped.find(stage, study.described(stage))
    assert found is not None, "the profile's settings are others than those that were shipped: train them anew"
    ledger = Ledger.load(found[1] / "privacy.json")
    assert (ledger.private_data, ledger.mechanisms) == ("none", ())
    assert yaml.safe_load((found[1] / "settings.yaml").read_text())["command"] == "python -m cardiac_ldm.shipped"


def test_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in shipped.WEIGHTS.rglob("*") if path.is_file()) <= 12e6


def test_shipped_models_load_without_a_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path))
    study = Study(Parameters(profile="laptop"))
    _ = study.anatomy_networks
    assert not study.load_autoencoder().training
    assert not study.denoiser(study.pretrained).training
    assert not list(tmp_path.iterdir())


def test_pretraining_goes_on_from_the_cycles_that_are_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = yaml.safe_load((Path(__file__).parent / "tiny.yaml").read_text())
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(said))
    said["pretrain"]["further"] = [{"patients": 12, "steps": 3, "learning_rate": 1e-3}]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(said))
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path / "weights")
    taught: list[int] = []

    def counted(patients: Patients, *given: Any, **more: Any) -> Any:
        taught.append(len(patients))
        return pretrain(patients, *given, **more)

    monkeypatch.setattr(trained, "pretrain", counted)
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path / "runs"))
    one = Study(Parameters(profile=str(tmp_path / "one.yaml")))
    whole = Study(Parameters(profile=str(tmp_path / "two.yaml"))).pretrained
    assert taught == [10, 12]
    shipped.ship("pretrain", "abc", one.described("pretrain"), one.pretrained.folder)
    monkeypatch.setenv("CARDIAC_LDM_RUNS", str(tmp_path / "others"))
    on = Study(Parameters(profile=str(tmp_path / "two.yaml"))).pretrained
    assert taught == [10, 12, 10, 12], "the first cycle was run again"
    assert on.metrics == whole.metrics
    assert [row["step"] for row in on.metrics["losses"]] == list(range(7))
    assert (on.folder / "weights.safetensors").read_bytes() == (whole.folder / "weights.safetensors").read_bytes()
    assert on.metrics["span"] != one.pretrained.metrics["span"]
