"""The neighbour store: what the encoder made of a knowledge base's pictures, kept for later requests (row N5).

Within a request keys and values are made once (`Stage.condition`). Here the encoder's maps of each neighbour are kept
between requests and processes, one safetensors file a neighbour and stage, in a folder of the knowledge base. What
depends on a neighbour's place among the K is made anew from them by `UNet.project_encoded`.

On a CPU the last bits of a network call depend on what else is in the batch. So with a store, and wherever
`GenerateSettings.encode_apart` says so, each neighbour goes through the encoder alone: then a kept one and one that is
encoded now are the same to the last bit, in whatever company.
"""

import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from index.embedder import weight_bytes
from index.errors import ConfigError
from index.search.sizes import parse_bytes
from radt.bundle import Bundle
from radt.cascade import Stage
from radt.conditioning import EncodedNeighbors, NeighborKV, map_tensors, to_device
from radt.neighbors import Neighbor, make_batches
from radt.resizing import Size

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "neighbors"  # in the knowledge base
ENDING = ".safetensors"
LOOKUPS = "lookups"  # a line a request: hits, misses, damaged
LOOKUPS_BYTES = 1 << 16  # of that file, before its lines become one
SWEEP_SHARE = 16  # the folder is measured whenever this part of the limit was written, and brought as far below it
ABANDONED_SECONDS = 3600.0  # a file that was being written so long ago never will be


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreUse:
    """Neighbours looked up, one for each stage, and what came of it. `damaged` are those of the misses that were."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0

    @property
    def hit_rate(self) -> float | None:
        """The share that was found; None when nothing was looked up."""
        asked = self.hits + self.misses
        return round(self.hits / asked, 4) if asked else None

    def plus(self, other: "StoreUse", *, times: int = 1) -> "StoreUse":
        """Both together; with `times` -1 what came since `other`."""
        return StoreUse(
            hits=self.hits + times * other.hits,
            misses=self.misses + times * other.misses,
            damaged=self.damaged + times * other.damaged,
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    size: int  # bytes
    used: float  # seconds since the epoch


class NeighborStore:
    """A folder of encoded neighbours, at most `limit` bytes of them; any number of processes may use it at once.

    A file is named by its pair and by a key of all that its content follows from, so it is right or it is not found.
    It comes into the folder whole, by a rename. The least recently used go first; one that is damaged counts as
    missing; where the disk refuses, nothing is kept and the request goes on. Between two measurements of the folder
    each process writes at most a sixteenth of the limit, or one entry that is larger, which is how far several may go
    above it.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.use = StoreUse()  # of this process
        self._unmeasured = limit  # bytes written since the folder was measured; at first nobody knows
        self._said = set[str]()
        self._followed: str | None = None  # the snapshot that `follow` last saw

    def get(self, pair: str, key: str) -> EncodedNeighbors | None:
        """What was kept of a pair under a key, b = k = 1, on the CPU."""
        path = self._path(pair, key)
        try:
            encoded = _read(path)
        except FileNotFoundError:
            self.use = replace(self.use, misses=self.use.misses + 1)
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s): this neighbour is encoded anew", path, error)
            self.use = replace(self.use, misses=self.use.misses + 1, damaged=self.use.damaged + 1)
            with suppress(OSError):
                path.unlink()
            return None
        self.use = replace(self.use, hits=self.use.hits + 1)
        with suppress(OSError):  # read-only, or gone meanwhile
            os.utime(path)
        return encoded

    def put(self, pair: str, key: str, encoded: EncodedNeighbors) -> None:
        """Keep what was made of a pair. What is larger than an emptied store has room for is not kept."""
        content = _to_bytes(encoded)
        if len(content) > self._room:
            return self._say_once(
                "an encoded neighbour of %d bytes is not kept in %s, which may hold %d: it is encoded each time",
                len(content),
                self.folder,
                self.limit,
            )
        try:
            if self._unmeasured + len(content) > self.limit // SWEEP_SHARE:
                self._make_room(len(content))
            self._write(self._path(pair, key), content)
            self._unmeasured += len(content)
        except OSError as error:
            self._say_once("cannot keep encoded neighbours in %s (%s): they are encoded each time", self.folder, error)

    def size(self) -> tuple[int, int]:
        """How many entries there are, and their bytes."""
        sizes = [entry.size for entry in self._entries()]
        return len(sizes), sum(sizes)

    def total_use(self) -> StoreUse:
        """What all requests of all processes looked up since the store was made or cleared."""
        total = StoreUse()
        with suppress(OSError):
            for line in (self.folder / LOOKUPS).read_text(encoding="ascii", errors="replace").splitlines():
                with suppress(ValueError):  # a line cut short by a full disk
                    hits, misses, damaged = map(int, line.split())
                    total = total.plus(StoreUse(hits=hits, misses=misses, damaged=damaged))
        return total

    def note(self, use: StoreUse) -> None:
        """Count a request among all: one short line, appended at once, so that no process disturbs another's."""
        path = self.folder / LOOKUPS
        with suppress(OSError):
            if path.exists() and path.stat().st_size > LOOKUPS_BYTES:
                self._write(path, _line(self.total_use()))
            with path.open("ab", buffering=0) as file:
                file.write(_line(use))

    def clear(self) -> int:
        """Take out everything; returns how many entries went."""
        entries = list(self._entries())
        for path in (*(entry.path for entry in entries), self.folder / LOOKUPS):
            path.unlink(missing_ok=True)
        return len(entries)

    def follow(self, kb: "KnowledgeBase | JoinedKnowledgeBase") -> None:
        """Drop what was made of pairs that the knowledge base does not have any more: removed means kept nowhere."""
        version = str(kb.store.version)
        if version == self._followed:
            return
        self._followed = version
        entries = list(self._entries())
        if not entries:
            return
        pairs = sorted({_pair_of(entry.path) for entry in entries})
        there = {str(number) for number in kb.store.matching_ids(f"id IN ({', '.join(pairs)})").tolist()}
        for entry in entries:
            if _pair_of(entry.path) not in there:
                with suppress(OSError):
                    entry.path.unlink()

    def describe(self) -> dict[str, Any]:
        """Where it is, how large, and how often it served, ready for JSON."""
        entries, size = self.size()
        total = self.total_use()
        return {
            "folder": str(self.folder),
            "entries": entries,
            "bytes": size,
            **asdict(total),
            "hit_rate": total.hit_rate,
        }

    def describe_process(self) -> dict[str, Any]:
        """The same of this process alone, without measuring the folder."""
        return {"folder": str(self.folder), "limit": self.limit, **asdict(self.use), "hit_rate": self.use.hit_rate}

    @property
    def _room(self) -> int:
        """Bytes that `_make_room` leaves: a sixteenth of the limit stays free for what comes next."""
        return self.limit - self.limit // SWEEP_SHARE

    def _path(self, pair: str, key: str) -> Path:
        return self.folder / f"{pair}-{key}{ENDING}"

    def _entries(self) -> Iterator[_Entry]:
        with suppress(OSError), os.scandir(self.folder) as files:
            for file in files:
                with suppress(FileNotFoundError):  # another process was faster
                    if file.name.endswith(ENDING) and _is_id(_pair_of(Path(file.name))):
                        facts = file.stat()
                        yield _Entry(self.folder / file.name, facts.st_size, facts.st_mtime)

    def _write(self, path: Path, content: bytes) -> None:
        """Rename a whole file into place. Not flushed to the disk: what a power cut damages is only made again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, coming: int) -> None:
        """Take out the least recently used until `coming` bytes fit into the room, and what dead processes left."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        excess = sum(entry.size for entry in entries) + coming - self._room
        for entry in entries:
            if excess <= 0:
                break
            entry.path.unlink(missing_ok=True)
            excess -= entry.size
        for path in self.folder.glob(".*.new-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        self._unmeasured = 0

    def _say_once(self, sentence: str, *facts: object) -> None:
        if sentence not in self._said:
            log.warning(sentence, *facts)
        self._said.add(sentence)


def open_neighbor_store(size: str | int, kb: "KnowledgeBase | JoinedKnowledgeBase") -> NeighborStore:
    """The store of a knowledge base, bounded to a size such as `256M`; ConfigError for what is no size."""
    limit = size if isinstance(size, int) else parse_bytes(size)
    if limit < 1:
        raise ConfigError(f"the neighbour store's size is in bytes, at least 1, got {limit}")
    return NeighborStore(store_folder(kb), limit=limit)


def inspect(kb: Sequence[str | Path], *, clear: bool = False) -> dict[str, Any]:
    """What `radt neighbor-store` shows of the store of a knowledge base, or of several as one; `clear` empties it."""
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

    opened = KnowledgeBase.open(kb[0]) if len(kb) == 1 else JoinedKnowledgeBase.open(kb)
    store = NeighborStore(store_folder(opened), limit=0)
    cleared = store.clear() if clear else 0
    return {**store.describe(), "cleared": cleared}


def sentence(report: dict[str, Any]) -> str:
    """What `inspect` found, for people."""
    asked = report["hits"] + report["misses"]
    served = "none was looked up yet" if not asked else f"{report['hits']} of {asked} looked up were found"
    removed = f"{report['cleared']} cleared; " if report["cleared"] else ""
    size = f"{report['bytes'] / 1e6:.1f} MB"
    return f"{removed}{report['entries']} encoded neighbours, {size}, in {report['folder']}; {served}"


def store_folder(kb: "KnowledgeBase | JoinedKnowledgeBase") -> Path:
    """Inside the knowledge base; for one that is remote or cannot be written, and for several as one, in the cache.

    The cache is `RADT_CACHE`, or ~/.cache/radt, as for remote knowledge bases; a folder in it belongs to a URL or to
    where a knowledge base lies, however that was typed.
    """
    directory = getattr(kb, "directory", None)
    is_remote = getattr(kb, "remote", None) is not None
    if directory is not None and not is_remote and os.access(directory, os.W_OK):
        return Path(directory) / FOLDER
    cache = Path(os.environ.get("RADT_CACHE") or Path.home() / ".cache" / "radt")
    parts = getattr(kb, "parts", [kb])
    places = [part.remote.url if part.remote else str(Path(part.directory).resolve()) for part in parts]
    return cache / FOLDER / blake2b("\n".join(places).encode(), digest_size=8).hexdigest()


class ApartEncoder:
    """Encodes each neighbour in a network call of its own, or takes it from the store.

    The user's own references are never kept: they are not of the knowledge base.
    """

    def __init__(self, bundle: Bundle, *, device: str, store: NeighborStore | None = None) -> None:
        self.store = store
        self._bundle, self._device = bundle, device
        self._weights: dict[str, str] = {}  # digest of a stage's weights, by its folder

    def encode(self, rows: Sequence[Sequence[Neighbor]], stages: Sequence[Stage]) -> list[NeighborKV | None]:
        """Keys and values for each stage; a row of neighbours an example, shorter ones padded and masked.

        None for each when nobody has a neighbour.
        """
        k = max((len(row) for row in rows), default=0)
        if k == 0:
            return [None] * len(stages)
        before = self.store.use if self.store else StoreUse()
        encoded = [[self._encode_one(neighbor, stages) for neighbor in row] for row in rows]
        if self.store is not None:
            self.store.note(self.store.use.plus(before, times=-1))
        mask = torch.tensor([[place < len(row) for place in range(k)] for row in rows], device=self._device)
        return [
            stage.unet.project_encoded(_stack([[each[place] for each in row] for row in encoded], k), mask)
            for place, stage in enumerate(stages)
        ]

    def stage_key(self, stage: Stage) -> str:
        """A digest of all that decides what the encoder of a stage makes of a neighbour, but the neighbour.

        The weights count by their digests in bundle.json; by themselves where it lists none. Threads, instruction set
        and the layout of the weights are in it, because they decide the last bits.
        """
        folder = stage.fast.name if stage.fast else stage.info.name
        if folder not in self._weights:
            self._weights[folder] = _weights_digest(self._bundle, folder, stage)
        on_gpu = self._device.startswith("cuda")
        machine = torch.cuda.get_device_name(self._device) if on_gpu else torch.backends.cpu.get_cpu_capability()
        kernel = stage.unet.conv_out.weight  # one of all, which share their layout in memory
        here = (torch.__version__, machine, torch.get_num_threads(), kernel.stride())
        what = (folder, self._weights[folder], self._bundle.text_encoder.fingerprint)
        return "/".join(map(str, (FORMAT, *here, *what)))

    def _encode_one(self, neighbor: Neighbor, stages: Sequence[Stage]) -> list[EncodedNeighbors]:
        """One neighbour for every stage; its caption is read once, and only if some stage's store lacks it."""
        store = self.store if _is_id(neighbor.id) else None
        keys = [] if store is None else [content_key(neighbor, stage.size, self.stage_key(stage)) for stage in stages]
        found = [None] * len(stages) if store is None else [store.get(neighbor.id, key) for key in keys]
        if all(each is not None for each in found):
            return [to_device(each, self._device) for each in found if each is not None]
        batches = make_batches([[neighbor]], self._bundle.text_encoder, [stage.size for stage in stages])
        assert batches is not None, "there is one neighbour"
        encoded = []
        for place, (stage, batch) in enumerate(zip(stages, batches, strict=True)):
            kept = found[place]
            made = stage.unet.encode_pairs(to_device(batch, self._device)) if kept is None else kept
            if kept is None and store is not None:
                store.put(neighbor.id, keys[place], made)
            encoded.append(to_device(made, self._device))
        return encoded


def content_key(neighbor: Neighbor, size: Size, stage_key: str) -> str:
    """Names what a stage's encoder makes of a neighbour: its pixels at the stage's size, its caption, the stage."""
    state = blake2b(f"{stage_key}\0{size}\0{neighbor.caption}".encode(), digest_size=16)
    state.update(neighbor.at(size).contiguous().numpy().tobytes())
    return state.hexdigest()


def _weights_digest(bundle: Bundle, folder: str, stage: Stage) -> str:
    state = blake2b(digest_size=16)
    listed = sorted((file.path, file.digest) for file in bundle.info.files if file.path.startswith(f"{folder}/"))
    state.update(repr(listed).encode())
    for part in () if listed else weight_bytes(stage.unet.state_dict()):
        state.update(part)
    return state.hexdigest()


def _stack(rows: Sequence[Sequence[EncodedNeighbors]], k: int) -> EncodedNeighbors:
    """Rows of up to k single neighbours as one record, zeros where a row is short."""
    blank = map_tensors(torch.zeros_like, next(each for row in rows for each in row))
    full = [map_tensors(lambda *parts: torch.cat(parts, dim=1), *row, *[blank] * (k - len(row))) for row in rows]
    return map_tensors(lambda *parts: torch.cat(parts), *full)


def _line(use: StoreUse) -> bytes:
    return f"{use.hits} {use.misses} {use.damaged}\n".encode("ascii")


def _is_id(pair: str) -> bool:
    """Whether it is a pair of the knowledge base: neither a reference of the user nor another file of the folder."""
    return pair.isascii() and pair.isdigit()


def _pair_of(path: Path) -> str:
    return path.name.partition("-")[0]


def _to_bytes(encoded: EncodedNeighbors) -> bytes:
    tensors = {f"maps.{place:02d}": each for place, each in enumerate(encoded.maps)}
    tensors |= {"captions": encoded.captions, "caption_mask": encoded.caption_mask}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, {"digest": _digest(tensors)})


def _read(path: Path) -> EncodedNeighbors:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if (file.metadata() or {}).get("digest") != _digest(tensors):
            raise ValueError("its bytes are not those that were written")
    return EncodedNeighbors(
        maps=tuple(tensors[name] for name in sorted(tensors) if name.startswith("maps.")),
        captions=tensors["captions"],
        caption_mask=tensors["caption_mask"],
    )


def _digest(tensors: dict[str, Tensor]) -> str:
    state = blake2b(digest_size=16)
    for name in sorted(tensors):
        state.update(f"{name}{tuple(tensors[name].shape)}".encode())
        state.update(tensors[name].numpy().tobytes())
    return state.hexdigest()
