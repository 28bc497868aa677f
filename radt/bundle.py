"""A model on disk: `bundle.json`, the text and image encoder in `clip/`, and one folder a stage (DESIGN, "Bundle").

Everything is JSON and safetensors. Next on the main path: `radt/pipeline.py`, which draws with a loaded bundle.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from index.atomic import new_folder
from index.config import from_dict, to_dict
from index.errors import ConfigError, ModelError
from radt.diffusion.denoiser import Prediction
from radt.diffusion.schedule import NoiseSchedule
from radt.settings import GenerateSettings

if TYPE_CHECKING:
    from radt.text_encoder import TextEncoder
    from radt.unet.unet import UNet, UNetConfig

T = TypeVar("T")
FORMAT = 1
CLIP_FOLDER = "clip"
TEXT_FOLDER = "text"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class FastTwin:
    """A stage distilled until a step costs one row: its folder, and the number of DDIM steps that it takes (row I10).

    `steps` is None where guidance alone was distilled: then any sampler and number of steps will do.
    """

    name: str
    steps: int | None = None
    highest_guidance: float  # the largest weight that it was taught


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInfo:
    """One generator of the cascade: its folder, and what its network was trained to predict under which noise."""

    name: str
    prediction: Prediction = "v"
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    fast: FastTwin | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """A file of the bundle, its path relative to it with forward slashes, and blake2b of its bytes."""

    path: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleInfo:
    """`bundle.json`. `sampling` holds the settings that suit this model; a request may change any of them.

    `text_encoder` is None for the text tower in `clip/`, "text" for a transformers model in the bundle's own `text/`,
    and otherwise the name of one.
    """

    name: str
    stages: tuple[StageInfo, ...]
    sampling: GenerateSettings = field(default_factory=GenerateSettings)
    text_encoder: str | None = None
    files: tuple[FileDigest, ...] = ()
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Names the weights and how they are read; two bundles with the same digest draw the same pictures."""
        stages = to_dict(self)["stages"]
        for stage in stages:
            if stage["fast"] is None:  # as bundles were named before there were twins
                del stage["fast"]
        facts = {"stages": stages, "files": sorted((file.path, file.digest) for file in self.files)}
        if self.text_encoder is not None:
            facts["text_encoder"] = self.text_encoder
        return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Bundle:
    """A loaded bundle: the networks are in evaluation mode and ask for no gradients."""

    folder: Path
    info: BundleInfo
    unets: tuple["UNet", ...]  # one a stage
    twins: tuple["UNet | None", ...]  # the distilled network of each stage that has one
    text_encoder: "TextEncoder"


def default_bundle() -> Path:
    """The demonstration model inside the package."""
    return Path(str(files("radt"))) / "models" / "emoji-demo"


def find_bundle(folder: str | Path | None = None) -> Path:
    """The folder to load: `folder`, or the demonstration model. A ModelError says what is missing."""
    path = default_bundle() if folder is None else Path(folder)
    if (path / "bundle.json").is_file():
        return path
    if folder is None:
        raise ModelError("this copy of radt has no demonstration model inside; name a model folder with --model")
    what = "has no bundle.json" if path.is_dir() else "does not exist"
    raise ModelError(f"model folder {str(path)!r} {what}; --model names a folder that `radt train` made")


def read_info(folder: Path) -> BundleInfo:
    """Read `bundle.json` alone: no weights, no torch work."""
    values = _read_json(folder / "bundle.json")
    version = values.get("format")
    if version != FORMAT:
        raise ModelError(f"model {str(folder)!r} has format {version!r} and this radt reads {FORMAT}: update radt")
    info = _parse(BundleInfo, values, folder / "bundle.json")
    if not info.stages:
        raise ModelError(f"model {str(folder)!r} lists no stages in bundle.json")
    return info


def load_bundle(folder: str | Path | None = None, *, device: str = "cpu") -> Bundle:
    """Load a bundle onto `device`. Weights that do not fit their configuration are a ModelError naming both shapes."""
    from radt.clip_text import read_plain_clip
    from radt.text_encoder import load_text_encoder

    path = find_bundle(folder)
    info = read_info(path)
    unets = tuple(load_unet(path / stage.name).to(device) for stage in info.stages)
    twins = tuple(load_unet(path / stage.fast.name).to(device) if stage.fast else None for stage in info.stages)
    tuned = text_encoder_of(path, info)
    plain = read_plain_clip(path / CLIP_FOLDER if tuned is None else Path(tuned), device=device)
    encoder = plain or load_text_encoder(path / CLIP_FOLDER, tuned, device=device)
    for stage, unet in zip(info.stages, unets, strict=True):
        _check_widths(stage.name, unet, encoder, path)
    return Bundle(folder=path, info=info, unets=unets, twins=twins, text_encoder=encoder)


def text_encoder_of(folder: Path, info: BundleInfo) -> str | None:
    """Which text encoder reads the prompts: a folder or a name for transformers, or None, the text tower in `clip/`."""
    return str(folder / TEXT_FOLDER) if info.text_encoder == TEXT_FOLDER else info.text_encoder


def load_unet(folder: Path) -> "UNet":
    """One stage: `config.json` and `model.safetensors`. Half-precision weights run in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from radt.unet.unet import UNet, UNetConfig

    unet = UNet(_parse(UNetConfig, _read_json(folder / "config.json"), folder / "config.json"))
    path = folder / WEIGHTS
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise ModelError(f"{str(path)!r} is missing: the model folder is not complete") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(path)!r} cannot be read ({error}): copy the model again") from error
    check_shapes({name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}, state, path)
    unet.load_state_dict(state)
    return unet.eval().requires_grad_(requires_grad=False)


def check_shapes(wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Any], path: Path) -> None:
    """Raise a ModelError that names the first tensor that is missing, superfluous, or of another shape."""
    for name, shape in wanted.items():
        if name not in state:
            raise ModelError(f"{str(path)!r} has no tensor {name!r} of shape {shape}: it is of another network")
        if tuple(state[name].shape) != shape:
            found = tuple(state[name].shape)
            raise ModelError(f"{str(path)!r} has {name!r} of shape {found} where config.json needs {shape}")
    for name in state:
        if name not in wanted:
            raise ModelError(f"{str(path)!r} has a tensor {name!r} that config.json has no place for")


def write_bundle(
    out: Path,
    *,
    name: str,
    clip: Path,
    unets: Sequence["UNet"],
    stages: Sequence[StageInfo],
    sampling: GenerateSettings | None = None,
    text_encoder: str | None = None,
    half: bool = False,
    below: Path | None = None,
) -> BundleInfo:
    """Write a whole bundle to a temporary folder beside `out` and rename it; `half` stores weights in float16.

    A `text_encoder` that is a folder comes into the bundle; a name stays a name. The stages of the bundle `below`, if
    there is one, come first as they are, up to the one that the new ones draw over.
    """
    first = () if below is None else stages_below(below, unets[0].config)
    with new_folder(out) as folder:
        shutil.copytree(clip, folder / CLIP_FOLDER)
        if text_encoder is not None and Path(text_encoder).is_dir():
            shutil.copytree(text_encoder, folder / TEXT_FOLDER)
            text_encoder = TEXT_FOLDER
        for part in (part for stage in first for part in (stage, stage.fast) if part is not None):
            shutil.copytree(Path(below or "") / part.name, folder / part.name)
        for unet, stage in zip(unets, stages, strict=True):
            _write_unet(folder / stage.name, unet, half=half)
        info = BundleInfo(
            name=name,
            stages=(*first, *stages),
            sampling=sampling or GenerateSettings(),
            text_encoder=text_encoder,
            files=tuple(digest_files(folder)),
        )
        _write_json(folder / "bundle.json", to_dict(info))
    return info


def stages_below(folder: Path, upper: "UNetConfig") -> tuple[StageInfo, ...]:
    """The stages of a bundle that lead up to what a stage draws over; a ConfigError when there are none."""
    from radt.unet.unet import UNetConfig

    stages = read_info(folder).stages
    sizes = [_parse(UNetConfig, _read_json(folder / stage.name / "config.json"), folder).size for stage in stages]
    if upper.low_res not in sizes:
        raise ConfigError(
            f"the stages in {str(folder)!r} draw heights and widths {sizes}, and none what is drawn over here, "
            f"{upper.low_res}"
        )
    return stages[: sizes.index(upper.low_res) + 1]


def add_twin(out: Path, *, bundle: Path, stage: int, unet: "UNet", twin: FastTwin) -> BundleInfo:
    """Write a copy of `bundle` to `out` with a distilled twin, in float16, beside one of its stages."""
    info = read_info(bundle)
    stages = list(info.stages)
    before, stages[stage] = stages[stage].fast, replace(stages[stage], fast=twin)
    with new_folder(out) as folder:
        for part in bundle.iterdir():
            if part.is_dir() and (before is None or part.name != before.name):
                shutil.copytree(part, folder / part.name)
        _write_unet(folder / twin.name, unet, half=True)
        info = replace(info, stages=tuple(stages), files=tuple(digest_files(folder)))
        _write_json(folder / "bundle.json", to_dict(info))
    return info


def digest_files(folder: Path) -> Iterator[FileDigest]:
    """The digest of every JSON and safetensors file below the stage and encoder folders, by path."""
    for path in sorted(folder.glob("*/**/*")):
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                digest = blake2b(digest_size=16)
                while block := file.read(1 << 20):
                    digest.update(block)
            yield FileDigest(path=path.relative_to(folder).as_posix(), digest=digest.hexdigest())


def changed_files(folder: Path, info: BundleInfo) -> list[str]:
    """The files whose bytes are not those that bundle.json was written for (missing ones too)."""
    now = {file.path: file.digest for file in digest_files(folder)}
    return [file.path for file in info.files if now.get(file.path) != file.digest]


def _write_unet(folder: Path, unet: "UNet", *, half: bool) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    _write_json(folder / "config.json", to_dict(unet.config))
    state = {key: value.detach().cpu().contiguous() for key, value in unet.state_dict().items()}
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(state, folder / WEIGHTS)


def _check_widths(stage: str, unet: "UNet", encoder: "TextEncoder", folder: Path) -> None:
    found = (encoder.width, encoder.pooled_width)
    wanted = (unet.config.text_width, unet.config.pooled_width)
    if found != wanted:
        raise ModelError(
            f"model {str(folder)!r} does not fit together: its text encoder gives tokens and pooled vectors of widths "
            f"{found}, and {stage!r} takes {wanted}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{str(path)!r} is missing: the model folder is not complete") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} is not readable JSON ({error}): copy the model again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{str(path)!r} should hold one JSON object: copy the model again")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _parse(kind: type[T], values: Mapping[str, Any], path: Path) -> T:
    try:
        return from_dict(kind, values)
    except ConfigError as error:
        raise ModelError(f"{str(path)!r}: {error}") from error
