"""Parts: several processes, on one machine or on many that share a folder, fill one knowledge base together.

Part I of N takes every shard whose name falls to it, and holds the writer's lock only while it commits. A whole build
and parts keep out of each other's way, and so do two processes with the same part.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

from index.atomic import one_sentence
from index.errors import ConfigError, KnowledgeBaseError
from index.ingest.engines import StagedShard
from index.ingest.ledger import Ledger, PairName
from index.lock import POLL_SECONDS, try_lock
from index.records import StoredPair
from index.removals import Removed
from index.store import PairStore

FOLDER = "parts"  # of the knowledge base: one lock file for each part
START_SECONDS = 60.0  # a part waits so long for those that are committing
NUMBERS = re.compile(r"[0-9]{1,18}")
# Of a turn of 2 ** 64: the fraction of the root of 43. Like that of the golden ratio it spreads numbers in a row, and
# of the roots up to 97 it spreads best those that go by tens, hundreds, thousands or powers of two.
STEP = 0x8EB44A8768581511
TURN_SECONDS = 3600.0  # and so long for its turn to commit: it has work to lose


@dataclass(frozen=True, slots=True)
class Part:
    """Part `number`, from 1, of `count`."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigError(f"a part is one of 1/{self.count} to {self.count}/{self.count}, got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `2/8`. ConfigError otherwise."""
        match = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
        if match is None:
            raise ConfigError(f"a part is given as NUMBER/COUNT, such as 2/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def has(self, shard: str) -> bool:
        """Whether a shard falls to this part: by its name alone, so that all processes agree.

        Shards that are numbered, as nearly all are, are spread more evenly than by chance, by whatever step the numbers
        go: each number is `STEP` of a turn further round the parts.
        """
        numbers = NUMBERS.findall(shard)  # all of them: `train-00003-of-00100`, `a/00007`
        if numbers:
            turn = sum(map(int, numbers)) * STEP % 2**64
        else:
            turn = int.from_bytes(blake2b(shard.encode(), digest_size=8).digest(), "big")
        return (turn * self.count) >> 64 == self.number - 1


@contextmanager
def admitted(
    store: PairStore, part: Part | None, *, wait: float = 0, on_wait: Callable[[str], None] = lambda sentence: None
) -> Iterator[None]:
    """The right to build: the writer's lock for a whole build, or for `part` only its own lock.

    KnowledgeBaseError, which says who it is, when another process stands against it for more than `wait` seconds.
    """
    if part is None:
        with without_parts(store, wait=wait, on_wait=on_wait):
            yield
        return
    with ExitStack() as held:
        with store.lock(max(wait, START_SECONDS), on_wait=on_wait):  # so no part begins beside a whole build
            held.enter_context(_part_lock(store.directory, part))
        yield


@contextmanager
def without_parts(
    store: PairStore, *, wait: float = 0, on_wait: Callable[[str], None] = lambda sentence: None
) -> Iterator[None]:
    """The writer's lock while no part is at work: what a part has written and not committed looks like garbage."""
    deadline = time.monotonic() + wait
    told = False
    while True:
        with store.lock(max(0.0, deadline - time.monotonic()), on_wait=on_wait):
            busy = _at_work(store.directory)
            if not busy:
                yield
                return
        sentence = f"{store.directory} is being filled by {', '.join(busy)}"
        if time.monotonic() >= deadline:
            raise KnowledgeBaseError(f"{sentence}; wait for that to end, then run the command again")
        if not told:
            on_wait(f"{sentence}; waiting for that up to {wait:.0f} s")
            told = True
        time.sleep(POLL_SECONDS)


class DeferredClaims:
    """The claims of a part: noted while it has no lock, and made when it has, before its shards are committed."""

    def __init__(self, store: PairStore, ledger: Ledger):
        self._store = store
        self._ledger = ledger
        self._names: dict[tuple[str, str], list[PairName]] = {}

    def note(self, pairs: Sequence[StoredPair | PairName]) -> None:
        """Remember which ids a shard wants."""
        for pair in pairs:
            name = PairName(id=pair.id, dataset=pair.dataset, shard=pair.shard, key=pair.key)
            self._names.setdefault((pair.dataset, pair.shard), []).append(name)

    def make(self, shards: Sequence[StagedShard]) -> list[StagedShard]:
        """Those of the shards that may be committed, their ids claimed. The caller holds the lock.

        Another process may have stored the same shard meanwhile; or a pair of it, or any image, has been taken down
        since it was staged, and then it is left for the next build.
        """
        self._ledger.refresh()
        removed = Removed.read(self._store.dataset)
        blind = {version for version in {shard.version for shard in shards} if self._forbids_less(version, removed)}
        welcome = []
        for shard in shards:
            record = shard.record
            names = self._names.pop((record.dataset, record.shard), [])
            if shard.version in blind or self._ledger.holds(record) or _has_lost_pairs(shard, names, removed.ids):
                continue
            self._ledger.claim(names)
            welcome.append(shard)
        return welcome

    def _forbids_less(self, version: int, removed: Removed) -> bool:
        """Whether who saw this version of the table may have let in an image that is forbidden by now."""
        if not (removed.digests or removed.urls):
            return False
        then = Removed.read(self._store.dataset.checkout_version(version))
        return not (removed.digests <= then.digests and removed.urls <= then.urls)


def _has_lost_pairs(shard: StagedShard, names: Sequence[PairName], removed: frozenset[int]) -> bool:
    """Staging drops what was taken down before: are there more such pairs now than rows are missing?"""
    dropped = shard.record.pairs - shard.rows.pairs - shard.rows.forbidden
    return len(removed.intersection(name.id for name in names)) > dropped


@contextmanager
def _part_lock(directory: Path, part: Part) -> Iterator[None]:
    with one_sentence(directory):
        (directory / FOLDER).mkdir(exist_ok=True)
        file = open(directory / FOLDER / f"{part.number}-of-{part.count}.lock", "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        if not try_lock(file):
            raise KnowledgeBaseError(
                f"part {part} of {directory} is being made by {_owner(file)}; wait for it, or take another part"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read() or "another process"


def _at_work(directory: Path) -> list[str]:
    """The parts that some process is making: their locks are taken. The files of the others are swept."""
    busy = []
    for path in sorted((directory / FOLDER).glob("*.lock")):
        with path.open("a+", encoding="utf-8") as file:
            if not try_lock(file):
                busy.append(f"part {path.stem.replace('-of-', '/')} ({_owner(file)})")
                continue
        path.unlink()
    return busy
