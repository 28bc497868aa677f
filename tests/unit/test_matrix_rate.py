"""What a network needs and what a device can do: against arithmetic."""

from pathlib import Path

import pytest
import torch

from index import matrix_rate as measured
from index.embedder import ClipEmbedder, DeferredEmbedder, Measurable
from tests.fakes import HashEmbedder


def test_operations_of_a_linear_layer_are_counted() -> None:
    layer = torch.nn.Linear(64, 32)
    assert measured.count_operations(layer, torch.zeros(10, 64)) == 2 * 10 * 64 * 32


def test_attention_is_counted_in_evaluation_mode_too() -> None:
    """Where torch would fuse the whole layer into one call that its counter does not know."""
    tokens, width = 9, 16
    attention = torch.nn.MultiheadAttention(width, 2, batch_first=True).eval()
    projections, products = 2 * tokens * 4 * width**2, 2 * 2 * tokens**2 * width
    with torch.inference_mode():
        found = measured.count_operations(
            lambda x: attention(x, x, x, need_weights=False), torch.zeros(1, tokens, width)
        )
    assert found == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_rate_is_that_of_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measured.PROBE_SIDE, "cpu", 64)
    seconds = iter([0, 4, 10, 11, 20, 22])  # products of 4, 1 and 2 seconds
    monkeypatch.setattr(measured, "PROBES", 3)
    monkeypatch.setattr("index.matrix_rate.time.perf_counter", lambda: next(seconds))
    assert measured.matrix_rate(torch.device("cpu"), torch.float32) == 2 * 64**3


def test_images_at_best(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.embedder.matrix_rate", lambda device, dtype: 1e9)
    embedder = ClipEmbedder.load(str(tiny_clip))
    most = embedder._network.most_images_per_second(torch.zeros(3, 3, 32, 32))
    # 32 wide, 1 layer, 4 patches of 16x16 and a class token, to 16 numbers
    patches, tokens, width = 2 * 4 * 3 * 16**2 * 32, 5, 32
    layer = 2 * tokens * (4 + 8) * width**2 + 4 * tokens**2 * width
    assert most == pytest.approx(1e9 / (patches + layer + 2 * width * 16))
    assert embedder.most_images_per_second() is None  # by a processor


def test_a_deferred_model_knows_what_the_loaded_one_knows() -> None:
    class Known(HashEmbedder):
        def most_images_per_second(self) -> float | None:
            return 5.0

    assert isinstance(Known(), Measurable)
    assert not isinstance(HashEmbedder(), Measurable)
    for loaded, most in ((Known(), 5.0), (HashEmbedder(), None)):
        deferred = DeferredEmbedder(["m"], dim=32, fingerprint=loaded.fingerprint, load=lambda name, it=loaded: it)
        assert deferred.most_images_per_second() == most


@pytest.mark.gpu
def test_a_gpu_could_embed_more_than_it_does(tiny_clip: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    most = ClipEmbedder.load(str(tiny_clip)).most_images_per_second()
    assert most is not None
    assert most > 1e5


def test_nothing_fails_for_a_figure(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("not this network")

    monkeypatch.setattr("index.embedder.count_operations", refuse)
    monkeypatch.setitem(measured.PROBE_SIDE, "cpu", 64)
    embedder = ClipEmbedder.load(str(tiny_clip))
    assert embedder._network.most_images_per_second(torch.zeros(1, 3, 32, 32)) is None
