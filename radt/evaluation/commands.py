"""The commands `radt evaluate images` and `radt evaluate retrieval`; heavy imports wait until one runs."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from radt.settings import Decompose

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

MEASURES_HELP = (
    "fd, kid, cmmd, precision, recall, density, coverage, is, clip-score, r-precision, soa, copies; with commas."
)


def add_commands(evaluate: typer.Typer, *, progress: Progress) -> None:
    """Put both commands under `radt evaluate`. `progress` opens a bar that is told (done, total)."""
    _add_images(evaluate, progress)
    _add_retrieval(evaluate, progress)


def _add_images(evaluate: typer.Typer, progress: Progress) -> None:
    @evaluate.command("images")
    def images(
        pictures: Annotated[str, typer.Argument(help="Folder of pictures; a knowledge base or corpus does, too.")],
        *,
        real: Annotated[
            str | None, typer.Option("--real", help="Real pictures to compare with: folder, knowledge base or corpus.")
        ] = None,
        extractor: Annotated[
            list[str] | None,
            typer.Option(
                "--extractor",
                help="inception[:WEIGHTS.pth], open_clip:NAME_OR_FOLDER, timm:NAME[:WEIGHTS], recognizer[:FOLDER]; "
                "repeatable. Default: inception.",
            ),
        ] = None,
        chosen: Annotated[
            str | None, typer.Option("--metrics", help=MEASURES_HELP + " Default: all that can be.")
        ] = None,
        captions: Annotated[
            Path | None,
            typer.Option(
                "--captions", help="csv or jsonl with file, caption, label; default: PNG records, .txt files."
            ),
        ] = None,
        out: Annotated[
            Path | None, typer.Option("--out", help="Keep results, plot and features here; the same command goes on.")
        ] = None,
        subset_size: Annotated[
            int | None,
            typer.Option("--subset-size", min=2, help="Pictures in a subset of KID. Default: 1000, or half."),
        ] = None,
        subsets: Annotated[
            int | None,
            typer.Option(
                "--subsets",
                min=2,
                help="Subsets that errors are taken over. Default: 100; 25 of FD, precision to coverage.",
            ),
        ] = None,
        candidates: Annotated[
            int | None, typer.Option("--candidates", min=2, help="Captions of R-precision. Default: 100, if there are.")
        ] = None,
        copy_limit: Annotated[
            float | None,
            typer.Option(
                "--copy-limit", min=0, max=1, help="Similarity above which a picture is a copy. Default: 0.95."
            ),
        ] = None,
        limit_real: Annotated[
            int | None, typer.Option("--limit-real", min=2, help="At most so many reals, by lot.")
        ] = None,
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of subsets and lots.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    ) -> None:
        """Measure a folder of pictures: likeness to reals, diversity, agreement with captions, copies."""
        from radt.evaluation.extractors import load_extractor
        from radt.evaluation.image_measures import OF_CAPTIONS, Options
        from radt.evaluation.image_set import find_pictures
        from radt.evaluation.images import measure_images
        from radt.evaluation.images_report import need_matplotlib, print_report, write_report

        if limit_real is not None and real is None:
            raise typer.BadParameter("--limit-real is about the pictures of --real; name those")
        if out is not None:
            need_matplotlib()
        options = Options(
            measures=None if chosen is None else tuple(name.strip() for name in chosen.split(",") if name.strip()),
            subset_size=subset_size,
            subsets=subsets,
            candidates=candidates,
            copy_limit=copy_limit,
            seed=seed,
        )
        if captions is not None and not any(map(options.wants, OF_CAPTIONS)):
            raise typer.BadParameter(f"--captions has no effect without {' or '.join(OF_CAPTIONS)}; name one")
        found = find_pictures(pictures, captions=captions, out=out)
        reals = None if real is None else find_pictures(real, out=out, limit=limit_real, seed=seed)
        extractors = [load_extractor(name) for name in dict.fromkeys(extractor or ["inception"])]
        with progress("measuring") as on_step:
            report = measure_images(
                found,
                extractors,
                reals=reals,
                options=options,
                cache=None if out is None else out / "features",
                source=pictures,
                real=real,
                on_step=on_step,
            )
        written = [] if out is None else write_report(report, out)
        _print_json(report.to_json()) if as_json else print_report(report, written)


def _add_retrieval(evaluate: typer.Typer, progress: Progress) -> None:
    @evaluate.command("retrieval")
    def retrieval(
        *,
        kb: Annotated[str, typer.Option("--kb", help="Knowledge base to be asked, a folder or a URL.")],
        queries: Annotated[
            Path,
            typer.Option("--queries", help="A query a line: TEXT, a tab, and relevant ids or a --where condition."),
        ],
        by: Annotated[
            list[str] | None,
            typer.Option("--by", help="clip, bm25, tfidf or hybrid; repeatable. Default: all but tfidf."),
        ] = None,
        k: Annotated[list[int] | None, typer.Option("-k", min=1, help="Repeatable. Default: 1, 5, 10.")] = None,
        depth: Annotated[int, typer.Option("--depth", min=1, help="Hits that MRR looks at.")] = 100,
        decompose: Annotated[
            Decompose, typer.Option("--decompose", help="Look for every thing that a query names, by which rule.")
        ] = "off",
        out: Annotated[Path | None, typer.Option("--out", help="Keep the result here.")] = None,
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
    ) -> None:
        """Measure how well a knowledge base finds what queries are known to be about."""
        from index.commands.options import open_for_query
        from radt.bundle import find_bundle
        from radt.evaluation import retrieval as library

        questions = library.read_questions(queries)
        base = open_for_query(kb, None, str(find_bundle(None)))
        with progress("searching") as on_query:
            report = library.evaluate_retrieval(
                base,
                questions,
                by=by or ("clip", "bm25", "hybrid"),
                ks=k or (1, 5, 10),
                depth=depth,
                options={"decompose": decompose},
                queries=str(queries),
                seed=seed,
                on_query=on_query,
            )
        written = [] if out is None else library.write_report(report, out)
        _print_json(report.to_json()) if as_json else library.print_report(report, written)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False))
