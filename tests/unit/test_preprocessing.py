"""Resizing on the device against open_clip's own transform, which is Pillow's; the device is the processor here.

On a machine with a GPU: `pytest -m gpu tests/unit/test_preprocessing.py tests/unit/test_embedder.py`.
"""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from index import preprocessing
from index.embedder import ClipEmbedder, decode_scaled, open_model
from index.preprocessing import Courier, DevicePixels, Framing, split
from tests.fakes import photo

SIZES = [(32, 32), (64, 64), (256, 256), (77, 40), (40, 77), (33, 32), (500, 31), (90, 300), (640, 480), (8, 5), (1, 1)]
SHIPPED = Path(__file__).parents[2] / "radt/models/emoji-demo/clip"
SETTINGS = [
    {},
    {"interpolation": "bilinear"},
    {"resize_mode": "squash"},
    {"resize_mode": "longest", "fill_color": 120},
    {"resize_mode": "longest", "interpolation": "bilinear"},
]


def noise(width: int, height: int, *, seed: int = 0) -> PIL.Image.Image:
    """Every pixel for itself: the hardest thing to resample."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_settings(clip: Path, folder: Path, settings: dict[str, Any], *, size: Any = 32) -> Path:
    """The tiny model with another preprocessing, and for images of another size."""
    shutil.copytree(clip, folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = size
    (folder / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": settings}))
    return folder


def device_pixels(clip: Path, device: str) -> tuple[DevicePixels, Any]:
    """What is to be tested, and its twin: open_clip's transform."""
    import torch

    model, _, preprocess, _ = open_model(str(clip))
    framing, parts = Framing.of(model, preprocess), split(preprocess)
    assert framing is not None
    assert parts is not None
    return DevicePixels(parts, framing, torch.device(device)), preprocess


def levels_apart(ours: Any, twins: Any, preprocess: Any) -> np.ndarray:
    """Differences of normalised numbers as steps of 255."""
    steps = 255 * np.array(preprocess.transforms[-1].std).reshape(1, 3, 1, 1)
    return np.abs(ours.cpu().numpy() - twins.numpy()) * steps


def check_pixels(clip: Path, device: str) -> None:
    """All sizes in one batch, twice, so that each buffer is used again."""
    import torch

    pixels, preprocess = device_pixels(clip, device)
    for seed in range(2):
        images = [photo(*size, seed=seed) for size in SIZES for _ in range(2)]
        apart = levels_apart(
            pixels([np.asarray(image) for image in images]),
            torch.stack([preprocess(image) for image in images]),
            preprocess,
        )
        assert apart.max() < 3.01, apart.max(axis=(1, 2, 3))
        assert apart.mean() < 0.05


@pytest.fixture
def cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return "cuda"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pixels_are_those_of_open_clip(settings: dict[str, Any], tiny_clip: Path, tmp_path: Path) -> None:
    check_pixels(with_settings(tiny_clip, tmp_path / "clip", settings), "cpu")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pixels_are_those_of_open_clip_in_a_frame_that_is_not_square(
    settings: dict[str, Any], tiny_clip: Path, tmp_path: Path
) -> None:
    check_pixels(with_settings(tiny_clip, tmp_path / "clip", settings, size=[32, 48]), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pixels_are_those_of_open_clip_on_a_gpu(
    settings: dict[str, Any], tiny_clip: Path, tmp_path: Path, cuda: str
) -> None:
    check_pixels(with_settings(tiny_clip, tmp_path / "clip", settings), cuda)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32)])
def test_frames_are_laid_as_open_clip_lays_them(mode: Any, size: tuple[int, int]) -> None:
    """Where the pixels go is exact for any size: on a plain image nothing else can differ."""
    import torch
    from open_clip.transform import image_transform

    preprocess = image_transform(size, is_train=False, resize_mode=mode, fill_color=77)
    parts = split(preprocess)
    assert parts is not None
    framing = Framing(size=size, resize_mode=mode, interpolation="bicubic", fill=77)
    pixels = DevicePixels(parts, framing, torch.device("cpu"))
    random = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in random.integers(1, 12, 2) * random.choice([1, 7, 11])) for _ in range(30)]
    images = [PIL.Image.new("RGB", size, (200, 10, 90)) for size in sizes]
    twins = torch.stack([preprocess(image) for image in images])
    assert torch.allclose(pixels([np.asarray(image) for image in images]), twins, atol=1e-6)


def files() -> Sequence[tuple[str, bytes]]:
    """Images of every mode of 8 bits or fewer that a file may have, and one that a camera held upright."""

    def encoded(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    image = photo(300, 200)
    see_through = image.copy()
    see_through.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    rotated = PIL.Image.Exif()
    rotated[0x0112] = 6
    return [
        *((mode, encoded(image.convert(mode), "PNG")) for mode in ("RGB", "L", "P", "1", "LA")),
        ("RGBA", encoded(see_through, "PNG")),
        ("CMYK", encoded(image.convert("CMYK"), "JPEG", quality=92)),
        ("L of a JPEG", encoded(image.convert("L"), "JPEG", quality=92)),
        ("EXIF rotation", encoded(image, "JPEG", exif=rotated)),
        ("palette with a hole", encoded(image.convert("P"), "GIF", transparency=3)),
        ("WebP", encoded(image, "WEBP")),
    ]


@pytest.mark.parametrize(("name", "content"), files(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_mode_looks_to_the_network_as_open_clips_loader_shows_it(
    name: str, content: bytes, tiny_clip: Path
) -> None:
    """Which turns any image into RGB before it resizes it, and does not heed EXIF.

    Grey of 16 bits it shows white, and we do not (`to_8_bits`).
    """
    pixels, preprocess = device_pixels(tiny_clip, "cpu")
    with PIL.Image.open(io.BytesIO(content)) as image:
        twin = preprocess(image.convert("RGB"))[None]
    decoded, _ = decode_scaled(content, side=None)
    assert levels_apart(pixels([np.asarray(decoded)]), twin, preprocess).max() < 2.01


EMBEDDED = [*(photo(*size, seed=1) for size in SIZES), *(noise(*size) for size in SIZES)]


@pytest.mark.parametrize("model", ["tiny", "shipped"])
def test_vectors_are_those_of_open_clip(model: str, tiny_clip: Path) -> None:
    """For photographs and for noise, in the order they came in, though they are embedded by size."""
    folder = tiny_clip if model == "tiny" else SHIPPED
    embedder = ClipEmbedder.load(str(folder), batch_size=5, resize_on_device=True)
    vectors, twins = embedder.images(EMBEDDED), ClipEmbedder.load(str(folder)).images(EMBEDDED)
    assert (vectors * twins).sum(1).min() > 0.9999
    if model == "shipped":  # random weights see little difference between any two images
        assert np.median(twins @ twins.T) < 0.9
    assert embedder.fingerprint == ClipEmbedder.load(str(folder)).fingerprint


def test_only_what_is_not_much_larger_than_the_network_waits_for_the_device(tiny_clip: Path) -> None:
    embedder = ClipEmbedder.load(str(tiny_clip), resize_on_device=True)
    assert embedder.prepare(photo(96, 96)).shape == (96, 96, 3)
    assert embedder.prepare(photo(97, 96)).shape == (32, 32, 3)
    assert embedder.prepare(photo(40, 30).convert("L")).shape == (30, 40, 3)
    assert ClipEmbedder.load(str(tiny_clip)).prepare(photo(40, 30)).shape == (32, 32, 3)  # the default without a GPU


def test_a_transform_of_ones_own_is_left_to_pillow(tiny_clip: Path) -> None:
    from torchvision.transforms import Compose, Grayscale

    model, tokenizer, preprocess, name = open_model(str(tiny_clip))
    steps = preprocess.transforms
    for other in (Compose([*steps[:-2], Grayscale(3), *steps[-2:]]), lambda image: preprocess(image)):
        assert Framing.of(model, other) is None
        embedder = ClipEmbedder(model, tokenizer, other, name=name, resize_on_device=True)
        twin = ClipEmbedder(model, tokenizer, other, name=name)
        assert np.array_equal(embedder.images([photo(64, 48)]), twin.images([photo(64, 48)]))
    assert Framing.of(object(), preprocess) is None


def test_many_images_of_one_size_are_worked_on_in_parts(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    pixels, _ = device_pixels(tiny_clip, "cpu")
    images = [np.asarray(photo(40, 50, seed=seed)) for seed in range(7)]
    whole = pixels(images).clone()
    monkeypatch.setattr(preprocessing, "WORK_BYTES", 2 * 12 * 40 * 50)
    assert [count for _, count in pixels._groups(images)] == [2, 2, 2, 1]
    assert torch.equal(pixels(images), whole)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(tiny_clip: Path, cuda: str) -> None:
    import torch

    pixels, _ = device_pixels(tiny_clip, cuda)
    images = [np.asarray(photo(*size)) for size in SIZES]
    pixels(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pixels(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_courier(device: str, keep_busy: Callable[[], object]) -> None:
    """What was sent stays as it was, whatever is sent after it."""
    import torch

    courier = Courier(torch.device(device))
    random = np.random.default_rng(0)
    loads = [[random.integers(0, 256, size, dtype=np.uint8) for size in random.integers(1, 9999, 5)] for _ in range(12)]
    arrived = []
    for load in loads:
        keep_busy()
        arrived.append(courier.send(load))
    for load, there in zip(loads, arrived, strict=True):
        assert np.array_equal(there.cpu().numpy(), np.concatenate(load))


def test_bytes_arrive() -> None:
    check_courier("cpu", lambda: None)


@pytest.mark.gpu
def test_bytes_arrive_on_a_busy_gpu(cuda: str) -> None:
    import torch

    matrix = torch.ones(4096, 4096, device=cuda)
    check_courier(cuda, lambda: matrix @ matrix)
