"""A large, cheap corpus in img2dataset's layout, for benchmarks: generated captions, small painted pictures.

    python tools/make_pairs.py OUT --num 1000000 [--size 32] [--shard 10000] [--seed 0] [--processes 2] [--jpeg]

Captions have 5 to 15 words: nouns by Zipf's law out of 30,000, a quarter of them with two subjects, a few with a term
that hardly another one has. A picture is painted from its caption's words, so other words make another picture. One
pair in a hundred repeats the picture of an earlier pair byte for byte. Pair i depends on the seed and i alone; run it
again to go on after an interruption: shards that have their stats are kept.
"""

import argparse
import colorsys
import io
import json
import math
import multiprocessing
import tarfile
import time
from bisect import bisect
from functools import cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import PIL.Image
import PIL.ImageDraw

from index.atomic import new_file, write_bytes

NOUNS = 30_000
COLORS = {
    "red": (214, 40, 40), "orange": (244, 140, 6), "yellow": (250, 210, 40), "green": (60, 160, 70),
    "blue": (40, 90, 200), "purple": (130, 60, 170), "brown": (120, 80, 50), "pink": (240, 140, 180),
    "gray": (128, 128, 128), "black": (24, 24, 24), "white": (245, 245, 245), "silver": (190, 195, 200),
    "golden": (212, 175, 55), "turquoise": (60, 200, 190),
}  # fmt: skip
QUALITIES = [
    "old",
    "new",
    "small",
    "large",
    "vintage",
    "handmade",
    "modern",
    "wooden",
    "shiny",
    "broken",
    "painted",
    "soft",
    "heavy",
    "tiny",
    "antique",
]
RELATIONS = ("next to", "left of", "in front of", "behind", "and", "with", "under", "beside")
SCENES = (
    "in the snow", "at the harbour", "on a table", "in a garden", "at night", "on the beach", "in a busy street",
    "under a cloudy sky", "in the forest", "on a white background", "at sunset", "in the museum",
)  # fmt: skip
OPENINGS = ("a photo of", "picture of", "illustration of", "close up of", "stock image:", "drawing of", "", "", "")
ENDINGS = ("for sale", "free shipping", "high resolution", "royalty free", "by the artist", "from the side", "", "", "")
TWO_SUBJECTS, RARE, REPEATED = 0.25, 0.02, 0.01  # shares of the pairs


class Subject(NamedTuple):
    color: str
    noun: str


class Scene(NamedTuple):
    """What a pair says and shows."""

    caption: str
    subjects: tuple[Subject, ...]
    place: str


class Work(NamedTuple):
    """One shard to write."""

    out: Path
    shard: int
    recipe: dict[str, int]


@cache
def nouns() -> tuple[list[str], list[float]]:
    """Made-up words, the commonest shortest, and the running sums of their Zipf weights."""
    random = Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "an")]
    words: dict[str, None] = {}
    while len(words) < NOUNS:
        words["".join(random.choices(syllables, k=2 + (len(words) > 1500) + (len(words) > 20_000)))] = None
    return list(words), list(accumulate(1 / rank for rank in range(1, NOUNS + 1)))


def subject(random: Random) -> Subject:
    words, sums = nouns()
    return Subject(random.choice(list(COLORS)), words[bisect(sums, random.random() * sums[-1], hi=NOUNS - 1)])


def scene(seed: int, number: int) -> Scene:
    """The caption of pair `number`, and what is to be seen on its picture."""
    random = Random(f"{seed} {number}")
    subjects = tuple(subject(random) for _ in range(1 + (random.random() < TWO_SUBJECTS)))
    place = random.choice(SCENES)
    named = f" {random.choice(RELATIONS)} ".join(f"a {random.choice(QUALITIES)} {s.color} {s.noun}" for s in subjects)
    rare = f"model {random.choice('QXZ')}{random.randrange(100_000)}" if random.random() < RARE else ""
    words = f"{random.choice(OPENINGS)} {named} {place} {rare} {random.choice(ENDINGS)}".split()
    return Scene(" ".join(words[:15]), subjects, place)


def picture_number(seed: int, number: int) -> int:
    """The pair whose picture this one shows: mostly its own, at times that of an earlier one."""
    while number:
        random = Random(f"{seed} picture {number}")
        if random.random() >= REPEATED:
            break
        number = random.randrange(number)
    return number


def paint(what: Scene, size: int, random: Random) -> PIL.Image.Image:
    """The place is the ground's colour; a noun is a figure of its own, in the caption's colour, somewhere."""
    ground = colorsys.hsv_to_rgb(SCENES.index(what.place) / len(SCENES), 0.25, random.uniform(0.75, 1))
    image = PIL.Image.new("RGB", (size, size), tuple(int(255 * part) for part in ground))
    pen = PIL.ImageDraw.Draw(image)
    for i, (color, noun) in enumerate(what.subjects):
        width = size // 2 if len(what.subjects) > 1 else size
        _figure(pen, COLORS[color], noun, left=i * width, width=width, jitter=random.randrange(max(1, size // 8)))
    return image


def _figure(
    pen: PIL.ImageDraw.ImageDraw, color: tuple[int, ...], noun: str, *, left: int, width: int, jitter: int
) -> None:
    """A polygon whose corners follow from the noun, with a mark in its middle."""
    shape = Random(noun)
    corners = shape.randrange(3, 9)
    x, y, radius = left + width / 2, width / 2 + jitter, width * 0.45
    points = [
        (x + math.cos(angle) * reach, y + math.sin(angle) * reach)
        for corner in range(corners)
        for angle, reach in [(math.tau * corner / corners + shape.random(), radius * shape.uniform(0.45, 1))]
    ]
    pen.polygon(points, fill=color)
    pen.rectangle(
        (x - 2, y - 2, x + shape.randrange(5), y + shape.randrange(5)), fill=COLORS[shape.choice(list(COLORS))]
    )


def encoded_picture(recipe: dict[str, int], number: int) -> tuple[str, bytes]:
    """File suffix and bytes; every fifth picture is a PNG unless all are to be JPEG."""
    seed, number = recipe["seed"], picture_number(recipe["seed"], number)
    image = paint(scene(seed, number), recipe["size"], Random(f"{seed} paint {number}"))
    buffer = io.BytesIO()
    if number % 5 == 0 and not recipe.get("jpeg"):
        image.save(buffer, "PNG", compress_level=1)
        return "png", buffer.getvalue()
    image.save(buffer, "JPEG", quality=85)
    return "jpg", buffer.getvalue()


def write_shard(work: Work) -> int:
    """Tar, table and stats of one shard, each whole or not there; the number of pairs written."""
    started, recipe = time.time(), work.recipe
    first = work.shard * recipe["shard"]
    rows = []
    with new_file(work.out / f"{work.shard:05d}.tar") as partial, open(partial, "wb") as file:
        for number in range(first, min(first + recipe["shard"], recipe["num"])):
            suffix, encoded = encoded_picture(recipe, number)
            row = _record(f"{work.shard:05d}{number - first:04d}", number, encoded, recipe)
            rows.append(row)
            for ending, content in ((suffix, encoded), ("txt", row["caption"].encode()), ("json", _json(row))):
                file.write(_tar_member(f"{row['key']}.{ending}", content))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    _write_table(work.out / f"{work.shard:05d}.parquet", rows)
    stats = {"count": len(rows), "successes": len(rows), "failed_to_download": 0, "failed_to_resize": 0}
    stats |= {"start_time": started, "end_time": time.time(), "status_dict": {"success": len(rows)}, "recipe": recipe}
    write_bytes(work.out / f"{work.shard:05d}_stats.json", _json(stats))
    return len(rows)


def _record(key: str, number: int, encoded: bytes, recipe: dict[str, int]) -> dict[str, Any]:
    """img2dataset's columns."""
    return {
        "key": key,
        "caption": scene(recipe["seed"], number).caption,
        "url": f"https://pairs.example/{number}",
        "status": "success",
        "error_message": None,
        "width": recipe["size"],
        "height": recipe["size"],
        "original_width": recipe["size"],
        "original_height": recipe["size"],
        "sha256": sha256(encoded).hexdigest(),
    }


def _tar_member(name: str, content: bytes) -> bytes:
    """Header, content and padding of a member without time or owner."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    column = table.schema.get_field_index("error_message")  # all null, a type that other readers trip over
    with new_file(path) as partial:
        pq.write_table(table.cast(table.schema.set(column, pa.field("error_message", pa.string()))), partial)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def unfinished(out: Path, recipe: dict[str, int]) -> list[Work]:
    """The shards without stats. SystemExit when the folder holds a corpus of other settings."""
    todo = []
    for shard in range(math.ceil(recipe["num"] / recipe["shard"])):
        stats = out / f"{shard:05d}_stats.json"
        if not stats.exists():
            todo.append(Work(out, shard, recipe))
        elif json.loads(stats.read_text())["recipe"] != recipe:
            raise SystemExit(f"{out} holds {stats.name} of a corpus with other settings: choose an empty folder")
    return todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, required=True, help="pairs")
    parser.add_argument("--size", type=int, default=32, help="of the pictures, in pixels")
    parser.add_argument("--shard", type=int, default=10_000, help="pairs in a shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--jpeg", action="store_true", help="no PNG among them")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    recipe = {"num": asked.num, "size": asked.size, "shard": asked.shard, "seed": asked.seed}
    recipe |= {"jpeg": 1} if asked.jpeg else {}
    todo = unfinished(asked.out, recipe)
    started, written = time.perf_counter(), 0
    with multiprocessing.Pool(asked.processes) as pool:
        for pairs in pool.imap_unordered(write_shard, todo):
            written += pairs
            print(f"{written} pairs, {written / (time.perf_counter() - started):.0f}/s", flush=True)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"out": str(asked.out), "pairs": asked.num, "written": written, "seconds": seconds}))


if __name__ == "__main__":
    main()
