"""The autoencoders, KL and VQ: volumes to latents and back, slice by slice, so that depth is never down-sampled.

The two ways to regularise a latent are those of Rombach et al. (arXiv 2112.10752, section 3.1). MONAI's 3D autoencoders
silently lose a slice of 13; its 2D one applied to every slice can't. A pixel-unshuffle stem (Shi et al., arXiv
1609.05158) shrinks the plane before the first convolution, which is most of the cost on a CPU.

Texture is not information: a latent that held the grain of a slice would have no room for its heart. So the decoder is
given white noise beside the latent (after Karras et al., arXiv 1812.04948) and draws the grain from that.
"""

import torch
from einops import rearrange
from monai.networks.blocks.upsample import UpSample
from monai.networks.layers.vector_quantizer import EMAQuantizer
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn

from cardiac_ldm.models.anatomy import N_LABELS


class Autoencoder(nn.Module):
    """KL autoencoder of short-axis volumes; `latent_mean` and `latent_std` standardise its latents channel by channel.

    Args:
        latent_channels: channels of the latent.
        channels: width at each level; every level after the first halves the plane.
        residual_blocks: residual blocks a level.
        stem: factor of the pixel-unshuffle stem (1 for none).
        grain: whether the decoder draws from noise too; else it pays no heed to the noise.
        labelled: whether the decoder labels what it draws.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        latent_channels: int,
        channels: tuple[int, ...],
        residual_blocks: int,
        stem: int,
        grain: bool,
        labelled: bool,
    ) -> None:
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
        self.grain = nn.ModuleDict(_grains(self.net.decoder.blocks, self.reduction) if grain else {})
        self.anatomy = _anatomy_head(channels[0], stem) if labelled else None
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def moments(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each (b, c, h/r, w/r), for slices (b, 1, h, w) in [0, 1]."""
        mean, std = self.net.encode(self.squeeze(2 * slices - 1))
        return mean, std

    def draw(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """Slices (b, 1, h, w) in [0, 1] from latents (b, c, h/r, w/r) as `moments` gives them.

        noise: white, (b, 1, h, w), from which texture is drawn; without it there is none.
        """
        return self.render(self.seen(latents), noise)[0]

    def seen(self, latents: Tensor) -> Tensor:
        """What the decoder sees of latents (b, c, h/r, w/r) as `moments` gives them: all of it."""
        return latents

    def render(self, seen: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Slices as `draw` gives them, and the logits (b, 4, h, w) of their labels if the decoder has an anatomy head.

        seen: latents (b, c, h/r, w/r) as `seen` gives them.
        """
        x = features = self.net.post_quant_conv(seen)
        for number, block in enumerate(self.net.decoder.blocks):
            x = block(x)
            if noise is not None and str(number) in self.grain:
                x = x + self.grain[str(number)](noise)
            if isinstance(block, AEKLResBlock):
                features = x
        x = self.expand(x)
        if noise is not None and self.grain:
            x = x + self.grain["finish"](torch.cat([x, noise], dim=1))
        return x.float().sigmoid(), self.anatomy(features).float() if self.anatomy else None

    def training_pass(self, slices: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's half of a training step, on public slices (b, 1, h, w) in [0, 1].

        Args:
            noise: white, of the latents' shape (b, c, h/r, w/r).

        Returns:
            What the decoder sees, a sample of the posterior, and the posterior's KL divergence from the standard normal
            (Kingma and Welling, arXiv 1312.6114), in nats, averaged over the numbers of the latent.
        """
        mean, std = self.moments(slices)
        return mean + std * noise, 0.5 * (mean**2 + std**2 - 2 * std.log() - 1).mean()

    def decoder_parameters(self) -> dict[str, nn.Parameter]:
        """What turns latents into slices, by the names of `named_parameters`: nothing of encoder or codebook."""
        decoder = ("net.post_quant_conv.", "net.decoder.", "grain.")
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(decoder)}

    def encode(self, volumes: Tensor) -> Tensor:
        """Standardised posterior means (b, c, d, h/r, w/r) of volumes (b, d, h, w) in [0, 1]."""
        mean, _ = self.moments(rearrange(volumes, "b d h w -> (b d) 1 h w"))
        mean = (mean - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        return rearrange(mean, "(b d) c h w -> b c d h w", b=len(volumes))

    def decode(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """Volumes (b, d, h, w) in [0, 1] from standardised latents (b, c, d, h/r, w/r) and white noise (b, d, h, w)."""
        return self.decode_labelled(latents, noise)[0]

    def decode_labelled(self, latents: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Volumes as `decode` gives them, and their labels, uint8 (b, d, h, w), if the decoder has an anatomy head."""
        flat = rearrange(latents, "b c d h w -> (b d) c h w")
        flat = flat * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        noise = None if noise is None else rearrange(noise, "b d h w -> (b d) 1 h w")
        slices, logits = self.render(self.seen(flat), noise)
        volumes = rearrange(slices, "(b d) 1 h w -> b d h w", b=len(latents))
        if logits is None:
            return volumes, None
        return volumes, rearrange(logits.argmax(dim=1).to(torch.uint8), "(b d) h w -> b d h w", b=len(latents))


@torch.random.fork_rng(devices=())  # everything else starts as it would without grain
def _grains(blocks: nn.ModuleList, reduction: int) -> dict[str, nn.Module]:
    """By the number of each residual block of a decoder, what turns a noise image into what is added to its output.

    "finish" works on the slice itself, where no trace is left of the grid of the pixel-shuffle.
    """
    grains: dict[str, nn.Module] = {}
    for number, block in enumerate(blocks):
        if isinstance(block, UpSample):
            reduction //= 2
        if isinstance(block, AEKLResBlock):
            mixed = nn.Conv2d(reduction**2, block.out_channels, 1, bias=False)
            nn.init.normal_(mixed.weight, std=0.03 / reduction)
            grains[str(number)] = nn.Sequential(nn.PixelUnshuffle(reduction), mixed)
    last = nn.Conv2d(16, 1, 3, padding=1)
    nn.init.normal_(last.weight, std=0.003)
    grains["finish"] = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.SiLU(), last)
    return grains


@torch.random.fork_rng(devices=())
def _anatomy_head(channels: int, stem: int) -> nn.Module:
    """From the decoder's last features to the logits of the labels."""
    conv = nn.Conv2d(channels, N_LABELS * stem**2, 3, padding=1)
    return nn.Sequential(nn.GroupNorm(16, channels), nn.SiLU(), conv, nn.PixelShuffle(stem))


class VQAutoencoder(Autoencoder):
    """Autoencoder whose decoder sees each latent vector as the nearest of `codes` codes (arXiv 1711.00937).

    `encode` gives the vectors before they are quantised, and the diffusion model works on those; `draw` and `decode`
    quantise first. The posterior's deviation goes unused.

    The codebook follows a moving average of the vectors it is given, past any gradient and any clipping: what teaches
    it is NOT private. Only `training_pass` teaches it; nothing else moves it, in train mode as in eval mode.

    Args:
        codes: size of the codebook; a code has `latent_channels` numbers.
    """

    def __init__(
        self,
        latent_channels: int,
        channels: tuple[int, ...],
        residual_blocks: int,
        stem: int,
        grain: bool,
        labelled: bool,
        codes: int,
    ) -> None:
        super().__init__(latent_channels, channels, residual_blocks, stem, grain, labelled)
        self.quantiser = EMAQuantizer(2, codes, latent_channels, commitment_cost=1.0)
        # MONAI starts from counts of zero, which sends every code that the first batch misses 1e5 times as far away.
        self.quantiser.ema_cluster_size.fill_(1)

    def seen(self, latents: Tensor) -> Tensor:
        """The nearest codes (b, c, h/r, w/r) of latents; gradients pass straight on."""
        # `quantize` and `embed` leave the codebook alone in every mode; a few slices at a time, because MONAI spells
        # out the distance of each vector to each code.
        nearest = [self.quantiser.embed(self.quantiser.quantize(few)[2]) for few in latents.split(8)]
        return latents + (torch.cat(nearest) - latents).detach()

    def training_pass(self, slices: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's half of a training step, on public slices (b, 1, h, w); in train mode it moves the codebook.

        Returns:
            What the decoder sees, the nearest codes, and the commitment: the mean squared distance, number by number,
            of the latents from them. `noise` goes unused.
        """
        quantised, commitment, _ = self.quantiser(self.moments(slices)[0])
        return quantised, commitment
