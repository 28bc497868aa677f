"""The Efficient U-Net with neighbour attention: one encoder for x_t and, at t = 0, for every neighbour (R7, R9, I11).

It is every stage of a cascade. A super-resolution stage also takes the picture of the stage below, resized, by channel
(I4); a neighbour is then encoded over its own small version, so that both go through the encoder in the same state.

Next on the main path: `radt/diffusion/denoiser.py`, which turns this network's prediction into a clean image.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from index.errors import ConfigError
from radt.conditioning import (
    EncodedNeighbors,
    GuidanceInput,
    LowResolution,
    NeighborBatch,
    NeighborKV,
    TextCondition,
    map_tensors,
)
from radt.resizing import Size, resize
from radt.shapes import Features, NeighborMask, PerExample, Pixels
from radt.unet.attention import (
    AttentionMaps,
    CaptionAgreement,
    NeighborAttention,
    TextRefiner,
    TextRefinerLayer,
    TextSelfAttention,
)
from radt.unet.layers import ResidualBlock, Upsample, fourier_features, group_norm, zero_

LevelMap = Float[Tensor, "b _c _h _w"]  # features of any level


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """Sizes of one U-Net. Level 0 is the finest; every tuple of widths or counts has one entry a level."""

    image_size: int  # height in pixels
    text_width: int
    pooled_width: int
    channels: tuple[int, ...] = (64, 128, 128)
    blocks: tuple[int, ...] = (2, 2, 2)
    fold: int = 2  # fold x fold pixels become channels of the first level
    embedding_width: int = 256
    attention_levels: tuple[int, ...] = (1, 2)  # text and self-attention, in encoder and decoder
    encoder_neighbor_levels: tuple[int, ...] = (1, 2)
    decoder_neighbor_levels: tuple[int, ...] = (0, 1)
    heads: int = 4
    neighbor_heads: int = 2
    neighbor_key_width: int = 28  # with 32 position channels, up to 3 neighbours and the sink: 64 in all
    neighbor_value_width: int = 64
    image_width: int | None = None  # None: as wide as high
    low_res_size: int | None = None  # height of the picture drawn over; None: the first stage, which draws over none
    guidance_input: bool = False  # told the guidance that it imitates in one row: a fast twin (I10)
    neighbor_encoder: Literal["shared", "separate"] = "shared"  # shared: neighbours go through the network's own (R7)
    text_layers: int = 0  # of the refiner, through which tokens see each other before the picture attends to them

    def __post_init__(self) -> None:
        levels = range(len(self.channels))
        if len(self.blocks) != len(self.channels):
            raise ConfigError(f"blocks {self.blocks} needs one entry a level, as channels {self.channels} has")
        for name in ("attention_levels", "encoder_neighbor_levels", "decoder_neighbor_levels"):
            wrong = [level for level in getattr(self, name) if level not in levels]
            if wrong:
                raise ConfigError(f"{name} names level {wrong[0]}, but there are levels 0 to {levels[-1]}")
        shrink = self.fold * 2 ** (len(self.channels) - 1)
        for name, side in zip(("image_size", "image_width"), self.size, strict=True):
            if side % shrink:
                raise ConfigError(f"{name} {side} must be a multiple of {shrink} (fold and {len(levels)} levels)")
        if self.text_layers < 0:
            raise ConfigError(f"text_layers must be 0 (tokens as they are) or more, got {self.text_layers}")
        if self.low_res_size is not None and not 0 < self.low_res_size <= self.image_size:
            raise ConfigError(f"low_res_size {self.low_res_size} must be at most image_size {self.image_size}")

    @property
    def size(self) -> Size:
        """Height and width of what is drawn."""
        return self.image_size, self.image_size if self.image_width is None else self.image_width

    @property
    def low_res(self) -> Size | None:
        """Height and width of what is drawn over."""
        if self.low_res_size is None:
            return None
        height, width = self.size
        return self.low_res_size, round(width * self.low_res_size / height)

    @property
    def neighbor_layers(self) -> tuple[tuple[str, int], ...]:
        """Every neighbour attention in the order it runs: (side, level)."""
        last = len(self.channels) - 1
        encoder = [("encoder", level) for level in range(last + 1) if level in self.encoder_neighbor_levels]
        decoder = [("decoder", level) for level in range(last, -1, -1) if level in self.decoder_neighbor_levels]
        return tuple(encoder + decoder)

    @property
    def has_neighbor_encoder(self) -> bool:
        """Whether neighbours have an encoder of their own (R8); it ends at the deepest level that is read."""
        return self.neighbor_encoder == "separate" and bool(self.neighbor_layers)


class TextEmbedding(nn.Module):
    """Time, pooled text and augmentation level in one vector (CombineEmbs); a learned null stands for dropped text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled = nn.Sequential(nn.LayerNorm(config.pooled_width), nn.Linear(config.pooled_width, width))
        self.null_pooled = nn.Parameter(torch.zeros(config.pooled_width))
        if config.low_res is not None:
            self.augmentation = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        if config.guidance_input:
            self.guidance = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(
        self, t: PerExample, text: TextCondition, low_res: LowResolution | None, guidance: GuidanceInput | None = None
    ) -> Float[Tensor, "b e"]:
        """The vector that modulates every residual block."""
        is_null = ~text.mask.any(dim=-1, keepdim=True)
        pooled = torch.where(is_null, self.null_pooled, text.pooled)
        combined = self.time(fourier_features(t, self.width)) + self.pooled(pooled)
        if low_res is not None:
            combined = combined + self.augmentation(fourier_features(low_res.level, self.width))
        if guidance is not None:  # weights as 1/w, which lies in (0, 1] as fourier_features has it
            dials = (1 / guidance.text_guidance, 1 / guidance.neighbor_guidance, guidance.text_share)
            features = torch.cat([fourier_features(dial, self.width) for dial in dials], dim=-1)
            combined = combined + self.guidance(features)
        return nn.functional.silu(combined)


class EncoderLevel(nn.Module):
    """DBlock: strided convolution first, then residual blocks, then attention."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width = config.channels[level]
        if level == 0:
            pictures = 1 if config.low_res is None else 2  # x_t, and what it is drawn over
            self.enter: nn.Module = nn.Conv2d(3 * pictures * config.fold**2, width, 3, padding=1)
        else:
            self.enter = nn.Conv2d(config.channels[level - 1], width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, width, config.embedding_width) for _ in range(config.blocks[level])
        )
        self.attention = _attention(config, level)

    def forward(self, x: LevelMap, embedding: Float[Tensor, "b e"], text: TextCondition) -> LevelMap:
        """The level's map before any neighbour is looked at."""
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, embedding)
        return h if self.attention is None else self.attention(h, text)


class DecoderLevel(nn.Module):
    """UBlock: the skip comes in (`enter`), then residual blocks and attention (`refine`), upsampling last (`leave`).

    The neighbours are looked at between `enter` and `refine`, so that what is copied is still worked into the picture.
    """

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        width = config.channels[level]
        self.merge = ResidualBlock(2 * width, width, config.embedding_width)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, width, config.embedding_width) for _ in range(config.blocks[level] - 1)
        )
        self.attention = _attention(config, level)
        self.leave = Upsample(width, config.channels[level - 1]) if level > 0 else nn.Identity()

    def enter(self, x: Features, skip: Features, embedding: Float[Tensor, "b e"]) -> Features:
        """Join the skip connection, scaled by 1/sqrt(2) (row I11)."""
        return self.merge(torch.cat([x, skip * 2**-0.5], dim=1), embedding)

    def refine(self, x: Features, embedding: Float[Tensor, "b e"], text: TextCondition) -> Features:
        """The level's remaining blocks, and its text and self-attention."""
        for block in self.blocks:
            x = block(x, embedding)
        return x if self.attention is None else self.attention(x, text)


class UNet(nn.Module):
    """Predict from x_t, text and neighbours. The encoder is the source's DStack, the decoder its UStack."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        levels = range(len(config.channels))
        self.embedding = TextEmbedding(config)
        if config.text_layers:
            self.refiner = TextRefiner(config.text_width, layers=config.text_layers, heads=config.heads)
        self.encoder = nn.ModuleList(EncoderLevel(config, level) for level in levels)
        self.decoder = nn.ModuleList(DecoderLevel(config, level) for level in levels)
        if config.has_neighbor_encoder:
            deepest = max(level for _, level in config.neighbor_layers)
            self.neighbor_embedding = TextEmbedding(config)
            self.neighbor_encoder = nn.ModuleList(EncoderLevel(config, level) for level in levels[: deepest + 1])
        self.agreement = CaptionAgreement(config.text_width)
        self.neighbor_attention = nn.ModuleDict({
            f"{side}{level}": NeighborAttention(
                config.channels[level],
                config.text_width,
                heads=config.neighbor_heads,
                key_width=config.neighbor_key_width,
                value_width=config.neighbor_value_width,
            )
            for side, level in config.neighbor_layers
        })
        self.norm_out = group_norm(config.channels[0])
        self.conv_out = nn.Conv2d(config.channels[0], 3 * config.fold**2, 3, padding=1)
        self.init_weights()

    def reader(self, side: str, level: int) -> NeighborAttention:
        """The neighbour attention of a level of the encoder or the decoder."""
        return cast(NeighborAttention, self.neighbor_attention[f"{side}{level}"])

    def refined(self, text: TextCondition) -> TextCondition:
        """The text as attention reads it: through the refiner where there is one."""
        if not self.config.text_layers:
            return text
        return replace(text, tokens=self.refiner(text.tokens, text.mask))

    def init_weights(self) -> None:
        """Zero the last projection of every branch: blocks and attentions start as the identity, the output at 0."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                zero_(module.conv2)
                zero_(module.modulation)
            elif isinstance(module, TextSelfAttention | NeighborAttention | TextRefinerLayer):
                zero_(module.project_out)
            if isinstance(module, TextRefinerLayer):
                zero_(cast(nn.Linear, module.mlp[-1]))
            if isinstance(module, NeighborAttention):
                zero_(module.to_offset)
                if self.config.low_res is not None:
                    module.start_by_content()
        zero_(self.conv_out)
        if self.config.guidance_input:  # so that a twin starts as its teacher, whatever guidance it is told
            zero_(cast(nn.Linear, self.embedding.guidance[-1]))

    def forward(
        self,
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        neighbors: NeighborKV | None = None,
        *,
        low_res: LowResolution | None = None,
        guidance: GuidanceInput | None = None,
    ) -> Pixels:
        """The raw prediction (eps, x0 or v as trained), shape of x. `neighbors` None skips every neighbour layer.

        `guidance` is for a network with `guidance_input` alone; None asks it for no guidance in particular.
        """
        return self._predict(x, t, text, _NeighborReader(self, text, neighbors), low_res=low_res, guidance=guidance)

    def attention_mass(
        self,
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        neighbors: NeighborKV,
        *,
        low_res: LowResolution | None = None,
    ) -> Float[Tensor, "b k"]:
        """The share of attention that each neighbour gets in one call, mean over positions and layers (row N1).

        The shares of a row sum to at most 1; the rest went to the sink, that is to no neighbour.
        """
        if not self.config.neighbor_layers:
            return torch.zeros(neighbors.mask.shape, device=x.device)
        shares: list[Float[Tensor, "b k"]] = []

        def note(layer: NeighborAttention, h: Features, read: dict[str, Any]) -> None:
            shares.append(layer.mass(h, **read).mean(dim=1))

        self._predict(x, t, text, _NeighborReader(self, text, neighbors, note), low_res=low_res)
        return torch.stack(shares).mean(dim=0)

    def attention_maps(
        self,
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        neighbors: NeighborKV,
        *,
        low_res: LowResolution | None = None,
    ) -> list[AttentionMaps]:
        """Where the attention of one call comes from and goes, for every neighbour layer in the order they run.

        The slow twin of `attention_mass`: the mean over layers of each map's mean or sum is that share.
        """
        maps: list[AttentionMaps] = []

        def note(layer: NeighborAttention, h: Features, read: dict[str, Any]) -> None:
            height = h.shape[2]
            picture = rearrange(layer.mass(h, **read), "b (h w) k -> b k h w", h=height)
            neighbor = rearrange(layer.region_mass(h, **read), "b k (h w) -> b k h w", h=height)
            maps.append(AttentionMaps(picture=picture, neighbor=neighbor))

        self._predict(x, t, text, _NeighborReader(self, text, neighbors, note), low_res=low_res)
        return maps

    def _predict(
        self,
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        attend: "_NeighborReader",
        *,
        low_res: LowResolution | None,
        guidance: GuidanceInput | None = None,
    ) -> Pixels:
        assert guidance is None or self.config.guidance_input, "only a network with guidance_input is told guidance"
        embedding = self.embedding(t, text, low_res, guidance)
        maps = self._encode(self.encoder, x, embedding, attend=attend, low_res=low_res)
        return self._decode(maps, embedding, attend)

    @property
    def shares_encoder(self) -> bool:
        """Whether no neighbour is looked at before the encoder's last map is made."""
        return set(self.config.encoder_neighbor_levels) <= {len(self.encoder) - 1}

    def predict_rows(
        self,
        x: Pixels,
        t: PerExample,
        text: TextCondition,
        neighbors: NeighborKV | None,
        *,
        rows: Int[Tensor, " r"],
        low_res: LowResolution | None = None,
    ) -> Float[Tensor, "r c h w"]:
        """Predictions of which some differ in their neighbours alone: those share one pass of the encoder.

        `rows` says for every prediction which row of x it is of; `neighbors` has a row for every prediction.
        """
        assert self.shares_encoder, "neighbours are looked at inside the encoder"
        embedding = self.embedding(t, text, low_res)
        nobody = _NeighborReader(self, text, None)
        encoded = self._encode(self.encoder, x, embedding, attend=nobody, low_res=low_res)
        maps = [one[rows] for one in encoded]
        embedding, text = embedding[rows], map_tensors(lambda tensor: tensor[rows], text)
        attend = _NeighborReader(self, text, neighbors)
        maps[-1] = attend(maps[-1], "encoder", len(maps) - 1)
        return self._decode(maps, embedding, attend)

    def _decode(self, maps: list[LevelMap], embedding: Float[Tensor, "b e"], attend: "_NeighborReader") -> Pixels:
        h = maps[-1]
        for level in reversed(range(len(self.decoder))):
            decoder = cast(DecoderLevel, self.decoder[level])
            h = attend(decoder.enter(h, maps[level], embedding), "decoder", level)
            h = decoder.leave(decoder.refine(h, embedding, attend.text))
        return nn.functional.pixel_shuffle(self.conv_out(nn.functional.silu(self.norm_out(h))), self.config.fold)

    def encode(
        self, x: Pixels, t: PerExample, text: TextCondition, *, low_res: LowResolution | None = None
    ) -> list[LevelMap]:
        """The encoder alone, without neighbours: one map a level, finest first."""
        nobody = _NeighborReader(self, text, None)
        return self._encode(self.encoder, x, self.embedding(t, text, low_res), attend=nobody, low_res=low_res)

    def encode_neighbors(
        self, pixels: Pixels, text: TextCondition, *, low_res: LowResolution | None = None
    ) -> list[LevelMap]:
        """The maps that neighbours are read from: by the network's own encoder at t = 0 (R7), or by theirs (R8)."""
        start = pixels.new_zeros(len(pixels))
        if not self.config.has_neighbor_encoder:
            return self.encode(pixels, start, text, low_res=low_res)
        nobody = _NeighborReader(self, text, None)
        embedding = self.neighbor_embedding(start, text, low_res)
        return self._encode(self.neighbor_encoder, pixels, embedding, attend=nobody, low_res=low_res)

    def _encode(
        self,
        levels: nn.ModuleList,
        x: Pixels,
        embedding: Float[Tensor, "b e"],
        *,
        attend: "_NeighborReader",
        low_res: LowResolution | None,
    ) -> list[LevelMap]:
        assert (low_res is None) == (self.config.low_res is None), "a super-resolution stage, and no other, draws over"
        maps = []
        seen = x if low_res is None else torch.cat([x, low_res.pixels], dim=1)
        h = nn.functional.pixel_unshuffle(seen, self.config.fold)
        for level, encoder in enumerate(levels):
            h = attend(encoder(h, embedding, attend.text), "encoder", level)
            maps.append(h)
        return maps

    def project_neighbors(self, neighbors: NeighborBatch) -> NeighborKV:
        """Encode the neighbours, pixels and caption; project keys and values."""
        return self.project_encoded(self.encode_pairs(neighbors), neighbors.mask)

    def encode_pairs(self, neighbors: NeighborBatch) -> EncodedNeighbors:
        """What does not depend on a neighbour's place among the others, so that it can be kept (`neighbor_store.py`).

        At a super-resolution stage each is encoded over its own picture, shrunk and enlarged again, without noise.
        """
        b, k = neighbors.pixels.shape[:2]
        flat_text = TextCondition(
            tokens=neighbors.text.tokens.flatten(0, 1),
            mask=neighbors.text.mask.flatten(0, 1),
            pooled=neighbors.text.pooled.flatten(0, 1),
        )
        pixels = neighbors.pixels.flatten(0, 1)
        small = self.config.low_res
        below = (
            None
            if small is None
            else LowResolution(pixels=resize(resize(pixels, small), self.config.size), level=pixels.new_zeros(b * k))
        )
        maps = self.encode_neighbors(pixels, flat_text, low_res=below)
        return EncodedNeighbors(
            maps=tuple(rearrange(maps[level], "(b k) c h w -> b k c h w", b=b) for level in self._levels_read),
            captions=self.agreement.embed(neighbors.text.tokens),
            caption_mask=neighbors.text.mask,
        )

    def project_encoded(self, encoded: EncodedNeighbors, mask: NeighborMask) -> NeighborKV:
        """Keys and values of every layer from what `encode_pairs` made. Here a neighbour gets its place among the K."""
        maps = dict(zip(self._levels_read, encoded.maps, strict=True))
        projected = [self.reader(side, level).project(maps[level]) for side, level in self.config.neighbor_layers]
        return NeighborKV(
            keys=tuple(keys for keys, _ in projected),
            values=tuple(values for _, values in projected),
            captions=encoded.captions,
            caption_mask=encoded.caption_mask,
            mask=mask,
        )

    @property
    def _levels_read(self) -> list[int]:
        """The levels that some neighbour attention reads, finest first."""
        return sorted({level for _, level in self.config.neighbor_layers})


class _NeighborReader:
    """Applies the neighbour attention of a level where there is one, in the order the keys were projected.

    `text` is what all attention of the call reads. Prompt and captions are compared by the tokens as they came: equal
    words agree whatever stands beside them. `note` is told each layer that runs, what it sees of the picture, and what
    it reads of the neighbours.
    """

    def __init__(
        self,
        unet: UNet,
        text: TextCondition,
        neighbors: NeighborKV | None,
        note: Callable[[NeighborAttention, Features, dict[str, Any]], None] | None = None,
    ) -> None:
        self.unet, self.text, self.neighbors, self.note = unet, unet.refined(text), neighbors, note
        self.layers = unet.config.neighbor_layers
        self.agreement = None if neighbors is None else unet.agreement(text, neighbors)

    def __call__(self, h: Features, side: str, level: int) -> Features:
        if self.neighbors is None or self.agreement is None or (side, level) not in self.layers:
            return h
        i = self.layers.index((side, level))
        layer = self.unet.reader(side, level)
        keys, mask = self.neighbors.keys[i], self.neighbors.mask
        if self.note is not None:
            self.note(layer, h, {"keys": keys, "mask": mask, "text": self.text, "agreement": self.agreement})
        return layer(h, keys=keys, values=self.neighbors.values[i], mask=mask, text=self.text, agreement=self.agreement)


def _attention(config: UNetConfig, level: int) -> TextSelfAttention | None:
    if level not in config.attention_levels:
        return None
    return TextSelfAttention(config.channels[level], config.text_width, config.heads)
