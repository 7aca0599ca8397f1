"""What encoders see in the middle slices: the features by which cohorts are compared."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from monai.networks.layers import SkipConnection
from torch import Tensor, nn

from cardiac_ldm.errors import ParameterError
from cardiac_ldm.models.anatomy import Segmenter
from cardiac_ldm.models.device import compute_device
from cardiac_ldm.models.perception import PerceptionEncoder
from cardiac_ldm.progress import tqdm

SLICES, N_SLICES = slice(3, 10), 7
"""Slices 3..9 of 13, as Daum et al., arXiv 2407.16405: further out, many volumes are padding."""
_BATCH = 4


class AnatomyEncoder(nn.Module):
    """The way down of a segmenter (the study's own, trained on public patients) and its deepest features, averaged.

    It was trained on hearts, with contrast and sharpness drawn at random, and its instance norms take out each map's
    mean and scale. So it's a judge of anatomy that hardly sees blur, noise or contrast: put one of texture beside it.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        block, down = segmenter.network.model, []
        while isinstance(block[1], SkipConnection):
            down.append(block[0])
            block = block[1].submodule
        self.network = nn.Sequential(*down, block).eval()

    def forward(self, slices: Tensor) -> Tensor:
        """Give features (n, 128) of slices (n, 1, 96, 96) in [0, 1]."""
        return self.network(rearrange(slices, "n 1 (h i) (w j) -> n (i j) h w", i=2, j=2)).mean(dim=(2, 3))


class InceptionEncoder(nn.Module):
    """Inception-v3's pooled features, 2048 of them, from a TorchScript file that the user names: those of FID.

    The file is NVIDIA's inception-2015-12-05.pt (the network of Heusel et al., arXiv 1706.08500, as StyleGAN's
    metrics take it), or any script that maps images (n, 3, 299, 299) in [0, 1] to features (n, 2048), its own scaling
    included: `torch.jit.trace(nn.Sequential(scaling, network), images).save(path)` writes one where torchvision is
    installed. Slices are resized bilinearly, and their grey repeated.
    """

    SIZE, WIDTH = 299, 2048

    def __init__(self, file: Path) -> None:
        """Load the network and try it on two images.

        Raises:
            ParameterError: there's no such file, it isn't TorchScript, or its network is another.
        """
        super().__init__()
        wanted = "give NVIDIA's inception-2015-12-05.pt, or an Inception-v3 traced with torch.jit that ends in its pool"
        if not file.is_file():
            raise ParameterError(f"{file}: no such file; {wanted}")
        try:
            self.network = torch.jit.load(file, map_location="cpu").eval()
        except RuntimeError as error:
            raise ParameterError(f"{file}: not TorchScript (weights alone don't make a network); {wanted}") from error
        try:
            arguments = self.network.forward.schema.arguments
            self._nvidia = any(argument.name == "return_features" for argument in arguments)
            with torch.no_grad():
                shape = tuple(self(torch.zeros(2, 1, self.SIZE, self.SIZE)).shape)
        except (RuntimeError, AttributeError, torch.jit.Error) as error:
            raise ParameterError(f"{file}: its network can't read images (n, 3, 299, 299); {wanted}") from error
        if shape != (2, self.WIDTH):
            raise ParameterError(f"{file}: its network gives {shape} for 2 images, not (2, {self.WIDTH}); {wanted}")

    def forward(self, slices: Tensor) -> Tensor:
        """Give features (n, 2048) of slices (n, 1, h, w) in [0, 1]."""
        resized = nn.functional.interpolate(slices, size=(self.SIZE, self.SIZE), mode="bilinear")
        images = resized.expand(-1, 3, -1, -1)
        return self.network(255 * images, return_features=True) if self._nvidia else self.network(images)


@torch.no_grad()
def slice_features(images: np.ndarray, encoder: nn.Module | None = None) -> np.ndarray:
    """Features, float32 (7 n, d), of slices 3..9 of volumes (n, 13, 96, 96) in [0, 1].

    encoder: maps slices (b, 1, 96, 96) to features (b, d), and is put in evaluation mode; EfficientNet-Lite0 with
    d = 1280 (`PerceptionEncoder`) if None.
    """
    encoder = (encoder or PerceptionEncoder()).eval().to(device := compute_device())
    batches = np.array_split(images[:, SLICES], max(1, len(images) // _BATCH))
    features = [
        encoder(torch.from_numpy(rearrange(volumes, "n d h w -> (n d) 1 h w")).to(device)).cpu().numpy()
        for volumes in tqdm(batches, desc="features", unit="batch", leave=False)
    ]
    return np.concatenate(features)


def volume_features(images: np.ndarray) -> np.ndarray:
    """EfficientNet's features, float32 (n, 1280), of volumes (n, 13, 96, 96), averaged over slices 3..9."""
    return reduce(slice_features(images), "(n s) f -> n f", "mean", s=N_SLICES)
