"""ClipEmbedder with a real, tiny open_clip model; the decoder with hostile files."""

import io
import json
import logging
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from index.embedder import (
    ClipEmbedder,
    DeferredEmbedder,
    check_fingerprint,
    decode_image,
    decode_scaled,
    image_size,
    unit_rows,
)
from index.errors import CorpusError, KnowledgeBaseError, ModelError
from tests.fakes import HashEmbedder, draw, encode, photo

TEXTS = ["a red circle", "a blue square", "caf\u00e9 " * 50]


@pytest.fixture(scope="module")
def embedder(tiny_clip: Path) -> ClipEmbedder:
    return ClipEmbedder.load(str(tiny_clip))


def test_vectors_are_unit_float32(embedder: ClipEmbedder) -> None:
    for vectors in (embedder.texts(TEXTS), embedder.images([draw(i) for i in range(3)])):
        assert vectors.shape == (3, embedder.dim)
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.texts([]).shape == (0, embedder.dim)


def test_vectors_are_those_of_open_clip(embedder: ClipEmbedder, tiny_clip: Path) -> None:
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    image = draw(3)
    with torch.inference_mode():
        text = model.eval().encode_text(tokenizer(TEXTS), normalize=True).numpy()
        picture = model.encode_image(preprocess(image)[None], normalize=True).numpy()
    assert np.allclose(embedder.texts(TEXTS), text, atol=1e-6)
    assert np.allclose(embedder.images([image]), picture, atol=1e-6)


def test_batches_do_not_matter(embedder: ClipEmbedder, tiny_clip: Path) -> None:
    images = [draw(i) for i in range(5)]
    small = ClipEmbedder.load(str(tiny_clip), batch_size=2)
    assert np.allclose(small.images(images), embedder.images(images), atol=1e-6)
    prepared = [embedder.prepare(image) for image in images]
    assert np.array_equal(embedder.embed(prepared), embedder.images(images))


PREPROCESSING = [
    {},
    {"interpolation": "bilinear"},
    {"resize_mode": "squash"},
    {"resize_mode": "longest", "fill_color": 120},
    {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
]


@pytest.mark.parametrize("settings", PREPROCESSING, ids=str)
def test_preprocessing_is_that_of_open_clip_to_the_last_bit(
    settings: dict[str, object], tiny_clip: Path, tmp_path: Path
) -> None:
    """Resized as bytes and normalised as a batch, or all of it image by image: the network sees the same numbers."""
    import open_clip
    import torch

    shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({**config, "preprocess_cfg": settings}))
    embedder = ClipEmbedder.load(str(tmp_path / "clip"))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    images = [photo(width, height) for width, height in ((32, 32), (77, 40), (40, 77), (31, 500), (8, 8))]
    expected = torch.stack([preprocess(image) for image in images])
    assert embedder.prepare(images[0]).dtype == np.uint8
    assert torch.equal(embedder._on_device([embedder.prepare(image) for image in images]), expected)
    with torch.inference_mode():
        vectors = model.eval().encode_image(expected, normalize=True).numpy()
    assert (embedder.images(images) * vectors).sum(1).min() > 0.9999


def test_preprocessing_of_another_form_is_used_as_a_whole(tiny_clip: Path) -> None:
    from index.embedder import open_model

    model, tokenizer, preprocess, name = open_model(str(tiny_clip))
    embedder = ClipEmbedder(model, tokenizer, lambda image: preprocess(image), name=name)
    assert embedder.prepare(draw(1)).dtype == np.float32
    assert np.array_equal(embedder.images([draw(1)]), ClipEmbedder.load(str(tiny_clip)).images([draw(1)]))


def test_the_fast_way_gives_nearly_the_same_vectors(
    embedder: ClipEmbedder, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, on this processor: bfloat16, and compiled from the second full batch on."""
    from functools import partial

    import torch

    from index.embedder import open_model

    monkeypatch.setattr("index.embedder.COMPILE_AFTER", 2)
    model, tokenizer, preprocess, name = open_model(str(tiny_clip))
    fast = ClipEmbedder(model, tokenizer, preprocess, name=name, batch_size=4, fast=True)
    fast._network._compile = partial(torch.compile, backend="eager")
    images = [photo(40 + i, 50, seed=i) for i in range(14)]
    vectors = fast.images(images)
    assert fast._network._compiled is not None
    assert vectors.dtype == np.float32
    assert (vectors * embedder.images(images)).sum(1).min() > 0.999
    assert not np.array_equal(vectors, embedder.images(images))
    assert fast.fingerprint == embedder.fingerprint


def test_a_network_that_cannot_be_compiled_runs_uncompiled(
    tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from index.embedder import open_model

    monkeypatch.setattr("index.embedder.COMPILE_AFTER", 1)
    model, tokenizer, preprocess, name = open_model(str(tiny_clip))
    fast = ClipEmbedder(model, tokenizer, preprocess, name=name, batch_size=2, fast=True)

    def no_compiler(encode: object) -> None:
        raise RuntimeError("no C compiler\nsecond line")

    fast._network._compile = no_compiler
    assert fast.images([draw(i) for i in range(6)]).shape == (6, 16)
    assert [record.message for record in caplog.records] == ["the network runs uncompiled: no C compiler"]


@pytest.mark.slow
def test_a_compiled_network_gives_the_vectors_of_the_plain_one(
    tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own compiler, with what this machine has for it."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch needs a C++ compiler to compile for a processor")
    check_compiled(str(tiny_clip), monkeypatch)


@pytest.mark.gpu
def test_a_gpu_gives_the_vectors_of_the_plain_network(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, compiled or not, resized there: beside open_clip in float32 on the processor."""
    import open_clip
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    check_compiled(str(tiny_clip), monkeypatch)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    images = [photo(40 + i, 50, seed=i) for i in range(6)]
    with torch.inference_mode():
        twins = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), normalize=True).numpy()
    for fast in (None, False):
        embedder = ClipEmbedder.load(str(tiny_clip), batch_size=4, fast=fast)
        assert embedder.prepare(images[0]).shape == (50, 40, 3)
        assert (embedder.images(images) * twins).sum(1).min() > 0.999


def check_compiled(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [photo(40 + i, 50, seed=i) for i in range(8)]
    eager = ClipEmbedder.load(model, batch_size=4, fast=True).images(images)
    monkeypatch.setattr("index.embedder.COMPILE_AFTER", 1)
    embedder = ClipEmbedder.load(model, batch_size=4, fast=True)
    vectors = embedder.images(images)
    assert embedder._network._compiled is not None
    assert (vectors * eager).sum(1).min() > 0.9999


def jpeg(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((400, 300), (200, 150)),
        ((640, 480), (160, 120)),
        ((2000, 1000), (250, 125)),
        ((300, 191), (300, 191)),  # less than twice three times 32
    ],
)
def test_a_large_jpeg_is_decoded_small_and_its_vector_stays(
    embedder: ClipEmbedder, size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    encoded = jpeg(photo(*size))
    small, of_file = decode_scaled(encoded, side=embedder.image_side())
    assert of_file == size == image_size(encoded)
    assert small.size == decoded
    whole = decode_image(encoded)
    assert whole.size == size
    vectors = embedder.images([small, whole])
    assert float(vectors[0] @ vectors[1]) > 0.9999
    difference = embedder.prepare(small).astype(int) - embedder.prepare(whole)
    assert np.abs(difference).mean() < 1  # of 255


def test_only_jpeg_has_a_fraction_of_its_size(embedder: ClipEmbedder) -> None:
    assert decode_scaled(encode(photo(640, 480)), side=32)[0].size == (640, 480)
    assert decode_scaled(jpeg(photo(640, 480)), side=None)[0].size == (640, 480)


def test_a_deferred_model_is_loaded_once_by_many_threads_and_can_be_sent_elsewhere() -> None:
    import pickle
    import time
    from concurrent.futures import ThreadPoolExecutor

    loads: list[str] = []

    def load(name: str) -> HashEmbedder:
        loads.append(name)
        time.sleep(0.05)
        return HashEmbedder()

    deferred = DeferredEmbedder(["m"], dim=32, fingerprint=HashEmbedder().fingerprint, load=load)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(deferred.prepare, [draw(i) for i in range(16)]))
    assert loads == ["m"]
    used = DeferredEmbedder(["m"], dim=32, fingerprint="f")
    used._loaded = deferred
    sent = pickle.loads(pickle.dumps(used))  # noqa: S301 - our own
    assert (sent.name, sent.fingerprint, sent._loaded) == ("m", "f", None)


def test_the_model_is_in_evaluation_mode(embedder: ClipEmbedder) -> None:
    assert not embedder._model.training


def test_fingerprint_is_stable_and_covers_all_that_decides(
    embedder: ClipEmbedder, tiny_clip: Path, tmp_path: Path
) -> None:
    assert ClipEmbedder.load(f"local-dir:{tiny_clip}").fingerprint == embedder.fingerprint
    seen = {embedder.fingerprint}
    for part, value in (("mean", [0.5, 0.5, 0.5]), ("resize_mode", "squash"), ("interpolation", "bilinear")):
        folder = tmp_path / part
        shutil.copytree(tiny_clip, folder)
        settings = json.loads((folder / "open_clip_config.json").read_text())
        settings["preprocess_cfg"][part] = value
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        seen.add(ClipEmbedder.load(str(folder)).fingerprint)
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_clip, folder)
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    seen.add(ClipEmbedder.load(str(folder)).fingerprint)
    assert len(seen) == 5


def test_other_weights_have_another_fingerprint(embedder: ClipEmbedder, other_clip: Path) -> None:
    other = ClipEmbedder.load(str(other_clip))
    with pytest.raises(KnowledgeBaseError, match="cannot be compared"):
        check_fingerprint(other, embedder.fingerprint)


def test_a_bundle_names_its_clip_folder(embedder: ClipEmbedder, tiny_clip: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_clip, tmp_path / "bundle" / "clip")
    assert ClipEmbedder.load(str(tmp_path / "bundle")).fingerprint == embedder.fingerprint


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ViT-B32", "did you mean ViT-B-32"),
        ("ViT-B-32/laion2b_s34b_b79", "did you mean laion2b_s34b_b79k"),
        ("models/nothing-here", "neither a folder nor a model"),
        ("local-dir:nothing-here", "there is no folder"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ClipEmbedder.load(name)


def test_folders_that_are_no_model(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds open_clip_config\.json"):
        ClipEmbedder.load(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_clip, broken)
    (broken / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot load the model"):
        ClipEmbedder.load(str(broken))
    (broken / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickled"):
        ClipEmbedder.load(str(broken))


def test_unit_rows_of_extreme_numbers() -> None:
    rows = np.array([[1e300, 1e300], [1e-300, 0], [np.inf, 1], [3, 4]])
    units = unit_rows(rows)
    np.testing.assert_allclose(units[3], [0.6, 0.8], atol=1e-7)
    lengths = np.linalg.norm(units, axis=1)
    assert all(np.isnan(length) or abs(length - 1) < 1e-6 for length in lengths)


def test_rows_without_a_direction_are_nan() -> None:
    rows = unit_rows(np.array([[3, 4], [0, 0], [np.inf, 1], [np.nan, 1], [1e30, 1]], np.float32))
    assert np.allclose(rows[0], [0.6, 0.8])
    assert np.isnan(rows[1:]).all()


def test_a_deferred_embedder_loads_once_and_checks() -> None:
    loaded: list[str] = []
    real = HashEmbedder()

    def load(name: str) -> HashEmbedder:
        loaded.append(name)
        if name == "gone":
            raise ModelError("gone")
        return HashEmbedder(salt="" if name == "right" else name)

    deferred = DeferredEmbedder(["gone", "wrong", "right"], dim=32, fingerprint=real.fingerprint, load=load)
    assert loaded == []
    assert np.array_equal(deferred.texts(["x"]), real.texts(["x"]))
    assert np.array_equal(deferred.images([draw(1)]), real.images([draw(1)]))
    assert loaded == ["gone", "wrong", "right"]
    never = DeferredEmbedder(["wrong"], dim=32, fingerprint=real.fingerprint, load=load)
    with pytest.raises(KnowledgeBaseError, match="cannot be compared"):
        never.texts(["x"])


# Decoding


def _huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_images_decode_to_rgb(kind: str) -> None:
    image = decode_image(encode(draw(1), kind))
    assert (image.mode, image.size) == ("RGB", (32, 32))


def test_grey_of_16_bits_keeps_its_level() -> None:
    grey = PIL.Image.fromarray(np.array([[0, 20000, 65535]], dtype=np.uint16))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG", transparency=20000)  # a level of 16 bits, which those of 8 must not be compared with
    for content in (encode(grey), buffer.getvalue()):
        image = decode_image(content)
        assert np.asarray(image)[0].tolist() == [[level] * 3 for level in (0, 78, 255)]
        assert image.info.get("transparency") is None


def _bad_files() -> Sequence[tuple[str, bytes]]:
    whole = encode(draw(1, size=64), "JPEG")
    return [
        ("empty", b""),
        ("text", b"<html>not found</html>"),
        ("cut", whole[: len(whole) // 2]),
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n"),
        ("bomb", _huge_png(12_000, 12_000)),
        ("great bomb", _huge_png(60_000, 60_000)),
    ]


@pytest.mark.parametrize(("name", "content"), _bad_files())
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bad_files_are_refused(name: str, content: bytes) -> None:
    with pytest.raises(CorpusError, match="pixels" if "bomb" in name else "does not decode"):
        decode_image(content)


def test_an_image_is_let_through_up_to_the_limit() -> None:
    content = encode(PIL.Image.new("RGB", (20, 10)))
    assert decode_image(content, max_pixels=200).size == (20, 10)
    with pytest.raises(CorpusError, match="200 pixels"):
        decode_image(content, max_pixels=199)


def test_an_image_that_a_resize_would_blow_up_is_refused() -> None:
    assert decode_image(encode(PIL.Image.new("RGB", (100, 1)))).size == (100, 1)
    with pytest.raises(CorpusError, match="101 by 1, too narrow"):
        decode_image(encode(PIL.Image.new("RGB", (101, 1))))


def test_the_hubs_retries_are_not_reported_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no route to host")

    monkeypatch.setattr("open_clip.create_model_and_transforms", unreachable)
    with pytest.raises(ModelError, match="no route to host"):
        ClipEmbedder.load("ViT-B-32")
    assert not caplog.records
