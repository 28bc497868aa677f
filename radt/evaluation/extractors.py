"""What turns pictures into features to be compared: Inception, any open_clip or timm model, or our own recogniser.

A name says which: `inception`, `inception:WEIGHTS.pth`, `open_clip:NAME_OR_FOLDER`, `timm:NAME[:WEIGHTS]`,
`timm:FOLDER`, `recognizer[:FOLDER]`. Only over Inception is a Frechet distance called FID.

All but open_clip's models, which keep their own preprocessing, see whole pictures resized as clean-fid does (Parmar et
al. 2022): by Pillow's bicubic filter with antialiasing, in floating point, nothing cropped.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32

from index.errors import ConfigError, MissingExtraError, ModelError
from index.text import writable

if TYPE_CHECKING:
    from PIL.Image import Image

    from radt.evaluation.emoji_recognizer import EmojiRecognizer

Kind: TypeAlias = Literal["inception", "open_clip", "timm", "recognizer"]

BATCH_ROWS = 16
IMAGENET_CLASSES = 1000
INCEPTION_SIDE = 299
INCEPTION_WIDTH = 2048
INCEPTION_SHA256 = "6726825d"  # how the digest of torch-fidelity's file begins, as its name has it
TENSORS_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch/serialization.py, goes before what a caller of torch.load says
CMMD_MODEL = "ViT-L-14-336-quickgelu/openai"  # of Jayasumana et al. 2024, by its full name in open_clip
UNTRAINED = "untrained"  # fixed random weights in the place of WEIGHTS, for tests
FORMS = "inception[:WEIGHTS.pth], open_clip:NAME_OR_FOLDER, timm:NAME[:WEIGHTS], timm:FOLDER or recognizer[:FOLDER]"
HINT = "the extra brings it: pip install 'radt[eval]'"

Pixels = Float32[np.ndarray, "n side side 3"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Extracted:
    """Features of pictures and, where the extractor is a classifier, its logits."""

    features: Float32[np.ndarray, "n d"]
    logits: Float32[np.ndarray, "n c"] | None = None


@runtime_checkable
class Extractor(Protocol):
    """Pictures to features. Those of two digests cannot be compared: `digest` covers weights, network, preprocessing.

    `name` can be written as UTF-8, with escapes where what was typed cannot. `side` is that of the square which the
    network sees, in pixels; `resize` says in words how a picture becomes one; `width` is the number of features.
    `class_words` says in which words a caption may name a class, and which logit it has; empty where there are no
    classes or no words for them. `class_numbers` says the same of numbers: empty where nobody says in which order the
    classes stand.
    """

    name: str
    kind: Kind
    side: int
    resize: str
    width: int
    digest: str
    class_words: Mapping[str, int]
    class_numbers: Mapping[int, int]

    def extract(self, pictures: Sequence["Image"]) -> Extracted:
        """Features of RGB pictures of any sizes."""
        ...


def load_extractor(name: str) -> Extractor:
    """The extractor of this name (see the module). ConfigError for another form, ModelError for weights not there."""
    scheme, _, rest = name.partition(":")
    loaders: dict[str, Callable[[str], Extractor]] = {
        "inception": lambda rest: InceptionExtractor.load(Path(rest) if rest else None),
        "open_clip": lambda rest: OpenClipExtractor.load(_required(name, rest)),
        "timm": lambda rest: TimmExtractor.load(_required(name, rest)),
        "recognizer": lambda rest: RecognizerExtractor.load(Path(rest) if rest else None),
    }
    if scheme not in loaders:
        near = difflib.get_close_matches(scheme, loaders, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"there is no extractor {name!r}: {hint}It is one of {FORMS}")
    return loaders[scheme](rest)


def _required(name: str, rest: str) -> str:
    if not rest:
        raise ConfigError(f"the extractor {name!r} needs to be told which model: it is one of {FORMS}")
    return rest


def resize_clean(picture: "Image", side: int) -> Float32[np.ndarray, "side side 3"]:
    """A whole RGB picture as a square, in 0 to 255: Pillow's bicubic in floating point (Parmar et al. 2022, section 3).

    The filter widens as it shrinks, so that nothing aliases, and nothing is rounded to 8 bits; overshoot is cut off.
    """
    from PIL import Image

    channels = np.moveaxis(np.asarray(picture.convert("RGB"), np.float32), -1, 0)
    resized = [
        np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)) for channel in channels
    ]
    return np.clip(np.stack(resized, axis=-1), 0, 255)


def clean_resize_words(side: int) -> str:
    """How `resize_clean` is named in results."""
    return f"whole picture to {side}x{side}, PIL bicubic with antialias, in float (clean-fid)"


class InceptionExtractor:
    """Inception-v3 of 2015 with 2048 features and 1008 logits without bias: torch-fidelity's port, as in FID.

    `is_published`: its weights are the file that FIDs are measured with, and no others of the same shape.
    """

    kind: Kind = "inception"
    side = INCEPTION_SIDE
    width = INCEPTION_WIDTH
    class_words: Mapping[str, int] = MappingProxyType({})
    class_numbers: Mapping[int, int] = MappingProxyType({})

    def __init__(self, network: Any, *, name: str, is_published: bool) -> None:
        self.name, self.is_published = writable(name), is_published
        self.resize = clean_resize_words(self.side)
        self._device = _device()
        self._network = network.eval().to(self._device)
        self.digest = _digest(self._network, self.resize)

    @classmethod
    def load(cls, weights: Path | None = None) -> "InceptionExtractor":
        """From torch-fidelity's or torchmetrics' weights file; without one, that is downloaded once."""
        with _extra("torch-fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        path = _downloaded_inception() if weights is None else weights
        _read_weights(path)  # it is loaded below in a way that would run what a file tells it to
        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise ModelError(
                f"{str(path)!r} holds no weights of this Inception ({_line(error)}): name torch-fidelity's file "
                "weights-inception-2015-12-05-6726825d.pth"
            ) from error
        digest = sha256(path.read_bytes()).hexdigest()
        name = "inception" if weights is None else f"inception:{weights}"
        return cls(network, name=name, is_published=digest.startswith(INCEPTION_SHA256))

    def extract(self, pictures: Sequence["Image"]) -> Extracted:
        """The pool features and the logits."""
        parts = [self._forward(pixels) for pixels in _batches(pictures, self.side)]
        return Extracted(
            features=np.concatenate([features for features, _ in parts]),
            logits=np.concatenate([logits for _, logits in parts]),
        )

    def _forward(self, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
        """torch-fidelity's own forward less its resize and its demand for 8 bits; it runs its layers in their order."""
        import torch

        *layers, _ = self._network.children()
        with torch.inference_mode():
            x = (_on(pixels, self._device) - 128) / 128
            for layer in layers:
                x = layer(x)
            features = x.flatten(1)
            logits = features @ self._network.fc.weight.T
            return features.float().cpu().numpy(), logits.float().cpu().numpy()


class OpenClipExtractor:
    """The image half of an open_clip model, whose texts can be compared with its pictures. Features have length 1.

    `is_published`: it is the one that CMMDs are published with. `bundle` is the digest of the bundle whose prompts it
    reads, None where it was not named by one. `fingerprint` is the embedder's, as knowledge bases and records have it;
    `digest` also covers what the network does with its weights.
    """

    kind: Kind = "open_clip"
    class_words: Mapping[str, int] = MappingProxyType({})
    class_numbers: Mapping[int, int] = MappingProxyType({})

    def __init__(self, embedder: Any, *, name: str, resize: str, structure: str, bundle: str | None = None) -> None:
        self._embedder = embedder
        self.bundle = bundle
        self.name, self.resize = writable(name), resize
        self.is_published = embedder.name == CMMD_MODEL
        self.side = embedder.image_side() or 0
        self.width = embedder.dim
        self.fingerprint: str = embedder.fingerprint
        self.digest = _digest_of(self.fingerprint, structure)

    @classmethod
    def load(cls, name: str) -> "OpenClipExtractor":
        """Whatever `--model` takes: NAME/WEIGHTS, hf-hub:..., or a folder."""
        from index.embedder import ClipEmbedder, open_model

        model, tokenizer, preprocess, full_name = open_model(name)
        embedder = ClipEmbedder(model, tokenizer, preprocess, name=full_name, fast=False, resize_on_device=False)
        return cls(
            embedder,
            name=f"open_clip:{name}",
            resize=_steps(preprocess),
            structure=_structure(model),
            bundle=_bundle_of(full_name),
        )

    def extract(self, pictures: Sequence["Image"]) -> Extracted:
        """Unit vectors of pictures."""
        return Extracted(features=self._embedder.images([picture.convert("RGB") for picture in pictures]))

    def texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Unit vectors of texts."""
        return self._embedder.texts(texts)


def _bundle_of(full_name: str) -> str | None:
    """The digest of the bundle that a folder of open_clip's form lies in, if it reads that bundle's prompts."""
    from radt.bundle import CLIP_FOLDER, read_info

    clip = Path(full_name)
    if clip.name != CLIP_FOLDER or not (clip.parent / "bundle.json").is_file():
        return None
    with suppress(ModelError):  # of another format, say: its encoder is read all the same
        info = read_info(clip.parent)
        return info.digest if info.text_encoder is None else None
    return None


def _steps(preprocess: Any) -> str:
    """What an open_clip preprocessing does to the shape of a picture, in words."""
    steps = [each for each in getattr(preprocess, "transforms", [preprocess]) if hasattr(each, "size")]
    words = []
    for step in steps:
        size = step.size if isinstance(step.size, int) else "x".join(map(str, step.size))
        how = f" {step.interpolation.value}" if hasattr(step, "interpolation") else ""
        words.append(f"{type(step).__name__} {size}{how}")
    return f"the model's own: {', '.join(words)}"


class TimmExtractor:
    """A timm model: its features before the classifier, after pooling, and its logits where it has classes."""

    kind: Kind = "timm"

    def __init__(self, network: Any, *, name: str) -> None:
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(network)
        self.name = writable(name)
        self.side = int(config["input_size"][-1])
        self.resize = clean_resize_words(self.side)
        self._device = _device()
        self._network = network.eval().to(self._device)
        self._mean, self._std = (np.array(config[key], np.float32) for key in ("mean", "std"))
        preprocessing = f"{self.resize} {config['mean']} {config['std']}"
        self.digest = _digest(self._network, f"{preprocessing}\n{_structure(self._network)}")
        self.class_words: Mapping[str, int] = _timm_words(network)
        self.class_numbers: Mapping[int, int] = {i: i for i in range(network.num_classes)} if self.class_words else {}
        self.width = self._forward(np.zeros((1, self.side, self.side, 3), np.float32))[0].shape[1]

    @classmethod
    def load(cls, which: str) -> "TimmExtractor":
        """`NAME`, whose published weights are fetched, `NAME:FILE` with a checkpoint, or a folder with config.json."""
        with _extra("timm"):
            import timm
        import torch

        name, colon, path = ("", "", "") if Path(which).is_dir() else which.rpartition(":")
        model = name if colon and not which.startswith("hf-hub:") else which
        path = path if model == name else ""
        if path not in ("", UNTRAINED) and not Path(path).is_file():
            raise ModelError(
                f"there is no file {path!r}: give the weights of {model!r}, or its name alone to fetch them"
            )
        asked: dict[str, Any] = {"pretrained": True}
        if path:
            asked = {} if path == UNTRAINED else {"checkpoint_path": path}
        try:
            with torch.random.fork_rng(devices=[]), _tensors_alone():
                torch.manual_seed(0)
                full = f"local-dir:{model}" if Path(model).is_dir() else model
                network = timm.create_model(full, **asked)
        except Exception as error:  # of the Hub, of a file, of timm's registry: each has its own kinds
            near = difflib.get_close_matches(model, timm.list_models(), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near and near[0] != model else ""
            raise ModelError(
                f"cannot load the timm model {model!r}{hint}: {_line(error)}; name a model of timm, with a file of "
                "weights as timm:NAME:FILE where they cannot be fetched"
            ) from error
        return cls(network, name=f"timm:{which}")

    def extract(self, pictures: Sequence["Image"]) -> Extracted:
        """Pooled features, and logits where there are classes."""
        parts = [self._forward(pixels) for pixels in _batches(pictures, self.side)]
        logits = [each for _, each in parts if each is not None]
        return Extracted(
            features=np.concatenate([features for features, _ in parts]),
            logits=np.concatenate(logits) if logits else None,
        )

    def _forward(self, pixels: Pixels) -> tuple[np.ndarray, np.ndarray | None]:
        import torch

        with torch.inference_mode():
            inside = self._network.forward_features(_on((pixels / 255 - self._mean) / self._std, self._device))
            features = self._network.forward_head(inside, pre_logits=True).flatten(1).float().cpu().numpy()
            has_classes = getattr(self._network, "num_classes", 0) > 0
            logits = self._network.forward_head(inside).float().cpu().numpy() if has_classes else None
            return features, logits


def _timm_words(network: Any) -> dict[str, int]:
    """Names of the classes: those in its own config, else ImageNet's where their number says that they are its."""
    from timm.data import ImageNetInfo

    count = int(getattr(network, "num_classes", 0))
    own = (getattr(network, "pretrained_cfg", None) or {}).get("label_names")
    info = ImageNetInfo()
    if isinstance(own, list | tuple) and len(own) == count and list(own) != list(info.label_names()):
        names = [[str(name)] for name in own]
    else:
        names = [info.index_to_description(i).split(",") for i in range(count)] if count == IMAGENET_CLASSES else []
    words: dict[str, int] = {}
    for column, those in enumerate(names):
        for name in those:
            words.setdefault(name.strip().lower(), column)
    return words


class RecognizerExtractor:
    """Our own recogniser of emoji: knows which of them a picture shows, and nothing of photographs."""

    kind: Kind = "recognizer"

    def __init__(self, recognizer: "EmojiRecognizer", *, name: str) -> None:
        self._recognizer = recognizer
        self.name = writable(name)
        self.side = recognizer.network.config.image_size
        self.resize = f"{clean_resize_words(self.side)}, rounded to 8 bits"
        self.digest = _digest_of(recognizer.digest, self.resize)
        self.width = recognizer.network.config.feature_width
        self.class_words: Mapping[str, int] = _emoji_words(recognizer.classes)
        self.class_numbers: Mapping[int, int] = {each: column for column, each in enumerate(recognizer.classes)}

    @classmethod
    def load(cls, folder: Path | None = None) -> "RecognizerExtractor":
        """From its folder; without one, the one inside the package."""
        from radt.evaluation.emoji_recognizer import EmojiRecognizer

        recognizer = EmojiRecognizer.load(folder, device=str(_device()))
        return cls(recognizer, name="recognizer" if folder is None else f"recognizer:{folder}")

    def extract(self, pictures: Sequence["Image"]) -> Extracted:
        """Its features and logits."""
        rounded = [np.rint(pixels).astype(np.uint8) for pixels in _batches(pictures, self.side)]
        return Extracted(
            features=np.concatenate([self._recognizer.features(each) for each in rounded]),
            logits=np.concatenate([self._recognizer.logits(each) for each in rounded]),
        )


def _emoji_words(classes: Sequence[int]) -> dict[str, int]:
    """The nouns that our scenes name emoji by; of those that several classes share, the first."""
    from radt.corpora.emoji import load_entities
    from radt.corpora.wording import noun

    columns = {class_id: column for column, class_id in enumerate(classes)}
    words: dict[str, int] = {}
    for entity in load_entities():
        if entity.class_id in columns:
            words.setdefault(noun(entity).lower(), columns[entity.class_id])
    return words


# Shared


def _batches(pictures: Sequence["Image"], side: int) -> Iterator[Pixels]:
    for start in range(0, len(pictures), BATCH_ROWS):
        yield np.stack([resize_clean(picture, side) for picture in pictures[start : start + BATCH_ROWS]])


def _on(pixels: Pixels, device: Any) -> Any:
    """[n c h w] on the device."""
    import torch

    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _digest(network: Any, preprocessing: str) -> str:
    from index.embedder import weight_bytes

    state = blake2b(preprocessing.encode(), digest_size=16)
    for part in weight_bytes(network.state_dict()):
        state.update(part)
    return state.hexdigest()


def _digest_of(*parts: str) -> str:
    return blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _structure(network: Any) -> str:
    """Class and plain settings of every module: what decides features besides the weights, such as an activation."""
    lines = []
    for name, module in network.named_modules():
        settings = {key: value for key, value in sorted(vars(module).items()) if _is_setting(key, value)}
        lines.append(f"{name} {type(module).__name__} {settings}")
    return "\n".join(lines)


def _is_setting(key: str, value: Any) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    is_plain = all(isinstance(each, str | int | float | None) for each in values)
    return is_plain and key != "training" and not key.startswith("_")


def _read_weights(path: Path) -> Mapping[str, Any]:
    """Tensors of a file that torch wrote; nothing in it is run. ModelError for any other."""
    import torch

    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}: give the weights' own path")
    try:
        weights: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none makes of the reader
        raise ModelError(f"{str(path)!r} is no file of weights ({_line(error)}): copy it again") from error
    return weights


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Inside, torch reads tensors alone and runs nothing of a file, whatever is asked of it: not every timm asks so."""
    before = os.environ.get(TENSORS_ALONE)
    os.environ[TENSORS_ALONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TENSORS_ALONE]
        else:
            os.environ[TENSORS_ALONE] = before


def _downloaded_inception() -> Path:
    """torch-fidelity's weights in torch's cache, fetched if need be and checked by the digest in their name."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = str(URL_INCEPTION_V3).rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        try:
            torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"Inception's weights are not here and cannot be fetched ({_line(error)}): bring {file} from "
                f"{URL_INCEPTION_V3} and name it as inception:FILE, or use another extractor, such as open_clip:FOLDER"
            ) from error
    return path


@contextmanager
def _extra(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"this extractor needs {package}, which is not installed: {HINT}") from error


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:;") if lines else type(error).__name__
