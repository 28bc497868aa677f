"""Preprocessing as open_clip's transform has it: by Pillow, image by image, or on the device, for a batch of any sizes.

Pillow's is the definition: it gives the numbers of open_clip to the last bit, and is what a processor uses. The other
is for a GPU: threads only decode, and bytes are sent, resized, cropped and normalised there. On photographs its pixels
differ by at most 3 of 255, and one in a thousand of them (bilinear: in twenty) at all.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

WORK_BYTES = 256 << 20  # of the device, for the numbers of the images that are resized at once
SPARE_ROOM = 1.25  # a pinned buffer grows seldom: pinning memory is slow, and other work on the device waits for it


class Split(NamedTuple):
    """Preprocessing as what Pillow does to one image, and the numbers by which a batch is normalised on the device."""

    resize: Callable[[Any], Any]
    mean: Sequence[float]
    std: Sequence[float]


def split(preprocess: Any) -> Split | None:
    """None for one that does not end in to-tensor and normalise: it is then used as a whole."""
    from torchvision.transforms import Compose, Normalize

    steps = list(getattr(preprocess, "transforms", ()))
    if len(steps) < 2 or not isinstance(steps[-1], Normalize) or "ToTensor" not in type(steps[-2]).__name__:
        return None
    return Split(Compose(steps[:-2]), steps[-1].mean, steps[-1].std)


@dataclass(frozen=True, kw_only=True, slots=True)
class Framing:
    """How an image of any size is brought to `size`, height and width, of the network.

    `shortest` covers the frame and is cropped at its centre, `longest` fits into it and is padded with `fill`, `squash`
    is stretched to it.
    """

    size: tuple[int, int]
    resize_mode: Literal["shortest", "longest", "squash"]
    interpolation: Literal["bicubic", "bilinear"]
    fill: int

    @classmethod
    def of(cls, model: Any, preprocess: Any) -> "Framing | None":
        """That of the model's `preprocess_cfg`. None when `preprocess` is not what open_clip makes of it."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        settings = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
        if not settings:
            return None
        config = PreprocessCfg(**settings)
        if repr(image_transform_v2(config, is_train=False)) != repr(preprocess):
            return None
        height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
        resize_mode: Any = config.resize_mode or "shortest"
        is_bicubic = config.interpolation != "bilinear" or (resize_mode == "shortest" and height != width)
        return cls(
            size=(height, width),
            resize_mode=resize_mode,
            interpolation="bicubic" if is_bicubic else "bilinear",
            fill=config.fill_color,
        )

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to, by the rounding of torchvision and of open_clip."""
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            side, short = self.size[0], min(height, width)
            return int(side * height / short), int(side * width / short)
        ratios = height / self.size[0], width / self.size[1]
        ratio = min(ratios) if self.resize_mode == "shortest" else max(ratios)
        return round(height / ratio), round(width / ratio)


class DevicePixels:
    """Batches of images as the network takes them: sent as bytes, brought to its size and normalised on the device.

    Nothing in it waits for the device, so that batches queue up there. (torchvision's Normalize does wait, twice.)
    """

    def __init__(self, parts: Split, framing: Framing | None, device: Any):
        import torch

        self._mean = torch.tensor(parts.mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(parts.std, device=device).view(-1, 1, 1)
        self._framing = framing
        self._device = device
        self._courier = Courier(device)

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Any:
        """[n 3 h w] float32. Neighbours of one size are resized together; without a framing all have the network's."""
        import torch

        sent, taken, row = self._courier.send(images), 0, 0
        height, width = images[0].shape[:2] if self._framing is None else self._framing.size
        fill = 0 if self._framing is None else self._framing.fill
        batch = torch.full((len(images), 3, height, width), float(fill), device=self._device)
        for shape, count in self._groups(images):
            size = count * shape[0] * shape[1] * shape[2]
            pixels = sent[taken : taken + size].view(count, *shape).permute(0, 3, 1, 2).float()
            self._frame(pixels, batch[row : row + count])
            taken, row = taken + size, row + count
        return batch.div_(255).sub_(self._mean).div_(self._std)

    def _groups(self, images: Sequence[np.ndarray]) -> Iterator[tuple[tuple[int, ...], int]]:
        """(shape, count) of neighbours that are alike, no more of them than can be worked on at once."""
        for shape, alike in groupby(image.shape for image in images):
            count = len(list(alike))
            height, width = shape[:2] if self._framing is None else self._framing.scaled(shape[0], shape[1])
            at_once = max(1, WORK_BYTES // (12 * max(shape[0], height) * max(shape[1], width)))
            for start in range(0, count, at_once):
                yield shape, min(at_once, count - start)

    def _frame(self, pixels: Any, batch: Any) -> None:
        """Resize [n 3 h w] and lay it over the centre of `batch`, what sticks out cut off."""
        if self._framing is not None:
            pixels = self._resized(pixels, *self._framing.scaled(*pixels.shape[2:]))
        ours, theirs = zip(*map(_centred, pixels.shape[2:], batch.shape[2:]), strict=True)
        batch[:, :, theirs[0], theirs[1]] = pixels[:, :, ours[0], ours[1]]

    def _resized(self, pixels: Any, height: int, width: int) -> Any:
        """Whole numbers again after each direction, as with Pillow: the first one's overshoot is cut, too.

        Pillow 13 takes the other direction first where an image shrinks by much more height than width; not so here.
        """
        from torch.nn.functional import interpolate

        assert self._framing is not None
        for size in ((pixels.shape[2], width), (height, width)):
            if tuple(pixels.shape[2:]) != size:
                pixels = interpolate(pixels, size, mode=self._framing.interpolation, antialias=True)
                pixels = pixels.add_(0.5).floor_().clamp_(0, 255)
        return pixels


def _centred(length: int, frame: int) -> tuple[slice, slice]:
    """What is seen of `length` pixels in a frame of another length, and where in it, by torchvision's rounding."""
    if length >= frame:
        start = round((length - frame) / 2)
        return slice(start, start + frame), slice(0, frame)
    start = (frame - length) // 2
    return slice(0, length), slice(start, start + length)


class Courier:
    """Brings bytes to a device through two pinned buffers: one is filled while the other travels, beside the network.

    On a processor the same steps are taken, with streams and events that do nothing.
    """

    def __init__(self, device: Any):
        import torch

        self._device = device
        self._is_cuda = device.type == "cuda"
        self._streams: Any = torch.get_device_module(device)
        self._way = self._streams.Stream()
        self._buffers = [_Buffer(self._streams.Event()) for _ in range(2)]
        self._mutex = threading.Lock()

    def send(self, arrays: Sequence[UInt8[np.ndarray, "..."]]) -> Any:
        """Their bytes, one after the other: uint8 [bytes] on the device, there for whatever is queued on it next."""
        with self._mutex:
            self._buffers.reverse()
            buffer = self._buffers[0]
            buffer.has_left.synchronize()
            staged = buffer.hold(sum(array.size for array in arrays), is_pinned=self._is_cuda)
            np.concatenate([array.reshape(-1) for array in arrays], out=staged.numpy())
            with self._streams.stream(self._way):
                arrived = staged.to(self._device, non_blocking=True, copy=True)
                buffer.has_left.record(self._way)
            here = self._streams.current_stream()
            here.wait_stream(self._way)
            if self._is_cuda:
                arrived.record_stream(here)  # it was allocated on the way, and is used here
            return arrived


class _Buffer:
    """Memory on this side, and the moment from which it may be written again."""

    def __init__(self, has_left: Any):
        self.has_left = has_left
        self._memory: Any = None

    def hold(self, size: int, *, is_pinned: bool) -> Any:
        """uint8 [size]."""
        import torch

        if self._memory is None or len(self._memory) < size:
            self._memory = torch.empty(int(SPARE_ROOM * size), dtype=torch.uint8, pin_memory=is_pinned)
        return self._memory[:size]
