"""Pages: one HTML file each, with all it needs inside, made of a template under the head that all of them share."""

import html
from importlib.resources import files
from string import Template


def page_file(name: str) -> str:
    """A template or script that lies beside this module."""
    return files("index.search").joinpath(name).read_text(encoding="utf-8")


def filled(template: str, *, title: str, **places: str) -> str:
    """The page of a template. `title` is text, `places` are HTML by the names that the template has for them."""
    title = html.escape(title)
    head = Template(page_file("page_head.html").rstrip()).substitute(title=title)
    return Template(page_file(template)).substitute(places, head=head, title=title)
