"""Networks at depth 13 and any other, the attribute path, and the diffusion arithmetic."""

import pytest
import torch
from torch import Tensor, nn

from cardiac_ldm.models.autoencoder import Autoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.diffusion import (
    TIMESTEPS,
    ScheduleName,
    diffusion_loss,
    drop_attributes,
    sample_ddim,
    sample_ddpm,
    schedule,
)

RANGE = torch.stack([torch.zeros(14), torch.full((14,), 10.0)])


def small_denoiser(depth: int = 13) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(2, (8, 16), (False, True), 1, 2, 16, depth, RANGE)
    for parameter in model.parameters():  # what starts at zero would hide the paths behind it
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("depth", [1, 12, 13])
@pytest.mark.parametrize("channels", [(8, 16), (8, 8, 16)])
def test_the_denoiser_keeps_the_shape_at_any_depth(depth: int, channels: tuple[int, ...]) -> None:
    model = Denoiser(2, channels, (False,) + (True,) * (len(channels) - 1), 2, 2, 16, depth, RANGE)
    x = torch.randn(2, 2, depth, 12, 12)
    assert model(x, torch.tensor([0, 149]), torch.rand(2, 14)).shape == x.shape


def test_the_denoiser_sees_across_depth_and_within_the_slice() -> None:
    model, x = small_denoiser(), torch.randn(1, 2, 13, 8, 8)
    touched = x.clone()
    touched[0, 0, 0, 0, 0] += 5
    change = (
        model(touched, torch.tensor([5]), torch.rand(1, 14, generator=torch.Generator().manual_seed(0)))
        - model(x, torch.tensor([5]), torch.rand(1, 14, generator=torch.Generator().manual_seed(0)))
    ).abs()
    assert change[0, :, 12].max() > 0
    assert change[0, :, 0, 7, 7].max() > 0


def test_rows_of_a_batch_never_mix() -> None:
    model, x = small_denoiser().train(), torch.randn(3, 2, 13, 8, 8)
    t, attributes = torch.tensor([3, 50, 140]), 10 * torch.rand(3, 14)
    together = model(x, t, attributes)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], attributes[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def test_every_attribute_matters_and_may_be_missing() -> None:
    model, x = small_denoiser(), torch.randn(1, 2, 13, 8, 8)
    attributes = torch.full((1, 14), 5.0)
    base = model(x, torch.tensor([5]), attributes)
    for i in range(14):
        for value in (9.0, torch.nan):
            changed = attributes.clone()
            changed[0, i] = value
            output = model(x, torch.tensor([5]), changed)
            assert output.isfinite().all()
            assert not torch.allclose(output, base, atol=1e-6)


def test_tuning_attention_leaves_convolutions_alone() -> None:
    model = small_denoiser()
    attention, everything = model.tunable("attention"), model.tunable("all")
    assert len(everything) == len(list(model.parameters()))
    assert any(".attention." in name for name in attention)
    assert any(name.startswith("attributes.") for name in attention)
    assert not any("stem" in name or ".block." in name for name in attention)


@pytest.mark.parametrize(("channels", "stem", "reduction"), [((16, 16), 1, 2), ((16, 16, 16), 2, 8)])
def test_the_autoencoder_keeps_all_slices(channels: tuple[int, ...], stem: int, reduction: int) -> None:
    model = Autoencoder(3, channels, 1, stem)
    volumes = torch.rand(2, 13, 96, 96)
    latents = model.encode(volumes)
    assert model.reduction == reduction
    assert latents.shape == (2, 3, 13, 96 // reduction, 96 // reduction)
    decoded = model.decode(latents)
    assert decoded.shape == volumes.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


def test_latents_are_standardised_and_back() -> None:
    model = Autoencoder(2, (16, 16), 1, 1).eval()
    volumes = torch.rand(1, 13, 32, 32)
    before = model.decode(model.encode(volumes))
    model.latent_mean.copy_(torch.tensor([3.0, -1.0]))
    model.latent_std.copy_(torch.tensor([0.5, 7.0]))
    assert torch.allclose(model.decode(model.encode(volumes)), before, atol=1e-5)


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_schedules_go_from_data_to_noise(name: ScheduleName) -> None:
    alphas = schedule(name).alphas_cumprod
    assert len(alphas) == TIMESTEPS == 150
    assert (alphas.diff() < 0).all()
    assert alphas[0] > 0.99
    assert alphas[-1] < 0.01
    if name == "paper":
        assert schedule(name).betas[[0, -1]].tolist() == pytest.approx([1e-4, 7e-2])


class Oracle(nn.Module):
    """Knows the one volume there is, and predicts exactly what leads to it."""

    def __init__(self, truth: Tensor, name: ScheduleName) -> None:
        super().__init__()
        self.truth, self.name, self.alphas = truth, name, schedule(name).alphas_cumprod

    def forward(self, x: Tensor, t: Tensor, attributes: Tensor) -> Tensor:
        alpha = self.alphas[t].view(-1, 1, 1, 1, 1)
        noise = (x - alpha.sqrt() * self.truth) / (1 - alpha).sqrt()
        return noise if self.name == "paper" else alpha.sqrt() * noise - (1 - alpha).sqrt() * self.truth


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_a_perfect_model_has_no_loss_and_samples_the_truth(name: ScheduleName) -> None:
    truth = torch.randn(1, 2, 3, 4, 4)
    oracle, generator = Oracle(truth, name), torch.Generator().manual_seed(0)
    noise, attributes = torch.randn(5, 2, 3, 4, 4, generator=generator), torch.zeros(5, 14)
    t = torch.tensor([0, 1, 40, 100, 149])
    loss = diffusion_loss(oracle, schedule(name), truth.expand(5, -1, -1, -1, -1), attributes, t, noise)
    assert loss.shape == (5,)
    assert loss.max() < 1e-6
    for guidance in (0.0, 2.0):
        assert torch.allclose(sample_ddim(oracle, name, noise, attributes, guidance, 15), truth, atol=1e-2)
        sampled = sample_ddpm(oracle, name, noise, attributes, guidance, generator)
        assert torch.allclose(sampled, truth, atol=0.1)


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    class Conditional(nn.Module):
        def forward(self, x: Tensor, t: Tensor, attributes: Tensor) -> Tensor:
            known = attributes[:, 0].isfinite().view(-1, 1, 1, 1, 1)
            return torch.where(known, 3.0, 1.0).expand_as(x)

    from cardiac_ldm.models.diffusion import _guided

    x = torch.zeros(2, 1, 1, 2, 2)
    assert (_guided(Conditional(), x, torch.zeros(2), torch.zeros(2, 14), 2.0) == 3 * 3.0 - 2 * 1.0).all()


def test_dropping_attributes_hides_whole_rows() -> None:
    dropped = drop_attributes(torch.ones(4000, 14), 0.1, torch.Generator().manual_seed(0)).isnan()
    assert (dropped.all(1) == dropped.any(1)).all()
    assert dropped.any(1).float().mean() == pytest.approx(0.1, abs=0.02)
