"""The network that tells emoji apart, and its folder: shared by its training and by evaluation.

It is independent of what it judges: no weight, embedding or held-out list of the generator reaches it, it is trained
on all entities, held-out ones too, and it never lies in a bundle.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_unshuffle, relu

from index.atomic import new_folder
from index.config import from_dict, to_dict
from index.errors import ConfigError, ModelError
from radt.shapes import Pixels, Pooled

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecognizerConfig:
    """Sizes. A picture of `image_size` pixels a side is folded by 2, and halved after each width but the last."""

    image_size: int = 48
    widths: tuple[int, ...] = (48, 96, 192)
    feature_width: int = 192

    def __post_init__(self) -> None:
        if not self.widths or min(*self.widths, self.feature_width) < 1:
            raise ConfigError(f"widths and feature_width must be 1 or more, got {self.widths} and {self.feature_width}")
        if self.image_size < 1 or self.image_size % (4 * self.coarsest):
            raise ConfigError(
                f"image_size must be a multiple of {4 * self.coarsest} with {len(self.widths)} widths, "
                f"got {self.image_size}"
            )

    @property
    def coarsest(self) -> int:
        """By how much the last map is smaller than the first."""
        return 2 ** (len(self.widths) - 1)

    @property
    def cells(self) -> int:
        """Positions a side of the map that features are read from: where something stands tells flags apart."""
        return self.image_size // (4 * self.coarsest)


class Block(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2016, section 3.3)."""

    def __init__(self, width_in: int, width_out: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width_out)
        is_same = width_in == width_out and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c_out h_out w_out"]:
        """Map features; a stride of 2 halves the map."""
        inner = relu(self.first_norm(self.first(x)))
        return relu(self.shortcut(x) + self.second_norm(self.second(inner)))


class RecognizerNetwork(nn.Module):
    """A small residual network from pixels to features to classes."""

    def __init__(self, config: RecognizerConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        first, last = config.widths[0], config.widths[-1]
        self.stem = nn.Conv2d(12, first, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(first)
        pairs = zip((first, *config.widths[:-1]), config.widths, strict=True)
        self.blocks = nn.Sequential(*[Block(a, b, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)])
        self.to_features = nn.Linear(last * config.cells**2, config.feature_width, bias=False)
        self.feature_norm = nn.BatchNorm1d(config.feature_width)
        self.to_classes = nn.Linear(config.feature_width, num_classes)

    def features(self, pixels: Pixels) -> Pooled:
        """What a picture in [-1, 1] looks like, without its class."""
        maps = self.blocks(relu(self.stem_norm(self.stem(pixel_unshuffle(pixels, 2)))))
        return self.feature_norm(self.to_features(nn.functional.avg_pool2d(maps, 2).flatten(1)))

    def forward(self, pixels: Pixels) -> Pooled:
        """Logits of the classes."""
        return self.to_classes(relu(self.features(pixels)))


def to_frame(pictures: UInt8[np.ndarray, "n h w 3"], side: int) -> Float[Tensor, "n 3 side side"]:
    """Pictures of any size as the network takes them: square of `side` pixels, in [-1, 1]. Aspect is not kept."""
    pixels = rearrange(torch.from_numpy(np.array(pictures)), "n h w c -> n c h w").float() / 127.5 - 1
    if pixels.shape[-2:] == (side, side):
        return pixels
    return interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)


def crop_box(
    picture: UInt8[np.ndarray, "h w 3"], box: tuple[float, float, float, float], side: int
) -> UInt8[np.ndarray, "side side 3"]:
    """The part of a picture in `box` (left, top, right, bottom as fractions of the frame), resized to a square.

    The box may pass the edges of the picture, whose outermost pixels then go on.
    """
    from PIL import Image  # a configuration does not need it

    height, width = picture.shape[:2]
    left, top, right, bottom = (edge * full for edge, full in zip(box, (width, height, width, height), strict=True))
    assert right > left, box
    assert bottom > top, box
    spare = int(np.ceil(max(0.0, -left, -top, right - width, bottom - height)))
    padded = np.pad(picture, ((spare, spare), (spare, spare), (0, 0)), mode="edge") if spare else picture
    frame = (left + spare, top + spare, right + spare, bottom + spare)
    return np.array(Image.fromarray(padded).resize((side, side), Image.Resampling.BILINEAR, box=frame))


def save_recognizer(folder: Path, network: RecognizerNetwork, classes: Sequence[int]) -> str:
    """Write the folder: kernels in half precision, norms in full. Returns its digest, that of the bytes of weights."""
    assert len(classes) == network.to_classes.out_features, (len(classes), network.to_classes.out_features)
    weights = {
        name: (value.half() if value.ndim > 1 else value).detach().cpu().contiguous()
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    data = save(weights, {"format": "pt"})
    facts = {"network": to_dict(network.config), "classes": [int(each) for each in classes], "digest": _digest(data)}
    with new_folder(folder) as partial:
        (partial / WEIGHTS_FILE).write_bytes(data)
        (partial / CONFIG_FILE).write_text(json.dumps(facts) + "\n")
    return str(facts["digest"])


def load_recognizer(folder: Path) -> tuple[RecognizerNetwork, tuple[int, ...], str]:
    """The network for use, its class ids in the order of its logits, and the digest of its weights.

    Raises:
        ModelError: the folder is none of a recogniser, or its weights are not the ones it was saved with.
    """
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text())
        data = (folder / WEIGHTS_FILE).read_bytes()
        config, classes = from_dict(RecognizerConfig, facts["network"]), tuple(int(each) for each in facts["classes"])
        found, wanted = _digest(data), facts["digest"]
        network = RecognizerNetwork(config, len(classes))
        missing, unexpected = network.load_state_dict({k: v.float() for k, v in load(data).items()}, strict=False)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no emoji recogniser ({error}); {HOW_TO_TRAIN}") from error
    if found != wanted:
        raise ModelError(f"the weights in {folder} are not those that config.json names ({found} and {wanted})")
    if unexpected or [name for name in missing if not name.endswith("num_batches_tracked")]:
        raise ModelError(f"the weights in {folder} are not of the network that config.json describes; {HOW_TO_TRAIN}")
    return network.eval(), classes, found


HOW_TO_TRAIN = "make one with `radt train recognizer-emoji --out runs/recognizer`"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()
