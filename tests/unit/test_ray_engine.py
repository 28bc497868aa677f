"""What the Ray engine does before and without a cluster; builds on one are in tests/integration/test_ray_engine.py."""

import pickle
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from index.embedder import ClipEmbedder, DeferredEmbedder
from index.errors import KnowledgeBaseError, MissingExtraError
from index.ingest.build import BuildConfig, build
from index.ingest.ray_engine import _Crew, _portable, _worker_shape
from index.knowledge_base import KnowledgeBase
from tests.fakes import HashEmbedder, write_img2dataset


def node(*, alive: bool = True, **resources: float) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"memory": 1e9, **resources}}


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([node(CPU=16)], (4, 4, 0)),
        ([node(CPU=1), node(CPU=1)], (2, 1, 0)),
        ([node(CPU=2), node(CPU=9)], (1 + 4, 2, 0)),
        ([node(CPU=16), node(CPU=16, alive=False), node()], (4, 4, 0)),
        ([node(CPU=32), node(CPU=64, GPU=8), node(CPU=8, GPU=2)], (10, 4, 1)),
        ([node(CPU=4, GPU=8)], (8, 0, 1)),
    ],
)
def test_one_worker_for_each_gpu_or_for_four_processors(
    nodes: list[dict[str, object]], shape: tuple[int, int, int]
) -> None:
    assert _worker_shape(nodes) == shape


def test_a_cluster_without_processors_is_told_so() -> None:
    with pytest.raises(KnowledgeBaseError, match="no processor to give"):
        _worker_shape([node(CPU=0)])


def test_while_no_worker_ends_a_shard_what_is_done_is_seen_to(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([[], [], ["a"]])
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(wait=lambda *args, **options: (next(waits), [])))
    crew, idle = object.__new__(_Crew), list[str]()
    crew._awaited = {"a": ("worker", "job")}
    assert crew._next_to_end(lambda: idle.append("idle")) == "a"
    assert len(idle) == 2


def build_on_ray(folder: Path, *, address: str | None = None) -> None:
    write_img2dataset(folder / "pets")
    kb = KnowledgeBase.create(folder / "kb", HashEmbedder())
    build(kb, [str(folder / "pets")], BuildConfig(engine="ray", ray_address=address))


def test_without_ray_the_pip_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'radt\[ray\]'"):
        build_on_ray(tmp_path)


def test_an_address_where_nobody_listens_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and not listening: nobody else answers there
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(KnowledgeBaseError, match=f"no Ray cluster at {address} .*ray start --head"):
            build_on_ray(tmp_path, address=address)


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeBaseError, match="no Ray cluster at here:there"):
        build_on_ray(tmp_path, address="here:there")


def test_a_node_that_does_not_start_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")  # as Ray does

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(KnowledgeBaseError, match=r"Ray cluster of this machine: The current node timed out[^\n]*$"):
        build_on_ray(tmp_path)


def travel(embedder: DeferredEmbedder) -> DeferredEmbedder:
    sent = pickle.dumps(embedder)
    assert len(sent) < 2000, "its name, not its weights"
    return pickle.loads(sent)  # noqa: S301 - our own


def test_a_model_travels_by_its_name_and_is_checked_on_arrival(tiny_clip: Path, other_clip: Path) -> None:
    model = ClipEmbedder.load(str(tiny_clip))
    portable = _portable(model)
    assert isinstance(portable, DeferredEmbedder)
    arrived = travel(portable)
    assert arrived.texts(["a dot"]).tolist() == model.texts(["a dot"]).tolist()
    again = travel(arrived)  # loaded or not
    assert again.texts(["a dot"]).tolist() == model.texts(["a dot"]).tolist()
    wrong = DeferredEmbedder([str(other_clip)], dim=model.dim, fingerprint=model.fingerprint)
    with pytest.raises(KnowledgeBaseError, match="cannot be compared"):
        travel(wrong).texts(["a dot"])


def test_a_cluster_that_turns_us_away_may_want_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("index.ingest.ray_engine._check_reachable", lambda address: None)
    corpus, kb = tmp_path / "pets", KnowledgeBase.create(tmp_path / "kb", HashEmbedder())
    write_img2dataset(corpus, shards=1)
    for mode, is_told in ((None, True), ("token", False)):
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        if mode is not None:
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(KnowledgeBaseError, match="Failed to connect to Ray cluster") as told:
            build(kb, [str(corpus)], BuildConfig(engine="ray", ray_address="head:1"))
        assert ("RAY_AUTH_MODE=token" in str(told.value)) == is_told
