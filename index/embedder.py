"""Embedder: texts and images to unit vectors of one space. ClipEmbedder is any open_clip model, by name or folder."""

import difflib
import io
import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8

from index.errors import CorpusError, KnowledgeBaseError, ModelError
from index.matrix_rate import count_operations, matrix_rate
from index.preprocessing import DevicePixels, Framing, split

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 80_000_000  # a decoded image above this is taken for a decompression bomb; below Pillow's own warning
MAX_ASPECT = 100  # of the sides: the model's resize brings the shorter one to size and would blow up the longer
DRAFT_MARGIN = 3  # a JPEG is decoded at 1/2, 1/4 or 1/8 while it stays so many times the network's size: cos > 0.9999
BATCH_ROWS = {"cpu": 64, "cuda": 256}  # images in one call of the network
BATCHES_IN_FLIGHT = 4
COMPILE_AFTER = 50  # full batches; compiling takes a minute, which a small build would not get back
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no format whose decoder runs a program (EPS)
CONFIG_NAME = "open_clip_config.json"
_LOADING = threading.Lock()  # decoding threads ask all at once; not in the object, which is sent to other machines
UNTRAINED = "untrained"  # a weights tag of ours: fixed random weights, for benchmarks and tests

# An image as `Embedder.prepare` leaves it for `embed`: bytes, of the network's size unless the device resizes, or
# numbers of the network's size and range.
Prepared = UInt8[np.ndarray, "_ _ 3"] | Float32[np.ndarray, "c h w"]


@runtime_checkable  # beartype asks, in the tests
class Embedder(Protocol):
    """Texts and images to unit vectors, float32; a row of NaN where the model gave nothing finite.

    `embed` of prepared images equals `images`; `prepare` is the part that threads can do, apart from the network.
    `fingerprint` covers weights, tokenizer, preprocessing and dtype: vectors of two fingerprints cannot be compared.
    """

    name: str
    dim: int
    fingerprint: str

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Embed texts."""
        ...

    def images(self, images: Sequence["PIL.Image.Image"]) -> Float32[np.ndarray, "n d"]:
        """Embed RGB images."""
        ...

    def prepare(self, image: "PIL.Image.Image") -> Prepared:
        """Bring one RGB image to the size of the network."""
        ...

    def embed(self, prepared: Sequence[Prepared]) -> Float32[np.ndarray, "n d"]:
        """Embed prepared images."""
        ...

    def image_side(self) -> int | None:
        """The longer side, in pixels, of what the network looks at; None when images must be decoded at full size."""
        ...

    def batch_rows(self) -> int:
        """How many images are best embedded at once."""
        ...


@runtime_checkable
class Measurable(Protocol):
    """An embedder that knows what its network costs and what its device can do."""

    def most_images_per_second(self) -> float | None:
        """How many a device could embed that did nothing but the network's matrix products; None: not known."""
        ...


class ClipEmbedder:
    """An open_clip model in evaluation mode, on the GPU where there is one.

    On a CPU it computes in float32. `fast`, the default on a GPU from Ampere on, runs images in bfloat16 and compiles
    the network once that pays; vectors then differ in the third decimal of a component, by less than 0.001 in cosine.
    `resize_on_device`, the default on a GPU, leaves resizing to it, too, and only decoding to the processors. On a CPU
    Pillow in threads takes a third of the time and gives open_clip's pixels to the last bit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Any,
        *,
        name: str,
        batch_size: int | None = None,
        fast: bool | None = None,
        resize_on_device: bool | None = None,
    ):
        import torch

        self.name = name
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size or BATCH_ROWS[self._device.type]
        self._model = model.eval().to(self._device)  # open_clip hands models over in training mode
        self._tokenizer = tokenizer
        self._preprocess = preprocess
        self._parts = split(preprocess)
        is_wanted = self._device.type == "cuda" if resize_on_device is None else resize_on_device
        self._framing = Framing.of(model, preprocess) if is_wanted else None
        self._pixels = DevicePixels(self._parts, self._framing, self._device) if self._parts else None
        self._network = _Network(self._model.encode_image, self._device, rows=self.batch_size, fast=fast)
        self.fingerprint = _fingerprint(model, tokenizer, preprocess)
        self.dim = self.texts([""]).shape[1]

    @classmethod
    def load(
        cls,
        name: str,
        *,
        batch_size: int | None = None,
        threads: int | None = None,
        fast: bool | None = None,
        resize_on_device: bool | None = None,
    ) -> "ClipEmbedder":
        """Load `NAME/WEIGHTS` (`ViT-B-32/laion2b_s34b_b79k`), `NAME`, `hf-hub:...`, or a folder in open_clip's form.

        A bare NAME takes its first published weights, `NAME/untrained` random ones. A folder holds
        open_clip_config.json and safetensors, itself or in `clip/`. `threads` is torch's number. ModelError otherwise.
        """
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer, preprocess, full_name = open_model(name)
        return cls(
            model,
            tokenizer,
            preprocess,
            name=full_name,
            batch_size=batch_size,
            fast=fast,
            resize_on_device=resize_on_device,
        )

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Embed texts; what is longer than the model's context is cut."""
        return self._in_batches(
            texts, lambda batch: self._model.encode_text(self._tokenizer(list(batch)).to(self._device))
        )

    def images(self, images: Sequence["PIL.Image.Image"]) -> Float32[np.ndarray, "n d"]:
        """Embed images, prepared in threads: Pillow's resampling leaves the interpreter lock."""
        with ThreadPoolExecutor() as threads:
            return self.embed(list(threads.map(self.prepare, images)))

    def prepare(self, image: "PIL.Image.Image") -> Prepared:
        """Resize and crop as the model was trained, unless the device will: it gets bytes, no normalised numbers.

        What is much larger than the network's size is resized here all the same, or a batch would fill the memory.
        """
        if self._parts is None:
            prepared: np.ndarray = self._preprocess(image).numpy()
            return prepared
        if self._framing is not None and image.width * image.height <= (DRAFT_MARGIN * max(self._framing.size)) ** 2:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)
        return np.asarray(self._parts.resize(image), np.uint8)

    def embed(self, prepared: Sequence[Prepared]) -> Float32[np.ndarray, "n d"]:
        """Embed prepared images."""
        order = sorted(range(len(prepared)), key=lambda i: prepared[i].shape)  # those of one size are resized at once
        vectors = self._in_batches([prepared[i] for i in order], lambda batch: self._network(self._on_device(batch)))
        return vectors[np.argsort(order)]

    def image_side(self) -> int | None:
        """As the model's configuration has it."""
        size = getattr(self._model.visual, "image_size", None)
        return max(size) if isinstance(size, tuple) else size

    def batch_rows(self) -> int:
        """The batch size it was made with; on a GPU several of them, so that sending overlaps computing."""
        return self.batch_size * (BATCHES_IN_FLIGHT if self._device.type == "cuda" else 1)

    def most_images_per_second(self) -> float | None:
        """Of a GPU, measured in a moment. A processor decodes, too, and has others to serve: no figure holds there."""
        import PIL.Image

        side = self.image_side()
        if side is None or self._device.type == "cpu":
            return None
        blank = self.prepare(PIL.Image.new("RGB", (side, side)))
        return self._network.most_images_per_second(self._on_device([blank]))

    def _on_device(self, batch: Sequence[Prepared]) -> Any:
        """Prepared images as the network takes them, [n c h w]."""
        import torch

        if self._pixels is not None:
            return self._pixels(batch)
        return torch.from_numpy(np.stack(batch)).to(self._device)

    def _in_batches(self, items: Sequence[Any], encode: Callable[[Sequence[Any]], Any]) -> Float32[np.ndarray, "n d"]:
        import torch

        if not items:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode():
            batches = [  # a GPU computes one of them while the next is gathered and sent: nothing waits in between
                encode(items[start : start + self.batch_size]).float()
                for start in range(0, len(items), self.batch_size)
            ]
            return unit_rows(torch.cat(batches).cpu().numpy())


class _Network:
    """The image network. When fast: in bfloat16, and compiled once many full batches came (others would recompile)."""

    def __init__(self, encode: Callable[[Any], Any], device: Any, *, rows: int, fast: bool | None):
        import torch

        self._encode = encode
        self._device = device
        self._rows = rows
        self.is_fast = _has_bfloat16(device) if fast is None else fast
        self._full_batches = 0
        self._compile: Callable[[Callable[[Any], Any]], Callable[[Any], Any]] = torch.compile
        self._compiled: Callable[[Any], Any] | None = None

    def most_images_per_second(self, pixels: Any) -> float | None:
        """By the operations of these, and the rate of a large plain matrix product in the same numbers."""
        import torch

        numbers = torch.bfloat16 if self.is_fast else torch.float32
        with suppress(Exception):  # of any kind, out of a network of any make: a build does not fail for a figure
            return matrix_rate(self._device, numbers) * len(pixels) / count_operations(self._encode, pixels)
        return None

    def __call__(self, pixels: Any) -> Any:
        """Features [n d] of normalised pixels [n c h w]."""
        import torch

        if not self.is_fast:
            return self._encode(pixels)
        with torch.autocast(self._device.type, torch.bfloat16):
            return self._fast_encode(pixels)(pixels)

    def _fast_encode(self, pixels: Any) -> Callable[[Any], Any]:
        if len(pixels) != self._rows:
            return self._encode
        self._full_batches += 1
        if self._full_batches == COMPILE_AFTER:
            self._compiled = self._try_to_compile(pixels)
        return self._compiled or self._encode

    def _try_to_compile(self, pixels: Any) -> Callable[[Any], Any] | None:
        """None where there is no compiler, or the network is one that cannot be compiled."""
        try:
            compiled = self._compile(self._encode)
            compiled(pixels)
        except Exception as error:  # whatever its back end raises
            logging.getLogger(__name__).warning("the network runs uncompiled: %s", str(error).partition("\n")[0])
            return None
        return compiled


def _has_bfloat16(device: Any) -> bool:
    """GPUs older than Ampere only emulate it, slower than float32. A processor stays with open_clip's own numbers."""
    import torch

    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class DeferredEmbedder:
    """An embedder that is loaded when something is first embedded: showing or word search need no torch.

    Tries `names` in turn; the first that loads with the fingerprint of the knowledge base is used.
    """

    def __init__(
        self, names: Sequence[str], *, dim: int, fingerprint: str, load: Callable[[str], Embedder] | None = None
    ):
        assert names, "an embedder needs a name"
        self.name = names[0]
        self.dim = dim
        self.fingerprint = fingerprint
        self._names = names
        self._load = load or ClipEmbedder.load
        self._loaded: Embedder | None = None

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Embed texts."""
        return self._embedder().texts(texts)

    def images(self, images: Sequence["PIL.Image.Image"]) -> Float32[np.ndarray, "n d"]:
        """Embed images."""
        return self._embedder().images(images)

    def prepare(self, image: "PIL.Image.Image") -> Prepared:
        """Prepare one image."""
        return self._embedder().prepare(image)

    def embed(self, prepared: Sequence[Prepared]) -> Float32[np.ndarray, "n d"]:
        """Embed prepared images."""
        return self._embedder().embed(prepared)

    def image_side(self) -> int | None:
        """What the network looks at."""
        return self._embedder().image_side()

    def batch_rows(self) -> int:
        """How many images are best embedded at once."""
        return self._embedder().batch_rows()

    def most_images_per_second(self) -> float | None:
        """What the network could do at best."""
        embedder = self._embedder()
        return embedder.most_images_per_second() if isinstance(embedder, Measurable) else None

    def load_now(self) -> None:
        """Load the model, unless it is loaded."""
        self._embedder()

    def __reduce__(self) -> tuple[Any, ...]:
        """It travels to another process as names, not as a loaded model."""
        again = partial(DeferredEmbedder, dim=self.dim, fingerprint=self.fingerprint, load=self._load)
        return again, (list(self._names),)

    def _embedder(self) -> Embedder:
        with _LOADING:
            if self._loaded is None:
                self._loaded = self._first_that_fits()
            return self._loaded

    def _first_that_fits(self) -> Embedder:
        *others, last = self._names
        for name in others:
            with suppress(ModelError, KnowledgeBaseError):
                return self._checked(name)
        return self._checked(last)

    def _checked(self, name: str) -> Embedder:
        embedder = self._load(name)
        check_fingerprint(embedder, self.fingerprint)
        return embedder


def check_fingerprint(embedder: Embedder, fingerprint: str) -> None:
    """Refuse an embedder other than the one that made the vectors."""
    if embedder.fingerprint != fingerprint:
        raise KnowledgeBaseError(
            f"the knowledge base was made by a model with fingerprint {fingerprint[:12]}, and {embedder.name!r} has "
            f"{embedder.fingerprint[:12]}: their vectors cannot be compared; name the model it was made with, or build "
            "another knowledge base"
        )


def unit_rows(vectors: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Rows at length one; a row that has none (zero, infinite, NaN) is all NaN."""
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        units = np.where(np.isfinite(norms) & (norms > 0), vectors / norms, np.nan)
    return units.astype(np.float32)


def decode_image(encoded: bytes, *, max_pixels: int = MAX_PIXELS) -> "PIL.Image.Image":
    """Decode to RGB. CorpusError, saying why, for what is not an image, is cut short, or would fill the memory."""
    return decode_scaled(encoded, side=None, max_pixels=max_pixels)[0]


def decode_scaled(
    encoded: bytes, *, side: int | None, max_pixels: int = MAX_PIXELS
) -> tuple["PIL.Image.Image", tuple[int, int]]:
    """`decode_image`, and the width and height of the file.

    A JPEG that is much larger than `side`, the pixels that are needed of it, comes at a fraction of its size
    (`DRAFT_MARGIN`), which its decoder does in a fraction of the time.
    """
    with _opened(encoded, max_pixels) as image:
        size = (image.width, image.height)
        if side is not None:
            image.draft("RGB", (DRAFT_MARGIN * side, DRAFT_MARGIN * side))
        return to_8_bits(image).convert("RGB"), size


def to_8_bits(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Grey of 16 bits in 8, which Pillow's own conversion would cut off at 255; any other image as it is."""
    if image.mode not in ("I;16", "I"):
        return image
    grey = image.point(lambda level: level / 257 + 0.5).convert("L")
    grey.info.pop("transparency", None)  # a level of 16 bits
    return grey


def image_size(encoded: bytes) -> tuple[int, int]:
    """Width and height by the header alone. CorpusError as from `decode_image`, as far as a header tells."""
    with _opened(encoded, MAX_PIXELS) as image:
        return image.width, image.height


@contextmanager
def _opened(encoded: bytes, max_pixels: int) -> Iterator["PIL.Image.Image"]:
    """The image, of an acceptable size, not decoded yet. What the block raises is put down to the file, too."""
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise CorpusError(f"the image has {pixels} pixels, and more than {max_pixels} are refused")
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise CorpusError(f"the image is {image.width} by {image.height}, too narrow for a model to look at")
            yield image
    except CorpusError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise CorpusError(f"the image has more than the {max_pixels} pixels that are let through") from error
    except Exception as error:  # a decoder on a hostile file may raise anything, and it is always the file's fault
        reason = _without_addresses(f"{type(error).__name__}: {error}")
        raise CorpusError(f"the image does not decode: {reason}") from error


def _without_addresses(text: str) -> str:
    """The same text in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


# Finding a model


def open_model(name: str) -> tuple[Any, Any, Any, str]:
    """(model, tokenizer, preprocessing, full name) of whatever `ClipEmbedder.load` takes. ModelError otherwise."""
    folder = _model_folder(name)
    if folder is not None:
        return *_open(f"local-dir:{folder}", None), str(folder)
    if name.startswith("hf-hub:"):
        return *_open(name, None), name
    architecture, weights = _named_weights(name)
    return *_open(architecture, None if weights == UNTRAINED else weights), f"{architecture}/{weights}"


def _model_folder(name: str) -> Path | None:
    """The folder with open_clip_config.json that `name` means, or None when it does not name a folder."""
    path = Path(name.removeprefix("local-dir:"))
    if not path.is_dir():
        if name.startswith("local-dir:"):
            raise ModelError(f"there is no folder {str(path)!r}; give the folder that holds {CONFIG_NAME}")
        return None
    for folder in (path, path / "clip"):
        if (folder / CONFIG_NAME).is_file():
            if not any(folder.glob("*.safetensors")):
                raise ModelError(
                    f"{folder} has no .safetensors weights; pickled ones are never loaded, so convert them"
                )
            return folder.resolve()
    raise ModelError(f"{str(path)!r} is not a model: neither it nor its clip/ holds {CONFIG_NAME}")


def _named_weights(name: str) -> tuple[str, str]:
    """Architecture and weights tag. ModelError with the nearest names when open_clip does not know one of them."""
    import open_clip

    architecture, _, weights = name.partition("/")
    if architecture not in open_clip.list_models():
        near = _nearest(architecture, open_clip.list_models())
        raise ModelError(f"{name!r} is neither a folder nor a model that open_clip knows{near}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not weights:
        return architecture, _first_fitting_tag(architecture, tags)
    if weights != UNTRAINED and weights not in tags:
        raise ModelError(f"{architecture} has no weights {weights!r}{_nearest(weights, [*tags, UNTRAINED])}")
    twin = f"{architecture}-quickgelu"
    if weights in open_clip.list_pretrained_tags_by_model(twin) and not _fits(architecture, weights):
        raise ModelError(f"the weights {weights!r} fit the activation of {twin}: ask for {twin}/{weights}")
    return architecture, weights


def _first_fitting_tag(architecture: str, tags: Sequence[str]) -> str:
    """OpenAI's weights fit only the quickgelu twin of an architecture; open_clip would load them and merely warn."""
    for tag in tags:
        if _fits(architecture, tag):
            return tag
    raise ModelError(f"{architecture} has no published weights; ask for {architecture}/{UNTRAINED} or give a folder")


def _fits(architecture: str, tag: str) -> bool:
    """Whether the weights were trained with the activation that the architecture has."""
    from open_clip import get_model_config, get_pretrained_cfg

    wanted = bool((get_model_config(architecture) or {}).get("quick_gelu", False))
    return bool(get_pretrained_cfg(architecture, tag).get("quick_gelu", False)) == wanted


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    folded = {k.lower().replace("/", "-"): k for k in known}
    near = [folded[n] for n in difflib.get_close_matches(name.lower().replace("/", "-"), folded, n=3, cutoff=0.4)]
    return f"; did you mean {', '.join(near)}?" if near else f"; it knows {', '.join(known[:8])} and others"


def _open(name: str, pretrained: str | None) -> tuple[Any, Any, Any]:
    """(model, tokenizer, preprocessing). The random weights of an untrained model are the same every time."""
    import open_clip
    import torch
    from safetensors import SafetensorError

    try:
        with torch.random.fork_rng(devices=[]), _quiet_files(), _quiet_retries():
            torch.manual_seed(0)
            model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
            return model, open_clip.get_tokenizer(name), preprocess
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        what = f"{name}/{pretrained}" if pretrained else name.removeprefix("local-dir:")
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"cannot load the model {what!r}: {reason}; check the files, or the network if they are to be fetched"
        ) from error


@contextmanager
def _quiet_files() -> Iterator[None]:
    """open_clip's tokenizer leaves its vocabulary file for the collector to close, which Python reports."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """The Hub's client reports every attempt twice; what came of them is in the error."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)


# Fingerprint
#
# It covers what the vectors are meant to be, not how a machine comes near that: bfloat16, compiling and resizing on the
# device are left out. Their vectors agree with the plain ones to 0.999 in cosine (0.9999 was seen), and a knowledge
# base that a GPU has built must take the queries of a laptop.


def _fingerprint(model: Any, tokenizer: Any, preprocess: Any) -> str:
    """A hash of weights, tokenizer, preprocessing and dtype: all that decides a vector apart from the machine."""
    state = blake2b(digest_size=16)
    for part in weight_bytes(model.state_dict()):
        state.update(part)
    state.update(tokenizer_identity(tokenizer))
    state.update(_without_addresses(repr(preprocess)).encode())
    return state.hexdigest()


def weight_bytes(tensors: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """Name, dtype, shape and bytes of every tensor, by name, to be hashed."""
    import torch

    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tokenizer_identity(tokenizer: Any) -> bytes:
    """Vocabulary, merges and settings, plus the ids of a probe text, which shows what settings do not."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps those of transformers
    if hasattr(inner, "backend_tokenizer"):
        vocabulary = inner.backend_tokenizer.to_str()
    elif hasattr(inner, "get_vocab"):
        vocabulary = json.dumps(sorted(inner.get_vocab().items()))
    else:
        merges = sorted((rank, pair) for pair, rank in inner.bpe_ranks.items())
        vocabulary = json.dumps([sorted(inner.encoder.items()), merges])
    probe = tokenizer(["The Quick brown fox's 42 jumps, (twice)! caf\u00e9 \U0001f408 \u4f60\u597d " + "very " * 200])
    settings = [type(tokenizer).__name__, getattr(tokenizer, "context_length", None), probe.tolist()]
    return f"{json.dumps(settings)}\n{vocabulary}".encode()
