"""TextToImage: a prompt to pictures through neighbours, text encoder, guidance and sampler. The main path (DESIGN 1).

Next: `radt/neighbors.py` for what is retrieved, `radt/cascade.py` for the stages, `radt/unet/unet.py` for their
networks, `radt/diffusion/guidance.py` and `radt/diffusion/samplers.py` for the loop.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from index.config import from_dict, to_dict
from index.errors import ConfigError, QueryError
from radt.bundle import Bundle, load_bundle
from radt.cascade import Cascade, Stage, find_sampler, stages_of
from radt.compiling import prepare
from radt.conditioning import Condition, take_rows, to_device
from radt.copying import most_similar, with_similarity
from radt.diffusion.guidance import NetworkUse, OnCall, check_effect, network_use
from radt.diffusion.samplers import draw_noise
from radt.fast import settle
from radt.idle import check_idle
from radt.image_to_image import InitImage, make_init_image
from radt.neighbor_store import ApartEncoder, NeighborStore, open_neighbor_store
from radt.neighbors import (
    RGB8,
    Neighbor,
    Reference,
    from_pixels,
    make_batches,
    neighbors_of,
    to_pixels,
    to_rgb8,
)
from radt.postprocess import apply_post
from radt.provenance import Origin, Record, current_origin, save_png
from radt.quality import prompt_agreements
from radt.resizing import Size, resize
from radt.settings import GenerateSettings
from radt.text_encoder import Truncation

if TYPE_CHECKING:
    from index.embedder import Embedder
    from index.knowledge_base import KnowledgeBase
    from index.search.joined import JoinedKnowledgeBase

OnStep = Callable[[int, int], None]  # network steps done, of how many


def ignore(done: int, total: int) -> None:
    """The default `on_step`: nobody is watching."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedImage:
    """A picture, the record from which it can be drawn again, and the milliseconds that each part of its request took.

    `timings_ms` has `retrieve`, `encode_neighbors` (both once per prompt: 0 in its later pictures) and `sample`.
    """

    image: Image.Image
    record: Record
    timings_ms: Mapping[str, float]
    neighbor_store: Mapping[str, Any] | None = None  # where it is, and what it served so far; None: there is none
    network: NetworkUse | None = None  # what it cost
    truncations: tuple[Truncation, ...] = ()  # of the prompts and the neighbours' captions, those that were cut

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
            "init_image": None if self.record.init is None else self.record.init.name,
            "candidates": [to_dict(candidate) for candidate in self.record.candidates],
            "copy_similarity": self.record.copy_similarity,
            "network": None if self.network is None else to_dict(self.network),
            "truncated": [to_dict(each) for each in self.truncations],
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
        self,
        bundle: Bundle,
        *,
        kb: "KnowledgeBase | JoinedKnowledgeBase | None" = None,
        device: str = "cpu",
        neighbor_store: NeighborStore | None = None,
        compiled: bool = False,
    ) -> None:
        self.bundle, self.kb, self.device, self.neighbor_store = bundle, kb, device, neighbor_store
        self.compiled = compiled
        self._apart = ApartEncoder(bundle, device=device, store=neighbor_store)
        self.cascade = Cascade(stages_of(bundle), device=device)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        kb: "KnowledgeBase | JoinedKnowledgeBase | str | Path | Sequence[str | Path] | None" = None,
        device: str = "auto",
        neighbor_store: str | int | None = None,
        compile: bool = False,
    ) -> "TextToImage":
        """Load a bundle (None: the demonstration model) and open the knowledge base. `device`: auto, cpu or cuda.

        Several knowledge bases, named in a list, are searched as one. `neighbor_store` is how many bytes of encoded
        neighbours are kept with them (`256M`, or a number); None keeps none. `compile` makes every step faster and the
        first ones slow (`radt/compiling.py`).
        """
        device = find_device(device)
        bundle = load_bundle(model, device=device)
        for unet in filter(None, (*bundle.unets, *bundle.twins)):
            prepare(unet, device=device, compiled=compile)
        if isinstance(kb, str | Path | Sequence):
            kb = _open_knowledge_base(kb, models=[str(bundle.folder)])
        store = None if neighbor_store is None or kb is None else open_neighbor_store(neighbor_store, kb)
        return cls(bundle, kb=kb, device=device, neighbor_store=store, compiled=compile)

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
        init: InitImage | Image.Image | None = None,
        on_step: OnStep = ignore,
        **settings: Any,
    ) -> Iterator[GeneratedImage]:
        """Draw `n` pictures, each handed over as soon as it is done. `settings` are fields of GenerateSettings.

        What is not said is as the model's bundle has it. The references come first among the neighbours and the
        knowledge base fills up to `k`. `init` is a picture to start from, with the setting `strength`. QueryError or
        ConfigError for what cannot be done as asked.
        """
        asked = self.settings_for(prompt, self.settings(**settings))
        check_seeds(n, seed)
        if isinstance(init, Image.Image):
            init = self.init_image(init, settings=asked)
        total = n * self.cascade.network_steps(asked)

        def requests() -> Iterator[DrawRequest]:
            neighbors = self.retrieve(prompt, settings=asked, references=references)
            for number in range(seed, seed + n):
                yield DrawRequest(prompt=prompt, neighbors=neighbors, seed=number)

        yield from self.pictures(requests(), settings=asked, init=init, on_step=lambda done: on_step(done, total))

    def pictures(
        self,
        requests: Iterable[DrawRequest],
        *,
        settings: GenerateSettings,
        init: InitImage | None = None,
        on_step: Callable[[int], None] = lambda done: None,
    ) -> Iterator[GeneratedImage]:
        """A picture with its record for every request, in order, `settings.batch_size` of them in one network call.

        The requests are taken one batch at a time, so they may look their neighbours up when asked for: that time is
        told as `retrieve`. Requests that follow each other with the same prompt and the same list of neighbours share
        one encoding (row N5). `on_step` counts network steps.
        """
        clock, origin, coming = _Clock(self.device), self.origin(), iter(requests)
        encoded, done = _Encoded(self, settings), 0
        while True:
            with clock("retrieve"):
                batch = list(islice(coming, settings.batch_size))
            if not batch:
                return
            with clock("encode_neighbors"):
                conditions = encoded.conditions(batch)

            def report(steps: int, before: int = done) -> None:
                on_step(before + steps)

            with clock("sample"):
                calls: list[Sequence[int]] = []
                seeds = [each.seed for each in batch]
                drawn = self._finished(conditions, settings, seeds, report, init=init, on_call=calls.append)
            done += self.cascade.network_steps(settings) * len(batch)
            timings = {name: milliseconds / len(batch) for name, milliseconds in clock.milliseconds.items()}
            for row, (request, picture) in enumerate(zip(batch, drawn, strict=True)):
                stage, condition = self.cascade.of(settings)[0], take_rows(conditions[0], [row])
                paid = self.with_attention(request.neighbors, condition, picture, stage=stage)
                neighbors = with_similarity(paid, picture)
                record = Record(
                    prompt=request.prompt,
                    seed=request.seed,
                    settings=settings,
                    origin=origin,
                    neighbors=neighbors,
                    init=init,
                    copy_similarity=most_similar(neighbors),
                )
                store = None if self.neighbor_store is None else self.neighbor_store.describe_process()
                yield GeneratedImage(
                    image=Image.fromarray(picture.numpy()),
                    record=record,
                    timings_ms=timings,
                    neighbor_store=store,
                    network=network_use(calls, row),
                    truncations=self.truncations(request, settings),
                )

    def truncations(self, request: DrawRequest, settings: GenerateSettings) -> tuple[Truncation, ...]:
        """Which of the texts of a request are longer than the text encoder reads, and what it leaves out."""
        negative = [] if settings.negative_prompt is None else [settings.negative_prompt]
        captions = [neighbor.caption for neighbor in request.neighbors]
        return tuple(self.bundle.text_encoder.truncations([request.prompt, *negative, *captions]))

    def settings_for(self, prompt: str, settings: GenerateSettings) -> GenerateSettings:
        """The settings as a prompt has them: an empty one asks for no text (row I15), and then none is strengthened."""
        if settings.unconditional and prompt.strip():
            raise QueryError(f"unconditional draws from no prompt, and {prompt!r} was given: leave one of them out")
        if prompt.strip():
            return settings
        asked = replace(settings, unconditional=True, text_guidance=1.0, sr_text_guidance=1.0)
        check_effect(asked)
        return asked

    def init_image(self, image: Image.Image, *, settings: GenerateSettings, name: str = "image") -> InitImage:
        """A picture as the stages of a request start from it."""
        return make_init_image(image, [stage.size for stage in self.cascade.of(settings)], name=name)

    @cached_property
    def clip(self) -> "Embedder":
        """The model's own pair of image and text encoders, loaded when something is first measured."""
        from index.embedder import ClipEmbedder

        return ClipEmbedder.load(str(self.bundle.folder))

    def prompt_agreements(self, prompt: str, images: Sequence[Image.Image]) -> list[float]:
        """How well pictures agree with a prompt, by the model's own CLIP: cosines in [-1, 1]."""
        return prompt_agreements(self.clip, prompt, images)

    def settings(self, **changes: Any) -> GenerateSettings:
        """The bundle's own settings with some changed. An unknown name or value is a ConfigError."""
        stored = {} if self.neighbor_store is None else {"encode_apart": True}
        given = from_dict(GenerateSettings, {**to_dict(self.bundle.info.sampling), **stored, **changes})
        find_sampler(given)
        check_effect(given)
        stages = self.cascade.of(given)
        check_idle(given, named=changes, num_stages=len(stages))
        return settle(given, stages, named=changes)

    def retrieve(
        self, prompt: str, *, settings: GenerateSettings, references: Sequence[Reference] = ()
    ) -> list[Neighbor]:
        """The neighbours of a prompt as this model sees them: the references, then the best pairs, `k` in all."""
        wanted = settings.k - len(references)
        if self.kb is None or wanted <= 0 or settings.unconditional:
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
        if self.neighbor_store is not None:
            self.neighbor_store.follow(self.kb)
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
        encoder, stages = self.bundle.text_encoder, self.cascade.of(settings)
        text = encoder.encode(prompts)
        if settings.unconditional:
            text = text.drop(torch.ones(len(prompts), dtype=torch.bool, device=text.mask.device))
        if settings.encode_apart:
            text, apart = to_device(text, self.device), self._apart.encode(neighbors, stages)
            conditions = tuple(Condition(text=text, neighbors=each) for each in apart)
        else:
            batches = make_batches(neighbors, encoder, [stage.size for stage in stages])
            conditions = self.cascade.condition(text, batches, settings)
        if settings.negative_prompt is None:
            return conditions
        negative = to_device(encoder.encode([settings.negative_prompt] * len(prompts)), self.device)
        return tuple(replace(each, negative=negative) for each in conditions)

    def draw(
        self,
        prompt: str,
        neighbors: Sequence[Neighbor],
        *,
        settings: GenerateSettings,
        seeds: Sequence[int],
        init: InitImage | None = None,
    ) -> list[RGB8]:
        """Pictures from neighbours at hand, without a knowledge base: what `radt replay` does."""
        conditions = self.encode(prompt, neighbors, settings=settings)
        return [self._finished(conditions, settings, [seed], init=init)[0] for seed in seeds]

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
            yield from self._finished(conditions, settings, [each.seed for each in some], report)

    def _finished(
        self,
        conditions: Sequence[Condition],
        settings: GenerateSettings,
        seeds: Sequence[int],
        on_step: Callable[[int], None] = lambda done: None,
        *,
        init: InitImage | None = None,
        on_call: OnCall = lambda rows: None,
    ) -> list[RGB8]:
        """Drawn pictures in 8 bits, after what `settings.post` asks for."""
        pictures = self.cascade.sample(conditions, settings, seeds, on_step, init=init, on_call=on_call)
        drawn = list(from_pixels(pictures))
        if settings.post is None:
            return drawn
        done = [apply_post(Image.fromarray(picture.numpy()), settings.post) for picture in drawn]
        return [to_rgb8(image, (image.height, image.width)) for image in done]

    @torch.inference_mode()
    def with_attention(
        self, neighbors: Sequence[Neighbor], condition: Condition, picture: RGB8, *, stage: Stage
    ) -> tuple[Neighbor, ...]:
        """The neighbours, each with the share of attention that this picture pays to it (row N1).

        Measured in one more call of the first stage (or its twin), half-way through the noise, so that drawing is not
        slowed. The shares sum to at most 1; the rest is attention that no neighbour earned.
        """
        if condition.neighbors is None:
            return tuple(neighbors)
        x0 = resize(to_pixels(picture)[None].to(self.device), stage.size)
        noise = draw_noise(x0, [torch.Generator().manual_seed(0)])
        t = torch.full((1,), 0.5, device=self.device)
        x = stage.info.schedule.add_noise(x0, noise, t)
        shares = stage.unet.attention_mass(x, t, condition.text, condition.neighbors)[0].tolist()
        shares = shares[: len(neighbors)]  # others of its batch may have had more
        return tuple(replace(each, attention=round(share, 4)) for each, share in zip(neighbors, shares, strict=True))

    def origin(self) -> Origin:
        """What is drawing, for the record of a picture."""
        return current_origin(
            model=self.name,
            model_digest=self.digest,
            device=self.device,
            compiled=self.compiled,
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


def check_seeds(n: int, seed: int, *, best_of: int = 1) -> None:
    """A QueryError when there are no `n` pictures of `best_of` candidates with seeds from `seed` on."""
    if n < 1:
        raise QueryError(f"n is the number of pictures, at least 1, got {n}")
    if best_of < 1:
        raise QueryError(f"best-of is the number of candidates, at least 1, got {best_of}")
    if not 0 <= seed < 2**63 - n * best_of:
        raise QueryError(f"the seed must lie between 0 and 2**63 - n, got {seed}")


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


class _Encoded:
    """The conditions of a batch. Its different prompts are encoded together, and only when they are not the last's."""

    def __init__(self, pipeline: TextToImage, settings: GenerateSettings) -> None:
        self._pipeline, self._settings = pipeline, settings
        self._known: dict[tuple[str, int], DrawRequest] = {}  # by prompt and list of neighbours; keeps the lists alive
        self._conditions: tuple[Condition, ...] = ()

    def conditions(self, batch: Sequence[DrawRequest]) -> tuple[Condition, ...]:
        """One condition a stage, with a row a request."""
        keys = [(request.prompt, id(request.neighbors)) for request in batch]
        distinct = dict(zip(keys, batch, strict=True))
        if distinct.keys() != self._known.keys():
            prompts, neighbors = zip(*((each.prompt, each.neighbors) for each in distinct.values()), strict=True)
            self._conditions = self._pipeline.encode_many(prompts, neighbors, settings=self._settings)
            self._known = distinct
        places = [list(self._known).index(key) for key in keys]
        return tuple(take_rows(condition, places) for condition in self._conditions)


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
