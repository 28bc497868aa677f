"""Builds on a real Ray cluster: two raylets, one processor each. Equal to local ones, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from index.embedder import ClipEmbedder
from index.ingest.build import BuildConfig, build
from index.knowledge_base import KnowledgeBase
from index.store import PairStore
from tests.fakes import HashEmbedder, sample, write_tar

ROOT = Path(__file__).parents[2]
PATIENCE = 200.0  # seconds, of a busy machine
SHARDS = 10
PER_SHARD = 12

CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster()
cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    print("killed", flush=True)
cluster.shutdown()
"""

BUILD = """
import os, pathlib, time
from index.cli import run
from index.errors import ModelError
from tests.fakes import HashEmbedder

class Noted(HashEmbedder):
    '''Slow; says in a file for each process and machine that it is in the middle of a shard; obeys the file `order`.'''

    def texts(self, texts):
        if self.order() == "refuse":
            raise ModelError("this machine has no model")
        return super().texts(texts)

    def embed(self, prepared):
        import ray
        node = ray.get_runtime_context().get_node_id()
        pathlib.Path({notes!r}, f"{{os.getpid()}}-{{node}}").touch()
        if self.order() == "die":
            os._exit(1)
        time.sleep(0.15)
        return super().embed(prepared)

    def order(self):
        path = pathlib.Path({notes!r}, "order")
        return path.read_text() if path.exists() else ""

def command(args):
    from index.ingest.build import BuildConfig, build
    from index.knowledge_base import KnowledgeBase

    kb = KnowledgeBase.create({kb!r}, Noted())
    config = BuildConfig(engine="ray", ray_address={address!r})
    build(kb, [{source!r}], config, on_shard=lambda record: print(record.shard, flush=True))

run(command, [])
"""


@dataclass
class Machines:
    """A running cluster."""

    address: str
    process: "subprocess.Popen[str]"

    def kill_second(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "killed\n"


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """In a process of its own, so that nothing of Ray is left in this one, nor on the machine."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: it holds sockets
    (Path(folder) / "ray").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not come up"
        yield Machines(address, process)
    finally:
        process.communicate(timeout=PATIENCE)
        left = _until(lambda: not _processes_with(folder) or None, seconds=20)
        shutil.rmtree(folder, ignore_errors=True)
    assert left, _processes_with(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "pets"
    for shard in range(SHARDS):
        members = [item for i in range(PER_SHARD) for item in sample(shard * PER_SHARD + i).items()]
        members += [(f"bad{shard}.png", b"nonsense"), (f"bad{shard}.txt", b"nothing")]
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local engine makes of the corpus."""
    kb = tmp_path_factory.mktemp("local") / "kb"
    build(KnowledgeBase.create(kb, HashEmbedder()), [str(corpus)], BuildConfig())
    return kb


@dataclass
class Running:
    """A build on the cluster, in another process."""

    kb: Path
    notes: Path
    process: "subprocess.Popen[str]"

    def at_work(self) -> list[tuple[int, str]]:
        """Process and machine of the workers that were seen in the middle of a shard."""
        names = [path.name.partition("-") for path in self.notes.glob("*-*")]
        return [(int(pid), node) for pid, _, node in names]

    def end(self) -> tuple[list[str], str, int]:
        """The shards in the order they landed, what was said on stderr, and the exit status."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return out.splitlines(), err, self.process.returncode


def start(machines: Machines, corpus: Path, folder: Path, *, order: str = "") -> Running:
    kb, notes = folder / "kb", folder / "notes"
    notes.mkdir()
    if order:
        (notes / "order").write_text(order)
    script = BUILD.format(notes=str(notes), kb=str(kb), address=machines.address, source=str(corpus))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return Running(kb, notes, process)


def contents(kb: Path) -> list[tuple[str, ...]]:
    """All rows; their order is the one in which the shards ended."""
    return sorted(tuple(map(str, row.values())) for row in PairStore(kb).dataset.to_table().to_pylist())


def _until(condition: Callable[[], object], *, seconds: float = PATIENCE) -> object:
    """What the condition gives once it gives anything; None when it never does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    return None


def _processes_with(text: str) -> list[str]:
    """Command lines of the processes that name it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:  # it has just ended
            continue
        if text in line:
            found.append(line)
    return found


def names_of_shards() -> list[str]:
    return [f"{shard:05d}.tar" for shard in range(SHARDS)]


@pytest.mark.slow
def test_two_machines_make_the_same_table_as_one_process(
    machines: Machines, corpus: Path, local: Path, tmp_path: Path
) -> None:
    running = start(machines, corpus, tmp_path)
    landed, err, status = running.end()
    assert (sorted(landed), err, status) == (names_of_shards(), "", 0)
    assert len({node for _, node in running.at_work()}) == 2, "both machines had shards"
    assert contents(running.kb) == contents(local)
    again = build(
        KnowledgeBase.open(running.kb, HashEmbedder()),
        [str(corpus)],
        BuildConfig(engine="ray", ray_address="127.0.0.1:1"),
    )
    assert (again.pairs_added, again.shards_unchanged) == (0, SHARDS), "a build without work needs no cluster"


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_shard_loses_nothing(
    machines: Machines, corpus: Path, local: Path, tmp_path: Path
) -> None:
    running = start(machines, corpus, tmp_path)
    assert _until(running.at_work)
    os.kill(running.at_work()[0][0], signal.SIGKILL)
    landed, err, status = running.end()
    assert (sorted(landed), err, status) == (names_of_shards(), "", 0)
    assert contents(running.kb) == contents(local)


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_is_named(machines: Machines, corpus: Path, tmp_path: Path) -> None:
    landed, err, status = start(machines, corpus, tmp_path, order="die").end()
    assert (landed, status) == ([], 1)
    assert err.startswith("error: shard '0000")
    assert f"of {corpus} has ended 3 workers" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_what_a_worker_refuses_is_one_sentence(machines: Machines, corpus: Path, tmp_path: Path) -> None:
    landed, err, status = start(machines, corpus, tmp_path, order="refuse").end()
    assert (landed, err, status) == ([], "error: this machine has no model\n", 1)


@pytest.mark.slow
def test_the_command_prints_one_document_and_the_model_travels_by_its_name(
    machines: Machines, corpus: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    KnowledgeBase.create(tmp_path / "kb", ClipEmbedder.load(str(tiny_clip)))
    command = [sys.executable, "-m", "radt.cli", "index", "build", str(corpus), "--kb", str(tmp_path / "kb"), "--json"]
    command += ["--engine", "ray", "--ray-address", machines.address, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    report = json.loads(done.stdout)
    assert (report["pairs_added"], report["quarantined"]) == (SHARDS * PER_SHARD, SHARDS)
    assert sum(report["stages"].values()) == pytest.approx(1, abs=0.01)
    assert PairStore(tmp_path / "kb").count("vector is not null") == SHARDS * PER_SHARD


@pytest.mark.slow
def test_a_machine_that_goes_down_loses_nothing(  # the last one: it is gone then
    machines: Machines, corpus: Path, local: Path, tmp_path: Path
) -> None:
    running = start(machines, corpus, tmp_path)
    assert _until(lambda: len({node for _, node in running.at_work()}) == 2)
    machines.kill_second()
    landed, err, status = running.end()
    assert (sorted(landed), err, status) == (names_of_shards(), "", 0)
    assert contents(running.kb) == contents(local)
