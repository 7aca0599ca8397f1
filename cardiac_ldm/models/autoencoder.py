"""The KL autoencoder: volumes to latents and back, slice by slice, so that depth is never down-sampled.

MONAI's 3D autoencoders silently lose a slice of 13; its 2D one applied to every slice can't. A pixel-unshuffle stem
(Shi et al., arXiv 1609.05158) halves the plane before the first convolution, which is most of the cost on a CPU.
"""

import torch
from einops import rearrange
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """KL autoencoder of short-axis volumes; `latent_mean` and `latent_std` standardise its latents channel by channel.

    Args:
        latent_channels: channels of the latent.
        channels: width at each level; every level after the first halves the plane.
        residual_blocks: residual blocks a level.
        stem: factor of the pixel-unshuffle stem (1 for none).
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, latent_channels: int, channels: tuple[int, ...], residual_blocks: int, stem: int) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.reduction = stem * 2 ** (len(channels) - 1)
        self.squeeze, self.expand = nn.PixelUnshuffle(stem), nn.PixelShuffle(stem)
        self.net = AutoencoderKL(
            spatial_dims=2,
            in_channels=stem**2,
            out_channels=stem**2,
            num_res_blocks=residual_blocks,
            channels=channels,
            attention_levels=(False,) * len(channels),
            latent_channels=latent_channels,
            norm_num_groups=16,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def moments(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (b, c, h/r, w/r), for slices (b, 1, h, w) in [0, 1]."""
        mean, std = self.net.encode(self.squeeze(2 * slices - 1))
        return mean, std

    def draw(self, latents: Tensor) -> Tensor:
        """Slices (b, 1, h, w) in [0, 1] from latents (b, c, h/r, w/r) as `moments` gives them."""
        return self.expand(self.net.decode(latents)).sigmoid()

    def encode(self, volumes: Tensor) -> Tensor:
        """Standardised posterior means (b, c, d, h/r, w/r) of volumes (b, d, h, w) in [0, 1]."""
        mean, _ = self.moments(rearrange(volumes, "b d h w -> (b d) 1 h w"))
        mean = (mean - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        return rearrange(mean, "(b d) c h w -> b c d h w", b=len(volumes))

    def decode(self, latents: Tensor) -> Tensor:
        """Volumes (b, d, h, w) in [0, 1] from standardised latents (b, c, d, h/r, w/r)."""
        flat = rearrange(latents, "b c d h w -> (b d) c h w")
        flat = flat * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return rearrange(self.draw(flat), "(b d) 1 h w -> b d h w", b=len(latents))
