"""Train an autoencoder, KL or VQ, on public patients, and measure the scale of its latents on them.

Information comes first: encoder and decoder learn what is where. Then, where the settings say so, texture: the decoder
alone learns to draw what no latent holds, from noise and against a critic. The latents are the same after as before.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from monai.losses import DiceCELoss, PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from cardiac_ldm.cohort import Patients, require_public
from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.anatomy import Segmenter
from cardiac_ldm.models.autoencoder import Autoencoder, VQAutoencoder
from cardiac_ldm.models.device import compute_device, device_of, own_share
from cardiac_ldm.models.perception import Critic, PerceptionEncoder
from cardiac_ldm.progress import tqdm
from cardiac_ldm.settings import Count, Positive, PublicTraining, Settings, Weight
from cardiac_ldm.training.anatomy import train_segmenter
from cardiac_ldm.training.fit import Loss, Recipe, drawn_at, fit, total

_MOVES = 9
"""Places at which the texture's window may start, along each axis."""


class KLRegularisation(Settings):
    """Latents are drawn to the standard normal; `weight` is that of the KL divergence."""

    kind: Literal["kl"]
    weight: Weight


class VQRegularisation(Settings):
    """The decoder sees the nearest of `codes` codes; `weight` is that of the latents' commitment to their codes."""

    kind: Literal["vq"]
    codes: int = Field(ge=2)
    weight: Weight


class TextureSettings(Settings):
    """Training of the decoder alone; weights are relative to the L1 term, which sees slices blurred to 4 pixels."""

    steps: Count
    learning_rate: Positive
    perceptual: Weight
    adversarial: Weight


class HeartSettings(Settings):
    """How much more the heart counts than what lies round it; learnt from the labels of public patients.

    emphasis: how many times more the L1 terms weigh within 7 mm of the heart. labels: weight of the Dice and
    cross-entropy of the decoder's own labels. guide: weight of those of what a segmenter sees in the drawn slices;
    guide_steps: length of its training; none is trained for a weight of 0.
    """

    emphasis: float = Field(ge=1)
    labels: Weight
    guide: Weight
    guide_steps: int = Field(ge=0)


class AutoencoderSettings(PublicTraining):
    """Architecture and training of the autoencoder; weights of the loss are relative to the L1 term.

    adversarial: of a critic of pixels in the first stage, as in the paper. heart: what labels teach, in both stages, or
    nothing. texture: the second stage, whose decoder draws from noise, or nothing.
    """

    latent_channels: Count
    channels: tuple[int, ...]
    residual_blocks: int = Field(ge=0)
    stem: Count
    steps: Count
    volumes: Count
    slices: Count
    learning_rate: Positive
    l2: Weight
    regularisation: Annotated[KLRegularisation | VQRegularisation, Field(discriminator="kind")]
    perceptual: Weight
    adversarial: Weight
    heart: HeartSettings | None
    texture: TextureSettings | None

    def build(self) -> Autoencoder:
        """A fresh autoencoder of the kind that `regularisation` names."""
        size = self.latent_channels, self.channels, self.residual_blocks, self.stem
        extras = self.texture is not None, self.heart is not None
        if isinstance(self.regularisation, VQRegularisation):
            return VQAutoencoder(*size, *extras, self.regularisation.codes)
        return Autoencoder(*size, *extras)


@dataclass(frozen=True)
class _Batch:
    """This process's share of the slices (b, 1, 96, 96) of a step, their labels, and what the step draws from."""

    slices: Tensor
    labels: Tensor
    size: int
    generator: torch.Generator

    @classmethod
    def draw(cls, patients: Patients, settings: AutoencoderSettings, seed: int, step: int) -> "_Batch":
        """Those of one step, for all processes alike."""
        rng, generator = drawn_at(seed, step)
        drawn = _random_slices(patients, settings.volumes, settings.slices, rng)
        size, device = len(drawn[0]), compute_device()
        slices, labels = (part[own_share(size)].to(device) for part in drawn)
        return cls(slices, labels, size, generator)

    def noise(self, *shape: int) -> Tensor:
        """White noise (b, *shape), the next that is drawn."""
        return torch.randn(self.size, *shape, generator=self.generator)[own_share(self.size)].to(self.slices.device)


def train_autoencoder(
    patients: Patients, settings: AutoencoderSettings, seed: int, state: Path
) -> tuple[Autoencoder, list[dict[str, float]]]:
    """Train on `slices` slices of `volumes` random volumes a step; resumes from `state` and what it leaves beside it.

    Returns:
        The trained autoencoder with the latent scale set, and the losses by step.

    Raises:
        PrivacyError: the patients are private.
    """
    require_public(patients, "private patients through the autoencoder's weights and the scale of its latents")
    torch.manual_seed(seed)
    model, perception = settings.build(), PerceptionEncoder().to(compute_device())
    heart = _Heart(settings.heart, patients, seed, state.with_stem(f"{state.stem}-guide")) if settings.heart else None
    adam = partial(torch.optim.Adam, betas=(0.9, 0.99))
    recipe = Recipe(settings.steps, settings.learning_rate, adam, precision=settings.precision)
    loss, critic = _information(model, settings, perception, heart)
    losses = fit(
        model,
        lambda step: loss(_Batch.draw(patients, settings, seed, step)),
        recipe,
        "autoencoder",
        critic=critic if settings.adversarial else None,
        state=state,
    )
    _set_latent_scale(model, patients, np.random.default_rng([seed, settings.steps]))
    if texture := settings.texture:
        loss, critic = _texture(model, texture, perception, heart)
        losses += fit(
            model,
            lambda step: loss(_Batch.draw(patients, settings, seed, step)),
            replace(recipe, steps=texture.steps, learning_rate=texture.learning_rate),
            "texture",
            learns=[*model.decoder_parameters().values(), *(model.anatomy.parameters() if model.anatomy else ())],
            critic=critic,
            first=settings.steps,
            state=state.with_stem(f"{state.stem}-texture"),
        )
    return model, losses


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
        Segmenter()  # draws from the stream that builds the critics, as it did for the weights that are published
        # Another seed than the judge's: it starts elsewhere and sees other volumes.
        steps = settings.guide_steps
        guide, _ = train_segmenter(patients, steps=steps, batch=4, learning_rate=5e-3, seed=seed + 1, state=path)
        self.guide = guide.requires_grad_(False)

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
            found["guide"] = self.settings.guide * self.dice(self.guide(drawn)[:, :, 0].float(), labels)
        return found


def _weighed_l1(drawn: Tensor, real: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return functional.l1_loss(drawn, real)
    return (weights * (drawn - real).abs()).mean()


def _information(
    model: Autoencoder, settings: AutoencoderSettings, perception: PerceptionEncoder, heart: _Heart | None
) -> tuple[Callable[[_Batch], Loss], nn.Module]:
    """The first stage: everything learns to reproduce what was there; its loss, and its critic."""
    critic = PatchDiscriminator(spatial_dims=2, channels=32, in_channels=1, num_layers_d=3)
    judge = PatchAdversarialLoss(criterion="least_squares")

    def loss(batch: _Batch) -> Loss:
        slices, labels = batch.slices, batch.labels
        side = slices.shape[-1] // model.reduction
        seen, penalty = model.training_pass(slices, batch.noise(model.latent_channels, side, side))
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
            return Loss(found)
        critic.requires_grad_(False)
        found["adversarial"] = settings.adversarial * judge(critic(drawn)[-1], True, for_discriminator=False)
        critic.requires_grad_(True)

        def of_critic() -> Tensor:
            real, fake = critic(slices)[-1], critic(drawn.detach())[-1]
            return 0.5 * (judge(real, True, for_discriminator=True) + judge(fake, False, for_discriminator=True))

        return Loss(found, of_critic)

    return loss, critic


def _texture(
    model: Autoencoder, settings: TextureSettings, perception: PerceptionEncoder, heart: _Heart | None
) -> tuple[Callable[[_Batch], Loss], nn.Module]:
    """The second stage: the decoder learns to draw from noise what the latents don't hold (hinge loss)."""
    critic = Critic()

    def loss(batch: _Batch) -> Loss:
        slices, labels = batch.slices, batch.labels
        with torch.no_grad():
            latents, std = model.moments(slices)
        if not isinstance(model, VQAutoencoder):
            latents = latents + std * batch.noise(*latents.shape[1:])
        drawn, logits = model.render(model.seen(latents), batch.noise(*slices.shape[1:]))
        of_heart = heart.terms(drawn, logits, labels) if heart else {}
        weights = heart.weights(labels) if heart else None
        # A window that moves: the strides of the encoder would else leave their grid in the texture.
        top, left = torch.randint(_MOVES, (2,), generator=batch.generator).tolist()
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
            "texture adversarial": -settings.adversarial * total(score.mean() for score in critic(drawn, fake)),
            **of_heart,
        }
        critic.requires_grad_(True)

        def of_critic() -> Tensor:
            on_real = critic(slices, real)
            on_fake = critic(drawn.detach(), [seen.detach() for seen in fake])
            pairs = zip(on_real, on_fake, strict=True)
            return total(functional.relu(1 - a).mean() + functional.relu(1 + b).mean() for a, b in pairs)

        return Loss(found, of_critic)

    return loss, critic


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
    return total(((a - b).square().sum(dim=1) + 1e-8).sqrt().mean() for a, b in zip(*unit, strict=True))


def _random_slices(patients: Patients, volumes: int, slices: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random slices of `volumes` random volumes and their labels, both (slices, 1, 96, 96).

    Of the empty ones, which all look alike, there is one at most.
    """
    chosen = rng.choice(len(patients.patient_index), min(volumes, len(patients.patient_index)), replace=False)
    stack = rearrange(patients.images(chosen), "v d h w -> (v d) 1 h w")
    labels = rearrange(patients.labels(chosen), "v d h w -> (v d) 1 h w")
    filled = stack.any(axis=(1, 2, 3))
    allowed = np.concatenate([np.flatnonzero(filled), np.flatnonzero(~filled)[:1]])
    rows = allowed[rng.choice(len(allowed), min(slices, len(allowed)), replace=False)]
    return torch.from_numpy(stack[rows]), torch.from_numpy(labels[rows])


@torch.no_grad()
def _set_latent_scale(model: Autoencoder, patients: Patients, rng: np.random.Generator) -> None:
    """Standardise latents by the mean and deviation of each channel over 64 public volumes."""
    chosen = rng.choice(len(patients.patient_index), min(64, len(patients.patient_index)), replace=False)
    latents = model.encode(torch.from_numpy(patients.images(chosen)).to(device_of(model)))
    model.latent_std.copy_(latents.std(dim=(0, 2, 3, 4)))
    model.latent_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))


@torch.no_grad()
def reconstruct(model: Autoencoder, images: np.ndarray, seed: int) -> np.ndarray:
    """What is left of float32 volumes (n, 13, 96, 96) after encoding and decoding; `seed` draws their texture.

    Slices beyond a patient's stack are all zero in a prepared volume, and stay so, as in synthetic cohorts: otherwise
    the segmenter reads hearts out of what the decoder makes of padding.
    """
    device, generator, drawn = device_of(model), torch.Generator().manual_seed(seed), []
    for batch in tqdm(torch.from_numpy(images).split(8), desc="reconstruct"):
        noise = torch.randn(batch.shape, generator=generator).to(device)
        drawn.append(model.decode(model.encode(batch.to(device)), noise).cpu().numpy())
    found = np.concatenate(drawn)
    found[~images.any(axis=(2, 3))] = 0
    return found
