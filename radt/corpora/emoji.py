"""The emoji corpus (DESIGN section 6): a table of entities, and pictures of them from a colour-emoji font.

`emoji.json` holds the entities; it is made by `tools/make_emoji_table.py`. The pictures come from whatever
colour-emoji font is installed. Next on the path: `scenes.py`, which composes these pictures.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, features

from index.errors import CorpusError
from radt.corpora.img2dataset import Sample, Written, write_shards

Color: TypeAlias = tuple[int, int, int]  # sRGB, 0 to 255
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the frame
Layer: TypeAlias = UInt8[np.ndarray, "*batch h w 4"]  # RGB premultiplied by alpha: no channel exceeds alpha
Split: TypeAlias = Literal["all", "train", "heldout"]

FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora, older
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "C:/Windows/Fonts/seguiemj.ttf",
)
# Bitmap fonts have only certain sizes: Noto 109, Apple 160. Outline fonts such as Microsoft's take any.
FONT_SIZES = (109, 160)

GROUNDS: tuple[tuple[str, Color], ...] = (
    ("white", (255, 255, 255)),
    ("ivory", (255, 253, 240)),
    ("light gray", (236, 236, 238)),
    ("silver", (205, 208, 212)),
    ("light blue", (214, 232, 250)),
    ("light green", (218, 242, 218)),
    ("light yellow", (253, 246, 200)),
    ("light pink", (252, 222, 230)),
    ("lavender", (230, 222, 248)),
    ("peach", (253, 226, 204)),
    ("sky blue", (120, 185, 235)),
    ("orange", (240, 150, 50)),
    ("green", (90, 170, 90)),
    ("purple", (130, 90, 180)),
    ("dark gray", (80, 84, 90)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entity:
    """One emoji. Entities of one `class_id` look the same; held-out ones are never trained on."""

    position: int
    codes: tuple[str, ...]
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    class_id: int
    held_out: bool

    @property
    def sequence(self) -> str:
        """The characters that a font turns into the picture."""
        return "".join(chr(int(code, 16)) for code in self.codes)

    @property
    def caption(self) -> str:
        """Name and keywords, as in `wolf: face`; keywords that say nothing new are left out."""
        said = set(_words(self.name))
        fresh = []
        for keyword in self.keywords:
            words = set(_words(keyword))
            if words - said:
                fresh.append(keyword)
                said |= words
        return f"{self.name}: {', '.join(fresh)}" if fresh else self.name

    def facts(self) -> dict[str, Any]:
        """What a corpus record says about this entity."""
        return {
            "codes": " ".join(self.codes),
            "name": self.name,
            "group": self.group,
            "class_id": self.class_id,
            "held_out": self.held_out,
        }


@cache
def load_entities() -> tuple[Entity, ...]:
    """Load the committed table, in the order of Unicode's emoji-test.txt."""
    rows = json.loads(_read_table())
    return tuple(entity_from_json(row, position) for position, row in enumerate(rows))


def table_digest() -> str:
    """Names this version of the table, so that a corpus of another version is not taken for a corpus of this one."""
    return blake2b(_read_table(), digest_size=8).hexdigest()


def entity_from_json(row: dict[str, Any], position: int) -> Entity:
    """Build one entity from one line of the table."""
    return Entity(
        position=position,
        codes=tuple(row["codes"]),
        name=row["name"],
        keywords=tuple(row["keywords"]),
        group=row["group"],
        subgroup=row["subgroup"],
        class_id=row["class_id"],
        held_out=row["held_out"],
    )


def select(entities: Sequence[Entity], split: str) -> tuple[Entity, ...]:
    """The entities of one split. Classes never straddle `train` and `heldout`."""
    if split not in get_args(Split):
        raise CorpusError(f"unknown split {split!r}: use one of {', '.join(get_args(Split))}")
    return tuple(e for e in entities if split == "all" or e.held_out == (split == "heldout"))


def find_font(path: str | Path | None = None) -> Path:
    """The colour-emoji font to draw with: `path` if given, else the first one found where systems keep theirs."""
    if path is not None:
        if not Path(path).is_file():
            raise CorpusError(f"no font file at {path}: give the path of a colour-emoji .ttf or .ttc file")
        return Path(path)
    for candidate in FONT_PATHS:
        if Path(candidate).expanduser().is_file():
            return Path(candidate).expanduser()
    raise CorpusError(
        "no colour-emoji font found: install one (Debian or Ubuntu: apt install fonts-noto-color-emoji), "
        "or name a font file with --font"
    )


class GlyphRenderer:
    """Draws entities as square RGBA pictures, cropped to their ink. Indexable by an entity's position in the table."""

    def __init__(self, font: str | Path | None = None) -> None:
        self.path = find_font(font)
        self._font = _open_font(self.path)
        self._glyphs: dict[str, Image.Image | None] = {}
        self._missing = _ink(self._draw("\U0010ffff"))  # unassigned for ever: shows what the font draws for "no glyph"
        self._one_glyph = 1.5 * self._font.getlength("\U0001f600")
        if not _is_colored(self._square_glyph("\U0001f600")):
            raise CorpusError(f"{self.path} draws no emoji in colour: give a colour-emoji font with --font")

    @property
    def family(self) -> str:
        """The font's own name, such as `Noto Color Emoji`."""
        return self._font.getname()[0] or self.path.stem

    @property
    def license(self) -> str:
        """A line for the corpus records saying what the pictures may be used for."""
        if self.family == "Noto Color Emoji":
            return "Noto Color Emoji, Google Inc., SIL Open Font License 1.1"
        return f"drawn with {self.family}: the licence of that font applies"

    def draws(self, entity: Entity) -> bool:
        """Whether the font has one picture for this entity (not a blank, a box, or its parts side by side)."""
        return self._square_glyph(entity.sequence) is not None

    def glyph(self, entity: Entity) -> Image.Image:
        """The picture at the font's own resolution: RGBA, straight alpha, square, touching two sides at least."""
        glyph = self._square_glyph(entity.sequence)
        if glyph is None:
            raise CorpusError(
                f"{self.path} does not draw {entity.name!r} ({' '.join(entity.codes)}): use another --font"
            )
        return glyph

    def __getitem__(self, position: int) -> Image.Image:
        return self.glyph(load_entities()[position])

    def _square_glyph(self, sequence: str) -> Image.Image | None:
        if sequence not in self._glyphs:
            ink = _ink(self._draw(sequence)) if self._font.getlength(sequence) <= self._one_glyph else None
            is_missing = ink is None or (self._missing is not None and ink.tobytes() == self._missing.tobytes())
            self._glyphs[sequence] = None if is_missing or ink is None else _pad_to_square(ink)
        return self._glyphs[sequence]

    def _draw(self, sequence: str) -> Image.Image:
        side = 2 * int(self._font.size)
        canvas = Image.new("RGBA", (2 * side, 2 * side))
        ImageDraw.Draw(canvas).text((side // 2, side // 2), sequence, font=self._font, embedded_color=True)
        # Pillow blends colour and alpha alike into the clear canvas, so what lies there is premultiplied.
        return Image.frombytes("RGBa", canvas.size, canvas.tobytes()).convert("RGBA")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendition:
    """How one picture of an entity is drawn. `scale` is the larger side of its ink as a fraction of the frame."""

    number: int
    scale: float
    angle: float  # degrees, counter-clockwise
    shift: tuple[float, float]  # right and down, fractions of the frame
    ground_name: str
    ground: Color

    @property
    def box(self) -> Box:
        """The square that the ink is fitted into."""
        left, top = ((1 - self.scale) / 2 + s for s in self.shift)
        return left, top, left + self.scale, top + self.scale


def rendition(entity: Entity, number: int) -> Rendition:
    """Rendition 0 is upright on white; the others are drawn by lot, fixed by the entity's codes and the number."""
    if number == 0:
        return Rendition(number=0, scale=0.92, angle=0.0, shift=(0.0, 0.0), ground_name="white", ground=GROUNDS[0][1])
    digest = blake2b(f"{' '.join(entity.codes)}/{number}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    scale = float(rng.uniform(0.72, 0.95))
    room = (1 - scale) / 2
    ground_name, ground = GROUNDS[int(rng.integers(len(GROUNDS)))]
    return Rendition(
        number=number,
        scale=scale,
        angle=float(rng.uniform(-8, 8)),
        shift=(float(rng.uniform(-room, room)), float(rng.uniform(-room, room))),
        ground_name=ground_name,
        ground=ground,
    )


def placement_layer(glyph: Image.Image, box: Box, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """Fit a square RGBA glyph into `box` of an empty frame: premultiplied RGBA, no channel above alpha.

    One Lanczos resampling, with the box at its exact place between pixels: the frame is cut out of the glyph's
    own pixel grid. What lies outside the frame is cropped.
    """
    left, top, right, bottom = box
    across, down = glyph.width / (right - left), glyph.height / (bottom - top)  # the frame's sides in glyph pixels
    x, y = left * across, top * down  # where the glyph starts in the frame
    # One spare pixel on each side, so that the fractional part of the offset stays inside the canvas.
    canvas = Image.new("RGBa", (int(across) + 3, int(down) + 3))
    canvas.paste(glyph.convert("RGBa"), (int(x // 1) + 1, int(y // 1) + 1))
    x0, y0 = 1 - x % 1, 1 - y % 1
    frame = canvas.resize((size, size), Image.Resampling.LANCZOS, box=(x0, y0, x0 + across, y0 + down))
    layer = np.array(frame)
    # Lanczos overshoots: hold colour to alpha, or edges would glow.
    np.minimum(layer[..., :3], layer[..., 3:], out=layer[..., :3])
    return layer


def rendition_layer(glyph: Image.Image, rendition: Rendition, size: int) -> UInt8[np.ndarray, "size size 4"]:
    """Turn and place a glyph: premultiplied RGBA. The ink is fitted after turning, so nothing is cut off."""
    if rendition.angle:
        ink = _ink(glyph.rotate(rendition.angle, Image.Resampling.BICUBIC, expand=True))
        assert ink is not None, "a glyph lost its ink in turning"
        glyph = _pad_to_square(ink)
    return placement_layer(glyph, rendition.box, size)


def compose(layer: Layer, ground: Sequence[int] | UInt8[np.ndarray, "*ground 3"]) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Lay premultiplied layers over a colour or a picture (anything that broadcasts): RGB.

    A colour for each picture of a batch is `grounds[:, None, None]`.
    """
    beneath = np.asarray(ground, dtype=np.uint16)
    clear = 255 - layer[..., 3:].astype(np.uint16)
    # Rounded division; the sum cannot pass 255 because a colour never exceeds its alpha.
    return (layer[..., :3] + (clear * beneath + 127) // 255).astype(np.uint8)


def render_rendition(glyph: Image.Image, rendition: Rendition, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """One picture of the emoji corpus: RGB."""
    return compose(rendition_layer(glyph, rendition, size), rendition.ground)


def write_emoji(
    out: Path,
    *,
    renditions: int = 4,
    size: int = 128,
    split: Split = "all",
    num_entities: int | None = None,
    font: str | Path | None = None,
    shard_size: int = 2000,
    on_item: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the emoji corpus in img2dataset's layout; `on_item` is told (done, total). Whole shards are kept.

    `num_entities` keeps the first so many of the split.
    """
    if renditions < 1 or size < 8:
        raise CorpusError(f"renditions must be at least 1 and size at least 8, got {renditions} and {size}")
    glyphs = GlyphRenderer(font)
    drawn = list(islice((entity for entity in select(load_entities(), split) if glyphs.draws(entity)), num_entities))

    def sample(i: int) -> Sample:
        entity = drawn[i // renditions]
        drawing = rendition(entity, i % renditions)
        facts = entity.facts() | {
            "rendition": drawing.number,
            "ground": drawing.ground_name,
            "font": glyphs.family,
            "license": glyphs.license,
        }
        return Sample(
            pixels=render_rendition(glyphs.glyph(entity), drawing, size), caption=entity.caption, metadata=facts
        )

    recipe = {
        "corpus": "emoji",
        "table": table_digest(),
        "renditions": renditions,
        "size": size,
        "split": split,
        "font": glyphs.family,
    }
    return write_shards(out, sample, num=len(drawn) * renditions, shard_size=shard_size, recipe=recipe, on_item=on_item)


def _read_table() -> bytes:
    return files("radt.corpora").joinpath("emoji.json").read_bytes()


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise CorpusError(
            "this Pillow was built without Raqm, which joins emoji sequences into one picture: "
            "pip install --force-reinstall pillow brings one that has it"
        )
    for size in FONT_SIZES:
        if font := _font_of_size(path, size):
            return font
    raise CorpusError(f"{path} cannot be opened as a colour-emoji font: give another with --font")


def _font_of_size(path: Path, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.RAQM)
    except OSError:  # not a font, or a bitmap font without this size: FreeType does not say which
        return None


def _ink(picture: Image.Image) -> Image.Image | None:
    """Crop to what is not transparent; None when nothing is."""
    box = picture.getchannel("A").getbbox()
    return picture.crop(box) if box else None


def _is_colored(glyph: Image.Image | None) -> bool:
    return glyph is not None and bool(np.ptp(np.asarray(glyph.convert("RGB")), axis=-1).max() > 0)


def _pad_to_square(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
