"""Sizes: what each kind of searcher takes in memory, on disk and in time, and which kind a budget asks for.

The numbers per row are measured, see beside each; `index/ingest/plan.py` prints what follows from them.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.errors import ConfigError, MissingExtraError
from index.search.searcher import EXACT_BELOW, SearcherKind
from index.store import MAP_ROWS

# Bytes a row, beside the numbers themselves
ID_BYTES = 40  # five arrays of int64: by position, ascending, their order in the searcher; all and valid in the view
LANCE_ID_BYTES = 24  # the searcher has no positions
MAP_BYTES = 24  # of the `RowMap` that a session keeps once it has looked many pairs up
_SCANN_ROW_BYTES = 8  # its leaf, and the slack of the leaves' code blocks
_LANCE_ROW_BYTES = 16  # row address and the factors that go with a code
_LANCE_BITS = 5  # of IVF_RQ for each number: Lance's default; measured 336 B a row of 512, as this makes it
_LANCE_CACHE_BYTES = 1 << 30  # what Lance keeps of an index and of pages while it serves

HELD_SHARE = 0.1  # of the memory; vectors that take more are read for each search

# Seconds of one processor; 2 cores of an Intel Xeon (Sapphire Rapids) shared with other work, 2026-11-21. Measured and
# by these: 200k x 512 with 100k training rows 35 and 35, with 20k 15 and 15; 200k x 128 7.0 and 7.2; 200k x 256 in 3
# shards 32 and 34, in 8 shards 30 and 32
_SCANN_LEAF_SECONDS = 3.7e-10  # for each training row, leaf and number: twelve rounds of k-means
_SCANN_CODE_SECONDS = 9.4e-7  # for each training row of the codes and each block
_SCANN_ASSIGN_SECONDS = 1.0e-10  # for each row, leaf and number: a matrix product
_SCANN_ENCODE_SECONDS = 1.6e-7  # for each row and block: anisotropic codes
# 100k x 512 in 316 lists 9.3 s
_LANCE_SECONDS = 1.8e-7  # for each row and number

# 200k x 256, recall@10 with 32 of 447 leaves: 0.963 with 100 training rows a leaf, 0.992 with 224, 0.992 with all
_TRAINING_ROWS_PER_LEAF = 200
_FEWEST_TRAINING_ROWS = 100_000
_MOST_TRAINING_ROWS = 400_000  # they take gigabytes
_CODE_TRAINING_ROWS = 100_000
_TRAINING_FACTOR = 9  # bytes held while training, for each number of the training rows: two float32 copies and a bit

WORKING_BYTES = 128 << 20  # blocks of scores while rows are compared, and of rows: see `working_bytes`
_WORKING_ROWS = 3 << 15

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """How the vectors are to be searched, what that takes, and why it was chosen. Bytes are the searcher's alone."""

    kind: SearcherKind
    rows: int
    dim: int
    reason: str
    shards: int = 1  # ScaNN only
    vectors: Literal["memory", "disk"] = "memory"  # where the exact scores of the candidates come from
    is_resident: bool = True  # False: shards do not fit together and are loaded one at a time
    serving_bytes: int
    building_bytes: int  # the most held while it is built, `working_bytes` left out
    disk_bytes: int
    build_seconds: float  # of one processor; two take half as long


def choose_structure(
    rows: int, dim: int, *, ram: int | None = None, kind: Literal["auto", "exact", "scann", "lance"] = "auto"
) -> Structure:
    """The structure for `rows` vectors of `dim` numbers within `ram` bytes, by default most of this machine's memory.

    `auto`: exact while that is quick; ScaNN with its vectors in memory where they fit; ScaNN with its codes in memory
    and its vectors on disk; Lance when not even the codes fit, or where ScaNN cannot be imported. A kind that is asked
    for is what is chosen. ConfigError when `ram` does not suffice for it in any form.
    """
    ram = default_ram() if ram is None else ram
    if kind == "exact" or (kind == "auto" and rows < EXACT_BELOW):
        return _exact(rows, dim, ram, is_asked=kind == "exact")
    if kind == "lance" or (kind == "auto" and not _has_scann()):
        why = "it was asked for" if kind == "lance" else "ScaNN has no package for this machine"
        return _lance(rows, dim, ram, reason=why)
    resident = _resident_scann(rows, dim, ram)
    if resident is not None:
        return resident
    if kind == "auto":
        need = scann_serving_bytes(rows, dim, vectors="disk")
        return _lance(rows, dim, ram, reason=f"ScaNN's codes alone take {gigabytes(need)} of the {gigabytes(ram)}")
    codes = scann_serving_bytes(rows, dim, vectors="disk") - _id_bytes(rows, ID_BYTES)
    room = max(ram // 8, ram - _id_bytes(rows, ID_BYTES))
    shards = max(_shards_to_build(rows, dim, ram), math.ceil(2 * codes / room))
    why = f"it was asked for; its codes exceed {gigabytes(ram)}: shards are loaded one at a time, which suits batches"
    return _scann(rows, dim, shards=shards, vectors="disk", reason=why, is_resident=False)


def scann_leaves(rows: int) -> int:
    """About sqrt(n) leaves; none below 20,000 rows, which are scored one by one."""
    return 0 if rows < EXACT_BELOW else round(math.sqrt(rows))


def scann_block(dim: int) -> int:
    """Numbers that share one code of four bits."""
    return 2 if dim <= 256 else 3 if dim <= 512 else 4


def training_rows(rows: int) -> int:
    """How many rows the leaves are learned from."""
    wanted = max(_FEWEST_TRAINING_ROWS, _TRAINING_ROWS_PER_LEAF * scann_leaves(rows))
    return min(rows, wanted, _MOST_TRAINING_ROWS)


def code_training_rows(rows: int) -> int:
    """How many of those the codes are learned from: sixteen centres for each block need no more."""
    return min(training_rows(rows), _CODE_TRAINING_ROWS)


def scann_serving_bytes(
    rows: int, dim: int, *, vectors: Literal["memory", "disk"], resident_rows: int | None = None
) -> int:
    """Memory of a session that searches with ScaNN: ids of all rows; codes, perhaps vectors, of those held at once.

    A million rows of 512 with their vectors: measured 2,177 MB after a batch by vector and, beside the words (see
    `plan.WORD_MEMORY`), 2,210 MB after a batch by both; by this 2,205.
    """
    numbers = 4 * dim if vectors == "memory" else 0
    held = rows if resident_rows is None else resident_rows
    return _id_bytes(rows, ID_BYTES) + held * (numbers + math.ceil(dim / scann_block(dim)) // 2 + _SCANN_ROW_BYTES)


def _id_bytes(rows: int, each: int) -> int:
    return rows * (each + (MAP_BYTES if rows <= MAP_ROWS else 0))


def scann_building_bytes(rows: int, dim: int) -> int:
    """The most memory ScaNN takes while it builds one shard: twice the vectors, and the training rows several times.

    Measured 6,383 B a row for 200k x 512 with 100k training rows and 4,558 B with 20k, the file it reads left out.
    """
    return rows * (8 * dim + _SCANN_ROW_BYTES + ID_BYTES) + _TRAINING_FACTOR * dim * training_rows(rows)


def scann_build_seconds(rows: int, dim: int) -> float:
    """Seconds of one processor to build one shard."""
    leaves, blocks = scann_leaves(rows), math.ceil(dim / scann_block(dim))
    if not leaves:
        return 0.0
    training = _SCANN_LEAF_SECONDS * training_rows(rows) * leaves * dim
    training += _SCANN_CODE_SECONDS * code_training_rows(rows) * blocks
    return training + rows * (_SCANN_ASSIGN_SECONDS * leaves * dim + _SCANN_ENCODE_SECONDS * blocks)


def working_bytes(dim: int) -> int:
    """Blocks of rows on their way, whatever the structure: belongs to the process, as its model does."""
    return WORKING_BYTES + 4 * dim * _WORKING_ROWS


def default_ram() -> int:
    """Four fifths of the memory this process may have; of 8 GB where the system does not say."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 * 10**9
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path).read_text(encoding="ascii").strip() if Path(path).is_file() else "max"
        if limit.isdigit():
            total = min(total, int(limit))
    return total * 4 // 5


def may_be_held(rows: int, dim: int) -> bool:
    """Whether vectors beside the searcher's own, thrice as much while they load, take little enough of the memory."""
    return 4 * dim * rows <= HELD_SHARE * default_ram()


def processors() -> int:
    """Those that this process may run on: fewer than the machine has, where someone has bound it to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_bytes(text: str) -> int:
    """`16G`, `800M`, `1.5T`, `1000000`: decimal units, as disks and this package's output have them."""
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        value = float(number.removesuffix(unit))
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"{text!r} is not a size; write it as 16G or 800M")
    return int(value * _UNITS[unit])


def gigabytes(size: float) -> str:
    """A size for people."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def _exact(rows: int, dim: int, ram: int, *, is_asked: bool) -> Structure:
    size = rows * 4 * dim + _id_bytes(rows, LANCE_ID_BYTES)
    why = "it was asked for" if is_asked else f"below {EXACT_BELOW:,} rows comparing all is as quick"
    if size > ram:
        why += f"; it does not fit in {gigabytes(ram)}"
    return Structure(
        kind="exact",
        rows=rows,
        dim=dim,
        reason=why,
        serving_bytes=size,
        building_bytes=min(size, 8 * dim * EXACT_BELOW),
        disk_bytes=0,
        build_seconds=0.0,
    )


def _resident_scann(rows: int, dim: int, ram: int) -> Structure | None:
    """ScaNN with all shards open at once, its vectors in memory if possible; None when not even its codes fit."""
    shards = _shards_to_build(rows, dim, ram)
    if scann_serving_bytes(rows, dim, vectors="memory") <= ram:
        why = f"{rows:,} vectors and their codes fit in {gigabytes(ram)}"
        return _scann(rows, dim, shards=shards, vectors="memory", reason=why)
    if scann_serving_bytes(rows, dim, vectors="disk") <= ram:
        why = f"the codes fit in {gigabytes(ram)}, the vectors do not and are read from disk"
        return _scann(rows, dim, shards=shards, vectors="disk", reason=why)
    return None


def _shards_to_build(rows: int, dim: int, ram: int) -> int:
    """How many parts, so that building each stays in `ram`."""
    smallest = scann_building_bytes(EXACT_BELOW, dim)
    if ram < smallest:
        raise ConfigError(
            f"{gigabytes(ram)} of memory are too little to build a searcher over vectors of {dim} numbers; give at "
            f"least {gigabytes(smallest)}"
        )
    shards = 1
    while scann_building_bytes(math.ceil(rows / shards), dim) > ram:
        shards = max(shards + 1, shards * scann_building_bytes(math.ceil(rows / shards), dim) // (2 * ram))
    return shards


def _scann(
    rows: int, dim: int, *, shards: int, vectors: Literal["memory", "disk"], reason: str, is_resident: bool = True
) -> Structure:
    each = math.ceil(rows / shards)
    serving = scann_serving_bytes(rows, dim, vectors=vectors, resident_rows=rows if is_resident else each)
    codes = math.ceil(dim / scann_block(dim)) + 4 + 8  # unpacked on disk, the leaf, the id
    return Structure(
        kind="scann",
        rows=rows,
        dim=dim,
        reason=reason,
        shards=shards,
        vectors=vectors,
        is_resident=is_resident,
        serving_bytes=serving,
        building_bytes=max(scann_building_bytes(each, dim), serving),
        disk_bytes=rows * (4 * dim + codes) + shards * 8 * dim * scann_leaves(each),
        build_seconds=shards * scann_build_seconds(each, dim),
    )


def lance_index_bytes(rows: int, dim: int) -> int:
    """Lance's inverted lists on disk, the vectors left out."""
    bits = _LANCE_BITS if dim % 8 == 0 else 8
    return rows * (dim * bits // 8 + _LANCE_ROW_BYTES)


def _lance(rows: int, dim: int, ram: int, *, reason: str) -> Structure:
    serving = _id_bytes(rows, LANCE_ID_BYTES) + min(_LANCE_CACHE_BYTES, lance_index_bytes(rows, dim))
    return Structure(
        kind="lance",
        rows=rows,
        dim=dim,
        reason=reason + ("" if serving <= ram else f"; even its ids and cache exceed {gigabytes(ram)}"),
        vectors="disk",
        serving_bytes=serving,
        building_bytes=max(serving, 2 * 256 * 4 * dim * max(1, round(math.sqrt(rows)))),  # k-means: 256 rows a list
        disk_bytes=rows * (4 * dim + 8 + 8) + lance_index_bytes(rows, dim),
        build_seconds=_LANCE_SECONDS * rows * dim,
    )


def _has_scann() -> bool:
    from index.search.scann_searcher import import_scann

    try:
        import_scann()
    except MissingExtraError:
        return False
    return True
