"""The Ray engine: workers on a cluster stage whole shards, and this process commits them as it does its own.

A worker writes its fragments into the table's folder, which all machines must see, and sends back what they are, not
what is in them. Nothing it does is visible before the commit here, so a worker may die at any moment: its shard is
given to another one, and what it had written is garbage for `radt index compact`.
"""

import os
import socket
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from index.embedder import ClipEmbedder, DeferredEmbedder, Embedder
from index.errors import CorpusError, KnowledgeBaseError, MissingExtraError
from index.ingest.decode import KeepImages
from index.ingest.engines import IDLE_SECONDS, StagedShard, run_local
from index.ingest.ledger import PairName
from index.ingest.meter import Meter, Stage
from index.ingest.shards import Shard
from index.records import StoredPair
from index.store import PairStore

MAX_DEATHS = 3  # workers that one shard may take with it
CPUS_A_WORKER = 4  # of a machine without GPUs; each worker holds the model once
CONNECT_SECONDS = 10.0
PATIENCE_SECONDS = 900.0  # for the first worker to come up, model included, when none is at work


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """A shard to be staged, and how many workers have died of it."""

    shard: Shard
    stamp: str
    digest: str
    deaths: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Staged:
    """What comes back from a worker: of each pair its id and its key, and no more."""

    shard: StagedShard
    names: list[tuple[int, str]]  # id and key of each pair
    images: int
    meter: dict[Stage, float]  # seconds of each stage


def run_ray(
    shards: Iterable[tuple[Shard, str, str]],
    *,
    embedder: Embedder,
    store: PairStore,
    claim: Callable[[Sequence[PairName]], None],
    on_batch: Callable[[int], None],
    on_idle: Callable[[], None] = lambda: None,
    workers: int | None = None,
    keep: KeepImages | None = None,
    meter: Meter | None = None,
    address: str | None = None,
) -> Generator[StagedShard, None, None]:
    """Stage shards, given with stamp and digest ("": the worker takes it), on a Ray cluster, in the order they end in.

    `workers` is how many at most; by default one for each GPU, or for every four processors when there is no GPU.
    `address` is HOST:PORT; by default RAY_ADDRESS, the cluster running on this machine, or else this machine alone.
    Without shards no cluster is needed. `on_idle` is called while no worker ends one. MissingExtraError without Ray;
    KnowledgeBaseError when the cluster cannot be used; CorpusError when a shard ends MAX_DEATHS workers.
    """
    jobs = (_Job(shard=shard, stamp=stamp, digest=digest) for shard, stamp, digest in shards)
    first = next(jobs, None)
    if first is None:
        return
    with _connected(address):
        crew = _Crew(embedder, store.directory, workers, keep or KeepImages())
        try:
            for staged in crew.stage(chain([first], jobs), on_idle):
                record = staged.shard.record
                claim([PairName(id=i, dataset=record.dataset, shard=record.shard, key=key) for i, key in staged.names])
                on_batch(staged.images)
                if meter is not None:
                    meter.add(staged.meter, pairs=record.pairs)
                yield staged.shard
        finally:
            crew.dismiss()


class _Crew:
    """The workers, and what is awaited of each: a shard, or that it is ready for its first."""

    def __init__(self, embedder: Embedder, directory: Path, workers: int | None, keep: KeepImages):
        import ray

        count, cpus, gpus = _worker_shape(ray.nodes())
        self._size = min(count, workers or count)
        self._awaited: dict[Any, tuple[Any, _Job | None]] = {}
        self._stillborn = 0
        kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(_Worker)
        arguments = ray.put(_portable(embedder)), str(directory.resolve()), cpus, keep
        self._new_worker: Callable[[], Any] = lambda: kind.remote(*arguments)

    def stage(self, jobs: Iterator[_Job], on_idle: Callable[[], None]) -> Iterator[_Staged]:
        """The jobs, done, as they end. A job whose worker dies goes to another."""
        import ray

        again: deque[_Job] = deque()
        for _ in range(self._size):
            self._hire()
        while True:
            reference = self._next_to_end(on_idle)
            worker, job = self._awaited.pop(reference)
            try:
                staged = ray.get(reference)
            except ray.exceptions.RayTaskError as error:  # it lives, and tells what is wrong
                raise error.cause from error
            except ray.exceptions.RayError as error:
                self._replace_dead(job, error, again)
                continue
            following = again.popleft() if again else next(jobs, None)
            if following is not None:
                self._awaited[worker.stage.remote(following)] = (worker, following)
            if staged is not None:
                yield staged
            if following is None and not again and not self._is_at_work():
                return

    def dismiss(self) -> None:
        """End all workers that have something to do."""
        import ray

        for worker, _ in self._awaited.values():
            ray.kill(worker)

    def _replace_dead(self, job: _Job | None, error: Exception, again: deque[_Job]) -> None:
        """Hire another worker, and put the shard of the dead one back, unless it is the shard that kills."""
        if job is not None:
            again.append(_once_more(job, error))
        else:
            self._stillborn += 1
        if self._stillborn >= MAX_DEATHS * self._size:
            raise KnowledgeBaseError(
                f"workers of the Ray cluster die before they are ready ({_first_line(error)}); they may lack memory "
                "for the model"
            ) from error
        self._hire()

    def _hire(self) -> None:
        worker = self._new_worker()
        self._awaited[worker.be_ready.remote()] = (worker, None)

    def _next_to_end(self, on_idle: Callable[[], None]) -> Any:
        import ray

        while self._is_at_work():
            ended, _ = ray.wait(list(self._awaited), num_returns=1, timeout=IDLE_SECONDS)
            if ended:
                return ended[0]
            on_idle()
        ended, _ = ray.wait(list(self._awaited), num_returns=1, timeout=PATIENCE_SECONDS)
        if not ended:
            raise KnowledgeBaseError(
                f"no worker came up on the Ray cluster in {PATIENCE_SECONDS:.0f} s; `ray status` says what it lacks"
            )
        return ended[0]

    def _is_at_work(self) -> bool:
        return any(job is not None for _, job in self._awaited.values())


class _Worker:
    """Lives on the cluster: has the model once, and stages one shard after the other."""

    def __init__(self, embedder: Embedder, directory: str, threads: int, keep: KeepImages):
        self._embedder, self._keep = embedder, keep
        self._directory = Path(directory)
        self._threads = threads
        self._store: PairStore | None = None

    def be_ready(self) -> None:
        """Load the model and see that the knowledge base is there. UserError when one of them cannot be had."""
        import PIL.Image

        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)  # a bad sample, as in a local build
        if not PairStore.exists(self._directory):
            raise KnowledgeBaseError(
                f"the machine {socket.gethostname()} of the Ray cluster does not see {self._directory}; the knowledge "
                "base must lie in a folder that all machines share"
            )
        self._store = PairStore(self._directory)
        self._embedder.texts([""])

    def stage(self, job: _Job) -> _Staged:
        """Stage one shard."""
        assert self._store is not None, "be_ready comes first"
        self._store.refresh()
        digest = job.digest or job.shard.digest()
        names: list[tuple[int, str]] = []
        images: list[int] = []
        meter = Meter()

        def note(pairs: Sequence[StoredPair]) -> None:
            names.extend((pair.id, pair.key) for pair in pairs)

        staged = run_local(
            [(job.shard, job.stamp, digest)],
            embedder=self._embedder,
            store=self._store,
            claim=note,
            on_batch=images.append,
            workers=self._threads,
            keep=self._keep,
            meter=meter,
        )
        (shard,) = staged
        return _Staged(shard=shard, names=names, images=sum(images), meter=meter.seconds)


def _once_more(job: _Job, error: Exception) -> _Job:
    deaths = job.deaths + 1
    if deaths >= MAX_DEATHS:
        raise CorpusError(
            f"shard {job.shard.name!r} of {job.shard.source} has ended {deaths} workers ({_first_line(error)}); give "
            "them more memory, or take it out of the source; what was finished is kept"
        ) from error
    return replace(job, deaths=deaths)


def _worker_shape(nodes: Sequence[dict[str, Any]]) -> tuple[int, int, int]:
    """How many workers the cluster carries, and the processors and GPUs of each."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [(int(m["GPU"]), int(m.get("CPU", 0))) for m in machines if m.get("GPU", 0) >= 1]
    if gpus:
        return sum(count for count, _ in gpus), min(cpus // count for count, cpus in gpus), 1
    cpus = [int(m["CPU"]) for m in machines if m.get("CPU", 0) >= 1]
    if not cpus:
        raise KnowledgeBaseError("the Ray cluster has no processor to give; start its nodes with --num-cpus")
    each = min(CPUS_A_WORKER, *cpus)
    return sum(count // each for count in cpus), each, 0


def _portable(embedder: Embedder) -> Embedder:
    """A model travels by its name, and its fingerprint is checked where it arrives; a small stand-in travels whole."""
    if isinstance(embedder, ClipEmbedder):
        return DeferredEmbedder([embedder.name], dim=embedder.dim, fingerprint=embedder.fingerprint)
    return embedder


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Ray, silent, for as long as the block runs; one that the caller has connected already is used and left so."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--engine ray needs Ray; install it with: pip install 'radt[ray]'") from error
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None and ":" in address:
        _check_reachable(address)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lance is not fork-safe")  # a fork of Ray's is another program at once
            ray.init(address=address, log_to_driver=False, logging_level="CRITICAL", include_dashboard=False)
    except Exception as error:  # where a node does not start, Ray raises no more than that
        where = address or "of this machine"
        reason = _first_line(error) + _about_tokens()
        raise KnowledgeBaseError(f"cannot use the Ray cluster {where}: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # else it prints pages to stdout when a machine dies
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of a change to come
}


def _about_tokens() -> str:
    """`ray start --head` asks for a token on a machine that has one, and Ray's own error does not say so."""
    if "RAY_AUTH_MODE" in os.environ:
        return ""
    return "; if `ray start` said that token authentication is enabled, set RAY_AUTH_MODE=token here and on every node"


def _check_reachable(address: str) -> None:
    """Ray itself would try for many minutes, and fill the terminal."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise KnowledgeBaseError(
            f"there is no Ray cluster at {address} ({error}); start one with `ray start --head`, or give its HOST:PORT"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
