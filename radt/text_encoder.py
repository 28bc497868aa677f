"""Frozen text encoders: prompts to contextual token embeddings and a pooled vector (rows I1, I2).

`ClipTextEncoder` is the text tower of any open_clip model, `TransformersTextEncoder` T5 or another text model of
transformers. Training reads neither: its captions are embedded once (`radt/training/precompute.py`). Next on the main
path: `radt/unet/unet.py`.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from index.embedder import open_model, tokenizer_identity, weight_bytes
from index.errors import ConfigError, ModelError
from radt.conditioning import TextCondition, concatenate, map_tensors

BATCH_SIZE = 64
PENULTIMATE = -2
# With what follows an apostrophe; scripts from U+2E80 on have no spaces to tell their words by.
WORD = re.compile(r"[^\W\u2e80-\U0010ffff]+(?:['\u2019][^\W\u2e80-\U0010ffff]+)*")
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # open_clip's own names


@dataclass(frozen=True, kw_only=True, slots=True)
class Truncation:
    """A text that is longer than its encoder reads, in tokens without the start and end marks."""

    text: str
    num_tokens: int
    num_read: int
    left_out: str  # the words that were not read, or not to their end

    @property
    def sentence(self) -> str:
        """For people."""
        return (
            f"only the first {self.num_read} of {self.num_tokens} tokens were read of "
            f"{json.dumps(shorten(self.text), ensure_ascii=False)}, so say what matters first: left out was "
            f"{json.dumps(shorten(self.left_out.lstrip(',.;: ')), ensure_ascii=False)}"
        )


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts to conditions. `width` is that of the tokens, `pooled_width` that of the pooled vector.

    `fingerprint` covers everything that decides an embedding; embeddings of two fingerprints cannot be mixed.
    """

    width: int
    pooled_width: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> TextCondition:
        """float32, one row a text, as many token places in every row of every call; the mask marks real tokens."""
        ...

    def truncations(self, texts: Sequence[str]) -> list[Truncation]:
        """Which of the texts `encode` cuts, and what it leaves out; each different text once."""
        ...


@runtime_checkable
class TrainableTextEncoder(TextEncoder, Protocol):
    """A text encoder that can be fine-tuned after the generators (row I2, `radt/training/text_tuning.py`)."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """Its weights by name, those that embeddings of texts follow from."""
        ...

    def embed(self, texts: Sequence[str]) -> TextCondition:
        """As `encode`, in one batch, and gradients flow to the weights that ask for them."""
        ...

    def save(self, folder: Path) -> None:
        """Write it to a folder that `load_text_encoder` takes."""
        ...


def load_text_encoder(
    clip: str | Path, name: str | Path | None = None, *, device: str = "cpu"
) -> "ClipTextEncoder | TransformersTextEncoder":
    """The text tower of the CLIP in folder `clip`; where `name` is given, a transformers model by name or folder.

    A folder in open_clip's form is a CLIP too: the text tower that was fine-tuned apart from the one that retrieves.
    """
    if name is None or (Path(name) / CLIP_CONFIG).is_file():
        clip = clip if name is None else name
        return ClipTextEncoder.load(clip, device=device)
    return TransformersTextEncoder.load(name, device=device)


class ClipTextEncoder:
    """The text tower of an open_clip model, frozen.

    Tokens are hidden states after block `layer` (-2, the last but one, by default) under the tower's final norm, as
    Stable Diffusion 2 takes them: the last block serves the pooled token alone. `pooled` is `encode_text` unnormalised.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, layer: int = PENULTIMATE, device: str = "cpu") -> None:
        self.name, self.layer = name, layer
        self._model, self._tokenizer, self._device = freeze(model, device), tokenizer, device
        self._tower = getattr(model, "text", model)  # open_clip's oldest class, CLIP, is its own text tower
        if not hasattr(self._tower, "transformer") or not hasattr(self._tower.transformer, "resblocks"):
            raise ModelError(f"the text tower of {name!r} is one of transformers; load it with TransformersTextEncoder")
        num_blocks = len(self._tower.transformer.resblocks)
        if not -num_blocks <= layer < num_blocks:
            raise ConfigError(f"layer {layer} is not one of the {num_blocks} blocks of the text tower of {name!r}")
        self._block = layer % num_blocks
        self.width = self._tower.ln_final.normalized_shape[0]
        self.pooled_width = self.encode([""]).pooled.shape[1]
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith("visual.")}
        self.fingerprint = fingerprint("open_clip", weights, tokenizer_identity(tokenizer), {"block": self._block})

    @classmethod
    def load(cls, name: str | Path, *, layer: int = PENULTIMATE, device: str = "cpu") -> "ClipTextEncoder":
        """Load `NAME/WEIGHTS` as open_clip knows them, `hf-hub:...`, or a folder with open_clip_config.json.

        Raises:
            ModelError: there is no such model, or no network to fetch it.
        """
        model, tokenizer, _, full_name = open_model(str(name))
        return cls(model, tokenizer, name=full_name, layer=layer, device=device)

    def encode(self, texts: Sequence[str]) -> TextCondition:
        """Embed texts; longer ones are cut to the model's context, as `truncations` tells."""
        return in_batches(texts, self._encode)

    def truncations(self, texts: Sequence[str]) -> list[Truncation]:
        """The texts with more tokens than the model's context, and what is left out of each."""
        length = self._tower.context_length
        if not hasattr(self._tokenizer, "encode"):  # one of transformers, wrapped by open_clip
            return cut_by(self._tokenizer.tokenizer, [self._tokenizer.clean_fn(text) for text in texts], length)
        room = length - 2  # the start and end marks
        found = []
        for text in dict.fromkeys(texts):
            ids = self._tokenizer.encode(text)
            if len(ids) > room:
                start = room
                while start and not self._tokenizer.decode(ids[start - 1 : start]).endswith(" "):  # within a word
                    start -= 1
                left_out = self._tokenizer.decode(ids[start:]).strip()
                found.append(Truncation(text=text, num_tokens=len(ids), num_read=room, left_out=left_out))
        return found

    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights of the text tower: not the picture's, nor the temperature between the two."""
        return {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")
        }

    def embed(self, texts: Sequence[str]) -> TextCondition:
        """As `encode`, in one batch, and gradients flow to the weights that ask for them."""
        return self._encode(texts)

    def save(self, folder: Path) -> None:
        """Write the model in open_clip's local-dir form; the folder that it was loaded from gives all but weights."""
        from safetensors.torch import save_file

        source = Path(self.name.removeprefix("local-dir:"))
        if not (source / CLIP_CONFIG).is_file():
            raise ModelError(f"{self.name!r} is no folder with {CLIP_CONFIG}, so there is nothing to save it like")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self._model.state_dict().items()}
        save_file(state, folder / CLIP_WEIGHTS)

    def _encode(self, texts: Sequence[str]) -> TextCondition:
        ids = self._tokenizer(list(texts), context_length=self._tower.context_length).to(self._device)
        output = self._model.forward_intermediates(
            text=ids, text_indices=[self._block], normalize=False, normalize_intermediates=True
        )
        tokens = output["text_intermediates"][0].float()
        return TextCondition(tokens=tokens, mask=self._mask(ids), pooled=output["text_features"].float())

    def _mask(self, ids: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
        """Up to the end mark where the tower pools there (padding repeats other ids); else whatever is not padding."""
        prefix = "text_" if self._tower is self._model else ""
        pool_type = getattr(self._tower, f"{prefix}pool_type")
        if pool_type not in ("argmax", "eos"):
            return ids != self._padding_id()
        end_id = getattr(self._tower, f"{prefix}eos_id")
        ends = ids.argmax(dim=1) if pool_type == "argmax" else (ids == end_id).int().argmax(dim=1)
        return torch.arange(ids.shape[1], device=ids.device) <= ends[:, None]

    def _padding_id(self) -> int:
        """What the tokenizer pads with: the tower's own `pad_id` is only a default where it has no padding mask."""
        inner = getattr(self._tokenizer, "tokenizer", None)
        return getattr(inner, "pad_token_id", None) or 0


class TransformersTextEncoder:
    """The encoder of T5 (as in Imagen) or another text model of transformers, frozen.

    Tokens are the last hidden states, `pooled` is their mean over real tokens (Imagen, appendix B).
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, max_length: int = 77, device: str = "cpu") -> None:
        self.name, self.max_length = name, max_length
        self._model, self._tokenizer, self._device = freeze(model, device), tokenizer, device
        if tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer of {name!r} has no padding token, so texts cannot be put in one batch")
        self.width = self.pooled_width = int(model.config.hidden_size)
        settings = {"kind": model.config.model_type, "max_length": max_length}
        self.fingerprint = fingerprint("transformers", model.state_dict(), self._tokenizer_identity(), settings)

    @classmethod
    def load(
        cls, name: str | Path, *, max_length: int = 77, device: str = "cpu", local_only: bool = False
    ) -> "TransformersTextEncoder":
        """Load a model by its name on the hub, or from a folder; `local_only` never asks the network.

        Weights are safetensors only and float32; no code of the model's own is run.

        Raises:
            ModelError: there is no such model, no network to fetch it, or it is not a text model.
        """
        import transformers

        options = {"local_files_only": local_only or Path(name).is_dir(), "trust_remote_code": False}
        with as_model_error(str(name)):
            config = transformers.AutoConfig.from_pretrained(str(name), **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(name), **options)
            known = type(config) in transformers.AutoModelForTextEncoding._model_mapping
            loader = transformers.AutoModelForTextEncoding if known else transformers.AutoModel
            model = loader.from_pretrained(str(name), dtype=torch.float32, use_safetensors=True, **options)
        if config.is_encoder_decoder and not known:
            model = model.get_encoder()
        return cls(model, tokenizer, name=str(name), max_length=max_length, device=device)

    def encode(self, texts: Sequence[str]) -> TextCondition:
        """Embed texts; longer ones are cut to `max_length` tokens, as `truncations` tells."""
        return in_batches(texts, self._encode)

    def truncations(self, texts: Sequence[str]) -> list[Truncation]:
        """The texts with more than `max_length` tokens, marks included, and what is left out of each."""
        return cut_by(self._tokenizer, texts, self.max_length)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All its weights."""
        return dict(self._model.named_parameters())

    def embed(self, texts: Sequence[str]) -> TextCondition:
        """As `encode`, in one batch, and gradients flow to the weights that ask for them."""
        return self._encode(texts)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as transformers does."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def _tokenizer_identity(self) -> bytes:
        """Vocabulary and rules where the tokenizer tells them, and the ids of a text full of oddities."""
        rules: Any = sorted(self._tokenizer.get_vocab().items())
        if self._tokenizer.is_fast:
            rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
            rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # follow calls
        probe = self._tokenize(["The Quick brown fox's 42 jumps, (twice)! caf\u00e9 \U0001f408 \u4f60\u597d"])
        return json.dumps([rules, probe.input_ids.tolist()], sort_keys=True).encode()

    def _tokenize(self, texts: Sequence[str]) -> Any:
        return self._tokenizer(
            list(texts), max_length=self.max_length, padding="max_length", truncation=True, return_tensors="pt"
        )

    def _encode(self, texts: Sequence[str]) -> TextCondition:
        batch = self._tokenize(texts).to(self._device)
        tokens = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
        mask = batch.attention_mask.bool()
        return TextCondition(tokens=tokens, mask=mask, pooled=masked_mean(tokens, mask))


def freeze(model: Any, device: str) -> Any:
    """Evaluation mode, no gradients, float32. open_clip hands its models over in training mode."""
    return model.eval().requires_grad_(requires_grad=False).float().to(device)


def in_batches(texts: Sequence[str], encode: Callable[[Sequence[str]], TextCondition]) -> TextCondition:
    """Encode some texts at a time, so that memory does not grow with their number; no text gives no rows."""
    asked = texts or [""]
    with torch.inference_mode():
        batches = [encode(asked[start : start + BATCH_SIZE]) for start in range(0, len(asked), BATCH_SIZE)]
        condition = concatenate(batches)
    # Copied outside, because autograd refuses tensors made in inference mode, and these may feed a training step.
    return map_tensors(lambda tensor: tensor[: len(texts)].clone(), condition)


def masked_mean(tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    """The mean over real tokens; 0 where there is none."""
    total = reduce(tokens * mask[..., None], "b n d -> b d", "sum")
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def fingerprint(kind: str, weights: Mapping[str, Tensor], tokenizer: bytes, settings: Mapping[str, Any]) -> str:
    """A hash of weights, tokenizer and settings."""
    state = blake2b(json.dumps([kind, dict(settings)], sort_keys=True).encode(), digest_size=16)
    for part in weight_bytes(weights):
        state.update(part)
    state.update(tokenizer)
    return state.hexdigest()


def cut_by(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Truncation]:
    """What a tokenizer of transformers cuts off at `max_length` tokens, the marks that it adds included."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    found = []
    for text in dict.fromkeys(texts):
        options = {"add_special_tokens": False, "return_offsets_mapping": tokenizer.is_fast, "verbose": False}
        encoded = tokenizer(text, **options)
        ids = encoded.input_ids
        if len(ids) > room:
            if tokenizer.is_fast:
                left_out = text[word_start(text, encoded.offset_mapping[room][0]) :]
            else:
                left_out = tokenizer.decode(ids[room:])
            found.append(Truncation(text=text, num_tokens=len(ids), num_read=room, left_out=left_out.strip()))
    return found


def word_start(text: str, place: int) -> int:
    """Where the word begins that a place is in the middle of; else the place itself."""
    return next((word.start() for word in WORD.finditer(text) if word.start() < place < word.end()), place)


def shorten(text: str, length: int = 60) -> str:
    """The beginning of a text, for a sentence."""
    return text if len(text) <= length else f"{text[:length].rstrip()}..."


@contextmanager
def as_model_error(name: str) -> Iterator[None]:
    """Whatever transformers raises for a model that cannot be had, as one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load the text encoder {name!r}: {reason}; check the name or folder, or the network"
        ) from error
