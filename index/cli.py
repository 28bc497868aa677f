"""`radt index`: its commands as one app, and how a command line ends. The commands are in `index/commands/`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from index.commands.build import add_build
from index.commands.change import add_changes
from index.commands.compare import add_compare
from index.commands.neighbors import add_neighbors
from index.commands.plan import add_plan
from index.commands.query import add_query
from index.commands.verify import add_verify
from index.commands.views import add_views
from index.errors import UserError, damage, was_interrupted
from index.text import one_line


def make_app(default_model: str | None = None) -> typer.Typer:
    """The `index` commands. `default_model` is what `--model` means when it is not given; `index` has none itself."""
    app = typer.Typer(
        help="Build a knowledge base of image-text pairs, search it, change it.",
        epilog="Add --debug to any command to see where an error comes from.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    add_plan(app, default_model)
    add_build(app, default_model)
    add_changes(app, default_model)
    add_query(app, default_model)
    add_compare(app, default_model)
    add_neighbors(app, default_model)
    add_views(app)
    add_verify(app, default_model)
    return app


def run(app: Callable[..., Any], args: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit: 0 done, 1 failed with one sentence on stderr, 2 wrong usage, 130 interrupted.

    `--debug`, anywhere, lets the traceback through.
    """
    words = list(sys.argv[1:] if args is None else args)
    is_debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"])
    except UserError as error:
        if is_debug:
            raise
        _fail(_stopped(words), 130) if was_interrupted(error) else _fail(str(error), 1)
    except (OSError, ValueError) as error:
        what = damage(error)
        if was_interrupted(error) and not is_debug:
            _fail(_stopped(words), 130)
        if is_debug or what is None:
            raise
        _fail(f"{_DAMAGED}: {what}", 1)
    except KeyboardInterrupt:
        _fail(_stopped(words), 130)
    except SystemExit as exit_:
        if exit_.code == 130:
            _fail(_stopped(words), 130)
        raise
    sys.exit(0)


_QUESTIONS = {"query", "compare", "show", "stats", "verify", "plan"}  # commands that leave nothing to go on from


def _stopped(words: Sequence[str]) -> str:
    if _QUESTIONS & set(words[:2]):
        return "stopped; the same command begins anew"
    return "stopped; what was finished is kept, and the same command goes on from there"


_DAMAGED = (
    "a file of the knowledge base is missing or damaged; put it back from a copy, or build the knowledge base again in "
    "another folder"
)


def _fail(sentence: str, code: int) -> NoReturn:
    print(f"error: {one_line(sentence)}", file=sys.stderr)
    sys.exit(code)
