"""`radt index show` and `stats`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from index.commands.options import JsonOption, KbOption, plain, print_json, print_table

if TYPE_CHECKING:
    from index.records import StoredPair


def add_views(app: typer.Typer) -> None:
    """Register `show` and `stats`."""

    @app.command()
    def show(
        pair: Annotated[int, typer.Argument(metavar="ID", help="Id of a pair.")],
        kb: KbOption,
        as_json: JsonOption = False,
    ) -> None:
        """Everything that is known of one pair."""
        from index.knowledge_base import KnowledgeBase

        document = _pair_json(KnowledgeBase.open(kb).show(pair))
        print_json(document) if as_json else print_table(str(pair), [(k, plain(v)) for k, v in document.items()])

    @app.command()
    def stats(kb: KbOption, as_json: JsonOption = False) -> None:
        """Sizes, datasets, model and searcher."""
        from index.knowledge_base import KnowledgeBase

        document = KnowledgeBase.open(kb).stats()
        print_json(document) if as_json else print_table(str(kb), [(k, plain(v)) for k, v in document.items()])


def _pair_json(pair: "StoredPair") -> dict[str, Any]:
    return {
        "id": str(pair.id),
        "caption": pair.caption,
        "dataset": pair.dataset,
        "source": pair.source,
        "shard": pair.shard,
        "key": pair.key,
        "image": pair.image.to_json(),
        "sha256": pair.sha256,
        "width": pair.width,
        "height": pair.height,
        "metadata": dict(pair.metadata),
    }
