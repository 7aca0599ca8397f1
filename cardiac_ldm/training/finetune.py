"""Fine-tune the pre-trained denoiser on private patients."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from einops import repeat
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cardiac_ldm.cohort import Patients
from cardiac_ldm.errors import ParameterError, PrivacyError
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import compute_device, device_of, is_first_process
from cardiac_ldm.models.diffusion import TIMESTEPS, drop_attributes
from cardiac_ldm.models.lora import merge_lora
from cardiac_ldm.privacy import Ledger, Mechanism, PrivatePlan, Randomness, dpsgd
from cardiac_ldm.privacy.budget import require_charged
from cardiac_ldm.training.checkpoint import load_weights, save_weights
from cardiac_ldm.training.pretrain import Latents, random_noising
from cardiac_ldm.training.private import PrivateSettings, require_places, train_privately
from cardiac_ldm.training.selection import LEFT, Selection, SelectionSettings
from cardiac_ldm.training.subspace import MOMENTUM, Directions, SubspaceLoss, SubspaceSettings, restraint


def _sensible(band: tuple[int, int, float]) -> tuple[int, int, float]:
    low, high, weight = band
    if not 0 <= low < high <= TIMESTEPS or not 0 < weight < math.inf:
        raise ValueError(f"must be [low, high, weight] with 0 <= low < high <= {TIMESTEPS} and a weight above 0")
    return band


def _some(bands: tuple[object, ...]) -> tuple[object, ...]:
    if not bands:
        raise ValueError("must hold at least one band [low, high, weight]")
    return bands


Band = Annotated[tuple[int, int, float], AfterValidator(_sensible)]


class FinetuneSettings(PrivateSettings):
    """The private recipe.

    timesteps: training timesteps are drawn uniformly from [low, high) bands chosen by weight (Ghalebikesabi et al.,
    arXiv 2302.13861). tuned: what of the denoiser learns, see `Denoiser.tunable`; "subspace", all of it, along the
    directions that `subspace` says. selection: which public patients teach the model again before, if any do.
    """

    delta: float = Field(gt=0, lt=1)
    attribute_dropout: float = Field(ge=0, le=1)
    timesteps: Annotated[tuple[Band, ...], AfterValidator(_some)]
    tuned: str = Field(pattern=r"^(all|attention|attributes|edges|head|lora-[1-9]\d*|subspace)$")
    subspace: SubspaceSettings | None = Field(None, exclude_if=lambda subspace: subspace is None)
    selection: SelectionSettings | None = Field(None, exclude_if=lambda selection: selection is None)

    @model_validator(mode="after")
    def _directions_where_needed(self) -> Self:
        if (self.tuned == "subspace") != (self.subspace is not None):
            raise ValueError("subspace: goes with tuned: subspace, and that with it; give both or neither")
        return self

    @property
    def optimiser(self) -> Callable[..., torch.optim.Optimizer]:
        """Adam; of a subspace's coordinates, where it would move noise as far as signal, gradient descent."""
        return partial(torch.optim.SGD, momentum=MOMENTUM) if self.subspace else torch.optim.Adam

    @property
    def along(self) -> SubspaceSettings:
        """The directions, where a subspace is tuned."""
        if self.subspace is None:
            raise ParameterError(f"finetune.tuned: {self.tuned} has no directions; give subspace, and its settings")
        return self.subspace

    def plan(self, epsilon: float, delta: float, n_patients: int, before: tuple[Mechanism, ...] = ()) -> PrivatePlan:
        """The plan of a budget, of which the selection of public patients is a part."""
        return super().plan(epsilon, delta, n_patients, (*before, *self._before(epsilon, delta, n_patients)))

    def _before(self, epsilon: float, delta: float, n_patients: int) -> tuple[Mechanism, ...]:
        return (self.selection.mechanism(epsilon, delta, n_patients),) if self.selection else ()

    def step_size(self, plan: PrivatePlan) -> float:
        """The learning rate; of a subspace, the part of it that suits the plan's noise."""
        if self.subspace is None:
            return self.learning_rate
        noise = plan.noise_multiplier * math.sqrt(self.subspace.dimensions) / plan.expected_batch
        return self.learning_rate * restraint(noise, self.subspace.apart)

    def check(self, epsilon: float, cohort: str, n_patients: int, secret: bool) -> None:
        """Find, before anything is trained, what would stop the private stage of a budget.

        Args:
            secret: whether the cohort's patients are real.

        Raises:
            PrivacyError: real patients wouldn't be protected.
            ParameterError: no plan with these settings spends the budget on so many patients.
        """
        if secret and math.isinf(epsilon):
            raise PrivacyError(f"epsilon: inf on {cohort} would reveal real private patients; give a finite one")
        before = self._before(epsilon, self.delta, n_patients) if math.isfinite(epsilon) else ()
        self.require_reachable(epsilon, self.delta, n_patients, before)

    def mechanisms(self, epsilon: float, places: int) -> tuple[Mechanism, ...]:
        """What the private stage of a budget spends."""
        return self.plan(epsilon, self.delta, places).mechanisms("denoiser", self.tuned)


def finetune(
    model: Denoiser,
    patients: Patients,
    latents: np.ndarray | Latents,
    plan: PrivatePlan,
    settings: FinetuneSettings,
    randomness: Randomness,
    folder: Path,
    public_data: str,
    directions: Directions | None = None,
    selection: Selection | None = None,
    save_every: float = 30.0,
) -> Ledger:
    """Run a plan on private patients; leaves `weights.safetensors` and `privacy.json` in `folder`.

    A folder with the weights of this very plan is read, not trained again: that would spend the budget twice. One with
    its ledger is gone on with, by the noise and the identity that this ledger has.

    Args:
        model: the pre-trained denoiser; changed in place.
        latents: (n_volumes, c, d, h, w) of the patients' volumes.
        public_data: what the pre-training used, for the ledger.
        directions: along which all weights learn, where a subspace is tuned.
        selection: of public patients, who teach the model before private ones do.

    Raises:
        ParameterError: the plan is for another number of patients, `folder` holds another run, or the recipe has a
            selection and there is none, or the reverse.
        PrivacyError: real patients weren't charged for this run, or the plan doesn't account for the selection.
    """
    if (settings.selection is None) != (selection is None):
        raise ParameterError("finetune.selection: goes with public patients to choose from; give both or neither")
    weights, unbound, path = (folder / x for x in ("weights.safetensors", "weights.unbound", "privacy.json"))
    data = {"private_data": f"{patients.name} ({patients.split})", "public_data": public_data}
    ledger = plan.ledger(randomness, stage="denoiser", tuned=settings.tuned, **data)
    if path.exists():
        known = Ledger.load(path)
        if not known.same_run(ledger):
            raise ParameterError(f"{path}: was left by a run with other settings; give this one its own folder")
        ledger = known if weights.exists() else known.bound()  # it was killed before they got their name
        *before, last = ledger.mechanisms
        plan = replace(plan, noise_multiplier=last.noise_multiplier, before=tuple(before))
    if weights.exists():
        load_weights(model, weights)
        _tidy(folder)
        return ledger
    if selection:
        require_places(patients, plan)
        require_charged(patients, randomness, ledger)
        if is_first_process():
            folder.mkdir(parents=True, exist_ok=True)
            ledger.save(path)
        selection.teach(model, patients, latents, plan, randomness, folder)
    tuned, loss = learning(model, patients, latents, plan, settings, directions)
    settings = settings.model_copy(update={"learning_rate": settings.step_size(plan)})
    given = plan, settings, randomness, ledger, patients, folder, save_every
    train_privately(tuned, loss, *given, optimiser=settings.optimiser)
    if isinstance(loss, SubspaceLoss):
        loss.move()
    merge_lora(model.cpu())
    if is_first_process():  # a ledger is never behind the weights, and what was needed to resume goes last
        save_weights(model.eval(), unbound)
        ledger = ledger.bound(unbound)
        ledger.save(path)
        unbound.replace(weights)
        _tidy(folder)
    return ledger


def _tidy(folder: Path) -> None:
    """Remove what a finished run no longer needs, and what kills left half-written."""
    for name in ("state.pt", "state.tmp", "weights.tmp", "progress.txt", *LEFT):
        (folder / name).unlink(missing_ok=True)


def learning(
    model: Denoiser,
    patients: Patients,
    latents: np.ndarray | Latents,
    plan: PrivatePlan,
    settings: FinetuneSettings,
    directions: Directions | None = None,
) -> tuple[dict[str, nn.Parameter], "PatientLoss | SubspaceLoss"]:
    """What learns, by name: weights of a denoiser, or z, which moves all of them along directions; patients' losses."""
    tuned, device = model.tunable("all" if settings.subspace else settings.tuned), compute_device()
    # places that nobody fills are empty
    offsets = np.pad(patients.offsets, (0, max(0, plan.n_patients - len(patients))), mode="edge")
    given = latents, torch.from_numpy(patients.attributes), offsets
    loss = PatientLoss(model.to(device), tuned, *given, plan.draws, settings)
    if directions is None:
        return tuned, loss
    along = SubspaceLoss(model, directions, loss.gradients)
    return {"z": along.z}, along


@dataclass
class PatientLoss:
    """Each patient's loss: the mean over their volumes and the draws of each.

    latents: (n_volumes, c, d, h, w); attributes: (n_volumes, n); patient p's are offsets[p] to offsets[p + 1], none
    where a place is empty. at_once: so many patients' gradients `gradients` takes at a time, fewer if memory ends.
    """

    model: Denoiser
    tuned: dict[str, nn.Parameter]
    latents: np.ndarray | Latents
    attributes: Tensor
    offsets: np.ndarray
    draws: int
    settings: FinetuneSettings
    at_once: int = 16

    def __call__(self, unit: int, generator: torch.Generator) -> Tensor | None:
        """The loss of a patient; None of an empty place."""
        rows = self.rows(unit, generator)
        return None if rows is None else self.losses(self.model.loss, *rows).mean()

    def rows(self, unit: int, generator: torch.Generator) -> tuple[Tensor, ...] | None:
        """Latents, attributes, timesteps and noise: a row for each draw of each volume."""
        own = range(self.offsets[unit], self.offsets[unit + 1])
        if not own:
            return None
        k = max(self.draws, 2 // len(own))  # one row alone is slow: PyTorch's Conv3d then takes its fallback
        given = drop_attributes(self.attributes[own], self.settings.attribute_dropout, generator)
        latents = repeat(torch.from_numpy(self.latents[own]), "v ... -> (v k) ...", k=k)
        drawn = random_noising(latents, generator, self.settings.timesteps)
        return latents, repeat(given, "v n -> (v k) n", k=k), *drawn

    def losses(self, loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Diffusion loss (b,) of rows, on the device that trains."""
        device = device_of(self.model)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return loss(*(part.to(device) for part in rows))

    def gradients(self, units: Sequence[int], draws: Callable[[int], torch.Generator]) -> Iterator[Tensor]:
        """Unclipped gradients, float32 (n, d) of some patients at a time; of an empty place, none."""
        left = [unit for unit in units if self.offsets[unit] < self.offsets[unit + 1]]
        while left:
            rows = [rows for unit in left[: self.at_once] if (rows := self.rows(unit, draws(unit)))]
            try:
                yield self._gradients(rows)
            except torch.OutOfMemoryError:
                if self.at_once == 1:
                    raise
                self.at_once = min(self.at_once, len(left)) // 2 or 1
            else:
                left = left[self.at_once :]

    def _gradients(self, patients: Sequence[tuple[Tensor, ...]]) -> Tensor:
        device = device_of(self.model)
        if device.type not in dpsgd.TOGETHER:
            with dpsgd.a_core_each(device) as spread:
                return torch.stack(list(spread(self._gradient, patients)))
        # who has fewer rows than another repeats some, which then count nothing
        row = torch.arange(max(len(latents) for latents, *_ in patients))
        shares = torch.stack([(row < len(latents)) / len(latents) for latents, *_ in patients])
        rows = [torch.stack([part[row % len(part)] for part in parts]) for parts in zip(*patients, strict=True)]

        def loss(weights: dict[str, Tensor], share: Tensor, *rows: Tensor) -> Tensor:
            found = self.losses(lambda *given: functional_call(of_model, weights, given), *rows)
            return (found * share.to(found.device)).sum()

        of_model = _Loss(self.model)
        weights = {f"model.{name}": parameter.detach() for name, parameter in self.tuned.items()}
        each = vmap(grad(loss), in_dims=(None, *(0 for _ in (shares, *rows))))(weights, shares, *rows)
        return torch.cat([part.flatten(1) for part in each.values()], dim=1).float()

    def _gradient(self, rows: tuple[Tensor, ...]) -> Tensor:
        loss = self.losses(self.model.loss, *rows).mean()
        parts = torch.autograd.grad(loss, list(self.tuned.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts]).float()


class _Loss(nn.Module):
    """A denoiser's loss as a module, which `functional_call` takes other weights for."""

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, *rows: Tensor) -> Tensor:
        return self.model.loss(*rows)
