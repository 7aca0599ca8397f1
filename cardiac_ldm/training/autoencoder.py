"""Train an autoencoder, KL or VQ, on public patients, and measure the scale of its latents on them.

Information comes first: encoder and decoder learn what is where. Then, where the settings say so, texture: the decoder
alone learns to draw what no latent holds, from noise and against a critic. The latents are the same after as before.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from einops import rearrange
from monai.losses import DiceCELoss, PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from cardiac_ldm.cohort import Patients, require_public
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.anatomy import Segmenter
from cardiac_ldm.models.autoencoder import Autoencoder, VQAutoencoder
from cardiac_ldm.models.perception import Critic, PerceptionEncoder
from cardiac_ldm.progress import tqdm
from cardiac_ldm.training.anatomy import train_segmenter
from cardiac_ldm.training.checkpoint import load_state, save_state

_MOVES = 9
"""Places at which the texture's window may start, along each axis."""


class KLRegularisation(BaseModel):
    """Latents are drawn to the standard normal; `weight` is that of the KL divergence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["kl"]
    weight: float = Field(ge=0)


class VQRegularisation(BaseModel):
    """The decoder sees the nearest of `codes` codes; `weight` is that of the latents' commitment to their codes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["vq"]
    codes: int = Field(ge=2)
    weight: float = Field(ge=0)


class TextureSettings(BaseModel):
    """Training of the decoder alone; weights are relative to the L1 term, which sees slices blurred to 4 pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    perceptual: float = Field(ge=0, allow_inf_nan=False)
    adversarial: float = Field(ge=0, allow_inf_nan=False)


class HeartSettings(BaseModel):
    """How much more the heart counts than what lies round it; learnt from the labels of public patients.

    emphasis: how many times more the L1 terms weigh within 7 mm of the heart. labels: weight of the Dice and
    cross-entropy of the decoder's own labels. guide: weight of those of what a segmenter sees in the drawn slices;
    guide_steps: length of its training; none is trained for a weight of 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    emphasis: float = Field(ge=1)
    labels: float = Field(ge=0)
    guide: float = Field(ge=0)
    guide_steps: int = Field(ge=0)


class AutoencoderSettings(BaseModel):
    """Architecture and training of the autoencoder; weights of the loss are relative to the L1 term.

    adversarial: of a critic of pixels in the first stage, as in the paper. heart: what labels teach, in both stages, or
    nothing. texture: the second stage, whose decoder draws from noise, or nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    latent_channels: int = Field(ge=1)
    channels: tuple[int, ...]
    residual_blocks: int = Field(ge=0)
    stem: int = Field(ge=1)
    steps: int = Field(ge=1)
    volumes: int = Field(ge=1)
    slices: int = Field(ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    l2: float = Field(ge=0, allow_inf_nan=False)
    regularisation: Annotated[KLRegularisation | VQRegularisation, Field(discriminator="kind")]
    perceptual: float = Field(ge=0, allow_inf_nan=False)
    adversarial: float = Field(ge=0, allow_inf_nan=False)
    heart: HeartSettings | None
    texture: TextureSettings | None

    def build(self) -> Autoencoder:
        """A fresh autoencoder of the kind that `regularisation` names."""
        size = self.latent_channels, self.channels, self.residual_blocks, self.stem
        extras = self.texture is not None, self.heart is not None
        if isinstance(self.regularisation, VQRegularisation):
            return VQAutoencoder(*size, *extras, self.regularisation.codes)
        return Autoencoder(*size, *extras)


@dataclass
class _Stage:
    """What learns, by which terms of the loss, against which critic.

    terms: slices, their labels, generator -> the terms, and what gives the critic's own loss afterwards.
    """

    name: str
    steps: int
    learning_rate: float
    parameters: Iterable[nn.Parameter]
    terms: Callable[[Tensor, Tensor, torch.Generator], tuple[dict[str, Tensor], Callable[[], Tensor] | None]]
    critic: nn.Module


def train_autoencoder(
    patients: Patients, settings: AutoencoderSettings, seed: int, state: Path, save_every: float = 30.0
) -> tuple[Autoencoder, list[dict[str, float]]]:
    """Train on `slices` slices of `volumes` random volumes a step; resumes from `state`, which it writes every 30 s.

    Returns:
        The trained autoencoder with the latent scale set, and the losses by step.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "private patients through the autoencoder's weights and the scale of its latents")
    torch.manual_seed(seed)
    model, perception = settings.build(), PerceptionEncoder()
    losses: list[dict[str, float]] = []
    heart = _Heart(settings.heart, patients, seed, state.with_name("guide.pt")) if settings.heart else None
    _descend(
        model, _information(model, settings, perception, heart), 0, patients, settings, seed, state, losses, save_every
    )
    _set_latent_scale(model.eval(), patients, np.random.default_rng([seed, settings.steps]))
    if settings.texture:
        stage = _texture(model.train(), settings.texture, perception, heart)
        _descend(model, stage, settings.steps, patients, settings, seed, state, losses, save_every)
    return model.eval(), losses


class _Heart:
    """What the labels of public patients teach; a guide, who is not the judge of the evaluation, reads what was drawn.

    The guide is trained once and kept at `path` until the autoencoder is done.
    """

    def __init__(self, settings: HeartSettings, patients: Patients, seed: int, path: Path) -> None:
        if not patients.labelled.all():
            raise ParameterError(
                f"autoencoder.heart: {np.count_nonzero(~patients.labelled)} patients of {patients.name} have no labels "
                "to learn from; set it to null in the profile"
            )
        self.settings, self.dice = settings, DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        self.guide: Segmenter | None = None
        if settings.guide == 0:
            return
        guide, saved = Segmenter(), load_state(path)
        if saved is None:
            # Another seed than the judge's: it starts elsewhere and sees other volumes.
            steps = settings.guide_steps
            trained, _ = train_segmenter(patients, steps=steps, batch=4, learning_rate=5e-3, seed=seed + 1)
            saved = {"guide": trained.state_dict()}
            save_state(path, **saved)
        guide.load_state_dict(saved["guide"])
        self.guide = guide.eval().requires_grad_(False)

    def weights(self, labels: Tensor) -> Tensor:
        """Of each pixel in the L1 terms, with mean 1: `emphasis` within 7 mm of the heart, one elsewhere."""
        near = functional.max_pool2d((labels > 0).float(), 9, stride=1, padding=4)
        weights = 1 + (self.settings.emphasis - 1) * near
        return weights / weights.mean()

    def terms(self, drawn: Tensor, logits: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """What the decoder's labels lack and what the guide misses in drawn slices (n, 1, h, w) of labels so shaped."""
        assert logits is not None
        found = {"labels": self.settings.labels * self.dice(logits, labels)}
        if self.guide:
            found["guide"] = self.settings.guide * self.dice(self.guide(drawn)[:, :, 0], labels)
        return found


def _weighed_l1(drawn: Tensor, real: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return functional.l1_loss(drawn, real)
    return (weights * (drawn - real).abs()).mean()


def _information(
    model: Autoencoder, settings: AutoencoderSettings, perception: PerceptionEncoder, heart: _Heart | None
) -> _Stage:
    """The first stage: everything learns to reproduce what was there."""
    critic = PatchDiscriminator(spatial_dims=2, channels=32, in_channels=1, num_layers_d=3)
    judge = PatchAdversarialLoss(criterion="least_squares")

    def terms(
        slices: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Callable[[], Tensor] | None]:
        seen, penalty = model.training_pass(slices, generator)
        drawn, logits = model.render(seen)
        found = {
            "l1": _weighed_l1(drawn, slices, heart.weights(labels) if heart else None),
            "l2": settings.l2 * functional.mse_loss(drawn, slices),
            settings.regularisation.kind: settings.regularisation.weight * penalty,
        }
        if settings.perceptual:
            with torch.no_grad():
                real = perception.perceptual_features(slices)
            found["perceptual"] = settings.perceptual * _unlikeness(perception.perceptual_features(drawn), real)
        if heart:
            found |= heart.terms(drawn, logits, labels)
        if not settings.adversarial:
            return found, None
        critic.requires_grad_(False)
        found["adversarial"] = settings.adversarial * judge(critic(drawn)[-1], True, for_discriminator=False)
        critic.requires_grad_(True)

        def of_critic() -> Tensor:
            real, fake = critic(slices)[-1], critic(drawn.detach())[-1]
            return 0.5 * (judge(real, True, for_discriminator=True) + judge(fake, False, for_discriminator=True))

        return found, of_critic

    return _Stage("autoencoder", settings.steps, settings.learning_rate, model.parameters(), terms, critic)


def _texture(
    model: Autoencoder, settings: TextureSettings, perception: PerceptionEncoder, heart: _Heart | None
) -> _Stage:
    """The second stage: the decoder learns to draw from noise what the latents don't hold (hinge loss)."""
    critic = Critic()

    def terms(
        slices: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Callable[[], Tensor] | None]:
        with torch.no_grad():
            mean, std = model.moments(slices)
        latents = mean if isinstance(model, VQAutoencoder) else torch.normal(mean, std, generator=generator)
        drawn, logits = model.render(model.seen(latents), torch.randn(slices.shape, generator=generator))
        of_heart = heart.terms(drawn, logits, labels) if heart else {}
        weights = heart.weights(labels) if heart else None
        # A window that moves: the strides of the encoder would else leave their grid in the texture.
        top, left = torch.randint(_MOVES, (2,), generator=generator).tolist()
        size = slices.shape[-1] - _MOVES + 1
        window = np.s_[..., top : top + size, left : left + size]
        drawn, slices, weights = drawn[window], slices[window], None if weights is None else weights[window]
        with torch.no_grad():
            real = perception.perceptual_features(slices)
        fake = perception.perceptual_features(drawn)
        critic.requires_grad_(False)
        found = {
            "blurred l1": blurred_l1(drawn, slices, weights),
            "texture perceptual": settings.perceptual * _unlikeness(fake[-2:], real[-2:]),
            "texture adversarial": -settings.adversarial * _total(score.mean() for score in critic(drawn, fake)),
            **of_heart,
        }
        critic.requires_grad_(True)

        def of_critic() -> Tensor:
            on_real = critic(slices, real)
            on_fake = critic(drawn.detach(), [seen.detach() for seen in fake])
            pairs = zip(on_real, on_fake, strict=True)
            return _total(functional.relu(1 - a).mean() + functional.relu(1 + b).mean() for a, b in pairs)

        return found, of_critic

    learns = [*model.decoder_parameters().values(), *(model.anatomy.parameters() if model.anatomy else ())]
    return _Stage("texture", settings.steps, settings.learning_rate, learns, terms, critic)


def blurred_l1(drawn: Tensor, real: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean absolute difference of images (n, c, h, w) blurred to 4 pixels: says nothing of their texture.

    weights: of the pixels, of the same shape; None for 1.
    """
    drawn, real = (functional.avg_pool2d(x, 4, stride=2) for x in (drawn, real))
    return _weighed_l1(drawn, real, None if weights is None else functional.avg_pool2d(weights, 4, stride=2))


def _unlikeness(drawn: list[Tensor], real: list[Tensor]) -> Tensor:
    """Mean distance of the directions of features, position by position, summed over maps: all maps weigh alike.

    After LPIPS (Zhang et al., arXiv 1801.03924), the distance itself in place of its square.
    """
    unit = [[functional.normalize(seen, dim=1) for seen in maps] for maps in (drawn, real)]
    return _total(((a - b).square().sum(dim=1) + 1e-8).sqrt().mean() for a, b in zip(*unit, strict=True))


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _descend(
    model: Autoencoder,
    stage: _Stage,
    first: int,
    patients: Patients,
    settings: AutoencoderSettings,
    seed: int,
    state: Path,
    losses: list[dict[str, float]],
    save_every: float,
) -> None:
    """Take a stage's steps, of which the first is number `first`; adds to `losses`."""
    parameters = list(stage.parameters)
    optimiser = torch.optim.Adam(parameters, stage.learning_rate, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, stage.learning_rate, max(stage.steps, 2), pct_start=0.1)
    of_critic = torch.optim.Adam(stage.critic.parameters(), stage.learning_rate, betas=(0.0, 0.99))
    parts: dict[str, Any] = {
        "model": model,
        "optimiser": optimiser,
        "rate": rate,
        "critic": stage.critic,
        "of_critic": of_critic,
    }
    if saved := load_state(state):
        if saved["first"] > first:
            return
        if saved["first"] == first:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            losses[:] = saved["losses"]

    written, done = time.monotonic(), len(losses) - first
    with tqdm(total=stage.steps, initial=done, desc=stage.name, unit="step") as bar:
        for step in range(first + done, first + stage.steps):
            rng = np.random.default_rng([seed, step])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            slices, labels = _random_slices(patients, settings.volumes, settings.slices, rng)
            terms, critics_loss = stage.terms(slices, labels, generator)
            optimiser.zero_grad()
            _total(terms.values()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            rate.step()
            if critics_loss:
                of_critic.zero_grad()
                critics_loss().backward()
                of_critic.step()
            losses.append({"step": step} | {name: term.item() for name, term in terms.items()})
            bar.set_postfix({n: f"{value:.4f}" for n, value in list(losses[-1].items())[1:2]}, refresh=False)
            bar.update()
            if time.monotonic() - written > save_every:
                saved_parts = {name: part.state_dict() for name, part in parts.items()}
                save_state(state, first=first, losses=losses, **saved_parts)
                written = time.monotonic()


def _random_slices(patients: Patients, volumes: int, slices: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random slices of `volumes` random volumes and their labels, both (slices, 1, 96, 96).

    Of the empty ones, which all look alike, there is one at most.
    """
    chosen = rng.choice(len(patients.owners), min(volumes, len(patients.owners)), replace=False)
    stack = rearrange(patients.images(chosen), "v d h w -> (v d) 1 h w")
    labels = rearrange(patients.labels(chosen), "v d h w -> (v d) 1 h w")
    filled = stack.any(axis=(1, 2, 3))
    allowed = np.concatenate([np.flatnonzero(filled), np.flatnonzero(~filled)[:1]])
    rows = allowed[rng.choice(len(allowed), min(slices, len(allowed)), replace=False)]
    return torch.from_numpy(stack[rows]), torch.from_numpy(labels[rows])


@torch.no_grad()
def _set_latent_scale(model: Autoencoder, patients: Patients, rng: np.random.Generator) -> None:
    """Standardise latents by the mean and deviation of each channel over 64 public volumes."""
    chosen = rng.choice(len(patients.owners), min(64, len(patients.owners)), replace=False)
    latents = model.encode(torch.from_numpy(patients.images(chosen)))
    model.latent_std.copy_(latents.std(dim=(0, 2, 3, 4)))
    model.latent_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))


@torch.no_grad()
def reconstruct(model: Autoencoder, images: np.ndarray, seed: int) -> np.ndarray:
    """What is left of float32 volumes (n, 13, 96, 96) after encoding and decoding; `seed` draws their texture.

    Slices beyond a patient's stack are all zero in a prepared volume, and stay so, as in synthetic cohorts: otherwise
    instruments read hearts out of what the decoder makes of padding.
    """
    batches, generator = torch.from_numpy(images).split(8), torch.Generator().manual_seed(seed)
    drawn = torch.cat(
        [
            model.decode(model.encode(batch), torch.randn(batch.shape, generator=generator))
            for batch in tqdm(batches, desc="reconstruct")
        ]
    ).numpy()
    drawn[~images.any(axis=(2, 3))] = 0
    return drawn
