"""The pictures of docs/generation.md, drawn by the model inside the package from a knowledge base of its emoji.

    radt corpus emoji emoji && radt index build emoji --kb kb
    python tools/make_pictures.py --kb kb

Every picture of a row has the same prompt and seed; below it stands what was asked for beside that.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from radt.explain import explain_file
from radt.explain_sheet import make_sheet
from radt.generate import neighbor_pictures
from radt.neighbors import with_pictures_of
from radt.pipeline import TextToImage
from radt.sheet import Picture, Row, Sheet, draw_sheet

OUT = Path(__file__).parents[1] / "docs" / "pictures"
PROMPTS = (  # of entities that no training saw
    "a flag of India on a blue background",
    "a crown on a purple background",
    "a sunflower on a pink background",
)
TWO_THINGS = "a crown left of a sunflower on a blue background"
# Flags with an emblem, and faces: what is small in them can come from nowhere but the neighbours.
DETAILS = (
    "a flag of India on a blue background",
    "a flag of Mongolia on a purple background",
    "a flag of Tuvalu on a red background",
    "a smiling face with smiling eyes on a pink background",
    "a sleeping face on a green background",
)
Ways = Mapping[str, Mapping[str, Any]]

SAMPLERS: Ways = {
    f"--sampler {name}": {"sampler": name} for name in ("dpmpp_2m", "heun", "ddim", "ancestral", "stochastic")
}
GUIDANCE: Ways = {
    "as the model has it": {},
    "--text-guidance 1 --neighbor-guidance 1": {"text_guidance": 1.0, "neighbor_guidance": 1.0},
    "--text-share 0": {"text_share": 0.0},
    "--text-share 1": {"text_share": 1.0},
    "--guidance joint": {"guidance": "joint"},
    "--guidance-interval 0.3 0.8": {"guidance_interval": (0.3, 0.8)},
    "--negative-prompt red": {"negative_prompt": "red"},
    "--text-guidance 9 --threshold dynamic": {"text_guidance": 9.0, "threshold": "dynamic"},
}
FAST: Ways = {"40 rows": {}, "--fast, 8 rows": {"fast": True}}
POST: Ways = {
    "": {},
    "--post sharpen=0.5,contrast=1.2,saturation=1.3": {"post": "sharpen=0.5,contrast=1.2,saturation=1.3"},
}
STRENGTHS = (0.3, 0.5, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kb", required=True, help="the emoji corpus, built with the shipped model")
    parser.add_argument("--model", help="model folder; default: the one inside the package")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    model = TextToImage.load(given.model, kb=given.kb, device="cpu")
    OUT.mkdir(parents=True, exist_ok=True)
    save("cascade", cascade(model, given.seed))
    save("details", details(model, given.seed))
    one = PROMPTS[-1:]
    for name, title, ways, prompts in (
        ("samplers", "One noise, five samplers, 20 steps", SAMPLERS, one),
        ("guidance", "One noise, other guidance", GUIDANCE, one),
        ("fast", "Guided in 20 steps, and by the fast twin", FAST, PROMPTS),
        ("post", "After drawing", POST, one),
    ):
        save(name, strip(model, title, ways, prompts=prompts, seed=given.seed))
    save("from-a-picture", from_a_picture(model, given.seed))
    (picture,) = model(TWO_THINGS, seed=given.seed)
    path = picture.save(OUT / "explained.png")
    save("explain", make_sheet(explain_file(path, given.model)))
    path.unlink()


def cascade(model: TextToImage, seed: int) -> Sheet:
    """The first stage alone, and all of them over it."""
    rows = []
    for prompt in PROMPTS:
        (small,), (large,) = model(prompt, seed=seed, stages=1), model(prompt, seed=seed)
        drawn = [
            Picture(image=each.image, lines=(f"{each.image.height}x{each.image.width}",)) for each in (small, large)
        ]
        rows.append(Row(prompt=prompt, cells=(neighbor_pictures(large), tuple(drawn))))
    return Sheet(title="Two stages, both with neighbours", columns=("Neighbours", "Drawn"), rows=tuple(rows))


def details(model: TextToImage, seed: int) -> Sheet:
    """Each prompt from its own neighbours, and from the next row's pictures under its own captions."""
    drawn = [model(prompt, seed=seed)[0] for prompt in DETAILS]
    rows = []
    for prompt, picture, other in zip(DETAILS, drawn, [*drawn[1:], drawn[0]], strict=True):
        references = with_pictures_of(picture.neighbors, other.neighbors)
        (swapped,) = model(prompt, k=len(references), references=references, seed=seed)
        cells = (
            neighbor_pictures(picture),
            (Picture(image=picture.image),),
            tuple(Picture(image=each.image) for each in references),
            (Picture(image=swapped.image),),
        )
        rows.append(Row(prompt=prompt, note="held out of all training", cells=cells))
    return Sheet(
        title="What comes from the pictures: the captions stay, the pictures are exchanged",
        columns=("Neighbours found", "Drawn", "The next row's pictures, same captions", "Drawn"),
        rows=tuple(rows),
    )


def strip(model: TextToImage, title: str, ways: Ways, *, prompts: Sequence[str], seed: int) -> Sheet:
    """A row a prompt, a picture a way."""
    rows = []
    for prompt in prompts:
        drawn = [(label, model(prompt, seed=seed, **settings)[0].image) for label, settings in ways.items()]
        pictures = tuple(Picture(image=image, lines=(label,)) for label, image in drawn)
        rows.append(Row(prompt=prompt, note=f"seed {seed}", cells=(pictures,)))
    return Sheet(title=title, columns=("Drawn",), rows=tuple(rows))


def from_a_picture(model: TextToImage, seed: int) -> Sheet:
    """A sketch, and what is drawn from it at several strengths."""
    prompt, sketch = PROMPTS[-1], make_sketch()
    drawn = [
        Picture(
            image=model(prompt, seed=seed, init=sketch, strength=strength)[0].image, lines=(f"--strength {strength}",)
        )
        for strength in STRENGTHS
    ]
    row = Row(prompt=prompt, note=f"seed {seed}", cells=((Picture(image=sketch),), tuple(drawn)))
    return Sheet(title="From a picture to a picture", columns=("--init-image", "Drawn"), rows=(row,))


def make_sketch(size: int = 128) -> Image.Image:
    """A stalk, and a brown disc on a yellow one, on pink."""
    sketch = Image.new("RGB", (size, size), "#f7a8c8")
    draw = ImageDraw.Draw(sketch)
    draw.rectangle([60, 70, 68, 122], fill="#3f9a3c")
    draw.ellipse([28, 10, 100, 82], fill="#fbc02d")
    draw.ellipse([48, 30, 80, 62], fill="#6d4c41")
    return sketch


def save(name: str, sheet: Sheet) -> None:
    """As a PNG of few colours, for the pictures have few."""
    path = OUT / f"{name}.png"
    draw_sheet(sheet).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.name, path.stat().st_size // 1024, "KiB")


if __name__ == "__main__":
    main()
