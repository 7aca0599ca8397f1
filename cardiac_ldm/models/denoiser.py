"""The conditional denoiser: a 3D U-Net over latents whose strides are in-plane only, so that any depth passes.

Convolutions and attention are factorised: within a slice (where attention also looks at the attributes) and across
depth at every position, the latter after Daum et al. (arXiv 2407.16405).
"""

import torch
from einops import rearrange, repeat
from monai.networks.blocks import SABlock
from monai.networks.nets.diffusion_model_unet import (
    DiffusionUNetResnetBlock,
    DiffusionUNetTransformerBlock,
    get_timestep_embedding,
)
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from cardiac_ldm.models.diffusion import Diffusion, ScheduleName
from cardiac_ldm.models.lora import add_lora


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters at 0, so that what it adds starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class AttributeEncoder(nn.Module):
    """One token an attribute: an embedding, or a learnt token where the value is missing, then self-attention.

    The embedding is linear in the value, as in the paper's system, and in the sines and cosines of its first
    `frequencies` half-waves over the range (Tancik et al., arXiv 2006.10739), which tell close values apart.

    Args:
        low, high: (n,) fixed public ranges that map to [-1, 1].
        dim: size of a token.
        frequencies: number of half-waves; 0 for the paper's embedding.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor, dim: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        features = 1 + 2 * frequencies
        self.weight = nn.Parameter(torch.randn(len(low), features, dim) / features**0.5)
        self.bias = nn.Parameter(torch.randn(len(low), dim))
        self.missing = nn.Parameter(torch.randn(len(low), dim))
        self.activation = nn.SELU()
        self.attention = SABlock(dim, num_heads=max(1, dim // 16), use_flash_attention=True)

    def forward(self, attributes: Tensor) -> Tensor:
        """Tokens (b, n, dim) of attributes (b, n) in their own units, NaN where missing."""
        value = 2 * (attributes - self.low) / (self.high - self.low) - 1
        value = value[..., None]
        waves = value * torch.arange(1, self.frequencies + 1, device=value.device) * torch.pi / 2
        features = torch.cat([value, waves.sin(), waves.cos()], dim=-1).nan_to_num()
        known = self.activation(torch.einsum("bnf,nfd->bnd", features, self.weight) + self.bias)
        tokens = torch.where(value.isnan(), self.missing, known)
        return tokens + self.attention(tokens)


class FactorisedAttention(nn.Module):
    """Attention within each slice and to the attributes, then across depth with a learnt depth embedding."""

    def __init__(self, channels: int, heads: int, context: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.within = DiffusionUNetTransformerBlock(
            channels, heads, channels // heads, cross_attention_dim=context, use_flash_attention=True
        )
        self.position = nn.Parameter(torch.zeros(depth, channels))
        self.across_norm = nn.LayerNorm(channels)
        self.across = SABlock(channels, num_heads=heads, use_flash_attention=True)
        self.out = zeroed(nn.Conv3d(channels, channels, 1))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(b, c, d, h, w) from (b, c, d, h, w) and attribute tokens (b, n, context)."""
        b, _, d, h, w = x.shape
        inside = rearrange(self.norm(x), "b c d h w -> (b d) (h w) c")
        inside = self.within(inside, context=repeat(tokens, "b n c -> (b d) n c", d=d))
        column = rearrange(inside, "(b d) (h w) c -> (b h w) d c", b=b, h=h)
        column = column + self.across(self.across_norm(column + self.position[:d]))
        return x + self.out(rearrange(column, "(b h w) d c -> b c d h w", b=b, h=h, w=w))


class Stage(nn.Module):
    """A residual block within slices, conditioned on the time embedding; a convolution across them; attention if given.

    The 3 x 3 x 3 kernel is factorised into 3 x 3 within the slice and 3 across depth (Tran et al., arXiv 1711.11248):
    a ninth of the work, and no stride ever meets the depth axis.
    """

    def __init__(self, channels_in: int, channels: int, embedding: int, attention: nn.Module | None) -> None:
        super().__init__()
        self.block = DiffusionUNetResnetBlock(2, channels_in, embedding, channels, norm_num_groups=8)
        self.norm = nn.GroupNorm(8, channels)
        self.depth = zeroed(nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)))
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor) -> Tensor:
        """(b, channels, d, h, w) from (b, channels_in, d, h, w)."""
        b, _, d, _, _ = x.shape
        slices = self.block(rearrange(x, "b c d h w -> (b d) c h w"), repeat(embedding, "b e -> (b d) e", d=d))
        x = rearrange(slices, "(b d) c h w -> b c d h w", b=b)
        x = x + self.depth(silu(self.norm(x)))
        return x if self.attention is None else self.attention(x, tokens)


class Denoiser(Diffusion):
    """3D U-Net that predicts noise or velocity from a noisy latent, its timestep and the attributes.

    Args:
        latent_channels: channels of the latent.
        patch: the in-plane side of a patch of the latent whose numbers become channels (as in Peebles and Xie, arXiv
            2212.09748); 1 for none.
        channels: width at each level; every level after the first halves the plane, never the depth.
        attention: whether each level has attention.
        residual_blocks: residual blocks a level on the way down (one more on the way up).
        heads: attention heads.
        context: size of an attribute token.
        frequencies: half-waves in which an attribute's value is embedded.
        depth: the largest number of slices.
        attribute_range: (2, n) lowest and highest value of each attribute, fixed and public.
        schedule: the noise schedule on which it learns and samples.
    """

    def __init__(
        self,
        latent_channels: int,
        patch: int,
        channels: tuple[int, ...],
        attention: tuple[bool, ...],
        residual_blocks: int,
        heads: int,
        context: int,
        frequencies: int,
        depth: int,
        attribute_range: Tensor,
        schedule: ScheduleName,
    ) -> None:
        super().__init__(schedule)
        self.width, self.patch = channels[0], patch
        embedding = 4 * channels[0]
        self.attributes = AttributeEncoder(attribute_range[0], attribute_range[1], context, frequencies)
        self.time = nn.Sequential(nn.Linear(channels[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.condition = nn.Linear(attribute_range.shape[1] * context, embedding)
        self.stem = nn.Conv3d(latent_channels * patch**2, channels[0], 3, padding=1)

        def stage(channels_in: int, level: int, attended: bool = True) -> Stage:
            wanted = attended and attention[level]
            attend = FactorisedAttention(channels[level], heads, context, depth) if wanted else None
            return Stage(channels_in, channels[level], embedding, attend)

        self.blocks, self.down, self.shrink = residual_blocks, nn.ModuleList(), nn.ModuleList()
        skips, current = [channels[0]], channels[0]
        for level, width in enumerate(channels):
            for _ in range(residual_blocks):
                self.down.append(stage(current, level))
                current = width
                skips.append(current)
            if level < len(channels) - 1:
                self.shrink.append(nn.Conv3d(width, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)))
                skips.append(width)
        deepest = len(channels) - 1
        self.middle = nn.ModuleList([stage(current, deepest), stage(current, deepest, attended=False)])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(channels))):
            for _ in range(residual_blocks + 1):
                self.up.append(stage(current + skips.pop(), level))
                current = channels[level]
            if level > 0:
                self.grow.append(nn.Conv3d(current, channels[level - 1], (1, 3, 3), padding=(0, 1, 1)))
                current = channels[level - 1]
        self.head = nn.Sequential(
            nn.GroupNorm(8, current), nn.SiLU(), zeroed(nn.Conv3d(current, latent_channels * patch**2, 3, padding=1))
        )

    def forward(self, latents: Tensor, timesteps: Tensor, attributes: Tensor) -> Tensor:
        """Prediction (b, c, d, h, w) for noisy latents of that shape, timesteps (b,) and attributes (b, n)."""
        tokens = self.attributes(attributes)
        embedding = self.time(get_timestep_embedding(timesteps, self.width)) + self.condition(tokens.flatten(1))
        p = self.patch
        x = self.stem(rearrange(latents, "b c d (h p) (w q) -> b (c p q) d h w", p=p, q=p))
        skips = [x]
        for number, block in enumerate(self.down, start=1):
            x = block(x, embedding, tokens)
            skips.append(x)
            if number % self.blocks == 0 and number < len(self.down):
                x = self.shrink[number // self.blocks - 1](x)
                skips.append(x)
        for block in self.middle:
            x = block(x, embedding, tokens)
        for number, block in enumerate(self.up, start=1):
            x = block(torch.cat([x, skips.pop()], dim=1), embedding, tokens)
            if number % (self.blocks + 1) == 0 and skips:
                x = self.grow[number // (self.blocks + 1) - 1](interpolate(x, size=skips[-1].shape[2:]))
        return rearrange(self.head(x), "b (c p q) d h w -> b c d (h p) (w q)", p=p, q=p)

    def tunable(self, tuned: str) -> dict[str, nn.Parameter]:
        """Freeze all but what fine-tuning may move, and return that by name.

        tuned: "all"; "attributes", the path from the attributes to the features they steer: their encoder, its
        projection, and cross-attention; "attention", all attention and the attributes' encoder (as DP-LDM, Lyu et al.,
        arXiv 2305.15759); "edges", the first and the last convolution, every bias and every norm's scale (with privacy:
        Bu et al., arXiv 2210.00036); "head", the last convolution and its norm, whose gradients need no backward pass
        through the rest (with privacy: Mehta et al., arXiv 2205.02973); "lora-r", rank-r additions to convolutions and
        attention, merged by `merge_lora`.
        """
        self.requires_grad_(False)
        if tuned.startswith("lora-"):
            layers = [
                module
                for name, module in self.named_modules()
                if isinstance(module, nn.Conv2d | nn.Conv3d) or (isinstance(module, nn.Linear) and "attention" in name)
            ]
            add_lora(layers, int(tuned.removeprefix("lora-")))
            parts: tuple[str, ...] = (".parametrizations.weight.0.",)
        else:
            parts = {
                "all": ("",),
                "attention": ("attributes.", "condition.", ".attention."),
                "attributes": ("attributes.", "condition.", ".attn2."),
                "edges": ("stem.", "head."),
                "head": ("head.",),
            }[tuned]
        found = {
            name: p
            for name, p in self.named_parameters()
            if any(part in name for part in parts) or (tuned == "edges" and p.ndim == 1)
        }
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found
