"""Pre-train the latent diffusion model on public patients, whose latents are encoded once and cached."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cardiac_ldm.cohort import ATTRIBUTES, GRID, Patients, require_public, require_releasable
from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.diffusion import (
    TIMESTEPS,
    ScheduleName,
    diffusion_loss,
    drop_attributes,
    min_snr_weight,
    schedule,
)
from cardiac_ldm.progress import tqdm
from cardiac_ldm.training.checkpoint import load_state, save_state, update_average

_SHOWN = 64
"""From so many latents on, encoding them shows its progress."""


class DenoiserSettings(BaseModel):
    """Architecture of the denoiser and the noise schedule it is trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: ScheduleName
    patch: int = Field(ge=1)
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    residual_blocks: int = Field(ge=0)
    heads: int = Field(ge=1)
    context: int = Field(ge=1)
    frequencies: int = Field(ge=0)

    def build(self, latent_channels: int) -> Denoiser:
        """A fresh denoiser; attributes are scaled by the fixed public ranges of `cohort.ATTRIBUTES`."""
        ranges = torch.tensor([[a.low for a in ATTRIBUTES], [a.high for a in ATTRIBUTES]])
        return Denoiser(
            latent_channels,
            self.patch,
            self.channels,
            self.attention,
            self.residual_blocks,
            self.heads,
            self.context,
            self.frequencies,
            GRID.n_slices,
            ranges,
        )


class PretrainSettings(BaseModel):
    """Training of the denoiser on public patients; min_snr: ceiling of the SNR that weighs the loss, or nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    attribute_dropout: float = Field(ge=0, le=1)
    average_decay: float = Field(ge=0, lt=1)
    min_snr: float | None = Field(gt=0)


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
        self.shape = len(patients.owners), autoencoder.latent_channels, GRID.n_slices, size, size
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
            self._stored[row] = self._autoencoder.encode(torch.from_numpy(self._patients.images([row])))[0].numpy()
        found: Any = self._stored
        return np.asarray(found.oindex[wanted])


def pretrain(
    patients: Patients,
    latents: np.ndarray,
    network: DenoiserSettings,
    settings: PretrainSettings,
    seed: int,
    state: Path,
    save_every: float = 30.0,
    start: Denoiser | None = None,
) -> tuple[Denoiser, list[dict[str, float]]]:
    """Train a denoiser on public latents; resumes from `state`, which it writes every 30 s.

    start: changed in place; without it, training starts from a fresh denoiser.

    Returns:
        The exponential moving average of the denoiser, and the losses by step.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "private patients through weights that were trained with no noise")
    torch.manual_seed(seed)
    model = start or network.build(latents.shape[1])
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam(model.parameters(), settings.learning_rate)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, max(settings.steps, 2), pct_start=0.1)
    noising, attributes = schedule(network.schedule), torch.from_numpy(patients.attributes)
    losses: list[dict[str, float]] = []
    if saved := load_state(state):
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        rate.load_state_dict(saved["rate"])
        average, losses = saved["average"], saved["losses"]

    written = time.monotonic()
    with tqdm(total=settings.steps, initial=len(losses), desc="pretrain", unit="step") as bar:
        for step in range(len(losses), settings.steps):
            rng = np.random.default_rng([seed, step])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            chosen = rng.integers(len(latents), size=settings.batch)
            given = drop_attributes(attributes[chosen], settings.attribute_dropout, generator)
            rows = torch.from_numpy(latents[chosen])
            loss = random_loss(model, noising, rows, given, generator, min_snr=settings.min_snr).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            rate.step()
            update_average(average, dict(model.named_parameters()), step, settings.average_decay)
            losses.append({"step": step, "loss": loss.item()})
            bar.set_postfix(loss=f"{np.mean([row['loss'] for row in losses[-20:]]):.4f}", refresh=False)
            bar.update()
            if time.monotonic() - written > save_every:
                save_state(
                    state,
                    model=model.state_dict(),
                    optimiser=optimiser.state_dict(),
                    rate=rate.state_dict(),
                    average=average,
                    losses=losses,
                )
                written = time.monotonic()
    model.load_state_dict(average)
    return model.eval(), losses


def random_loss(
    model: Denoiser,
    noising: torch.nn.Module,
    latents: Tensor,
    attributes: Tensor,
    generator: torch.Generator,
    bands: Sequence[tuple[int, int, float]] = ((0, TIMESTEPS, 1.0),),
    min_snr: float | None = None,
) -> Tensor:
    """Diffusion loss (b,) of latents (b, c, d, h, w) at one random timestep and noise a row, weighed if `min_snr`."""
    timesteps, noise = random_draws(latents, generator, bands)
    loss = diffusion_loss(model, noising, latents, attributes, timesteps, noise)
    return loss if min_snr is None else loss * min_snr_weight(noising, timesteps, min_snr)


def random_draws(
    latents: Tensor, generator: torch.Generator, bands: Sequence[tuple[int, int, float]]
) -> tuple[Tensor, Tensor]:
    """A timestep (b,) and noise (b, c, d, h, w) for each row of latents, on their device.

    Timesteps are uniform in [low, high) of a band (low, high, weight), chosen by weight.
    """
    lows, highs, weights = torch.tensor(bands).T
    chosen = torch.multinomial(weights, len(latents), replacement=True, generator=generator)
    within = torch.rand(len(latents), generator=generator) * (highs - lows)[chosen]
    timesteps = (lows[chosen].long() + within.long()).to(latents.device)
    return timesteps, torch.randn(latents.shape, generator=generator).to(latents.device)


@torch.no_grad()
def held_out_loss(
    model: Denoiser, name: ScheduleName, latents: np.ndarray | Latents, patients: Patients, draws: int = 8
) -> np.ndarray:
    """Mean denoising loss of each patient (n_patients,) over their volumes and `draws` fixed timesteps and noises.

    The timesteps are spread evenly and the noise is the same for every model, so that models compare in pairs.

    Raises:
        PrivacyError: the patients are real and private.
    """
    require_releasable(patients, "exact losses of private patients")
    noising, total = schedule(name), np.zeros(len(latents))
    attributes = torch.from_numpy(patients.attributes)
    for draw in tqdm(range(draws), desc="held-out loss"):
        generator = torch.Generator().manual_seed(draw)
        step = int((draw + 0.5) * TIMESTEPS / draws)
        for rows in torch.arange(len(latents)).split(16):
            batch = torch.from_numpy(latents[rows.numpy()])
            noise = torch.randn(batch.shape, generator=generator)
            loss = diffusion_loss(model, noising, batch, attributes[rows], torch.full((len(rows),), step), noise)
            total[rows.numpy()] += loss.numpy() / draws
    return np.bincount(patients.owners, total) / np.bincount(patients.owners)
