"""The command line `radt`. Each command parses, makes one library call and prints; heavy imports wait until then.

`radt index` is the sub-app of `index/cli.py`, with this package's demonstration model as its default.
"""

import json as jsonlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib.resources import files
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from index.cli import make_app, run
from radt import __version__
from radt.evaluation.commands import add_commands
from radt.evaluation.references_command import add_command as add_references
from radt.settings import BranchOrder, By, Decompose, Fusion, GuidanceRule, ThresholdRule

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Text-to-image generation with a memory that you own.",
    epilog="An error is one sentence; --debug shows where it came from.",
)
corpus = typer.Typer(no_args_is_help=True, help="Make the demonstration corpora from the installed colour-emoji font.")
evaluate = typer.Typer(no_args_is_help=True, help="Measure a model on a benchmark.")
app.add_typer(corpus, name="corpus")
app.add_typer(evaluate, name="evaluate")
app.add_typer(make_app(default_model=str(Path(str(files("radt"))) / "models" / "emoji-demo")), name="index")

Split = Literal["all", "train", "heldout"]

Model = Annotated[Path | None, typer.Option("--model", help="Model folder. Default: the one inside the package.")]
Kb = Annotated[Path | None, typer.Option("--kb", help="Knowledge base to look prompts up in.")]
Kbs = Annotated[
    list[str] | None,
    typer.Option("--kb", help="Knowledge base to look prompts up in, a folder or a URL; several are searched as one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Font = Annotated[Path | None, typer.Option("--font", help="A colour-emoji font file. Default: the installed one.")]
Seed = Annotated[int, typer.Option("--seed", help="Picture i of several takes seed + i.")]
Size = Annotated[int, typer.Option("--size", help="Side of a picture in pixels.")]
References = Annotated[
    list[str] | None, typer.Option("--reference", help="IMAGE=CAPTION, a neighbour by hand; repeatable.")
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto: the GPU if there is one.")
]

Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the networks: minutes once, then faster steps; for many pictures.")
]
StoreSize = Annotated[
    str,
    typer.Option(
        "--neighbor-store",
        envvar="RADT_NEIGHBOR_STORE",
        metavar="SIZE|off",
        help="Keep encoded neighbours with the knowledge base, at most so many bytes: 256M.",
    ),
]

# What a model has settings of its own for (radt/settings.py): what is not typed is left to the model.
SETTINGS: dict[str, Any] = {
    "k": Annotated[int | None, typer.Option("-k", help="Neighbours of a picture; 0 draws from the text alone.")],
    "steps": Annotated[int | None, typer.Option("--steps", help="Network steps.")],
    "sampler": Annotated[str | None, typer.Option("--sampler", help="dpmpp_2m, ddim, heun, ancestral or stochastic.")],
    "text_guidance": Annotated[float | None, typer.Option("--text-guidance", help="Weight of the prompt, 1 or more.")],
    "neighbor_guidance": Annotated[
        float | None, typer.Option("--neighbor-guidance", help="Weight of the neighbours, as well.")
    ],
    "text_share": Annotated[
        float | None, typer.Option("--text-share", help="The dial from neighbours, 0, to prompt, 1.")
    ],
    "fast": Annotated[
        bool | None,
        typer.Option("--fast/--no-fast", help="Draw with the model's distilled twin: few steps, one row each."),
    ],
    "order": Annotated[BranchOrder | None, typer.Option("--order", help="Which steps strengthen the prompt.")],
    "guidance": Annotated[
        GuidanceRule | None, typer.Option("--guidance", help="Prompt and neighbours in turn, or both in every step.")
    ],
    "guidance_interval": Annotated[
        tuple[float, float] | None,
        typer.Option("--guidance-interval", help="Times of the noise, 0 to 1, between which guidance acts."),
    ],
    "neighbor_interval": Annotated[
        tuple[float, float] | None,
        typer.Option("--neighbor-interval", help="The same, between which neighbours are seen at all."),
    ],
    "oscillate_to": Annotated[
        float | None, typer.Option("--oscillate-to", help="Weight of every other step; by default all are alike.")
    ],
    "oscillate_after": Annotated[
        int | None, typer.Option("--oscillate-after", help="Steps of full weight before they oscillate.")
    ],
    "negative_prompt": Annotated[
        str | None, typer.Option("--negative-prompt", help="What to lead away from, in place of the null text.")
    ],
    "threshold": Annotated[ThresholdRule | None, typer.Option("--threshold", help="Kept in range how.")],
    "percentile": Annotated[
        float | None, typer.Option("--percentile", help="Of a picture's magnitudes, what dynamic thresholding keeps.")
    ],
    "gamma": Annotated[float | None, typer.Option("--gamma", help="Noise of the ancestral sampler, 0 to 1.")],
    "by": Annotated[By | None, typer.Option("--by", help="What neighbours are found by.")],
    "fusion": Annotated[Fusion | None, typer.Option("--fusion", help="How hybrid joins the scores.")],
    "decompose": Annotated[
        Decompose | None,
        typer.Option("--decompose", help="Neighbours of every thing that a prompt names, found by which rule."),
    ],
    "diversity": Annotated[float | None, typer.Option("--diversity", help="Of the neighbours: 0, off, to 1.")],
    "stages": Annotated[int | None, typer.Option("--stages", help="How many stages of the cascade; all by default.")],
    "sr_steps": Annotated[int | None, typer.Option("--sr-steps", help="Network steps of each stage above the first.")],
    "sr_text_guidance": Annotated[float | None, typer.Option("--sr-text-guidance", help="Weight of the prompt there.")],
    "sr_neighbor_guidance": Annotated[
        float | None, typer.Option("--sr-neighbor-guidance", help="Weight of the neighbours there.")
    ],
    "augmentation_level": Annotated[
        float | None,
        typer.Option("--augmentation-level", help="Noise over the picture below: 0 trusts it, 1 ignores it."),
    ],
    "unconditional": Annotated[
        bool | None, typer.Option("--unconditional", help="Draw from no prompt and no knowledge base.")
    ],
    "strength": Annotated[
        float | None, typer.Option("--strength", help="How little of --init-image is kept: near 0 all, 1 nothing.")
    ],
    "post": Annotated[
        str | None,
        typer.Option("--post", help="After drawing: sharpen=0.3,contrast=1.1,brightness=1.1,saturation=1.2."),
    ],
    "batch_size": Annotated[
        int | None, typer.Option("--batch-size", help="Pictures a network call; 1 keeps each bitwise the same.")
    ],
}
OF_A_REQUEST = ("unconditional", "strength")  # which a benchmark leaves nothing to do
MEASURED = {name: option for name, option in SETTINGS.items() if name not in OF_A_REQUEST}
FILTERS: dict[str, Any] = {
    "dataset": Annotated[str | None, typer.Option("--dataset", help="Look in this dataset only.")],
    "where": Annotated[str | None, typer.Option("--where", help="SQL filter on pairs.")],
    "min_score": Annotated[float | None, typer.Option("--min-score", help="Leave out what scores less.")],
    "exclude": Annotated[list[str] | None, typer.Option("--exclude", help="Id of a pair not to use; repeatable.")],
}


def takes(options: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put these options in the place of a command's parameter `settings`, which gets those of them that were typed.

    Typer makes a command's options from its signature, so that is what changes.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def typed(**values: Any) -> None:
            given = {name: values.pop(name) for name in options}
            command(settings={name: value for name, value in given.items() if value is not None}, **values)

        own = signature(command).parameters
        place = list(own).index("settings")
        kept = [each.replace(kind=Parameter.KEYWORD_ONLY) for name, each in own.items() if name != "settings"]
        listed = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=each) for name, each in options.items()
        ]
        typed.__signature__ = Signature([*kept[:place], *listed, *kept[place:]])  # type: ignore[attr-defined]
        return typed

    return decorate


def main() -> None:
    """The entry point: exit 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    run(app)


@app.callback(invoke_without_command=True)
def radt(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Text-to-image generation with a memory that you own."""
    if version:
        typer.echo(f"radt {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Everything goes below this folder.")] = Path("demo"),
    model: Model = None,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Neighbours of a picture. Default: the model's own.")
    ] = None,
    entities: Annotated[int, typer.Option("--entities", min=1, help="Held-out entities to draw.")] = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A whole run on the built-in data and model: ends with a picture to open."""
    from radt.demo import run_demo

    report = run_demo(out, model=model, num_entities=entities, k=k, seed=seed, say=_say_to_stderr(quiet=as_json))
    if as_json:
        return _print_json(report.to_json())
    typer.echo(f"\nquery page      {report.query_page}\npictures        {report.pictures}")
    typer.echo(f"contact sheet   {report.sheet_html}\n\nOpen {report.sheet_png}")


@corpus.command("emoji")
def corpus_emoji(
    out: Annotated[Path, typer.Argument(help="Folder to write tar shards to, in img2dataset's layout.")],
    renditions: Annotated[int, typer.Option("--renditions", help="Pictures of every emoji.")] = 4,
    size: Size = 128,
    split: Annotated[
        Split, typer.Option("--split", help="Which entities: held-out ones are never trained on.")
    ] = "all",
    font: Font = None,
    as_json: Json = False,
) -> None:
    """Every emoji as an entity, a few pictures of each, captioned with its name and keywords."""
    from radt.corpora.emoji import write_emoji

    with _progress("drawing") as on_item:
        written = write_emoji(out, renditions=renditions, size=size, split=split, font=font, on_item=on_item)
    _print_written(written, as_json)


@corpus.command("emoji-scenes")
def corpus_scenes(
    out: Annotated[Path, typer.Argument(help="Folder to write tar shards to, in img2dataset's layout.")],
    num: Annotated[int, typer.Option("--num", help="How many scenes.")],
    split: Annotated[
        Split, typer.Option("--split", help="Which entities: held-out ones are never trained on.")
    ] = "train",
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other scenes.")] = 0,
    size: Size = 128,
    font: Font = None,
    as_json: Json = False,
) -> None:
    """Emoji counted, placed and sized on coloured grounds, with captions that say exactly so."""
    from radt.corpora.scenes import write_scenes

    with _progress("drawing") as on_item:
        written = write_scenes(out, num=num, split=split, seed=seed, size=size, font=font, on_item=on_item)
    _print_written(written, as_json)


@corpus.command("drawings")
def corpus_drawings(
    out: Annotated[Path, typer.Argument(help="Folder to write tar shards to, in img2dataset's layout.")],
    renditions: Annotated[int, typer.Option("--renditions", help="Pictures of every drawing.")] = 4,
    size: Size = 128,
    as_json: Json = False,
) -> None:
    """Drawings, signs, plots, digits and photographs from outside the font, each with a name of its own."""
    from radt.corpora.drawings import write_drawings

    with _progress("drawing") as on_item:
        written = write_drawings(out, renditions=renditions, size=size, on_item=on_item)
    _print_written(written, as_json)


@app.command()
def train(
    preset: Annotated[
        str,
        typer.Argument(help="clip-emoji, emoji-demo, -sr, -fast, recognizer-emoji, tiny, imagen-64, -256 or -1024."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Run folder. The same command again resumes.")],
    changes: Annotated[list[str], typer.Option("--set", help="key=value; repeatable.", default_factory=list)],
    text_only: Annotated[
        bool, typer.Option("--precompute-text", help="Embed all captions, say what that saves, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a preset; the run folder ends with a model for --model."""
    from radt.training.run import precompute_text
    from radt.training.run import train as train_preset

    if text_only:
        report = precompute_text(preset, changes, out, on_stage=_say_to_stderr(quiet=as_json))
        return _print_json(report.to_json()) if as_json else typer.echo(report.sentence)
    with _training_log() as on_step:
        folder = train_preset(preset, changes, out, on_step=on_step, on_stage=_say_to_stderr(quiet=False))
    _print_json({"model": str(folder)}) if as_json else typer.echo(folder)


@app.command()
@takes(SETTINGS | FILTERS)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help='One or more prompts; "" draws from none.')] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="File with a prompt a line, or .jsonl; the same command again goes on."),
    ] = None,
    model: Model = None,
    kb: Kbs = None,
    n: Annotated[int, typer.Option("-n", help="Pictures of each prompt.")] = 1,
    seed: Seed = 0,
    references: References = None,
    init_image: Annotated[Path | None, typer.Option("--init-image", help="A picture to start from.")] = None,
    best_of: Annotated[
        int, typer.Option("--best-of", help="Draw so many for each picture; keep what agrees with the prompt best.")
    ] = 1,
    max_copy: Annotated[
        float | None,
        typer.Option("--max-copy", help="Draw again what is more like a neighbour, 0 to 1, and keep no such picture."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the PNG files.")] = Path("out"),
    sheet: Annotated[Path | None, typer.Option("--sheet", help="Contact sheet: a PNG, and an HTML beside it.")] = None,
    device: DeviceOption = "auto",
    store: StoreSize = "off",
    compile: Compile = False,
    *,
    settings: dict[str, Any],
    explain: Annotated[bool, typer.Option("--explain", help="Say which neighbours were used.")] = False,
    as_json: Json = False,
) -> None:
    """Draw pictures from prompts and the neighbours found for them."""
    from radt import generate as library
    from radt.neighbors import read_reference

    if not (prompts or prompts_file or settings.get("unconditional")):
        raise typer.BadParameter("name a prompt, a file of prompts with --prompts, or --unconditional")
    request = library.Request(
        prompts=library.all_prompts(prompts or (), prompts_file),
        n=n,
        seed=seed,
        references=tuple(map(read_reference, references or ())),
        init_image=init_image,
        best_of=best_of,
        settings=settings,
        max_copy=max_copy,
        resume=prompts_file is not None,
        measured=as_json or prompts_file is not None,
    )
    say, refused = _say_to_stderr(quiet=as_json), list[Any]()
    with _progress("drawing") as on_step:
        drawn = library.generate_files(
            request,
            out=out,
            sheet=sheet,
            model=model,
            kb=kb,
            device=device,
            neighbor_store=None if store == "off" else store,
            compile=compile,
            on_step=on_step,
            on_refused=refused.append,
            say=say,
        )
    for line in library.copy_notes(drawn, refused):
        typer.echo(line, err=True)
    if as_json:
        _print_json(library.to_json(drawn, refused))
    else:
        for line in [*(library.explain(drawn) if explain else ()), *(str(each.path) for each in drawn)]:
            typer.echo(line)
    if refused:
        raise typer.Exit(code=1)


@app.command("neighbor-store")
def neighbor_store(
    kb: Annotated[list[str], typer.Option("--kb", help="Knowledge base that the encoded neighbours are kept with.")],
    clear: Annotated[bool, typer.Option("--clear", help="Take all of them out.")] = False,
    as_json: Json = False,
) -> None:
    """Show the encoded neighbours that are kept with a knowledge base, and how often they served; or clear them."""
    from radt.neighbor_store import inspect, sentence

    report = inspect(kb, clear=clear)
    _print_json(report) if as_json else typer.echo(sentence(report))


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A PNG that `radt generate` wrote.")],
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Draw a picture again from its own record and compare; exits 1 when it differs."""
    from radt.provenance import replay as replay_file

    result = replay_file(file, model)
    if as_json:
        _print_json(result.to_json())
    else:
        typer.echo(result.sentence)
    raise typer.Exit(code=0 if result.identical else 1)


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(help="A PNG that `radt generate` wrote.")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the sheet goes. Default: beside FILE, as NAME.explain.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a picture comes from: heat maps of what it looked at in each neighbour, licence, source, likeness."""
    from radt.explain import check_sheet, explain_file, lines
    from radt.explain_sheet import write_explanation

    sheet = out or file.with_suffix(".explain.png")
    check_sheet(file, sheet)
    explanation = explain_file(file, model)
    png, page = write_explanation(explanation, sheet)
    if as_json:
        return _print_json({**explanation.to_json(), "sheet": str(png), "page": str(page)})
    for line in (*lines(explanation), f"{png}", f"{page}"):
        typer.echo(line)


@evaluate.command("emoji-draw")
@takes(MEASURED)
def evaluate_emoji_draw(
    kb: Kb = None,
    model: Model = None,
    n: Annotated[int, typer.Option("-n", "--n", help="Held-out classes: prompts of each kind, in every arm.")] = 100,
    seed: Seed = 0,
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="all, or of alone,ground,placed,sized,counted,two some with commas.")
    ] = None,
    sweep: Annotated[
        Literal["k", "text-share", "by", "neighbors"] | None,
        typer.Option("--sweep", help="Draw at several values of one setting; killed, it goes on from --out."),
    ] = None,
    new_entity: Annotated[
        bool, typer.Option("--new-entity", help="Before and after the entities are added to a copy of --kb.")
    ] = False,
    recognizer: Annotated[
        Path | None,
        typer.Option("--recognizer", help="Folder that `radt train recognizer-emoji` leaves. Default: the one inside."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Keep figures, curves and sheets of pictures here.")] = None,
    device: DeviceOption = "auto",
    *,
    settings: dict[str, Any],
    font: Font = None,
    as_json: Json = False,
) -> None:
    """Draw entities never trained on with retrieval, without, and misled; count how many are recognised."""
    from radt.evaluation.emoji_draw_command import Asked, measure
    from radt.pipeline import TextToImage

    asked = Asked(
        n=n,
        seed=seed,
        kinds=kinds,
        sweep=sweep,
        new_entity=new_entity,
        recognizer=recognizer,
        font=font,
        out=out,
    )
    pipeline = TextToImage.load(model, kb=kb, device=device)
    document = measure(asked, pipeline, settings, progress=_progress, as_json=as_json)
    if as_json:
        _print_json(document)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `radt evaluate ... --out` wrote, or above them.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html and report.md.")],
    as_json: Json = False,
) -> None:
    """Put every table, curve and sheet of stored results on one page, with the commands that made them."""
    from radt.evaluation.report import write_report

    page, text = write_report(folders, out)
    _print_json({"html": str(page), "markdown": str(text)}) if as_json else typer.echo(f"{page}\n{text}")


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(help="A run folder of `radt train`; none: the installation.")] = None,
    model: Model = None,
    out: Annotated[Path | None, typer.Option("--out", help="With RUN: draw its curves into this PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Say what is installed and what is missing; or, of a run, whether its training is well. Exits 1 when it is not."""
    from radt.doctor import examine, is_healthy, lines

    if run is not None and model is not None:
        raise typer.BadParameter("--model is about the installation: a run has its own settings and weights")
    if run is not None:
        return _examine_run(run, out, as_json=as_json)
    if out is not None:
        raise typer.BadParameter("--out draws the curves of a run: name its folder")
    findings = examine(model)
    if as_json:
        _print_json({"healthy": is_healthy(findings), "findings": [finding.to_json() for finding in findings]})
    else:
        typer.echo("\n".join(lines(findings)))
    raise typer.Exit(code=0 if is_healthy(findings) else 1)


def _examine_run(run: Path, out: Path | None, *, as_json: bool) -> None:
    from radt.training.doctor import examine_run
    from radt.training.doctor_plot import draw_diagnosis

    diagnosis = examine_run(run, _say_to_stderr(quiet=as_json))
    drawn = None if out is None else draw_diagnosis(diagnosis, out)
    if as_json:
        _print_json({**diagnosis.to_json(), "plot": None if drawn is None else str(drawn)})
    else:
        typer.echo("\n".join([*diagnosis.lines(), *([str(drawn)] if drawn else [])]))
    raise typer.Exit(code=0 if diagnosis.is_well else 1)


def _print_json(document: Any) -> None:
    typer.echo(jsonlib.dumps(document, ensure_ascii=False))


def _print_written(written: Any, as_json: bool) -> None:
    if as_json:
        facts = ("out", "pairs", "shards", "shards_kept")
        return _print_json({
            name: str(value) if isinstance(value := getattr(written, name), Path) else value for name in facts
        })
    typer.echo(f"{written.pairs} pairs in {written.shards} shards ({written.shards_kept} already there): {written.out}")


def _say_to_stderr(*, quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is told (done, total); nothing at all where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _training_log() -> Iterator[Callable[[dict[str, float]], None]]:
    """The loop's figures on one line of the terminal; nothing elsewhere, for metrics.jsonl has them."""
    if not sys.stderr.isatty():
        yield lambda metrics: None
        return
    yield lambda metrics: _overwrite_line("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    typer.echo(err=True)


def _overwrite_line(text: str) -> None:
    typer.echo(f"\r\x1b[K{text}", nl=False, err=True)


add_commands(evaluate, progress=_progress)
add_references(evaluate, progress=_progress)

if __name__ == "__main__":
    main()
