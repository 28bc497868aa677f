"""TextToImage: a prompt to pictures through neighbours, text encoder, guidance and sampler. The main path (DESIGN 1).

Next: `radt/neighbors.py` for what is retrieved, `radt/cascade.py` for the stages, `radt/unet/unet.py` for their
networks, `radt/diffusion/guidance.py` and `radt/diffusion/samplers.py` for the loop.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from index.config import from_dict, to_dict
from index.errors import ConfigError, QueryError
from radt.bundle import Bundle, load_bundle
from radt.cascade import Cascade, Stage, find_sampler
from radt.conditioning import Condition, repeat
from radt.diffusion.samplers import draw_noise
from radt.neighbors import (
    RGB8,
    Neighbor,
    Reference,
    copy_similarity,
    from_pixels,
    make_batches,
    neighbors_of,
    to_pixels,
)
from radt.provenance import Origin, Record, current_origin, save_png
from radt.resizing import Size, resize
from radt.settings import GenerateSettings

if TYPE_CHECKING:
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

OnStep = Callable[[int, int], None]  # network steps done, of how many


def ignore(done: int, total: int) -> None:
    """The default `on_step`: nobody is watching."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedImage:
    """A picture, the record from which it can be drawn again, and the milliseconds that each part of its request took.

    `timings_ms` has `retrieve`, `encode_neighbors` (once per prompt, the same in all its pictures) and `sample`.
    """

    image: Image.Image
    record: Record
    timings_ms: Mapping[str, float]

    @property
    def prompt(self) -> str:
        """What was asked for."""
        return self.record.prompt

    @property
    def seed(self) -> int:
        """The seed of this picture's own generator."""
        return self.record.seed

    @property
    def neighbors(self) -> tuple[Neighbor, ...]:
        """The pairs it was drawn from, best first."""
        return self.record.neighbors

    @property
    def settings(self) -> GenerateSettings:
        """Everything else that was asked for."""
        return self.record.settings

    def save(self, path: str | Path) -> Path:
        """Write a PNG that carries its own record (`radt replay`)."""
        save_png(Path(path), self.image, self.record)
        return Path(path)

    def to_json(self, path: Path | None = None) -> dict[str, Any]:
        """As DESIGN section 4 fixes it."""
        return {
            "path": None if path is None else str(path),
            "seed": self.seed,
            "prompt": self.prompt,
            "neighbors": [neighbor.to_json() for neighbor in self.neighbors],
            "copy_similarity": self.record.copy_similarity,
            "settings": to_dict(self.settings),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawRequest:
    """One picture for `draw_many`: its prompt, the neighbours that it sees (none: the text alone), and its seed."""

    prompt: str
    neighbors: Sequence[Neighbor] = ()
    seed: int = 0


class TextToImage:
    """A loaded model, and perhaps a knowledge base. Safe to call again and again; it keeps nothing of a request."""

    def __init__(
        self, bundle: Bundle, *, kb: "KnowledgeBase | JoinedKnowledgeBase | None" = None, device: str = "cpu"
    ) -> None:
        self.bundle, self.kb, self.device = bundle, kb, device
        stages = zip(bundle.unets, bundle.info.stages, strict=True)
        self.cascade = Cascade([Stage(unet=unet, info=info) for unet, info in stages], device=device)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        kb: "KnowledgeBase | JoinedKnowledgeBase | str | Path | Sequence[str | Path] | None" = None,
        device: str = "auto",
    ) -> "TextToImage":
        """Load a bundle (None: the demonstration model) and open the knowledge base. `device`: auto, cpu or cuda.

        Several knowledge bases, named in a list, are searched as one.
        """
        device = find_device(device)
        bundle = load_bundle(model, device=device)
        if isinstance(kb, str | Path | Sequence):
            kb = _open_knowledge_base(kb, models=[str(bundle.folder)])
        return cls(bundle, kb=kb, device=device)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.bundle.info.name

    @property
    def digest(self) -> str:
        """Names the weights; the same digest draws the same pictures."""
        return self.bundle.info.digest

    @property
    def size(self) -> Size:
        """Height and width of what is drawn and of what is seen of a neighbour, in pixels."""
        return self.cascade.stages[-1].size

    def picture_size(self, settings: GenerateSettings) -> Size:
        """Height and width of what these settings draw: a request may run fewer stages than there are."""
        return self.cascade.of(settings)[-1].size

    def __call__(self, prompt: str, **request: Any) -> list[GeneratedImage]:
        """Draw `n` pictures; image i takes `seed` + i. The words are those of `stream`."""
        return list(self.stream(prompt, **request))

    def stream(
        self,
        prompt: str,
        *,
        n: int = 1,
        seed: int = 0,
        references: Sequence[Reference] = (),
        on_step: OnStep = ignore,
        **settings: Any,
    ) -> Iterator[GeneratedImage]:
        """Draw `n` pictures, each handed over as soon as it is done. `settings` are fields of GenerateSettings.

        What is not said is as the model's bundle has it. The references come first among the neighbours and the
        knowledge base fills up to `k`. QueryError or ConfigError for what cannot be done as asked.
        """
        asked = self.settings(**settings)
        if n < 1:
            raise QueryError(f"n is the number of pictures, at least 1, got {n}")
        if not 0 <= seed < 2**63 - n:
            raise QueryError(f"the seed must lie between 0 and 2**63 - n, got {seed}")
        clock = _Clock(self.device)
        with clock("retrieve"):
            neighbors = self.retrieve(prompt, settings=asked, references=references)
        with clock("encode_neighbors"):
            conditions = self.encode(prompt, neighbors, settings=asked)
        origin = self.origin()
        seeds = range(seed, seed + n)
        steps = self.cascade.network_steps(asked)
        for start in range(0, n, asked.batch_size):
            some = seeds[start : start + asked.batch_size]

            def report(done: int, before: int = start) -> None:
                on_step(before * steps + done, n * steps)

            with clock("sample"):
                repeated = [repeat(condition, len(some)) for condition in conditions]
                pictures = from_pixels(self.cascade.sample(repeated, asked, some, report))
            timings = {**clock.milliseconds, "sample": clock.milliseconds["sample"] / len(some)}
            for number, picture in zip(some, pictures, strict=True):
                record = Record(
                    prompt=prompt,
                    seed=number,
                    settings=asked,
                    origin=origin,
                    neighbors=self.with_attention(neighbors, conditions[0], picture),
                    copy_similarity=copy_similarity(picture, neighbors),
                )
                yield GeneratedImage(image=Image.fromarray(picture.numpy()), record=record, timings_ms=timings)

    def settings(self, **changes: Any) -> GenerateSettings:
        """The bundle's own settings with some changed. An unknown name or value is a ConfigError."""
        given = from_dict(GenerateSettings, {**to_dict(self.bundle.info.sampling), **changes})
        find_sampler(given.sampler)
        self.cascade.of(given)
        return given

    def retrieve(
        self, prompt: str, *, settings: GenerateSettings, references: Sequence[Reference] = ()
    ) -> list[Neighbor]:
        """The neighbours of a prompt as this model sees them: the references, then the best pairs, `k` in all."""
        wanted = settings.k - len(references)
        if self.kb is None or wanted <= 0:
            return neighbors_of([], references, self.size)
        hits = self.kb.search(
            prompt,
            k=wanted,
            by=settings.by,
            fusion=settings.fusion,
            decompose=settings.decompose,
            diversity=settings.diversity,
            dataset=settings.dataset,
            where=settings.where,
            min_score=settings.min_score,
            exclude=[pair_number(text) for text in settings.exclude],
        )
        return neighbors_of(hits, references, self.size)

    def encode(
        self, prompt: str, neighbors: Sequence[Neighbor], *, settings: GenerateSettings
    ) -> tuple[Condition, ...]:
        """Prompt and neighbours as one row of conditions a stage; keys and values are computed here, once (row N5)."""
        return self.encode_many([prompt], [neighbors], settings=settings)

    @torch.inference_mode()
    def encode_many(
        self, prompts: Sequence[str], neighbors: Sequence[Sequence[Neighbor]], *, settings: GenerateSettings
    ) -> tuple[Condition, ...]:
        """A row of conditions for every prompt, each with its own neighbours; one condition a stage."""
        encoder = self.bundle.text_encoder
        batches = make_batches(neighbors, encoder, [stage.size for stage in self.cascade.of(settings)])
        return self.cascade.condition(encoder.encode(prompts), batches, settings)

    def draw(
        self, prompt: str, neighbors: Sequence[Neighbor], *, settings: GenerateSettings, seeds: Sequence[int]
    ) -> list[RGB8]:
        """Pictures from neighbours at hand, without a knowledge base: what `radt replay` does."""
        conditions = self.encode(prompt, neighbors, settings=settings)
        return [from_pixels(self.cascade.sample(conditions, settings, [seed]))[0] for seed in seeds]

    def draw_many(
        self, requests: Sequence[DrawRequest], *, settings: GenerateSettings, on_step: OnStep = ignore
    ) -> Iterator[RGB8]:
        """One picture a request, in their order, `settings.batch_size` different prompts in one network call.

        Neighbours are at hand, as in `draw`; every picture has its own generator and its own guidance branches.
        """
        steps = self.cascade.network_steps(settings)
        for start in range(0, len(requests), settings.batch_size):
            some = requests[start : start + settings.batch_size]

            def report(done: int, before: int = start) -> None:
                on_step(before * steps + done, len(requests) * steps)

            prompts, neighbors = [each.prompt for each in some], [each.neighbors for each in some]
            conditions = self.encode_many(prompts, neighbors, settings=settings)
            yield from from_pixels(self.cascade.sample(conditions, settings, [each.seed for each in some], report))

    @torch.inference_mode()
    def with_attention(
        self, neighbors: Sequence[Neighbor], condition: Condition, picture: RGB8
    ) -> tuple[Neighbor, ...]:
        """The neighbours, each with the share of attention that this picture pays to it (row N1).

        Measured in one more call of the first stage, half-way through the noise, so that drawing is not slowed. The
        shares sum to at most 1; the rest is attention that no neighbour earned.
        """
        if condition.neighbors is None:
            return tuple(neighbors)
        stage = self.cascade.stages[0]
        x0 = resize(to_pixels(picture)[None].to(self.device), stage.size)
        noise = draw_noise(x0, [torch.Generator().manual_seed(0)])
        t = torch.full((1,), 0.5, device=self.device)
        x = stage.info.schedule.add_noise(x0, noise, t)
        shares = stage.unet.attention_mass(x, t, condition.text, condition.neighbors)[0].tolist()
        return tuple(replace(each, attention=round(share, 4)) for each, share in zip(neighbors, shares, strict=True))

    def origin(self) -> Origin:
        """What is drawing, for the record of a picture."""
        return current_origin(
            model=self.name,
            model_digest=self.digest,
            device=self.device,
            knowledge_base=None if self.kb is None else self.kb.manifest.fingerprint,
            snapshot=None if self.kb is None else str(self.kb.store.version),
        )


def _open_knowledge_base(
    kb: str | Path | Sequence[str | Path], *, models: Sequence[str]
) -> "KnowledgeBase | JoinedKnowledgeBase":
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

    several = [kb] if isinstance(kb, str | Path) else kb
    if len(several) == 1:
        return KnowledgeBase.open(several[0], models=models)
    return JoinedKnowledgeBase.open(several, models=models)


def find_device(name: str) -> str:
    """`auto` is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for and torch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def pair_number(text: str) -> int:
    """The id of a pair from its decimal text."""
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise QueryError(f"a pair's id is a whole number as `radt index query --json` prints it, got {text!r}")
    return int(text)


def file_name(position: int, prompt: str, seed: int) -> str:
    """As in `00000_wolf-on-red_seed0.png`: sorts by position and says what it shows."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-")
    return f"{position:05d}_{words or 'picture'}_seed{seed}.png"


class _Clock:
    """Wall time under a few names, in milliseconds, with the device's queue emptied before reading it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.milliseconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.milliseconds[name] = 1000 * (time.perf_counter() - start)
