"""ClipEmbedder with a real, tiny open_clip model; the decoder with hostile files."""

import json
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from index.embedder import ClipEmbedder, DeferredEmbedder, check_fingerprint, decode_image, unit_rows
from index.errors import CorpusError, KnowledgeBaseError, ModelError
from tests.fakes import HashEmbedder, draw, encode

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


def test_rows_without_a_direction_are_nan() -> None:
    rows = unit_rows(np.array([[3, 4], [0, 0], [np.inf, 1], [np.nan, 1]], np.float32))
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
