"""Fine-tuning on private patients: who contributes what, what moves, and that kills and processes change nothing."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, distributed, nn

from cardiac_ldm.cohort import GRID, Manifest, PatientRecord, Patients, load_manifest
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.privacy import Ledger, PrivatePlan, Randomness, dpsgd, epsilon_pld
from cardiac_ldm.profile import Profile
from cardiac_ldm.training import finetune as room
from cardiac_ldm.training import pretrain, private, rehearsed
from cardiac_ldm.training.checkpoint import load_state, load_weights, save_state
from cardiac_ldm.training.finetune import FinetuneSettings, PatientLoss, finetune
from tests.conftest import TINY, store_patients

pytestmark = pytest.mark.slow

PROFILE = Profile.load(str(TINY))
SEEDED, ENTROPY = Randomness(5, simulated=True), Randomness(None, simulated=False)
BROAD = PROFILE.denoiser
NARROW = BROAD.model_copy(update={"channels": (8,), "attention": (False,), "context": 8})


def made_up(folder: Path, volumes: Sequence[int] = (2,) * 12, manifest: Manifest | None = None) -> Patients:
    """Patients with so many volumes each, written as a prepared cohort's train split."""
    if not folder.exists():
        rng = np.random.default_rng(0)
        records = (
            PatientRecord(
                f"p{number}",
                None,
                np.broadcast_to(rng.random((n, 1, 1, GRID.size), np.float32), (n, *GRID.shape)),
                np.zeros((n, *GRID.shape), np.uint8),
                rng.random((n, 14), np.float32),
            )
            for number, n in enumerate(volumes)
        )
        store_patients(folder, len(volumes), records)
    return Patients(manifest or load_manifest("phantom_private"), "train", folder)


def recipe(**changes: object) -> FinetuneSettings:
    return PROFILE.finetune.model_copy(update=changes)


def plan_of(settings: FinetuneSettings, n_patients: int = 12, **changes: float) -> PrivatePlan:
    """A plan with no calibration behind it; the ledger states its epsilon, which is below 20."""
    terms = {"epsilon": 20.0, "delta": 1e-3, "noise_multiplier": 1.0} | changes
    given = settings.model_dump(include={"expected_batch", "steps", "clip", "draws"})
    return PrivatePlan(n_patients, **given, **terms)  # type: ignore[arg-type]


def latents_of(patients: Patients) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((len(patients.patient_index), 1, 3, 4, 4)).astype(np.float32)


def run(
    folder: Path,
    patients: Patients,
    settings: FinetuneSettings,
    plan: PrivatePlan | None = None,
    randomness: Randomness = SEEDED,
    network: pretrain.DenoiserSettings = BROAD,
    save_every: float = 30.0,
) -> tuple[nn.Module, Ledger]:
    torch.manual_seed(1)
    model, plan = network.build(1), plan or plan_of(settings, len(patients))
    torch.seed()  # nothing below may draw from the global generator
    if patients.secret and not (folder / "privacy.json").exists():
        charged(folder, patients, settings, plan, randomness)
    given = (patients, latents_of(patients), plan, settings, randomness, folder, "public")
    return model, finetune(model, *given, save_every=save_every)


def charged(
    folder: Path, patients: Patients, settings: FinetuneSettings, plan: PrivatePlan, randomness: Randomness
) -> None:
    """Leave the ledger of a run for which real patients were charged, as a study does."""
    words = {"private_data": f"{patients.name} ({patients.split})", "public_data": "public"}
    ledger = plan.ledger(randomness, stage="denoiser", tuned=settings.tuned, **words)
    folder.mkdir(parents=True, exist_ok=True)
    ledger.model_copy(update={"run": "its name in the record"}).save(folder / "privacy.json")


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cohorts")


@pytest.fixture(scope="module")
def patients(cohorts: Path) -> Patients:
    return made_up(cohorts / "twelve")


# Kills and processes: a server imports everything once and forks a child, or one for each rank, for every call.

LONG = recipe(steps=150, expected_batch=1, tuned="attributes")
LONG_PLAN = plan_of(LONG, epsilon=4.86)  # what its ledger states is little more than it spends


def long_run(cohort: str, folder: str) -> None:
    """A run that is saved after every step."""
    run(Path(folder), made_up(Path(cohort)), LONG, LONG_PLAN, network=NARROW, save_every=0)


SERVER = """
import json, os, sys, traceback
os.dup2(2, 1)
import tests.test_finetune as here

here.prepare_to_fork()
answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
print("ready", file=answers)
for line in sys.stdin:
    name, processes, arguments = json.loads(line)
    children = []
    for rank in range(processes):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                if processes > 1:
                    where = f"file://{arguments[0]}/meeting-{name}"
                    here.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=processes)
                getattr(here, name)(*arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    print(json.dumps(children), file=answers)
    sys.stdin.readline()  # until then a child that has ended keeps its number
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), file=answers)
"""


def prepare_to_fork() -> None:
    """What would take every child seconds: accountants remember what they computed, and an optimiser imports a lot."""
    LONG_PLAN.ledger(SEEDED, stage="", tuned="", private_data="", public_data="")
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])


class Server:
    """Calls functions of this module in fresh processes that have imported everything already."""

    def __init__(self, log: Path) -> None:
        reading, writing = os.pipe()
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(writing)],
                stdin=subprocess.PIPE,
                stderr=errors,
                pass_fds=[writing],
                cwd=TINY.parents[1],
                env=os.environ | threads,
                text=True,
            )
        os.close(writing)
        self.answers: IO[str] = os.fdopen(reading)
        assert self.answers.readline() == "ready\n", log.read_text()

    def start(self, work: Callable[..., None], *arguments: object, processes: int = 1) -> list[int]:
        """The processes' numbers."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([work.__name__, processes, list(map(str, arguments))]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.answers.readline())

    def outcome(self) -> list[int]:
        """Their exit codes, once they have ended; below 0 for a signal."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.answers.readline())

    def call(self, work: Callable[..., None], *arguments: object, processes: int = 1) -> None:
        self.start(work, *arguments, processes=processes)
        assert self.outcome() == [0] * processes, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def server(cohorts: Path) -> Iterator[Server]:
    started = Server(cohorts / "server.log")
    yield started
    assert started.process.stdin
    started.process.stdin.close()
    started.process.wait()


@cache
def spent_after(steps: int) -> float:
    """Epsilon of the first steps of the long run, rounded up to a multiple of 50 of them."""
    rounded = -(-steps // 50) * 50
    return rounded and epsilon_pld(((LONG_PLAN.noise_multiplier, LONG_PLAN.sampling_rate, rounded),), LONG_PLAN.delta)


def inspect(folder: Path) -> int:
    """How many steps a killed run has saved; what it left is whole, and its ledger states at least what they spent."""
    weights, state = folder / "weights.safetensors", load_state(folder / "state.pt")
    steps = LONG.steps if weights.exists() else state["step"] if state else 0
    if weights.exists():
        load_weights(NARROW.build(1), weights)
    if steps or (folder / "privacy.json").exists():
        assert Ledger.load(folder / "privacy.json").epsilon >= spent_after(steps)
    return steps


def test_fifty_kills_at_random_moments_change_nothing(server: Server, cohorts: Path, patients: Patients) -> None:
    began, rng = time.monotonic(), random.Random(time.time_ns())
    whole, folder = cohorts / "whole", cohorts / "killed-0"
    server.call(long_run, patients.path, whole)
    pace = (time.monotonic() - began) / LONG.steps
    kills = saved = round_ = 0
    begin = 0.1  # seconds from the fork to the first step
    while kills < 50:
        (child,) = server.start(long_run, patients.path, folder)
        goal = (LONG.steps - saved) / (51 - kills)
        time.sleep(rng.uniform(0, begin + 2 * pace * goal))
        os.kill(child, signal.SIGKILL)
        before, (code,) = saved, server.outcome()
        saved = inspect(folder)
        assert saved >= before
        if code == -signal.SIGKILL:
            kills += 1
            begin = min(max(begin * (1.25 if saved == before else 0.9), 0.03), 3.0)
        else:
            assert code == 0, server.log.read_text()[-3000:]
            round_, saved, folder = round_ + 1, 0, cohorts / f"killed-{round_ + 1}"
    server.call(long_run, patients.path, folder)
    for number in range(round_ + 1):
        ended = cohorts / f"killed-{number}"
        assert sorted(path.name for path in ended.iterdir()) == ["privacy.json", "weights.safetensors"]
        for path in ended.iterdir():
            assert path.read_bytes() == (whole / path.name).read_bytes()
    assert Ledger.load(whole / "privacy.json").epsilon >= spent_after(LONG.steps)
    print(f"\n{kills} kills, {round_} runs that ended before, {time.monotonic() - began:.1f} s; {pace:.3f} s a step")


def recorded_run(folder: str, tuned: str, entropy: str) -> None:
    """A run of 8 steps in folder/rank-RANK; keeps every step's gradient and the final weights in folder/RANK.pt."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    step, taken = PrivatePlan.gradient, []

    def recorded(*arguments: object) -> Tensor:
        taken.append(step(*arguments))  # type: ignore[arg-type]
        return taken[-1].clone()

    PrivatePlan.gradient = recorded  # type: ignore[method-assign, assignment]
    patients = of_entropy(Path(folder).parent) if entropy else made_up(Path(folder).parent / "twelve")
    settings = recipe(steps=8, expected_batch=2, tuned=tuned)
    where = Path(folder) / f"rank-{0 if entropy else rank}"  # the ledger of a charged run is there for all of them
    model, _ = run(where, patients, settings, None, ENTROPY if entropy else SEEDED)
    torch.save({"gradients": taken, "weights": model.state_dict()}, Path(folder) / f"{rank}.pt")


HOSPITAL = Manifest.model_validate(
    {
        "name": "hospital",
        "role": "private",
        "simulated": False,
        "licence": "none",
        "citation": "none",
        "reader": {"kind": "acdc"},
        "budget": {"epsilon": 10, "delta": 1e-5},
        "splits": {"train": [f"p{n}" for n in range(12)], "validation": ["a"], "test": ["b"]},
    }
)


def of_entropy(cohorts: Path) -> Patients:
    """Real private patients, as far as the library can tell."""
    return made_up(cohorts / "secret", manifest=HOSPITAL)


def recorded(server: Server, folder: Path, tuned: str, processes: int, entropy: str = "") -> list[dict]:
    folder.mkdir()
    if entropy:
        settings = recipe(steps=8, expected_batch=2, tuned=tuned)
        charged(folder / "rank-0", of_entropy(folder.parent), settings, plan_of(settings), ENTROPY)
    server.call(recorded_run, folder, tuned, entropy, processes=processes)
    assert [path.name for path in sorted(folder.glob("rank-*"))] == ["rank-0"]  # the others write nothing
    assert sorted(path.name for path in (folder / "rank-0").iterdir()) == ["privacy.json", "weights.safetensors"]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def test_two_processes_take_the_steps_of_one(server: Server, cohorts: Path) -> None:
    plan = plan_of(recipe(steps=8, expected_batch=2))
    sizes = {int(plan.sample_batch(SEEDED.generator(step, 0)).sum()) for step in range(plan.steps)}
    assert {0, 1, 3} <= sizes  # an empty lot, one that leaves a process without a patient, an odd one
    made_up(cohorts / "twelve")
    (alone,) = recorded(server, cohorts / "alone", "attention", 1)
    for together in recorded(server, cohorts / "together", "attention", 2):
        for one, two in zip(alone["gradients"], together["gradients"], strict=True):
            assert one.norm() > 0
            assert (one - two).norm() <= 1e-5 * one.norm()
        for name, weight in alone["weights"].items():
            assert torch.allclose(weight, together["weights"][name], rtol=0, atol=1e-5), name


def test_two_processes_with_fresh_randomness_end_with_the_same_weights(server: Server, cohorts: Path) -> None:
    first, second = recorded(server, cohorts / "fresh", "lora-2", 2, "entropy")
    left = load_file(cohorts / "fresh" / "rank-0" / "weights.safetensors")
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        assert torch.equal(weight, left[name]), name


# Which folder a run may go on in.


def stopped(
    folder: Path,
    patients: Patients,
    settings: FinetuneSettings,
    monkeypatch: pytest.MonkeyPatch,
    randomness: Randomness = SEEDED,
) -> None:
    """Leave a run that ended after its first step."""

    def save_then_stop(path: Path, **state: object) -> None:
        save_state(path, **state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(private, "save_state", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, patients, settings, None, randomness, save_every=0)


def test_only_the_same_run_goes_on(
    patients: Patients, cohorts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path, patients, recipe(), monkeypatch)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    others = made_up(cohorts / "other")
    for who, settings, plan, what in (
        (patients, recipe(learning_rate=0.5), None, "settings"),
        (patients, recipe(), plan_of(recipe(), epsilon=21.0), "settings"),
        (others, recipe(), None, "patients"),
    ):
        with pytest.raises(ParameterError, match=f"was left by a run with other {what}; give this one its own folder"):
            run(tmp_path, who, settings, plan)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left
    run(tmp_path, patients, recipe())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["privacy.json", "weights.safetensors"]


def test_a_finished_run_is_read_and_never_trained_twice(
    patients: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, ledger = run(tmp_path, patients, recipe(tuned="lora-2"))
    monkeypatch.setattr(room, "train_privately", lambda *_, **__: pytest.fail("trained twice"))
    (tmp_path / "progress.txt").touch()  # as a run that was killed while it tidied up
    again, same = run(tmp_path, patients, recipe(tuned="lora-2"))
    assert same == ledger
    assert sorted(path.name for path in tmp_path.iterdir()) == ["privacy.json", "weights.safetensors"]
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    other = plan_of(recipe(), epsilon=21.0)
    with pytest.raises(ParameterError, match=r"privacy\.json: was left by a run with other settings; give"):
        run(tmp_path, patients, recipe(tuned="lora-2"), other)


def test_a_plan_for_another_number_of_patients_is_refused(patients: Patients, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="has 12 patients, the plan is for 11"):
        run(tmp_path, patients, recipe(), plan_of(recipe(), 11))
    assert not list(tmp_path.iterdir())


# Who contributes what.


class Captured(Exception):  # noqa: N818
    """Ends a run where training would begin."""


def loss_of_units(
    patients: Patients, settings: FinetuneSettings, monkeypatch: pytest.MonkeyPatch, latents: np.ndarray | None = None
) -> tuple[list[nn.Parameter], PatientLoss, PrivatePlan]:
    """What fine-tuning hands to the private loop: the parameters, each unit's loss, and the plan."""
    held: list = []

    def capture(tuned: dict[str, nn.Parameter], unit_loss: object, plan: PrivatePlan, *_: object, **__: object) -> None:
        held.extend((list(tuned.values()), unit_loss, plan))
        raise Captured

    monkeypatch.setattr(room, "train_privately", capture)
    torch.manual_seed(1)
    model = BROAD.build(1)
    for parameter in model.parameters():  # what starts at zero would hide the paths behind it
        nn.init.normal_(parameter, std=0.1)
    given = latents_of(patients) if latents is None else latents
    plan = plan_of(settings, len(patients))
    with pytest.raises(Captured):
        finetune(model, patients, given, plan, settings, SEEDED, patients.path / "never", "public")
    return held[0], held[1], held[2]


def test_a_patients_gradient_averages_over_the_volumes_there_are(
    cohorts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = made_up(cohorts / "uneven", (1, 3, 2) * 4)
    latents, rows, losses = latents_of(patients), [], []
    settings = recipe(clip=1e-3, draws=2)
    parameters, unit_loss, plan = loss_of_units(patients, settings, monkeypatch, latents)

    original = Denoiser.loss

    def seen(model: Denoiser, volumes: Tensor, attributes: Tensor, *rest: Tensor) -> Tensor:
        rows.append((volumes, attributes))
        losses.append(original(model, volumes, attributes, *rest))
        return losses[-1]

    monkeypatch.setattr(Denoiser, "loss", seen)
    for unit, own in enumerate([[0], [1, 2, 3], [4, 5]]):
        loss = unit_loss(unit, SEEDED.draws(0, unit))
        assert loss is not None
        assert torch.equal(rows[-1][0], torch.from_numpy(np.repeat(latents[own], 2, axis=0)))
        volume = losses[-1].unflatten(0, (len(own), 2)).mean(1)
        assert loss.item() == pytest.approx(volume.mean().item())
        free = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])
        clipped = plan.clipped(loss, parameters)
        assert free.norm() > plan.clip >= clipped.double().norm()
        assert torch.cosine_similarity(free, clipped, dim=0) > 0.999


@pytest.mark.parametrize(("tuned", "precision"), [("all", "fp32"), ("edges", "bf16"), ("lora-2", "fp32")])
def test_several_patients_at_once_contribute_what_each_does_alone(
    tuned: str, precision: str, cohorts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patients = made_up(cohorts / "uneven", (1, 3, 2) * 4)
    latents = latents_of(patients)
    latents[patients.offsets[4]] = np.inf  # a gradient that isn't finite
    settings = recipe(clip=1e-2, draws=2, tuned=tuned, precision=precision, expected_batch=12)
    parameters, loss, plan = loss_of_units(patients, settings, monkeypatch, latents)
    loss.offsets = np.append(loss.offsets, loss.offsets[-1])  # a place that nobody fills
    loss.at_once = 5
    taken, backward = [], loss._gradients

    def short_of_memory(several: Sequence[tuple[Tensor, ...]]) -> Tensor:
        taken.append(len(several))
        if len(several) > 3:
            raise torch.OutOfMemoryError
        return backward(several)

    monkeypatch.setattr(loss, "_gradients", short_of_memory)
    plan = replace(plan, n_patients=13, expected_batch=13, noise_multiplier=0.0)
    alone = plan.gradient(0, parameters, loss, SEEDED)
    monkeypatch.setattr(dpsgd, "TOGETHER", ("cpu",))
    together = plan.gradient(0, parameters, loss, SEEDED)
    assert taken == [5, *[2] * 6]
    closeness = 1e-5 if precision == "fp32" else 0.05
    assert (alone - together).norm() <= closeness * alone.norm()
    each = [plan.clipped_rows(rows) for rows in loss.gradients(range(13), partial(SEEDED.draws, 0))]
    rows = torch.cat(each)
    assert rows.shape == (12, len(alone))
    for unit, row in enumerate(rows):
        value = loss(unit, SEEDED.draws(0, unit))
        assert value is not None
        own = plan.clipped(value, parameters)
        assert (row - own).norm() <= closeness * own.norm(), unit
        assert row.double().norm() <= plan.clip
    assert rows[4].norm() == 0 < rows[[0, 1, 2, 3, 5, 6]].norm(dim=1).min()
    noisy = replace(plan, noise_multiplier=2.0).gradient(0, parameters, loss, SEEDED)
    assert (noisy - together).std().item() == pytest.approx(2.0 * plan.clip / 13, rel=0.1)  # once, not once a chunk


def test_half_precision_gives_nearly_the_same_clipped_gradient(
    patients: Patients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = {}
    for precision in ("fp32", "bf16"):
        with monkeypatch.context() as patched:
            parameters, unit_loss, plan = loss_of_units(patients, recipe(precision=precision, clip=1e-3), patched)
        loss = unit_loss(3, SEEDED.draws(0, 3))
        assert loss is not None
        assert loss.dtype == torch.float32
        assert {part.dtype for part in torch.autograd.grad(loss, parameters, retain_graph=True)} == {torch.float32}
        gradients[precision] = plan.clipped(loss, parameters)
        assert gradients[precision].dtype == torch.float32
        assert 0.99 * plan.clip < gradients[precision].double().norm() <= plan.clip
    exact, rounded = gradients.values()
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()
    model, _ = run(tmp_path, patients, recipe(steps=1, precision="bf16"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_timesteps_fall_in_their_bands_as_often_as_weighted() -> None:
    n = 40_000
    bands = ((0, 10, 1.0), (40, 41, 2.0), (100, 150, 5.0))
    timesteps, _ = pretrain.random_noising(torch.zeros(n, 1, 1, 1, 1), torch.Generator().manual_seed(0), bands)
    counts = torch.bincount(timesteps, minlength=150)
    expected = torch.zeros(150, dtype=torch.float64)
    for low, high, weight in bands:
        expected[low:high] = n * weight / 8 / (high - low)
    assert len(counts) == 150
    assert not counts[expected == 0].any()
    inside = expected > 0
    chi_square = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    assert chi_square < 60 + 5 * 120**0.5  # 61 timesteps: mean 60, variance 120


# What moves.


@pytest.mark.parametrize("tuned", ["all", "attention", "attributes", "edges", "head", "lora-2"])
def test_only_what_is_tuned_moves(tuned: str, patients: Patients, tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = BROAD.build(1)
    settings = recipe(tuned=tuned, steps=2)
    after, _ = run(tmp_path, patients, settings)
    if tuned == "lora-2":
        wanted = {
            name
            for name, weight in before.named_parameters()
            if name.endswith(".weight")
            and name != "attributes.weight"  # an embedding, not a layer
            and (weight.dim() > 2 or (weight.dim() == 2 and re.search(r"attention\..*\.", name)))
        }
    elif tuned == "edges":
        outermost = r"(stem|head\.2)\.|.*(norm[^.]*|head\.0)\.weight|.*\.bias$"
        wanted = {name for name, _ in before.named_parameters() if re.match(outermost, name)} - {"attributes.bias"}
    else:
        starts = {
            "all": r"",
            "attention": r"attributes\.|condition\.|.*\.attention\.",
            "attributes": r"attributes\.|condition\.|.*\.attn2\.",
            "head": r"head\.(0|2)\.",
        }
        wanted = {name for name, _ in before.named_parameters() if re.match(starts[tuned], name)}
    moved = {name for name, weight in after.named_parameters() if not torch.equal(weight, before.get_parameter(name))}
    assert moved == wanted
    assert list(load_file(tmp_path / "weights.safetensors")) == sorted(before.state_dict())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tuned": "lora-0"}, r"finetune\.tuned: 'lora-0': "),
        ({"tuned": "lora"}, r"finetune\.tuned: 'lora': "),
        ({"tuned": "everything"}, r"finetune\.tuned: 'everything': .*all\|attention\|attributes\|edges\|head\|lora-"),
        ({"timesteps": [[10, 10, 1.0]]}, r"finetune\.timesteps\.0: \[10, 10, 1\.0\]: must be \[low, high, weight\]"),
        ({"timesteps": [[0, 151, 1.0]]}, r"finetune\.timesteps\.0: .* 0 <= low < high <= 150"),
        ({"timesteps": [[0, 9, 1.0], [0, 9, 0]]}, r"finetune\.timesteps\.1: .* a weight above 0"),
        ({"timesteps": []}, r"finetune\.timesteps: \[\]: must hold at least one band"),
        ({"learning_rate": 0}, r"finetune\.learning_rate: 0: .*greater than 0"),
        ({"precision": "fp16"}, r"finetune\.precision: 'fp16': .*'fp32' or 'bf16'"),
        ({"unit": "volume"}, r"finetune\.unit: is no setting"),
        ({"clipping": "normalised"}, r"finetune\.clipping: is no setting"),
        ({"decoder": {"share": 0.5}}, r"finetune\.decoder: "),
        ({"stepz": 5}, r"finetune\.stepz: is no setting of this study"),
    ],
)
def test_a_wrong_recipe_is_one_clear_sentence(changes: dict, sentence: str, tmp_path: Path) -> None:
    profile = yaml.safe_load(TINY.read_text())
    profile["finetune"] |= changes
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(profile))
    with pytest.raises(ParameterError, match=sentence) as raised:
        Profile.load(str(path))
    assert len(str(raised.value).replace(str(path), "")) < 200
    assert "\n" not in str(raised.value)


# What is left and shown.


def test_nothing_of_real_patients_is_shown_or_left(
    cohorts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = of_entropy(cohorts)
    capfd.readouterr()
    pretrain.Latents(PROFILE.autoencoder.build().eval(), secret, tmp_path / "latents.zarr")[:]
    stopped(tmp_path / "killed", secret, recipe(), monkeypatch, ENTROPY)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["privacy.json", "progress.txt", "state.pt"]
    state = load_state(tmp_path / "killed" / "state.pt") or {}
    assert set(state) == {"step", "tuned", "average", "optimiser", "ledger", "settings", "cohort", "directions"}
    _, ledger = run(tmp_path / "run", secret, recipe(), randomness=ENTROPY)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["privacy.json", "weights.safetensors"]
    with safe_open(tmp_path / "run" / "weights.safetensors", "pt") as file:
        assert not file.metadata()
    assert ledger.randomness == "ChaCha20, keyed by the operating system's entropy"
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_real_patients_are_met_on_their_record_alone_and_by_noise_that_nobody_can_draw(
    cohorts: Path, tmp_path: Path
) -> None:
    secret, plan = of_entropy(cohorts), plan_of(recipe())
    for randomness, says in ((ENTROPY, "hospital weren't charged"), (SEEDED, "hospital are real; their noise must be")):
        model, folder = BROAD.build(1), tmp_path / says[:20]
        folder.mkdir()
        with pytest.raises(PrivacyError, match=says):
            finetune(model, secret, latents_of(secret), plan, recipe(), randomness, folder, "public")
        assert not [*folder.iterdir()]


def test_the_progress_of_simulated_patients_is_shown(
    patients: Patients, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, patients, recipe())
    assert re.search(r"private denoiser: 4/4 steps, +[\d.]+ steps/s", capfd.readouterr().err)


# --- What it's expected to be worth ---------------------------------------------------------------------------------


def test_who_is_about_to_spend_is_told_what_rehearsals_of_no_more_patients_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = PROFILE.finetune.model_copy(update={"learning_rate": 1.0})
    found: list[tuple[Any, ...]] = [
        (80, 1, 0.5, 0.2, 0.8, PROFILE.finetune),
        (80, 10, -0.1, -0.3, 0.1, PROFILE.finetune),
        (400, 1, -0.6, -0.9, -0.3, PROFILE.finetune),
        (60, 1, -9.0, -9.5, -8.5, other),
    ]
    names = ("places", "epsilon", "change", "low", "high", "recipe")
    rows = [dict(zip(names, row, strict=True)) | {"n_patients": 100, "tuned": "edges"} for row in found]
    rows = [row | {"recipe": row["recipe"].model_dump(mode="json")} for row in rows]
    (tmp_path / "cohort_sizes.json").write_text(json.dumps({"rows": rows}))
    known = rehearsed.rehearsals(tmp_path / "cohort_sizes.json")
    monkeypatch.setattr(rehearsed, "rehearsals", lambda: known)

    def said(epsilon: float, places: int) -> str:
        return rehearsed.verdict(PROFILE.finetune, epsilon, places)

    assert said(1, 399) == (
        "In a rehearsal with 80 simulated public patients and epsilon 1, the loss on 100 others changed by +0.50 "
        "[+0.20, +0.80] / 1000: it's expected to harm. Consider the public model with your population's table of "
        "attributes (notebook 08, attributes private, table_share 1)"
    )
    assert "80 simulated public patients and epsilon 10, " in said(20, 80)
    assert "-0.10 [-0.30, +0.10] / 1000: it's expected to change nothing that could be told. Consider" in said(20, 80)
    assert said(5, 400).endswith("-0.60 [-0.90, -0.30] / 1000: it's expected to help")
    assert said(0.95, 400) == said(5, 400)
    assert said(1, 79) == said(0.5, 400).replace("400", "79")
    assert said(1, 79) == "Whether it helps isn't known: no rehearsal had this recipe and at most 79 patients"


def test_a_cohort_smaller_than_a_batch_joins_every_step_whole() -> None:
    settings = recipe(expected_batch=200)
    settings.require_reachable(1.0, 1e-3, 12)
    assert settings.plan(1.0, 1e-3, 12).sampling_rate == 1
