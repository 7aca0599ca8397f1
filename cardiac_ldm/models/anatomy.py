"""The instruments that read a synthetic heart: a segmenter and a phase classifier that a laptop can train."""

from einops import rearrange
from monai.networks.nets import Classifier, UNet
from torch import Tensor, nn

N_LABELS = 4
"""Background, right ventricle, myocardium, left ventricle."""


class Segmenter(nn.Module):
    """A 2D U-Net (Ronneberger et al., arXiv 1505.04597) on each slice, its pixels folded 2 x 2 into channels.

    Folding (pixel-unshuffle) keeps all detail and costs a third of a U-Net at full resolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = UNet(
            spatial_dims=2,
            in_channels=4,
            out_channels=4 * N_LABELS,
            channels=(32, 64, 96, 128),
            strides=(2, 2, 2),
            act="PRELU",
            norm="INSTANCE",
        )

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits (b, 4, 13, 96, 96) of the labels of images (b, 13, 96, 96) in [0, 1]."""
        logits = self.network(rearrange(images, "b d (h i) (w j) -> (b d) (i j) h w", i=2, j=2))
        return rearrange(logits, "(b d) (c i j) h w -> b c d (h i) (w j)", b=len(images), i=2, j=2)


class PhaseClassifier(nn.Module):
    """Tells end-diastole from end-systole; slices are channels, so depth is never strided."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Classifier(
            in_shape=(13, 96, 96), classes=2, channels=(32, 32, 64, 64), strides=(2, 2, 2, 2), num_res_units=1
        )

    def forward(self, images: Tensor) -> Tensor:
        """Give the logits (b, 2) of images (b, 13, 96, 96) in [0, 1]: index 0 is end-systole, 1 end-diastole (ESED)."""
        return self.network(images)
