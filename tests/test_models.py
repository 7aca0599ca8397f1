"""Networks at depth 13 and any other, the attribute path, texture, the diffusion arithmetic, and what is drawn."""

import math
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from benchmarks.sampling import sample_ddpm, sample_dpm_solver
from cardiac_ldm.cohort import ATTRIBUTE_NAMES
from cardiac_ldm.evaluation.synthesis import synthesise
from cardiac_ldm.models.autoencoder import Autoencoder, VQAutoencoder
from cardiac_ldm.models.denoiser import Denoiser
from cardiac_ldm.models.diffusion import (
    TIMESTEPS,
    Diffusion,
    Sampler,
    ScheduleName,
    drop_attributes,
    sample_ddim,
)

RANGE = torch.stack([torch.zeros(14), torch.full((14,), 10.0)])


def small_denoiser(depth: int = 13) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(2, 1, (8, 16), (False, True), 1, 2, 16, 2, depth, RANGE, "modern")
    for parameter in model.parameters():  # what starts at zero would hide the paths behind it
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("depth", [1, 12, 13])
@pytest.mark.parametrize("channels", [(8, 16), (8, 8, 16)])
def test_the_denoiser_keeps_the_shape_at_any_depth(depth: int, channels: tuple[int, ...]) -> None:
    model = Denoiser(2, 1, channels, (False,) + (True,) * (len(channels) - 1), 2, 2, 16, 2, depth, RANGE, "paper")
    x = torch.randn(2, 2, depth, 12, 12)
    assert model(x, torch.tensor([0, 149]), torch.rand(2, 14)).shape == x.shape


def test_patches_of_a_latent_are_channels_of_a_smaller_one() -> None:
    torch.manual_seed(0)
    sizes: tuple[Any, ...] = ((8, 16), (False, True), 1, 2, 16, 2, 3, RANGE, "modern")
    whole, patched = Denoiser(8, 1, *sizes), Denoiser(2, 2, *sizes)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.1)
    patched.load_state_dict(whole.state_dict())
    x, given = torch.randn(2, 2, 3, 8, 8), (torch.tensor([0, 149]), torch.rand(2, 14))
    small = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2).flatten(1, 2)
    expected = torch.empty_like(x)
    for number, drawn in enumerate(whole(small, *given).unflatten(1, (2, 4)).unbind(2)):
        expected[..., number // 2 :: 2, number % 2 :: 2] = drawn
    torch.testing.assert_close(patched(x, *given), expected)


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


Kind = Literal["kl", "vq"]
BOTH = pytest.mark.parametrize("kind", ["kl", "vq"])
WITH_AND_WITHOUT_GRAIN = pytest.mark.parametrize("grain", [False, True], ids=["smooth", "grain"])


def small_autoencoder(
    kind: Kind, grain: bool = False, channels: tuple[int, ...] = (16, 16), stem: int = 2, labelled: bool = False
) -> Autoencoder:
    torch.manual_seed(0)
    size = 2, channels, 1, stem, grain, labelled
    return Autoencoder(*size) if kind == "kl" else VQAutoencoder(*size, 20)


def small_vq() -> VQAutoencoder:
    model = small_autoencoder("vq")
    assert isinstance(model, VQAutoencoder)
    return model


def nearest_codes(model: VQAutoencoder, latents: Tensor) -> Tensor:
    """The code nearest to each vector of latents (b, c, h, w), found without MONAI."""
    codes, vectors = model.quantiser.embedding.weight.detach(), latents.detach().movedim(1, -1)
    distances = (vectors[..., None, :] - codes).square().sum(-1)
    return codes[distances.argmin(-1)].movedim(-1, 1)


@BOTH
@pytest.mark.parametrize(("channels", "stem", "reduction"), [((16, 16), 1, 2), ((16, 16, 16), 2, 8)])
def test_the_autoencoder_keeps_all_slices(kind: Kind, channels: tuple[int, ...], stem: int, reduction: int) -> None:
    model = small_autoencoder(kind, channels=channels, stem=stem)
    volumes = torch.rand(2, 13, 96, 96)
    latents = model.encode(volumes)
    assert model.reduction == reduction
    assert latents.shape == (2, 2, 13, 96 // reduction, 96 // reduction)
    decoded = model.decode(latents)
    assert decoded.shape == volumes.shape
    assert 0 <= decoded.min() <= decoded.max() <= 1


@BOTH
def test_latents_are_standardised_and_back(kind: Kind) -> None:
    model = small_autoencoder(kind).eval()
    volumes = torch.rand(1, 13, 32, 32)
    before = model.decode(model.encode(volumes))
    model.latent_mean.copy_(torch.tensor([3.0, -1.0]))
    model.latent_std.copy_(torch.tensor([0.5, 7.0]))
    assert torch.allclose(model.decode(model.encode(volumes)), before, atol=1e-5)


@BOTH
def test_slices_never_mix(kind: Kind) -> None:
    model, volumes = small_autoencoder(kind).eval(), torch.rand(1, 13, 32, 32)
    whole = model.decode(model.encode(volumes))
    alone = torch.cat([model.decode(model.encode(volumes[:, i : i + 1])) for i in range(13)], dim=1)
    assert torch.allclose(whole, alone, atol=1e-5)


@BOTH
@WITH_AND_WITHOUT_GRAIN
def test_exactly_what_decodes_is_what_a_decoder_can_tune(kind: Kind, grain: bool) -> None:
    model = small_autoencoder(kind, grain).requires_grad_(True)
    model.decode(torch.randn(1, 2, 13, 8, 8), torch.randn(1, 13, 32, 32)).sum().backward()
    assert any(name.startswith("grain.") for name in model.decoder_parameters()) == grain
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(model.decoder_parameters()) == reached
    for name, parameter in model.decoder_parameters().items():
        assert parameter is model.get_parameter(name)


@BOTH
def test_a_training_pass_reaches_encoder_and_decoder_and_no_grain(kind: Kind) -> None:
    model = small_autoencoder(kind, grain=True)
    seen, _ = model.training_pass(torch.rand(4, 1, 32, 32), torch.randn(4, 2, 8, 8))
    model.render(seen)[0].square().mean().backward()
    for part in (model.net.encoder, model.net.decoder):
        assert sum(parameter.grad.abs().sum() for parameter in part.parameters()) > 0
    assert {parameter.grad for parameter in model.grain.parameters()} == {None}


@BOTH
@WITH_AND_WITHOUT_GRAIN
def test_noise_is_what_grain_alone_draws_from(kind: Kind, grain: bool) -> None:
    model, latents = small_autoencoder(kind, grain), torch.randn(1, 2, 13, 8, 8)
    one, other = torch.randn(2, 1, 13, 32, 32)
    smooth, drawn = model.decode(latents), model.decode(latents, one)
    assert torch.equal(model.decode(latents), smooth)
    assert torch.equal(model.decode(latents, one), drawn)
    assert torch.equal(drawn, smooth) != grain
    assert torch.equal(drawn, model.decode(latents, other)) != grain


@BOTH
def test_without_noise_the_decoder_is_monais(kind: Kind) -> None:
    model, latents = small_autoencoder(kind, grain=True), torch.randn(3, 2, 8, 8)
    seen = nearest_codes(model, latents) if isinstance(model, VQAutoencoder) else latents
    assert torch.allclose(model.draw(latents), model.expand(model.net.decode(seen)).sigmoid(), atol=1e-6)


@BOTH
@pytest.mark.parametrize("channels", [(16,), (16, 16)])
@pytest.mark.parametrize("stem", [1, 2, 4])
def test_every_slice_has_the_texture_of_its_own_noise(kind: Kind, channels: tuple[int, ...], stem: int) -> None:
    model = coarse(small_autoencoder(kind, True, channels, stem))
    latents, noise = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 3, 4 * model.reduction, 4 * model.reduction)
    other = noise.clone()
    other[0, 2] = torch.randn(other[0, 2].shape)
    drawn = model.decode(latents, noise)
    change = (model.decode(latents, other) - drawn).abs().amax(dim=(2, 3))
    assert change[0, 2] > 0.01
    change[0, 2] = 0
    assert change.max() < 1e-6
    assert torch.allclose(model.decode(latents[:1, :, 2:], noise[:1, 2:]), drawn[:1, 2:], atol=1e-5)


def coarse(model: Autoencoder) -> Autoencoder:
    """The same autoencoder, its texture plain to see."""
    for parameter in model.grain.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@BOTH
def test_grain_leaves_everything_else_as_it_would_be_without(kind: Kind) -> None:
    smooth, after = small_autoencoder(kind, grain=False).state_dict(), torch.rand(3)
    grown, after_grain = small_autoencoder(kind, grain=True).state_dict(), torch.rand(3)
    assert {name.split(".")[0] for name in set(grown) - set(smooth)} == {"grain"}
    for name, tensor in smooth.items():
        assert torch.equal(tensor, grown[name]), name
    assert torch.equal(after, after_grain)


def test_the_kl_penalty_is_the_divergence_from_the_standard_normal() -> None:
    model, slices = small_autoencoder("kl"), torch.rand(3, 1, 32, 32)
    _, penalty = model.training_pass(slices, torch.randn(3, 2, 8, 8))
    expected = kl_divergence(Normal(*model.moments(slices)), Normal(0, 1)).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_decoder_sees_the_nearest_codes() -> None:
    model, latents = small_vq().eval(), torch.randn(20, 2, 8, 8)
    seen: list[Tensor] = []
    model.net.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.draw(latents)
    assert torch.allclose(seen[0], nearest_codes(model, latents), atol=1e-6)


def test_a_training_pass_draws_from_the_nearest_codes_and_tells_their_distance() -> None:
    model, slices = small_vq().eval(), torch.rand(3, 1, 32, 32)
    latents, _ = model.moments(slices)
    seen, commitment = model.training_pass(slices, torch.randn(3, 2, 8, 8))
    distance = (latents - nearest_codes(model, latents)).square().mean()
    assert commitment.item() == pytest.approx(distance.item(), rel=1e-5)
    assert torch.allclose(seen, nearest_codes(model, latents), atol=1e-6)


@BOTH
def test_the_anatomy_head_labels_every_pixel_and_changes_nothing_else(kind: Kind) -> None:
    plain, model = small_autoencoder(kind, True, stem=4), small_autoencoder(kind, True, stem=4, labelled=True)
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 1, 32, 32)
    slices, logits = model.render(model.seen(latents), noise)
    assert logits is not None
    assert logits.shape == (3, 4, 32, 32)
    assert torch.equal(slices, plain.draw(latents, noise))
    assert plain.render(latents)[1] is None
    logits.sum().backward()
    assert model.net.decoder.blocks[0].conv.weight.grad.any()  # what draws the slice also tells what is in it
    assert not any("anatomy" in name for name in model.decoder_parameters())  # no private label ever teaches it


def test_latents_are_the_vectors_before_they_are_quantised() -> None:
    model, volumes = small_vq().eval(), torch.rand(1, 13, 32, 32)
    latents = model.encode(volumes)
    other = deepcopy(model)
    other.quantiser.embedding.weight.data += 1
    assert torch.equal(other.encode(volumes), latents)
    assert not torch.allclose(other.decode(latents), model.decode(latents), atol=1e-4)


def test_gradients_pass_straight_through_the_codes() -> None:
    model, latents = small_vq().eval(), torch.randn(2, 2, 8, 8, requires_grad=True)
    codes = nearest_codes(model, latents).requires_grad_(True)
    (to_latents,) = torch.autograd.grad(model.draw(latents).square().sum(), latents)
    (to_codes,) = torch.autograd.grad(Autoencoder.draw(model, codes).square().sum(), codes)
    assert to_codes.abs().max() > 0
    assert torch.allclose(to_latents, to_codes, rtol=1e-3, atol=1e-6)


def test_only_a_training_pass_in_train_mode_moves_the_codebook() -> None:
    model = small_vq().requires_grad_(True)  # even if somebody asks for the gradients of everything
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    volumes, noise = torch.rand(1, 13, 32, 32), torch.randn(13, 2, 8, 8)
    before = deepcopy(model.quantiser.state_dict())

    def moved() -> list[str]:
        return [name for name, tensor in model.quantiser.state_dict().items() if not torch.equal(tensor, before[name])]

    for training in (False, True):
        model.train(training)
        optimiser.zero_grad()
        (model.decode(model.encode(volumes)) - volumes).square().sum().backward()
        optimiser.step()
        with torch.no_grad():
            model.decode(model.encode(volumes))
        assert moved() == []
    model.eval().training_pass(volumes[0][:, None], noise)
    assert moved() == []
    model.train().training_pass(volumes[0][:, None], noise)
    assert sorted(moved()) == ["ema_cluster_size", "ema_w", "embedding.weight"]


def test_codes_that_no_latent_is_near_stay_where_they_were() -> None:
    model = small_vq()
    model.quantiser.embedding.weight.data[:5] += 100
    model.quantiser.ema_w[:5] += 100
    far = model.quantiser.embedding.weight[:5].clone()
    for _ in range(3):
        model.training_pass(torch.rand(4, 1, 32, 32), torch.randn(4, 2, 8, 8))
    assert torch.allclose(model.quantiser.embedding.weight[:5], far, rtol=1e-3)


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_schedules_go_from_data_to_noise(name: ScheduleName) -> None:
    alphas = Diffusion(name).alphas_cumprod
    assert len(alphas) == TIMESTEPS == 150
    assert (alphas.diff() < 0).all()
    assert alphas[0] > 0.99
    assert alphas[-1] < 0.01
    if name == "paper":
        betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
        assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 7e-2], rel=1e-2)


class Oracle(Diffusion):
    """Knows the one volume there is, and predicts exactly what leads to it."""

    def __init__(self, truth: Tensor, name: ScheduleName) -> None:
        super().__init__(name)
        self.truth = truth

    def forward(self, x: Tensor, t: Tensor, attributes: Tensor) -> Tensor:
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
        noise = (x - alpha.sqrt() * self.truth) / (1 - alpha).sqrt()
        return noise if self.predicts_noise else alpha.sqrt() * noise - (1 - alpha).sqrt() * self.truth


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_a_perfect_model_has_no_loss_and_samples_the_truth(name: ScheduleName) -> None:
    truth = torch.randn(1, 2, 3, 4, 4)
    oracle, generator = Oracle(truth, name), torch.Generator().manual_seed(0)
    noise, attributes = torch.randn(5, 2, 3, 4, 4, generator=generator), torch.zeros(5, 14)
    t = torch.tensor([0, 1, 40, 100, 149])
    loss = oracle.loss(truth.expand(5, -1, -1, -1, -1), attributes, t, noise)
    assert loss.shape == (5,)
    assert loss.max() < 1e-6
    for guidance in (0.0, 2.0):
        for sample in (sample_ddim, sample_dpm_solver):
            assert torch.allclose(sample(oracle, noise, attributes, guidance, 15), truth, atol=1e-2)
        sampled = sample_ddpm(oracle, noise, attributes, guidance, TIMESTEPS)
        assert torch.allclose(sampled, truth, atol=0.1)


class GaussianOracle(Diffusion):
    """Predicts exactly for latents ~ N(MEAN, STD^2), and remembers by timestep what it was shown."""

    MEAN, STD = 0.5, 0.6

    def __init__(self, name: ScheduleName) -> None:
        super().__init__(name)
        self.alphas, self.seen = self.alphas_cumprod.double(), dict[int, Tensor]()

    def forward(self, x: Tensor, t: Tensor, attributes: Tensor) -> Tensor:
        alpha = self.alphas[t[0]]
        self.seen[int(t[0])] = x
        clean = self.MEAN + alpha.sqrt() * self.STD**2 / self.variance(alpha) * (x - alpha.sqrt() * self.MEAN)
        return (x - alpha.sqrt() * clean if self.predicts_noise else alpha.sqrt() * x - clean) / (1 - alpha).sqrt()

    def variance(self, alpha: Tensor) -> Tensor:
        return alpha * self.STD**2 + 1 - alpha

    def flow(self, noise: Tensor, t: int) -> Tensor:
        """Where the probability flow ODE takes noise from T - 1 to: as many standard deviations from the mean."""
        (start, end), (before, after) = (alpha := self.alphas[[149, t]]).sqrt(), self.variance(alpha).sqrt()
        return end * self.MEAN + after / before * (noise - start * self.MEAN)


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_dpm_solver_follows_the_flow_at_second_order_and_ddim_at_first(name: ScheduleName) -> None:
    noise, attributes = torch.randn(4, 1, 2, 3, 3, dtype=torch.float64), torch.zeros(4, 14)

    def error(sample: Sampler, steps: int) -> float:
        """Halfway, at t = 74, where both samplers pass if steps are an even divisor of T."""
        oracle = GaussianOracle(name)
        sample(oracle, noise, attributes, 0.0, steps, None)
        return (oracle.seen[74] - oracle.flow(noise, 74)).abs().max().item()

    errors = {sample: [error(sample, steps) for steps in (10, 30, 150)] for sample in (sample_ddim, sample_dpm_solver)}
    orders = {sample: math.log(some[1] / some[2]) / math.log(5) for sample, some in errors.items()}
    assert orders[sample_ddim] == pytest.approx(1, abs=0.1)
    assert orders[sample_dpm_solver] == pytest.approx(2, abs=0.25)
    assert all(ours < 0.5 * theirs for ours, theirs in zip(errors[sample_dpm_solver], errors[sample_ddim], strict=True))


@pytest.mark.parametrize("name", ["paper", "modern"])
def test_dpm_solver_with_a_generator_draws_from_the_distribution_anew(name: ScheduleName) -> None:
    oracle, generator = GaussianOracle(name), torch.Generator().manual_seed(0)
    noise, attributes = torch.randn(1, 1, 10, 60, 60, generator=generator, dtype=torch.float64), torch.zeros(1, 14)
    drawn = [sample_dpm_solver(oracle, noise, attributes, 0.0, 50, generator=generator) for _ in range(2)]
    for some in drawn:
        assert some.mean() == pytest.approx(oracle.MEAN, abs=0.02)
        assert some.std() == pytest.approx(oracle.STD, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([some.ravel() for some in drawn]))[0, 1]) < 0.1


@pytest.mark.parametrize("steps", [7, 8, 15, 20])
def test_dpm_solver_calls_the_model_once_a_step_from_the_noisiest_on(steps: int) -> None:
    oracle, calls = GaussianOracle("modern"), list[int]()
    sample_dpm_solver(oracle, torch.randn(1, 1, 1, 1, 1), torch.zeros(1, 14), 0.0, steps, lambda: calls.append(1))
    assert len(calls) == len(oracle.seen) == steps
    assert next(iter(oracle.seen)) == 149
    assert min(oracle.seen) == round(150 / steps) - 1


def test_min_snr_weights_ask_no_more_of_clean_latents_than_of_noisier_ones() -> None:
    t = torch.arange(150)
    for name, added in (("paper", 0), ("modern", 1)):
        model = Diffusion(name)  # type: ignore[arg-type]
        snr = model.alphas_cumprod / (1 - model.alphas_cumprod)
        of_image = model.min_snr_weight(t, 5.0) * (snr + added)  # an error of x_0 counts min(SNR, 5)
        assert torch.allclose(of_image, snr.clamp(max=5))
        assert of_image[0] == pytest.approx(5)
        assert of_image[-1] == pytest.approx(snr[-1].item())


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    class Conditional(Diffusion):
        def forward(self, x: Tensor, t: Tensor, attributes: Tensor) -> Tensor:
            known = attributes[:, 0].isfinite().view(-1, 1, 1, 1, 1)
            return torch.where(known, 3.0, 1.0).expand_as(x)

    x = torch.zeros(2, 1, 1, 2, 2)
    assert (Conditional("modern").guided(x, 0, torch.zeros(2, 14), 2.0) == 3 * 3.0 - 2 * 1.0).all()


def test_dropping_attributes_hides_whole_rows() -> None:
    dropped = drop_attributes(torch.ones(4000, 14), 0.1, torch.Generator().manual_seed(0)).isnan()
    assert (dropped.all(1) == dropped.any(1)).all()
    assert dropped.any(1).float().mean() == pytest.approx(0.1, abs=0.02)


class Blind(Diffusion):
    """Takes no notice of attributes, so that the volumes of a request have the same latents; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__("modern")
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, attributes: Tensor) -> Tensor:
        self.seen.append(x)
        return x / 2


OWNERS = np.array([4, 4, 0, 0, 7])


def synthetic_images(grain: bool = True, seed: int = 0, batch: int = 8, depth: float = np.nan) -> Tensor:
    attributes = np.full((len(OWNERS), 14), np.nan, np.float32)
    attributes[:, ATTRIBUTE_NAMES.index("DEPTH")] = depth
    model = coarse(small_autoencoder("kl", grain)).eval()
    given = {"steps": 2, "guidance": 0.0, "seed": seed, "batch": batch}
    cohort = synthesise(model, Blind(), attributes, OWNERS, **given)  # type: ignore[arg-type]
    return torch.from_numpy(cohort.images)


def test_a_seed_gives_the_same_cohort_whatever_the_batch() -> None:
    images = synthetic_images()
    assert torch.equal(synthetic_images(), images)
    assert (synthetic_images(seed=1) - images).abs().amax(dim=(1, 2, 3)).min() > 0.01
    for batch in (1, 2, 3):
        assert torch.allclose(synthetic_images(batch=batch), images, atol=1e-5)


@WITH_AND_WITHOUT_GRAIN
def test_the_volumes_of_a_request_differ_in_texture(grain: bool) -> None:
    images = synthetic_images(grain)
    assert not torch.allclose(images[1], images[2], atol=0.01)
    for ed, es in ((0, 1), (2, 3)):
        assert torch.allclose(images[ed], images[es], atol=0.01) != grain


def test_slices_beyond_the_depth_have_no_texture() -> None:
    filled = synthetic_images(depth=9.0).amax(dim=(2, 3)) > 0
    assert filled.tolist() == 5 * [2 * [False] + 9 * [True] + 2 * [False]]


def test_labels_are_drawn_with_their_volumes_and_end_where_these_do() -> None:
    model = small_autoencoder("kl", grain=True, labelled=True).eval()
    model.anatomy[-2].bias.data[4:8] = 50.0  # type: ignore[index]
    attributes = np.zeros((len(OWNERS), 14), np.float32)
    attributes[:, ATTRIBUTE_NAMES.index("DEPTH")] = 9
    drawn = synthesise(model, Blind(), attributes, OWNERS, steps=2, guidance=0.0, seed=0)  # type: ignore[arg-type]
    assert drawn.labels is not None
    assert drawn.labels.dtype == np.uint8
    assert (drawn.labels[:, 2:11] == 1).all()
    assert not drawn.labels[:, :2].any()
    assert not drawn.labels[:, 11:].any()


def test_no_latent_and_no_texture_starts_from_the_noise_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    beginnings: list[tuple[float, ...]] = []

    def remember(volumes: Tensor) -> None:
        beginnings.extend(tuple(volume.flatten()[:9].tolist()) for volume in volumes)

    def draw(model: Autoencoder, latents: Tensor, noise: Tensor) -> tuple[Tensor, None]:
        remember(noise)
        return noise, None

    monkeypatch.setattr(Autoencoder, "decode_labelled", draw)
    model, attributes = small_autoencoder("kl", grain=True), np.zeros((len(OWNERS), 14), np.float32)
    for seed in (0, 1):
        blind = Blind()
        synthesise(model, blind, attributes, OWNERS, steps=2, guidance=0.0, seed=seed)  # type: ignore[arg-type]
        remember(blind.seen[0])
    assert len(beginnings) == 2 * (len(OWNERS) + len(OWNERS))
    assert len(set(beginnings)) == 2 * (len(OWNERS) + len(set(OWNERS)))  # a request's latents start alike
