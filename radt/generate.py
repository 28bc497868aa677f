"""What `radt generate` does: prompts to PNG files that carry their own records, and perhaps one sheet of them.

One prompt or many, typed or from a file, take the same path: `plan` lists the pictures, `draw` makes them batch by
batch, and where it may go on from an earlier run, it passes over what is there.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from index.config import to_dict
from index.errors import ConfigError, QueryError
from radt.best_of import added, keep_best, seeds_of
from radt.copying import MAX_REDRAWS, Refused, check_limit, first_below, warning
from radt.image_to_image import InitImage, read_init_image
from radt.neighbors import Neighbor, Reference, neighbors_of
from radt.pipeline import DrawRequest, GeneratedImage, OnStep, TextToImage, check_seeds, file_name, ignore
from radt.prompts_file import Prompt, read_prompts
from radt.provenance import Record, read_png
from radt.quality import Quality, measure
from radt.settings import GenerateSettings
from radt.sheet import Picture, Row, Sheet, write_sheet

RETRIEVAL_ONLY = ("by", "fusion", "decompose", "diversity", "dataset", "where", "min_score", "exclude")
RESULTS = "results.jsonl"
STATE = "state of the knowledge base"  # that neighbours are found in
OF_A_RUN = ("network", "truncated")  # told when a picture is drawn, and not kept in its record


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One picture, the file it went to, and its measures if they were asked for."""

    path: Path
    picture: GeneratedImage
    quality: Quality | None = None

    def to_json(self) -> dict[str, Any]:
        """What `--json` and the results of a file of prompts say of it."""
        quality = None if self.quality is None else self.quality.to_json()
        return {**self.picture.to_json(self.path), "quality": quality}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked for. `settings` are the fields of GenerateSettings that were named; the model has the others.

    `best_of` candidates are drawn for every picture. `resume` passes over pictures that are there, and leaves a line
    about each picture in results.jsonl; `measured` wants the quality measures. A picture more like a neighbour than
    `max_copy` is drawn again from seeds of its own, and not kept if none of them helps (`radt/copying.py`).
    """

    prompts: tuple[str | Prompt, ...]
    n: int = 1
    seed: int = 0
    references: tuple[Reference, ...] = ()
    init_image: Path | None = None
    best_of: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_copy: float | None = None
    resume: bool = False
    measured: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One picture to be drawn: its place among all of the request, and the seeds of its candidates.

    `spare` has the seeds that follow, a range for each time that it may be drawn again because it was a copy.
    """

    number: int
    prompt: str
    seeds: range
    settings: GenerateSettings
    spare: tuple[range, ...] = ()

    @property
    def attempts(self) -> list["Task"]:
        """The task, and what it becomes when it is drawn again."""
        return [self, *(replace(self, seeds=seeds, spare=()) for seeds in self.spare)]


def generate_files(
    request: Request,
    *,
    out: Path,
    sheet: Path | None = None,
    model: str | Path | None = None,
    kb: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    neighbor_store: str | None = None,
    compile: bool = False,
    on_step: OnStep = ignore,
    on_refused: Callable[[Refused], None] = lambda refused: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Drawn]:
    """The whole command: load, draw, save, and write a contact sheet where one is wanted."""
    kb = kb or None
    check_effect(request, has_kb=kb is not None)
    pipeline = TextToImage.load(model, kb=kb, device=device, neighbor_store=neighbor_store, compile=compile)
    if kb is None and not (request.references or request.settings.get("unconditional")):
        say("no knowledge base (--kb) and no --reference: drawing from the text alone")
    pictures = draw(pipeline, request, out, on_step=on_step, on_refused=on_refused)
    if sheet is None:
        pictures = map(_without_originals, pictures)  # of many prompts they would fill the memory
    drawn = list(_with_results(pictures, out / RESULTS) if request.resume else pictures)
    for sentence in dict.fromkeys(cut.sentence for each in drawn for cut in each.picture.truncations):
        say(sentence)
    if sheet is not None and drawn:
        png, page = write_sheet(make_sheet(drawn, "Prompts, neighbours and pictures"), sheet)
        say(f"contact sheet: {png} and {page}")
    return drawn


def all_prompts(typed: Sequence[str], file: Path | None) -> tuple[str | Prompt, ...]:
    """The prompts that were typed, then those of a file; where there are neither, the empty one."""
    return (*typed, *(() if file is None else read_prompts(file))) or ("",)


def plan(pipeline: TextToImage, request: Request) -> Iterator[Task]:
    """Every picture that is asked for, in order. An error about one prompt of a file names its line."""
    number = 0
    for each in request.prompts:
        prompt = Prompt(text=each) if isinstance(each, str) else each
        n = request.n if prompt.n is None else prompt.n
        seed = request.seed if prompt.seed is None else prompt.seed
        try:
            check_seeds(n, seed, best_of=request.best_of)
            asked = pipeline.settings(**{**request.settings, **prompt.settings})
            asked = pipeline.settings_for(prompt.text, asked)
        except (ConfigError, QueryError) as error:
            raise type(error)(f"{prompt.source}: {error}" if prompt.source else str(error)) from error
        if asked.unconditional and request.best_of > 1:
            raise QueryError("best-of keeps what agrees with the prompt best, and a prompt is empty: leave it out")
        for position in range(n):
            seeds = seeds_of(position, seed=seed, best_of=request.best_of)
            again = range(n + position * MAX_REDRAWS, n + (position + 1) * MAX_REDRAWS)
            spare = tuple(seeds_of(each, seed=seed, best_of=request.best_of) for each in again)
            yield Task(number=number, prompt=prompt.text, seeds=seeds, settings=asked, spare=spare)
            number += 1


def draw(
    pipeline: TextToImage,
    request: Request,
    out: Path,
    *,
    on_step: OnStep = ignore,
    on_refused: Callable[[Refused], None] = lambda refused: None,
) -> Iterator[Drawn]:
    """Draw what is asked for, in order; each picture is on disk, whole, before the next batch is begun.

    A batch of which some pictures are there is drawn whole, so that a run that was killed leaves the pictures of one
    that was not, to the last bit.
    """
    runs = [list(tasks) for _, tasks in groupby(plan(pipeline, request), key=lambda task: task.settings)]
    there = dict(_find_drawn(pipeline, request, runs, out)) if request.resume else {}
    unfinished = [_unfinished(run, there) for run in runs]
    total = sum(_steps(pipeline, request, tasks) for tasks in unfinished)
    before = 0
    for run, tasks in zip(runs, unfinished, strict=True):
        pictures = _draw_run(pipeline, request, tasks, on_step=_shifted(on_step, before, total))
        drawn_anew = {task.number for task in tasks}
        for task in run:
            picture = next(pictures) if task.number in drawn_anew else None
            if task.number in there:
                path, picture = there[task.number]
            else:
                assert picture is not None, "what is not there is drawn"
                kept = _below_limit(pipeline, request, task, picture)
                if isinstance(kept, Refused):
                    on_refused(kept)
                    continue
                path, picture = kept.save(_path(task, kept.seed, out)), kept
            yield Drawn(path=path, picture=picture, quality=_measure(pipeline, picture) if request.measured else None)
        before += _steps(pipeline, request, tasks)


def check_effect(request: Request, *, has_kb: bool) -> None:
    """Refuse what would be ignored: neighbours asked for where there are none to be had, a strength of nothing."""
    if request.max_copy is not None:
        check_limit(request.max_copy)
    if has_kb and request.settings.get("unconditional"):
        raise QueryError("unconditional draws from no knowledge base: leave out --kb")
    for source, given in _all_settings(request):
        if given.get("strength") is not None and request.init_image is None:
            raise QueryError(
                f"{source}strength would have no effect without a picture to start from: name one with --init-image"
            )
        idle = [] if has_kb else [name for name in RETRIEVAL_ONLY if given.get(name) is not None]
        if given.get("k") and not has_kb and not request.references:
            idle.insert(0, "k")
        if idle:
            raise QueryError(
                f"{source}{', '.join(idle)} would have no effect without a knowledge base: name one with --kb"
            )


def to_json(drawn: Sequence[Drawn], refused: Sequence[Refused] = ()) -> dict[str, Any]:
    """The document that `--json` prints: every picture, what was not kept, and the times of the whole command."""
    names = ("retrieve", "encode_neighbors", "sample")
    timings = {name: sum(each.picture.timings_ms.get(name, 0.0) for each in drawn) for name in names}
    images = [each.to_json() for each in drawn]
    return {
        "images": images,
        "refused": [each.to_json() for each in refused],
        "timings_ms": {name: round(value, 3) for name, value in timings.items()},
        "neighbor_store": next(filter(None, (each.picture.neighbor_store for each in reversed(drawn))), None),
    }


def copy_notes(drawn: Sequence[Drawn], refused: Sequence[Refused]) -> list[str]:
    """A sentence for every picture that is nearly a copy of a neighbour, and for every one that was not kept."""
    warnings = (warning(each.picture, str(each.path)) for each in drawn)
    return [*filter(None, warnings), *(each.sentence for each in refused)]


def explain(drawn: Sequence[Drawn]) -> Iterator[str]:
    """Lines that say which pairs each prompt was drawn from, best first."""
    for prompt, group in _by_prompt(drawn):
        yield f"{prompt}: {'drawn from the text alone' if not group[0].picture.neighbors else 'drawn from'}"
        for neighbor in group[0].picture.neighbors:
            yield f"  {neighbor.id:>20}  {'  '.join(_scores(neighbor))}  {neighbor.caption}"
            yield f"  {'':>20}  {neighbor.terms}"
        if group[0].picture.network is not None:
            yield f"  {group[0].picture.network.sentence}"


def make_sheet(drawn: Sequence[Drawn], title: str) -> Sheet:
    """A row a prompt: its neighbours and its pictures."""
    rows = tuple(
        Row(prompt=prompt, cells=(neighbor_pictures(group[0].picture), drawn_pictures([d.picture for d in group])))
        for prompt, group in _by_prompt(drawn)
    )
    return Sheet(title=title, subtitle=subtitle(drawn[0].picture), columns=("Neighbours", "Pictures"), rows=rows)


def subtitle(picture: GeneratedImage) -> str:
    """How it was drawn, in one line."""
    asked, origin = picture.settings, picture.record.origin
    is_found = any(neighbor.score is not None for neighbor in picture.neighbors)
    search = f", found by {asked.by}, decompose {asked.decompose}" if is_found else ""
    return (
        f"radt {origin.radt}, model {origin.model}, {asked.sampler} at {asked.steps} steps, "
        f"text {asked.text_guidance:g}, neighbours {asked.neighbor_guidance:g}, text share {asked.text_share:g}{search}"
    )


def neighbor_pictures(picture: GeneratedImage) -> tuple[Picture, ...]:
    """The neighbours for a sheet, as found rather than as small as the network saw them."""
    return tuple(
        Picture(image=neighbor.original or neighbor.image, lines=(neighbor.caption, *_scores(neighbor)))
        for neighbor in picture.neighbors
    )


def drawn_pictures(pictures: Sequence[GeneratedImage]) -> tuple[Picture, ...]:
    """Drawn pictures for a sheet."""
    return tuple(Picture(image=picture.image, lines=(f"seed {picture.seed}",)) for picture in pictures)


def _scores(neighbor: Neighbor) -> list[str]:
    """What it was found for, the score, what that was fused from, and the attention that the first picture paid."""
    paid = [] if neighbor.attention is None else [f"attention {neighbor.attention:.0%}"]
    paid += [] if neighbor.similarity is None else [f"similarity {neighbor.similarity:.2f}"]
    if neighbor.score is None:
        return ["given by hand", *paid]
    components = {"clip": neighbor.clip, "bm25": neighbor.bm25}
    parts = [
        f"{name} {value:.2f}"
        for name, value in components.items()
        if value is not None and value != neighbor.score  # a search by one alone: its score is the component
    ]
    asked = [] if neighbor.part is None else [f"for {neighbor.part}"]
    return [*asked, f"score {neighbor.score:.4f}", *([", ".join(parts)] if parts else []), *paid]


def _by_prompt(drawn: Sequence[Drawn]) -> list[tuple[str, list[Drawn]]]:
    """Pictures of the same prompt that follow each other."""
    return [(prompt, list(group)) for prompt, group in groupby(drawn, key=lambda each: each.picture.prompt)]


def _draw_run(
    pipeline: TextToImage, request: Request, tasks: Sequence[Task], *, on_step: Callable[[int], None]
) -> Iterator[GeneratedImage]:
    """The pictures of tasks with the same settings, the best candidate of each."""
    if not tasks:
        return
    settings = tasks[0].settings
    pictures = pipeline.pictures(
        _requests(pipeline, request, tasks),
        settings=settings,
        init=_read_init(pipeline, request, settings),
        on_step=on_step,
    )
    for task in tasks:
        candidates = list(islice(pictures, request.best_of))
        if len(candidates) > 1:
            agreements = pipeline.prompt_agreements(task.prompt, [each.image for each in candidates])
            candidates = [keep_best(candidates, agreements)]
        yield candidates[0]


def _below_limit(
    pipeline: TextToImage, request: Request, task: Task, picture: GeneratedImage
) -> GeneratedImage | Refused:
    """The picture as it is where no `max_copy` is set or it keeps to it; else the first other that does, if any."""
    if request.max_copy is None:
        return picture
    anew = (_draw_run(pipeline, request, [attempt], on_step=lambda done: None) for attempt in task.attempts[1:])
    tried = list[GeneratedImage]()
    kept = first_below(request.max_copy, picture, _noted(chain.from_iterable(anew), tried))
    if isinstance(kept, Refused):
        return kept
    return replace(kept, timings_ms=added([each.timings_ms for each in (picture, *tried)]))


def _noted(pictures: Iterable[GeneratedImage], seen: list[GeneratedImage]) -> Iterator[GeneratedImage]:
    """The same pictures, each in `seen` once it was asked for."""
    for each in pictures:
        seen.append(each)
        yield each


def _requests(pipeline: TextToImage, request: Request, tasks: Sequence[Task]) -> Iterator[DrawRequest]:
    """Every candidate of every task; neighbours are looked up when a prompt's turn comes, once."""
    for prompt, group in groupby(tasks, key=lambda task: task.prompt):
        neighbors = pipeline.retrieve(prompt, settings=tasks[0].settings, references=request.references)
        for task in group:
            yield from (DrawRequest(prompt=prompt, neighbors=neighbors, seed=seed) for seed in task.seeds)


def _read_init(pipeline: TextToImage, request: Request, settings: GenerateSettings) -> InitImage | None:
    if request.init_image is None:
        return None
    return read_init_image(request.init_image, [stage.size for stage in pipeline.cascade.of(settings)])


def _unfinished(run: Sequence[Task], there: Mapping[int, Any]) -> list[Task]:
    """The batches of a run that are not all there, whole."""
    size = run[0].settings.batch_size
    batches = [run[start : start + size] for start in range(0, len(run), size)]
    return [task for batch in batches if any(task.number not in there for task in batch) for task in batch]


def _find_drawn(
    pipeline: TextToImage, request: Request, runs: Iterable[Sequence[Task]], out: Path
) -> Iterator[tuple[int, tuple[Path, GeneratedImage]]]:
    """What an earlier run left, by number. A QueryError when it was asked for something else."""
    everywhere = {
        "model": pipeline.digest,
        "knowledge base": pipeline.origin().knowledge_base,
        "references": _shown(neighbors_of([], request.references, pipeline.size)),
    }
    for run in runs:
        init = _read_init(pipeline, request, run[0].settings)
        for task in run:
            places = ((attempt, _path(task, seed, out)) for attempt in task.attempts for seed in attempt.seeds)
            attempt, path = next((each for each in places if each[1].exists()), (task, None))
            if path is None:
                continue
            image, record = read_png(path)
            if request.max_copy is not None and (record.copy_similarity or 0.0) > request.max_copy:
                raise QueryError(f"{str(path)!r} is there and is above --max-copy {request.max_copy:g}: take it away")
            asked = everywhere | _facts(attempt, init, request)
            if _looked_up(record):
                asked |= {STATE: pipeline.origin().snapshot}
            other = [name for name, value in _facts_of(record).items() if value != asked[name]]
            if other:
                raise QueryError(
                    f"{str(path)!r} is there and was drawn with another {', '.join(other)}: choose another --out"
                )
            yield task.number, (path, GeneratedImage(image=image, record=record, timings_ms={}))


def _facts(task: Task, init: InitImage | None, request: Request) -> dict[str, Any]:
    """What decides a task's picture beside what all of a run share, as far as that is known before it is drawn."""
    return {
        **_deciding(task.settings),
        "prompt": task.prompt,
        "init_image": None if init is None else init.pixels.tolist(),
        "candidates": list(task.seeds) if request.best_of > 1 else [],
    }


def _facts_of(record: Record) -> dict[str, Any]:
    """The same of a picture that is there, and what all of its run share."""
    return {
        **_deciding(record.settings),
        "model": record.origin.model_digest,
        "knowledge base": record.origin.knowledge_base,
        **({STATE: record.origin.snapshot} if _looked_up(record) else {}),
        "references": _shown([each for each in record.neighbors if each.id.startswith("reference:")]),
        "prompt": record.prompt,
        "init_image": None if record.init is None else record.init.pixels.tolist(),
        "candidates": [candidate.seed for candidate in record.candidates],
    }


def _looked_up(record: Record) -> bool:
    """Whether a knowledge base was asked for neighbours, beside the references."""
    references = sum(neighbor.id.startswith("reference:") for neighbor in record.neighbors)
    return record.settings.k > references and not record.settings.unconditional


def _shown(neighbors: Sequence[Neighbor]) -> list[Any]:
    """What a network is shown of references."""
    return [(each.id, each.caption, each.pixels.tolist()) for each in neighbors]


def _deciding(settings: GenerateSettings) -> dict[str, Any]:
    """All settings by their options, but the batch size, which moves the last bits only: a run may go on with another.

    What no option sets is named by the option that decides it.
    """
    named = {"encode_apart": "neighbor_store"}
    return {named.get(name, name): value for name, value in to_dict(settings).items() if name != "batch_size"}


def _path(task: Task, seed: int, out: Path) -> Path:
    return out / file_name(task.number, task.prompt, seed)


def _steps(pipeline: TextToImage, request: Request, tasks: Sequence[Task]) -> int:
    """Network steps of all candidates of tasks with the same settings."""
    return len(tasks) * request.best_of * pipeline.cascade.network_steps(tasks[0].settings) if tasks else 0


def _measure(pipeline: TextToImage, picture: GeneratedImage) -> Quality:
    if picture.settings.unconditional:
        return measure(picture.image)
    (agreement,) = pipeline.prompt_agreements(picture.prompt, [picture.image])
    return measure(picture.image, prompt_agreement=agreement)


def _with_results(drawn: Iterable[Drawn], path: Path) -> Iterator[Drawn]:
    """The same pictures; each leaves a line in the file at once, those of an earlier run first.

    The first is asked for before the file is begun anew: a run that refuses to go on does so then.
    """
    drawn = iter(drawn)
    first = list(islice(drawn, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for each in chain(first, drawn):
            line = {name: value for name, value in each.to_json().items() if name not in OF_A_RUN}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            yield each


def _without_originals(drawn: Drawn) -> Drawn:
    """Without the neighbours as they were found, which only a sheet shows."""
    record = drawn.picture.record
    neighbors = tuple(replace(neighbor, original=None) for neighbor in record.neighbors)
    return replace(drawn, picture=replace(drawn.picture, record=replace(record, neighbors=neighbors)))


def _all_settings(request: Request) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The settings of the request and those of single prompts, each after the words that say where they stand."""
    yield "", request.settings
    for prompt in request.prompts:
        if isinstance(prompt, Prompt):
            yield f"{prompt.source}: " if prompt.source else "", prompt.settings


def _shifted(on_step: OnStep, before: int, total: int) -> Callable[[int], None]:
    """The progress of one part as that of the whole."""
    return lambda done: on_step(before + done, total)
