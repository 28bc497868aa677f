"""Licence and source of a pair, by the names that data sets and their tools give them (row N1)."""

from collections.abc import Mapping
from typing import Any

# Without case, spaces and underscores; the first that says something wins. img2dataset: url; LAION: URL, LICENSE;
# Conceptual 12M and WIT: image_url, page_url; YFCC100M: licensename, licenseurl, downloadurl; Open Images: OriginalURL.
LICENSE_NAMES = ("license", "licence", "licensename", "licensetype", "licenseurl", "licenceurl", "rights")
URL_NAMES = (
    *("url", "imageurl", "sourceurl", "originalurl", "downloadurl", "contenturl"),
    *("pageurl", "originallandingurl", "landingurl", "source"),
)
SAYS_NOTHING = ("", "?", "nan", "none", "null", "unknown")  # LAION writes "?" where it found no licence


def license_of(metadata: Mapping[str, Any]) -> str | None:
    """What is known of a pair's licence: a name, or the address of its text; None where nothing is."""
    return _first(metadata, LICENSE_NAMES)


def url_of(metadata: Mapping[str, Any]) -> str | None:
    """Where the picture came from: the image itself if that is said, else the page that showed it; None if neither."""
    return _first(metadata, URL_NAMES)


def _first(metadata: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    plain = {name.lower().replace("_", "").replace(" ", ""): value for name, value in metadata.items()}
    said = (str(plain[name]).strip() for name in names if isinstance(plain.get(name), str | int | float))
    return next((text for text in said if text.lower() not in SAYS_NOTHING), None)
