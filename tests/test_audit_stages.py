"""The privacy evidence of a study: audits, attacks, what breaks the bound; what they show, and whom they may touch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from cardiac_ldm import study as module
from cardiac_ldm.cohort import Patients, Volumes
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness
from cardiac_ldm.privacy.bounds import BOUNDS, gaussian_bound
from cardiac_ldm.privacy.canaries import BatchLoss, ledger_scores, sensitivity
from cardiac_ldm.report import tables
from cardiac_ldm.report.figures import audit_bounds
from cardiac_ldm.study import Run, Study
from cardiac_ldm.trained import Trained
from cardiac_ldm.training.leaks import scaled_by_batch, sensitivities
from cardiac_ldm.training.pretrain import pretrain

pytestmark = pytest.mark.slow

WORDS = {"stage": "denoiser", "tuned": "all", "private_data": "nobody", "public_data": "phantom_public"}


# --- The audit -------------------------------------------------------------------------------------------------------


def test_an_audit_stays_below_what_is_stated_its_controls_exceed_it_and_no_patient_is_read(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = study.finetuned(1), study.finetuned(math.inf)
    monkeypatch.delattr(Patients, "_read")
    monkeypatch.delattr(Patients, "attributes")
    audits = [study.audited(epsilon).metrics for epsilon in (1, math.inf)]
    private, none = audits
    assert private["n_canaries"] >= 2000
    assert (private["stated"], private["delta"]) == (pytest.approx(1), 1e-5)
    shown = {(row["noise"], row["bound"]): row["shown"] for row in private["rows"]}
    assert set(shown) == {(noise, name) for noise in (1, 0.1) for name in BOUNDS}
    assert all((epsilon <= private["stated"]) == (noise == 1) for (noise, _), epsilon in shown.items())
    assert all(3 < row["shown"] <= row["at_most"] for row in none["rows"])
    rows = tables.audit_rows(audits)
    table = tables.audit_table(rows)
    assert list(table.index) == ["ε = 1", "ε = 1", "no privacy", "any, every canary found"]
    assert table["Gaussian"].iloc[0] == pytest.approx(shown[1, "Gaussian"], abs=0.005)
    assert list(audit_bounds(rows).data[0].x) == [pytest.approx(1)] * 2  # what is not finite has no bar


def test_an_audit_from_end_to_end_stays_below_what_is_stated_and_exceeds_it_without_noise(
    study: Study,
) -> None:
    for epsilon in (1, 10):
        found = study.audited_whole(epsilon).metrics
        assert found["stated"] == epsilon
        shown = {(row["noise"], row["bound"]): row["shown"] for row in found["rows"]}
        assert all(shown[1, name] <= epsilon for name in BOUNDS)
        lit = [name for name in BOUNDS if shown[0, name] > epsilon]
        assert "Gaussian" in lit
        assert epsilon > 1 or set(lit) == set(BOUNDS)
    assert shown[1, "Gaussian"] > 1  # final weights do tell who was in
    assert len(tables.audit_table(tables.audit_rows([found]))) == 3
    assert not study.audited_whole(10).folder.joinpath("noise-1.0").exists()


def test_the_public_model_has_nothing_to_audit(study: Study) -> None:
    with pytest.raises(ParameterError, match="epsilon: 0 is the public model, which met no private patient"):
        study.audited(0)


def ledger(*noise: float, n: int = 50) -> Ledger:
    """Of mechanisms with these noise multipliers, one after the other."""
    plan = PrivatePlan(n, 10, 3, 1.0, 1, math.inf, 1e-3, noise_multiplier=0.0)
    stated = plan.ledger(Randomness(0, simulated=True), **WORDS)
    stages = tuple(stated.mechanisms[0].model_copy(update={"noise_multiplier": sigma}) for sigma in noise)
    return stated.model_copy(update={"mechanisms": stages})


def test_canaries_are_in_all_stages_of_a_ledger_or_in_none() -> None:
    scores, included = ledger_scores(ledger(0.0, 0.0), 0, n_canaries=600)
    assert len(scores) == 600
    assert not scores[~included].any()
    assert scores[included].max() > 3  # each of the two stages has 3 lots
    assert scores[included].mean() == pytest.approx(6 * 0.2, abs=0.2)


def test_two_stages_together_show_more_than_either() -> None:
    both, one = (gaussian_bound(*ledger_scores(stated, 0), 1e-3) for stated in (ledger(0.8, 0.8), ledger(0.8)))
    assert both > 1.2 * one > 0


# --- Membership inference --------------------------------------------------------------------------------------------


def test_an_attack_tells_members_from_as_many_others_by_their_losses(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = study.attacked(0)

    def losses(model: object, latents: np.ndarray, patients: Patients, draws: int) -> np.ndarray:
        assert len(latents) == len(patients.patient_index)
        return np.arange(len(patients)) - 2.5 * (patients.split == "train")

    monkeypatch.setattr(module, "held_out_loss", losses)
    found = study.attacked(2)
    assert (found.metrics["n_members"], found.metrics["n_others"]) == (16, 16)
    members, others = found.read("losses")
    rates = {(row["attack"], row["measure"]): row["value"] for row in found.metrics["membership"]}
    assert rates["loss", "auc"] == pytest.approx(mannwhitneyu(-members, -others).statistic / 16**2)
    below = [known - x for known, x in zip(public.read("losses"), (members, others), strict=True)]
    attack = "loss below the public model's"
    assert rates[attack, "auc"] == pytest.approx(mannwhitneyu(*below).statistic / 16**2)
    assert rates["loss", "tpr_at_fpr_0.01"] is None  # sixteen can't show it
    assert {row["attack"] for row in public.metrics["membership"]} == {"loss"}
    table = tables.membership_table({"public data only": public.metrics, "ε = 2": found.metrics})
    assert list(table.index) == [("public data only", "loss"), ("ε = 2", "loss"), ("ε = 2", attack)]
    assert table.loc[("ε = 2", "loss"), "TPR at 1 % FPR [95 %]"] == "not defined"


# --- Memorisation ----------------------------------------------------------------------------------------------------


def test_copies_of_private_patients_show_and_so_do_the_groups_that_they_are_from(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = study.private.split("train")[:10]
    cohort = Volumes(
        "synthetic", train.images(np.arange(len(train.patient_index))), train.attributes, train.patient_index
    )
    cohort.save(tmp_path / "synthetic.npz")
    (tmp_path / "metrics.json").write_text('{"epsilon": 1}')
    monkeypatch.setattr(study, "synthesised", lambda epsilon: Run("synthesise", "copies", tmp_path))
    found = study.memorised(1).metrics
    rows = [row for row in found["memorisation"] if row["statistic"] == "nearer to training"]
    assert {row["grouping"] for row in rows} == {None, "sex", "age", "disease"}
    kept = np.isin(np.random.default_rng(0).permutation(24)[:8], range(10)).sum()  # as many as are held out
    assert all(row["value"] >= kept / 10 for row in rows if row["grouping"] is None)
    assert len(found["suspicious"]) == 3 * 6
    assert all(row["request"] == row["patient"] for row in found["suspicious"])  # also of those beyond the 8 drawn
    table = tables.memorisation_table({"copies": found})
    assert list(table.index) == [("copies", space) for space in ("image", "latent", "feature")]
    assert set(tables.memorised_groups_table({"copies": found}, "latent").index.get_level_values(0)) <= {
        "sex",
        "age",
        "disease",
    }


def test_the_control_starts_from_the_public_model(study: Study, tmp_path: Path) -> None:
    still = study.profile.pretrain.model_copy(update={"steps": 1, "learning_rate": 1e-12})
    public, train = study.denoiser(study.pretrained), study.public.split("train")
    latents, state = study.latents(train, study.public)[:], tmp_path / "state.pt"
    model, _ = pretrain(train, latents, study.denoiser(study.pretrained), still, 0, state)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, public.state_dict()[name])


# --- What breaks the bound -------------------------------------------------------------------------------------------


def batch_loss(numbers: list[float], weight: Tensor, dependent: bool) -> BatchLoss:
    """Patients whose losses are their number times the weight, and times the lot's size if `dependent`."""
    return lambda batch: lambda unit, generator: (len(batch) if dependent else 1) * numbers[unit] * weight.sum()


def test_sensitivity_is_what_one_unit_adds_and_changes() -> None:
    weight, numbers = torch.zeros(1, requires_grad=True), [0.3, -0.1, 0.25, 5.0]
    plan = PrivatePlan(5, 1, 1, 2.0, 1, 1.0, 1e-5, noise_multiplier=0.0)
    alone = sensitivity(plan, [weight], batch_loss(numbers, weight, False), [0, 1, 2], 3)
    assert alone == pytest.approx(1, abs=1e-5)  # 5 is clipped to 2
    assert alone <= 1
    moved = (2 + 4 * (0.3 - 0.1 + 0.25) - 3 * (0.3 - 0.1 + 0.25)) / 2
    found = sensitivity(plan, [weight], batch_loss(numbers, weight, True), [0, 1, 2], 3)
    assert found == pytest.approx(moved, rel=1e-5)


def test_both_habits_exceed_the_bound_and_the_mechanism_does_not(study: Study) -> None:
    models = study.load_autoencoder(), study.denoiser(study.pretrained)
    found = sensitivities(study.public.split("train")[:4], *models, 0.1)
    table = tables.sensitivity_table({"rows": found.to_dict("records")})
    assert list(table.index) == ["the mechanism", "latents scaled by the batch", "a critic that learnt from the batch"]
    assert (found[found.loss == "the mechanism"].sensitivity <= 1).all()
    assert (table.loc["a critic that learnt from the batch"] > 1.2).any()
    latents = np.random.default_rng(0).normal(size=(6, 2, 13, 12, 12)).astype(np.float32)
    latents[5] *= 9  # one odd patient
    plan, weights = PrivatePlan(7, 1, 1, 0.1, 1, 1.0, 1e-5, noise_multiplier=0.0), list(models[1].parameters())
    losses = [
        scaled_by_batch(models[1], latents, np.full((6, 14), np.nan, np.float32), of_batch)
        for of_batch in (False, True)
    ]
    own, scaled = (sensitivity(plan, weights, loss, range(5), 5) for loss in losses)
    assert own <= 1
    assert scaled > 1.2


# --- Whom they may touch ---------------------------------------------------------------------------------------------


def test_what_looks_at_private_patients_refuses_real_ones_before_anything_is_trained(
    hospital: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Trained, "finetuned")
    with pytest.raises(PrivacyError, match=r"hospital holds real private .* who among private patients trained"):
        hospital.attacked(1)
    with pytest.raises(PrivacyError, match=r"hospital holds real private .* whom among private patients the synthetic"):
        hospital.memorised(1)


def test_what_breaks_the_bound_is_shown_on_public_patients_alone(study: Study) -> None:
    models = study.load_autoencoder(), study.denoiser(study.pretrained)
    with pytest.raises(PrivacyError, match="exact gradients of private patients"):
        sensitivities(study.private.split("train")[:4], *models, 0.3)
