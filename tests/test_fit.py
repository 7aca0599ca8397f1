"""The one public loop: resuming where a generator runs on, and processes that share a batch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn

from cardiac_ldm.cohort import ATTRIBUTE_NAMES, GRID, PatientRecord, Patients, load_manifest
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.device import own_share
from cardiac_ldm.profile import Profile
from cardiac_ldm.training.anatomy import train_phase_classifier, train_segmenter
from cardiac_ldm.training.autoencoder import train_autoencoder
from cardiac_ldm.training.checkpoint import save_state
from cardiac_ldm.training.fit import Loss, Recipe, fit
from cardiac_ldm.training.pretrain import pretrain
from tests.conftest import TINY, store_patients

Trained = tuple[nn.Module, list[dict[str, float]]]


def made_up(folder: Path) -> Patients:
    """Public patients, written where they aren't yet."""
    if not folder.exists():
        rng = np.random.default_rng(0)
        attributes = rng.random((2, 14), np.float32)
        attributes[:, ATTRIBUTE_NAMES.index("ESED")] = [1, 0]
        labels = np.broadcast_to((np.arange(GRID.size) // 24).astype(np.uint8), (2, *GRID.shape))
        records = (
            PatientRecord(f"p{n}", None, rng.random((2, *GRID.shape), np.float32), labels, attributes) for n in range(4)
        )
        store_patients(folder, 4, records)
    return Patients(load_manifest("phantom_public"), "train", folder)


@pytest.mark.parametrize("train", [train_segmenter, train_phase_classifier])
def test_a_killed_training_of_an_instrument_goes_on_as_if_nothing_had_happened(
    train: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients, length = made_up(tmp_path / "patients"), {"steps": 4, "batch": 2, "learning_rate": 1e-2, "seed": 0}
    whole, losses = train(patients, **length)

    def save_then_stop(path: Path, **state: list[object]) -> None:
        save_state(path, **state)
        if len(state["losses"]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("cardiac_ldm.training.fit.save_state", save_then_stop)
        patched.setattr("cardiac_ldm.training.fit.SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train(patients, **length, state=tmp_path / "state.pt")
    resumed, after = train(patients, **length, state=tmp_path / "state.pt")
    assert after == losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_training_that_ended_is_read_and_not_repeated(tmp_path: Path) -> None:
    steps: list[int] = []

    def run() -> tuple[nn.Linear, list[dict[str, float]]]:
        torch.manual_seed(0)
        network = nn.Linear(3, 1)

        def loss(step: int) -> Loss:
            steps.append(step)
            return Loss({"square": network(torch.ones(2, 3)).square().mean()})

        return network, fit(network, loss, Recipe(3, 0.1, average_decay=0.5), "line", state=tmp_path / "state.pt")

    (first, losses), (second, again) = run(), run()
    assert steps == [0, 1, 2]
    assert again == losses
    assert torch.equal(first.weight, second.weight)


def test_half_precision_gives_nearly_the_same_losses_and_whole_weights(tmp_path: Path) -> None:
    patients, profile = made_up(tmp_path / "patients"), Profile.load(str(TINY))
    latents = np.random.default_rng(0).standard_normal((8, 2, 13, 12, 12)).astype(np.float32)
    found: dict[str, list[Trained]] = {}
    for precision in ("fp32", "bf16"):
        half = {"precision": precision}
        settings, ours = profile.pretrain.model_copy(update=half), profile.autoencoder.model_copy(update=half)
        found[precision] = [
            pretrain(patients, latents, profile.denoiser, settings, 0, tmp_path / f"{precision}.pt"),
            train_autoencoder(patients, ours, 0, tmp_path / f"autoencoder-{precision}.pt"),
        ]
    for (_, exact), (network, rounded) in zip(found["fp32"], found["bf16"], strict=True):
        assert exact != rounded
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}
        for one, other in zip(exact, rounded, strict=True):
            assert other == pytest.approx(one, rel=0.1, abs=0.05)


def test_single_precision_is_written_nowhere_so_that_runs_from_before_it_was_a_setting_keep_their_keys() -> None:
    settings = Profile.load(str(TINY)).pretrain
    assert settings.precision == "fp32"
    assert "precision" not in settings.model_dump(mode="json")
    half = type(settings).model_validate(settings.model_dump() | {"precision": "bf16"})
    assert half.model_dump(mode="json")["precision"] == "bf16"


def test_rows_are_shared_once_each_and_more_processes_than_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_share(2) == slice(None)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    shared = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        shared += list(range(7))[own_share(7)]
    assert sorted(shared) == list(range(7))
    with pytest.raises(ParameterError, match="2 rows can't be shared by 3 processes"):
        own_share(2)


# Processes: one that has imported everything forks another, and both train.

WORKER = """
import os, sys
from pathlib import Path
from tests.test_fit import distributed, train_everything

folder = Path(sys.argv[1])
rank = 0 if (child := os.fork()) else 1
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
train_everything(folder.parent / "patients", folder, rank)
distributed.destroy_process_group()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def train_everything(cohort: Path, folder: Path, rank: int) -> None:
    """Every public training whose loss is a mean over the batch; leaves losses and weights in folder/RANK.pt."""
    torch.set_num_threads(1)
    patients, profile = made_up(cohort), Profile.load(str(TINY))
    latents = np.random.default_rng(0).standard_normal((8, 2, 13, 12, 12)).astype(np.float32)
    smooth = profile.autoencoder.model_copy(update={"heart": None, "adversarial": 0.0})
    trained: dict[str, Trained] = {
        "denoiser": pretrain(patients, latents, profile.denoiser, profile.pretrain, 0, folder / "denoiser.pt"),
        "autoencoder": train_autoencoder(patients, smooth, 0, folder / "autoencoder.pt"),
        "phases": train_phase_classifier(patients, steps=3, batch=4, learning_rate=1e-2, seed=0),
    }
    left = {name: {"losses": losses, "weights": network.state_dict()} for name, (network, losses) in trained.items()}
    torch.save(left, folder / f"{rank}.pt")


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train_everything(tmp_path / "patients", tmp_path / "one", 0)
    worker = [sys.executable, "-c", WORKER, str(tmp_path / "two")]
    subprocess.run(worker, cwd=TINY.parents[1], check=True)
    alone, first, second = (torch.load(tmp_path / path) for path in ("one/0.pt", "two/0.pt", "two/1.pt"))
    assert not distributed.is_initialized()
    for stage, expected in alone.items():
        assert first[stage]["losses"] == second[stage]["losses"]
        for ours, theirs in zip(expected["losses"], first[stage]["losses"], strict=True):
            rel, least = (1e-2, 1e-3) if "texture adversarial" in ours else (1e-4, None)  # a critic blows rounding up
            assert theirs == pytest.approx(ours, rel=rel, abs=least), stage
        for name in expected["weights"]:
            assert torch.equal(first[stage]["weights"][name], second[stage]["weights"][name]), name
