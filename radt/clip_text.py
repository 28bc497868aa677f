"""The text tower of a plain CLIP, read without open_clip: its import takes longer than drawing a small picture.

A folder in open_clip's form whose tower has nothing out of the ordinary (the bundle that ships is one) is read into
torch's own transformer layers and the tokenizers package. `read_plain_clip` leaves every other to `ClipTextEncoder`,
the slow twin, with which it agrees to rounding.
"""

import html
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from index.errors import ModelError
from radt.conditioning import TextCondition
from radt.text_encoder import CLIP_CONFIG, CLIP_WEIGHTS, PENULTIMATE, Truncation, freeze, in_batches, word_start

TOKENIZER = "tokenizer.json"
PLAIN_MODEL = {"embed_dim", "vision_cfg", "text_cfg"}
PLAIN_TEXT = {"context_length", "vocab_size", "hf_tokenizer_name", "width", "layers", "heads", "pad_id", "pool_type"}
# A block's modules as open_clip names them and as torch does.
BLOCK_NAMES = {"attn": "self_attn", "ln_1": "norm1", "ln_2": "norm2", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}


def read_plain_clip(folder: Path, *, device: str = "cpu") -> "PlainClipTextEncoder | None":
    """The text encoder in a folder of open_clip's form; None where only open_clip can tell what it means."""
    try:
        model = json.loads((folder / CLIP_CONFIG).read_text())["model_cfg"]
        text = model["text_cfg"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # open_clip says what is wrong with it
    is_plain = set(model) <= PLAIN_MODEL and set(text) == PLAIN_TEXT and text["pool_type"] == "argmax"
    files_are_there = (folder / CLIP_WEIGHTS).is_file() and (folder / TOKENIZER).is_file()
    if not is_plain or text["hf_tokenizer_name"] != TOKENIZER or not files_are_there:
        return None
    return PlainClipTextEncoder(folder, text, embed_dim=model["embed_dim"], device=device)


class PlainClipTextEncoder:
    """A `TextEncoder` for drawing; it cannot be trained. Tokens and pooled vector are those of `ClipTextEncoder`."""

    def __init__(self, folder: Path, config: dict[str, Any], *, embed_dim: int, device: str = "cpu") -> None:
        from tokenizers import Tokenizer

        self.width, self.pooled_width = config["width"], embed_dim
        self._context, self._device = config["context_length"], device
        self._tower = freeze(_read_tower(folder / CLIP_WEIGHTS, config, embed_dim), device)
        self._whole = Tokenizer.from_file(str(folder / TOKENIZER))
        self._whole.no_truncation()
        self._whole.no_padding()
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        self._tokenizer.enable_truncation(self._context)
        pad = self._tokenizer.id_to_token(config["pad_id"])
        self._tokenizer.enable_padding(length=self._context, pad_id=config["pad_id"], pad_token=pad)
        files = (folder / name for name in (CLIP_CONFIG, CLIP_WEIGHTS, TOKENIZER))
        self.fingerprint = blake2b(b"".join(blake2b(file.read_bytes()).digest() for file in files)).hexdigest()[:32]

    def encode(self, texts: Sequence[str]) -> TextCondition:
        """Embed texts; longer ones are cut to the model's context, as `truncations` tells."""
        return in_batches(texts, self._encode)

    def truncations(self, texts: Sequence[str]) -> list[Truncation]:
        """The texts with more tokens than the model's context, and what is left out of each."""
        room = self._context - self._whole.num_special_tokens_to_add(is_pair=False)
        found = []
        for text in dict.fromkeys(clean(text) for text in texts):
            encoded = self._whole.encode(text, add_special_tokens=False)
            if len(encoded.ids) > room:
                left_out = text[word_start(text, encoded.offsets[room][0]) :].strip()
                found.append(Truncation(text=text, num_tokens=len(encoded.ids), num_read=room, left_out=left_out))
        return found

    def _encode(self, texts: Sequence[str]) -> TextCondition:
        encoded = self._tokenizer.encode_batch([clean(text) for text in texts])
        ids = torch.tensor([each.ids for each in encoded], device=self._device)
        tokens, pooled = self._tower(ids)
        ends = ids.argmax(dim=1)  # the end mark has the largest id
        return TextCondition(
            tokens=tokens, mask=torch.arange(self._context, device=self._device) <= ends[:, None], pooled=pooled
        )


class _Tower(nn.Module):
    """Token and position embeddings, causal pre-norm blocks, the final norm, a projection of the end mark."""

    def __init__(self, config: dict[str, Any], embed_dim: int) -> None:
        super().__init__()
        width, context = config["width"], config["context_length"]
        self.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config["heads"], 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config["layers"])
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.register_buffer("causal", torch.full((context, context), -torch.inf).triu(1), persistent=False)

    def forward(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b p"]]:
        """Hidden states before the last block under the final norm, and `encode_text`, unnormalised."""
        x = self.token_embedding(ids) + self.positional_embedding
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], src_mask=self.causal))
        last = self.ln_final(states[-1])[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
        return self.ln_final(states[PENULTIMATE]), last @ self.text_projection


def _read_tower(path: Path, config: dict[str, Any], embed_dim: int) -> _Tower:
    from safetensors import SafetensorError, safe_open

    tower = _Tower(config, embed_dim)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith(("visual.", "logit_"))]  # noqa: SIM118
            tower.load_state_dict({_torch_name(name): file.get_tensor(name) for name in names})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"{str(path)!r} cannot be read ({reason}): copy the model again") from error
    return tower


def _torch_name(name: str) -> str:
    name = name.replace("transformer.resblocks.", "blocks.")
    for theirs, torchs in BLOCK_NAMES.items():
        name = name.replace(f".{theirs}.", f".{torchs}.")
    return name


def clean(text: str) -> str:
    """As open_clip cleans a prompt: broken unicode mended, entities of HTML read, one space between words."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
