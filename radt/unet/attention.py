"""The two attentions of the network: over the image and its text, and over the retrieved neighbours (rows I11, R9)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from radt.conditioning import Keys, NeighborKV, TextCondition
from radt.shapes import Features, NeighborMask
from radt.unet.layers import group_norm

MASKED = -1e4  # a logit that softmax turns into exactly 0, and that bfloat16 can still hold
NUM_POSITION_WAVES = 16  # eight frequencies on each of two axes
POSITION_WIDTH = 2 * NUM_POSITION_WAVES  # a sine and a cosine of each


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AttentionMaps:
    """Where one layer's attention to each neighbour comes from and where it goes, mean over heads (row N1).

    `picture` is the share of each picture position's attention that the neighbour gets; `neighbor` is the share of all
    attention that falls on each of its positions. The mean of the one and the sum of the other are the same number.
    """

    picture: Float[Tensor, "b k _h _w"]
    neighbor: Float[Tensor, "b k _h _w"]


class TextSelfAttention(nn.Module):
    """Self-attention whose keys and values are concatenated with the text's (Imagen, section D.3.1; SPEC row I11)."""

    def __init__(self, channels: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.text_norm = nn.LayerNorm(text_width)
        self.text_to_kv = nn.Linear(text_width, 2 * channels, bias=False)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Features, text: TextCondition) -> Features:
        """Add to x what it attends to among its own positions and the text's tokens."""
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b (three g e) h w -> three b g (h w) e", three=3, g=self.heads)
        text_kv = self.text_to_kv(self.text_norm(text.tokens))
        text_k, text_v = rearrange(text_kv, "b n (two g e) -> two b g n e", two=2, g=self.heads)
        positions = torch.ones(*x.shape[:1], q.shape[2], dtype=torch.bool, device=x.device)
        mask = torch.cat([positions, text.mask], dim=1)[:, None, None, :]
        k, v = torch.cat([k, text_k], dim=2), torch.cat([v, text_v], dim=2)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.project_out(rearrange(attended, "b g (h w) e -> b (g e) h w", h=x.shape[2]))


class TextRefiner(nn.Module):
    """Let every token of a text see all others, before the picture attends to them; starts as the identity.

    A text tower that reads from left to right, as CLIP's does, has no sign at the first thing of "a wolf left of a cup"
    that it is the left one: here it gets one (the bidirectional token refiner of HunyuanVideo, Kong et al. 2024).
    Deviates from Imagen, where the picture attends to the frozen encoder's tokens as they are.
    """

    def __init__(self, width: int, *, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TextRefinerLayer(width, heads) for _ in range(layers))

    def forward(self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Tokens where `mask` is True see each other. The others, which nobody attends to, are not defined."""
        visible = (mask | ~mask.any(dim=-1, keepdim=True))[:, None, None]  # of a null text all, or there is no softmax
        for layer in self.layers:
            tokens = layer(tokens, visible)
        return tokens


class TextRefinerLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind its normalisation and beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Float[Tensor, "b n d"], visible: Bool[Tensor, "b 1 1 n"]) -> Float[Tensor, "b n d"]:
        """The same tokens, with what they saw of each other added."""
        qkv = self.to_qkv(self.attention_norm(tokens))
        q, k, v = rearrange(qkv, "b n (three g e) -> three b g n e", three=3, g=self.heads)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=visible)
        tokens = tokens + self.project_out(rearrange(seen, "b g n e -> b n (g e)"))
        return tokens + self.mlp(tokens)


class CaptionAgreement(nn.Module):
    """How well each word of the prompt is met by each neighbour's caption: late interaction (ColBERT, equation 3).

    This is what tells a right neighbour from a wrong one, whatever their order. Prompt and captions go through the
    same projection, so equal words agree from the first training step on, those of unseen entities too.
    Deviates from Re-Imagen: there the caption acts only through the neighbour's encoding; here also through this.
    """

    def __init__(self, text_width: int, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.project = nn.Linear(text_width, width, bias=False)

    def embed(self, tokens: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n r"]:
        """Tokens as unit vectors in the space of comparison."""
        return normalize(self.project(self.norm(tokens)), dim=-1)

    def forward(self, text: TextCondition, neighbors: NeighborKV) -> Float[Tensor, "b n k"]:
        """The best cosine of each prompt token among a caption's tokens; 0 where the prompt has no token."""
        cosine = torch.einsum("bnr,bkmr->bnkm", self.embed(text.tokens), neighbors.captions)
        cosine = cosine.masked_fill(~neighbors.caption_mask[:, None], -1.0)
        return cosine.amax(dim=-1) * text.mask[:, :, None]


class NeighborAttention(nn.Module):
    """Image positions attend to the neighbours' feature maps (R9). Keys and values are projected once a request.

    The logit of position i for position s of neighbour j is the sum of three terms, content being the source's own:

        q_i . k_js / sqrt(e)  +  gain * kernel(p_i + offset_i - p_s)  +  beta * sum_n a_in agreement_nj

    where a_in says which words of the prompt position i is about. The position term starts aligned, so that what is
    copied is copied in place from the first training step on; `offset` starts at zero and learns where else to look.
    One more key, the sink, has value zero: it takes the attention that no neighbour deserves, so that with all
    neighbours masked the layer adds exactly nothing, and K may differ from training.

    The three terms and the sink are channels of one inner product: position codes beside the content, and for each
    neighbour a query channel holding its bias, met by a key channel that is 1 on its positions. So the fused kernel
    needs no mask of size q x (k s). The tests hold this against the formula written out.
    """

    def __init__(self, channels: int, text_width: int, *, heads: int, key_width: int, value_width: int) -> None:
        super().__init__()
        self.heads, self.key_width, self.value_width = heads, key_width, value_width
        self.norm = group_norm(channels)
        self.neighbor_norm = group_norm(channels)
        self.to_query = nn.Conv2d(channels, heads * key_width, 1, bias=False)
        self.to_offset = nn.Conv2d(channels, heads * 2, 1)
        self.to_key = nn.Conv2d(channels, heads * key_width, 1, bias=False)
        self.to_value = nn.Conv2d(channels, heads * value_width, 1, bias=False)
        self.to_word_query = nn.Conv2d(channels, key_width, 1, bias=False)
        self.word_key = nn.Linear(text_width, key_width, bias=False)
        self.position_gain = nn.Parameter(torch.full((heads,), 8.0))
        self.agreement_gain = nn.Parameter(torch.full((heads,), 8.0))
        self.sink = nn.Parameter(torch.full((heads,), 8.0))
        self.project_out = nn.Conv2d(heads * value_width, channels, 1, bias=False)

    @torch.no_grad()
    def start_by_content(self) -> None:
        """Let queries and keys start alike, and place count for little: a position looks first at what resembles it.

        For a stage that draws over a picture, which shows what is to be found in the neighbours. Its neighbours were
        worth as much 500 steps after such a start as after 2,400 steps of looking in place (`tools/benchmarks.md`).
        """
        self.to_query.weight.mul_(2)  # a logit of about 7 for equal contents, beside the sink's 8
        self.to_key.weight.copy_(self.to_query.weight)
        self.position_gain.fill_(2.0)

    def project(self, maps: Float[Tensor, "b k c h w"]) -> tuple[Keys, Keys]:
        """Keys and values of K feature maps at this level, the sink last; their width covers every channel."""
        b, k = maps.shape[:2]
        flat = self.neighbor_norm(rearrange(maps, "b k c h w -> (b k) c h w"))
        content = rearrange(self.to_key(flat), "(b k) (g e) h w -> b g k (h w) e", b=b, g=self.heads)
        values = rearrange(self.to_value(flat), "(b k) (g e) h w -> b g (k h w) e", b=b, g=self.heads)
        grid = position_code(cell_centres(maps)).to(content.dtype)
        which = torch.eye(k, k + 1, dtype=content.dtype, device=maps.device)
        keys = torch.cat(
            [
                content,
                repeat(grid, "s p -> b g k s p", b=b, g=self.heads, k=k),
                repeat(which, "k j -> b g k s j", b=b, g=self.heads, s=len(grid)),
            ],
            dim=-1,
        )
        sink = nn.functional.one_hot(torch.tensor(keys.shape[-1] - 1, device=maps.device), keys.shape[-1])
        sinks = repeat(sink.to(keys.dtype), "e -> b g 1 e", b=b, g=self.heads)
        keys = torch.cat([rearrange(keys, "b g k s e -> b g (k s) e"), sinks], dim=2)
        width = self._common_width(k)
        return _pad_to(keys, width), _pad_to(nn.functional.pad(values, (0, 0, 0, 1)), width)

    def forward(
        self,
        x: Features,
        *,
        keys: Keys,
        values: Keys,
        mask: NeighborMask,
        text: TextCondition,
        agreement: Float[Tensor, "b n k"],
    ) -> Features:
        """Add the attended neighbours to x. Rows whose neighbours are all masked come back unchanged."""
        queries = self.queries(x, mask, text, agreement)
        attended = scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., : self.value_width]
        return x + self.project_out(rearrange(attended, "b g (h w) e -> b (g e) h w", h=x.shape[2]))

    def mass(
        self, x: Features, *, keys: Keys, mask: NeighborMask, text: TextCondition, agreement: Float[Tensor, "b n k"]
    ) -> Float[Tensor, "b q k"]:
        """The share of each position's attention that each neighbour gets, mean over heads; the rest is the sink's."""
        queries = self.queries(x, mask, text, agreement)
        return torch.cat([part.sum(dim=-1) for part in shares_of(queries, keys, num_neighbors=mask.shape[1])], dim=1)

    def region_mass(
        self, x: Features, *, keys: Keys, mask: NeighborMask, text: TextCondition, agreement: Float[Tensor, "b n k"]
    ) -> Float[Tensor, "b k s"]:
        """The share of all attention that falls on each position of each neighbour, mean over positions and heads.

        The twin of `mass`: summed over a neighbour's positions, it is `mass` averaged over the picture's.
        """
        queries = self.queries(x, mask, text, agreement)
        parts = shares_of(queries, keys, num_neighbors=mask.shape[1])
        return torch.stack([part.sum(dim=1) for part in parts]).sum(dim=0) / queries.shape[2]

    def queries(
        self, x: Features, mask: NeighborMask, text: TextCondition, agreement: Float[Tensor, "b n k"]
    ) -> Float[Tensor, "b g q e"]:
        """Every position's query: content, where it looks, how much it trusts each neighbour, and the sink's logit."""
        h = self.norm(x)
        content = rearrange(self.to_query(h), "b (g e) h w -> b g (h w) e", g=self.heads) / math.sqrt(self.key_width)
        offset = rearrange(self.to_offset(h), "b (g two) h w -> b g (h w) two", g=self.heads).float()
        where = position_code(cell_centres(x) + offset)
        where = where * (self.position_gain[:, None, None] / NUM_POSITION_WAVES)
        trust = self._trust(h, text, agreement).masked_fill(~mask[:, None, None], MASKED)
        sink = repeat(self.sink, "g -> b g q 1", b=len(x), q=content.shape[2])
        parts = [part.to(content.dtype) for part in (content, where, trust, sink)]
        return _pad_to(torch.cat(parts, dim=-1), self._common_width(mask.shape[1]))

    def _trust(self, h: Features, text: TextCondition, agreement: Float[Tensor, "b n k"]) -> Float[Tensor, "b g q k"]:
        """Weigh the words that each position is about: beta sum_n a_in agreement_nj."""
        about = rearrange(self.to_word_query(h), "b e h w -> b (h w) e") @ self.word_key(text.tokens).mT
        weights = about.float().masked_fill(~text.mask[:, None], MASKED).softmax(dim=-1)
        return (weights @ agreement.float())[:, None] * self.agreement_gain[:, None, None]

    def _common_width(self, k: int) -> int:
        """Keys and values share one width, a multiple of 8, or the fused kernel is not taken."""
        needed = max(self.key_width + POSITION_WIDTH + k + 1, self.value_width)
        return -(-needed // 8) * 8


def shares_of(
    queries: Float[Tensor, "b g q e"], keys: Keys, *, num_neighbors: int, chunk: int = 256
) -> Iterator[Float[Tensor, "b _q k s"]]:
    """What softmax gives every position of every neighbour, mean over heads, for some of the queries at a time.

    The fused kernel never holds these weights; all of them at once would take gigabytes at a fine level.
    """
    for some in torch.split(queries, chunk, dim=2):
        weights = (some @ keys.mT).softmax(dim=-1)[..., :-1].mean(dim=1)
        yield rearrange(weights, "b q (k s) -> b q k s", k=num_neighbors)


def _pad_to(x: Tensor, width: int) -> Tensor:
    return nn.functional.pad(x, (0, width - x.shape[-1]))


def cell_centres(x: Float[Tensor, "*b h w"]) -> Float[Tensor, "s two"]:
    """Row and column of each position of a map in raster order, in cells."""
    height, width = x.shape[-2:]
    device = x.device
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([rows, columns], dim=-1).flatten(0, 1).float()


def position_code(where: Float[Tensor, "*s two"]) -> Float[Tensor, "*s p"]:
    """Sine and cosine codes whose inner product is a kernel of the distance, largest (`NUM_POSITION_WAVES`) at zero.

    Wave lengths run from 2 to about 23 cells in steps of sqrt(2).
    """
    num_frequencies = NUM_POSITION_WAVES // 2
    frequencies = math.pi * 2.0 ** (-torch.arange(num_frequencies, device=where.device) / 2)
    angles = (where[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
