"""Pre-train the latent diffusion model on public patients, whose latents are encoded once and cached."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import zarr
from filelock import FileLock
from pydantic import Field
from torch import Tensor

from cardiac_ldm.cohort import ATTRIBUTES, GRID, Patients, require_public, require_releasable
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.device import compute_device, device_of, own_share
from cardiac_ldm.models.diffusion import TIMESTEPS, ScheduleName, drop_attributes
from cardiac_ldm.progress import tqdm
from cardiac_ldm.settings import Count, Decay, Positive, PublicTraining, Rate, Settings
from cardiac_ldm.training.fit import Loss, Recipe, drawn_at, fit

_SHOWN = 64
"""From so many latents on, encoding them shows its progress."""
Bands = Sequence[tuple[int, int, float]]
_ALL: Bands = ((0, TIMESTEPS, 1.0),)


class DenoiserSettings(Settings):
    """Architecture of the denoiser and the noise schedule it is trained on."""

    schedule: ScheduleName
    patch: Count
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    residual_blocks: int = Field(ge=0)
    heads: Count
    context: Count
    frequencies: int = Field(ge=0)

    def build(self, latent_channels: int) -> Denoiser:
        """A fresh denoiser; attributes are scaled by the fixed public ranges of `cohort.ATTRIBUTES`."""
        ranges = torch.tensor([[a.low for a in ATTRIBUTES], [a.high for a in ATTRIBUTES]])
        sizes = self.model_dump()
        return Denoiser(latent_channels, depth=GRID.n_slices, attribute_range=ranges, **sizes)


class Cycle(Settings):
    """A further cycle of the learning rate, on the first so many public train patients, or all where they're fewer."""

    patients: Count
    steps: Count
    learning_rate: Positive


class PretrainSettings(PublicTraining):
    """Training of the denoiser on public patients; min_snr: ceiling of the SNR that weighs the loss, or nothing.

    further: cycles that go on from the weights of the first.
    """

    steps: Count
    batch: Count
    learning_rate: Positive
    attribute_dropout: Rate
    average_decay: Decay
    min_snr: float | None = Field(gt=0)
    further: tuple[Cycle, ...] = Field((), exclude_if=lambda further: not further)

    def cycle(self, number: int) -> Self:
        """The settings of one cycle alone; the first is number 0."""
        own = self.further[number - 1].model_dump(exclude={"patients"}) if number else {}
        return self.model_copy(update=own | {"further": ()})


class Latents:
    """The latents float32 (n_volumes, c, 13, h, w) of patients, by `latents[rows]`: encoded when first asked for.

    They're kept at `path`, a row a file, which appears whole or not at all: processes may ask at once, and a killed one
    has lost nothing.

    Attributes:
        shape: (n_volumes, c, 13, h, w).
    """

    def __init__(self, autoencoder: Autoencoder, patients: Patients, path: Path) -> None:
        self._autoencoder, self._patients, self._path = autoencoder, patients, path
        size = GRID.size // autoencoder.reduction
        self.shape = len(patients.patient_index), autoencoder.latent_channels, GRID.n_slices, size, size
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not (path / "zarr.json").exists():
                zarr.create_array(
                    path,
                    shape=self.shape,
                    chunks=(1, *self.shape[1:]),
                    dtype="float32",
                    compressors=None,
                    chunk_key_encoding={"name": "default", "separator": "."},
                    overwrite=True,
                )
        self._stored = zarr.open_array(path, mode="r+")

    def __len__(self) -> int:
        return self.shape[0]

    @torch.no_grad()
    def __getitem__(self, rows: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        wanted = np.atleast_1d(np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows, np.int64)])
        missing = [row for row in np.unique(wanted).tolist() if not (self._path / f"c.{row}.0.0.0.0").exists()]
        hide = len(missing) < _SHOWN or self._patients.secret
        for row in tqdm(missing, desc=f"encode {self._patients.name}", unit="volume", disable=hide):
            # One at a time: in batches they would differ by rounding, and a run from its repetition.
            volume = torch.from_numpy(self._patients.images([row])).to(device_of(self._autoencoder))
            self._stored[row] = self._autoencoder.encode(volume)[0].cpu().numpy()
        found: Any = self._stored
        return np.asarray(found.oindex[wanted])


def pretrain(
    patients: Patients,
    latents: np.ndarray | Latents,
    network: DenoiserSettings | Denoiser,
    settings: PretrainSettings,
    seed: int,
    state: Path,
    chances: np.ndarray | None = None,
) -> tuple[Denoiser, list[dict[str, float]]]:
    """Train a denoiser on public latents by the first cycle; resumes from `state`, which it writes every 30 s.

    Args:
        latents: of the patients' volumes, and perhaps of others after them.
        network: a fresh one's settings, or a denoiser that goes on learning, changed in place.
        chances: (n_volumes,), of being drawn; alike unless given.

    Returns:
        The exponential moving average of the denoiser, and the losses by step.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "private patients through weights that were trained with no noise")
    torch.manual_seed(seed)
    model = network if isinstance(network, Denoiser) else network.build(latents.shape[1])
    device = compute_device()
    attributes = torch.from_numpy(patients.attributes)

    def loss(step: int) -> Loss:
        rng, generator = drawn_at(seed, step)
        chosen = rng.choice(len(attributes), settings.batch, p=chances)
        given = drop_attributes(attributes[chosen], settings.attribute_dropout, generator)
        rows = torch.from_numpy(latents[chosen])
        drawn = rows, given, *random_noising(rows, generator)
        rows, given, timesteps, noise = (part[own_share(settings.batch)].to(device) for part in drawn)
        found = model.loss(rows, given, timesteps, noise)
        if settings.min_snr is not None:
            found = found * model.min_snr_weight(timesteps, settings.min_snr)
        return Loss({"loss": found.mean()})

    decay = settings.average_decay
    recipe = Recipe(settings.steps, settings.learning_rate, average_decay=decay, precision=settings.precision)
    return model, fit(model, loss, recipe, "pretrain", state=state)


def random_noising(latents: Tensor, generator: torch.Generator, bands: Bands = _ALL) -> tuple[Tensor, Tensor]:
    """One random timestep and noise for each of latents (b, c, d, h, w), drawn on the CPU.

    Timesteps are uniform in [low, high) of a band (low, high, weight), chosen by weight.
    """
    lows, highs, weights = torch.tensor(bands).T
    chosen = torch.multinomial(weights, len(latents), replacement=True, generator=generator)
    within = torch.rand(len(latents), generator=generator) * (highs - lows)[chosen]
    return lows[chosen].long() + within.long(), torch.randn(latents.shape, generator=generator)


def random_loss(model: Denoiser, latents: Tensor, attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Diffusion loss (b,) of latents (b, c, d, h, w) at one random timestep and noise a row."""
    drawn = (part.to(latents.device) for part in random_noising(latents, generator))
    return model.loss(latents, attributes, *drawn)


@torch.no_grad()
def held_out_loss(model: Denoiser, latents: np.ndarray | Latents, patients: Patients, draws: int = 8) -> np.ndarray:
    """Mean denoising loss of each patient (n_patients,) over their volumes and `draws` fixed timesteps and noises.

    The timesteps are spread evenly and the noise is the same for every model, so that models compare in pairs.

    Raises:
        PrivacyError: the patients are real and private.
    """
    require_releasable(patients, "exact losses of private patients")
    total, device = np.zeros(len(latents)), device_of(model)
    attributes = torch.from_numpy(patients.attributes)
    for draw in tqdm(range(draws), desc="held-out loss"):
        generator = torch.Generator().manual_seed(draw)
        step = int((draw + 0.5) * TIMESTEPS / draws)
        for rows in torch.arange(len(latents)).split(16):
            batch = torch.from_numpy(latents[rows.numpy()])
            noise = torch.randn(batch.shape, generator=generator)
            given = (part.to(device) for part in (batch, attributes[rows], torch.full((len(rows),), step), noise))
            total[rows.numpy()] += model.loss(*given).cpu().numpy() / draws
    return np.bincount(patients.patient_index, total) / np.bincount(patients.patient_index)
