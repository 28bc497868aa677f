"""TextToImage: a prompt to pictures through neighbours, text encoder, guidance and sampler. The main path (DESIGN 1).

Next: `radt/neighbors.py` for what is retrieved, `radt/unet/unet.py` for the network, `radt/diffusion/guidance.py` and
`radt/diffusion/samplers.py` for the loop.
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
from radt.conditioning import Condition, repeat, to_device
from radt.diffusion.denoiser import Denoiser
from radt.diffusion.guidance import interleaved, plan_branches
from radt.diffusion.samplers import SAMPLERS, Sampler, draw_noise
from radt.diffusion.thresholding import Threshold, dynamic_threshold, static_threshold
from radt.neighbors import RGB8, Neighbor, Reference, copy_similarity, from_pixels, make_batch, neighbors_of, to_pixels
from radt.provenance import Origin, Record, current_origin, save_png
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
        stage = bundle.info.stages[0]
        self._denoiser = Denoiser(bundle.unet, schedule=stage.schedule, prediction=stage.prediction)

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
    def image_size(self) -> int:
        """Side of what is drawn and of what is seen of a neighbour, in pixels."""
        return self.bundle.unet.config.image_size

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
            condition = self.encode(prompt, neighbors)
        origin = self.origin()
        seeds = range(seed, seed + n)
        for start in range(0, n, asked.batch_size):
            some = seeds[start : start + asked.batch_size]

            def report(done: int, before: int = start) -> None:
                on_step(before * asked.steps + done, n * asked.steps)

            with clock("sample"):
                pictures = self._sample(repeat(condition, len(some)), asked, some, report)
            timings = {**clock.milliseconds, "sample": clock.milliseconds["sample"] / len(some)}
            for number, picture in zip(some, pictures, strict=True):
                record = Record(
                    prompt=prompt,
                    seed=number,
                    settings=asked,
                    origin=origin,
                    neighbors=self.with_attention(neighbors, condition, picture),
                    copy_similarity=copy_similarity(picture, neighbors),
                )
                yield GeneratedImage(image=Image.fromarray(picture.numpy()), record=record, timings_ms=timings)

    def settings(self, **changes: Any) -> GenerateSettings:
        """The bundle's own settings with some changed. An unknown name or value is a ConfigError."""
        given = from_dict(GenerateSettings, {**to_dict(self.bundle.info.sampling), **changes})
        find_sampler(given.sampler)
        return given

    def retrieve(
        self, prompt: str, *, settings: GenerateSettings, references: Sequence[Reference] = ()
    ) -> list[Neighbor]:
        """The neighbours of a prompt as this model sees them: the references, then the best pairs, `k` in all."""
        wanted = settings.k - len(references)
        if self.kb is None or wanted <= 0:
            return neighbors_of([], references, self.image_size)
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
        return neighbors_of(hits, references, self.image_size)

    def encode(self, prompt: str, neighbors: Sequence[Neighbor]) -> Condition:
        """Prompt and neighbours as one row of conditions; keys and values are computed here, once (row N5)."""
        return self.encode_many([prompt], [neighbors])

    @torch.inference_mode()
    def encode_many(self, prompts: Sequence[str], neighbors: Sequence[Sequence[Neighbor]]) -> Condition:
        """A row of conditions for every prompt, each with its own neighbours."""
        encoder, unet = self.bundle.text_encoder, self.bundle.unet
        text = to_device(encoder.encode(prompts), self.device)
        batch = make_batch(neighbors, encoder)
        kv = None if batch is None else unet.project_neighbors(to_device(batch, self.device))
        return Condition(text=text, neighbors=kv)

    def draw(
        self, prompt: str, neighbors: Sequence[Neighbor], *, settings: GenerateSettings, seeds: Sequence[int]
    ) -> list[RGB8]:
        """Pictures from neighbours at hand, without a knowledge base: what `radt replay` does."""
        condition = self.encode(prompt, neighbors)
        return [picture for seed in seeds for picture in self._sample(condition, settings, [seed])]

    def draw_many(
        self, requests: Sequence[DrawRequest], *, settings: GenerateSettings, on_step: OnStep = ignore
    ) -> Iterator[RGB8]:
        """One picture a request, in their order, `settings.batch_size` different prompts in one network call.

        Neighbours are at hand, as in `draw`; every picture has its own generator and its own guidance branches.
        """
        for start in range(0, len(requests), settings.batch_size):
            some = requests[start : start + settings.batch_size]

            def report(done: int, before: int = start) -> None:
                on_step(before * settings.steps + done, len(requests) * settings.steps)

            condition = self.encode_many([each.prompt for each in some], [each.neighbors for each in some])
            yield from self._sample(condition, settings, [each.seed for each in some], report)

    @torch.inference_mode()
    def with_attention(
        self, neighbors: Sequence[Neighbor], condition: Condition, picture: RGB8
    ) -> tuple[Neighbor, ...]:
        """The neighbours, each with the share of attention that this picture pays to it (row N1).

        Measured in one more network call, half-way through the noise, so that drawing itself is not slowed. The shares
        sum to at most 1; the rest is attention that no neighbour earned.
        """
        if condition.neighbors is None:
            return tuple(neighbors)
        x0 = to_pixels(picture)[None].to(self.device)
        noise = draw_noise(x0, [torch.Generator().manual_seed(0)])
        t = torch.full((1,), 0.5, device=self.device)
        x = self._denoiser.schedule.add_noise(x0, noise, t)
        shares = self.bundle.unet.attention_mass(x, t, condition.text, condition.neighbors)[0].tolist()
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

    @torch.inference_mode()
    def _sample(
        self,
        condition: Condition,
        settings: GenerateSettings,
        seeds: Sequence[int],
        on_step: Callable[[int], None] = lambda done: None,
    ) -> list[RGB8]:
        """One batch of pictures, one a row of the condition, each from its own generator.

        The generators live on the CPU, so that a seed means the same everywhere.
        """
        sampler, schedule = find_sampler(settings.sampler), self._denoiser.schedule
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = draw_noise(torch.empty(len(seeds), 3, self.image_size, self.image_size, device=self.device), generators)
        branches = [
            plan_branches(settings.steps, text_share=settings.text_share, order=settings.order, generator=generator)
            for generator in generators
        ]
        denoise = interleaved(
            self._denoiser,
            condition,
            text_guidance=settings.text_guidance,
            neighbor_guidance=settings.neighbor_guidance,
            branches=branches,
            threshold=find_threshold(settings),
        )
        x0 = sampler(
            denoise,
            noise,
            schedule.time_steps(settings.steps),
            schedule=schedule,
            generators=generators,
            branches=branches,
            on_step=lambda step, x0: on_step((step + 1) * len(seeds)),
        )
        return list(from_pixels(x0))


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


def find_sampler(name: str) -> Sampler:
    """The sampler of this name; a ConfigError lists the names there are."""
    if name not in SAMPLERS:
        raise ConfigError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def find_threshold(settings: GenerateSettings) -> Threshold:
    """What keeps the clean image in range."""
    return dynamic_threshold(settings.steps) if settings.threshold == "dynamic" else static_threshold


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
