"""A knowledge base in a bucket, read where it lies and never written.

Tables are Lance's, which reads a bucket by itself: that of the pairs, and that of a Lance searcher. `kb.json` and the
rest of the searcher that it names are copied to a cache on this disk; only what has changed is fetched again.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from index.atomic import new_folder, write_bytes
from index.errors import KnowledgeBaseError, UserError

MANIFEST = "kb.json"
LISTING = "listing.json"  # of a copied searcher: what it was copied from
_URL = re.compile(r"^([a-z][a-z0-9+.-]+):/+(.+)$")  # a Path has lost one of the slashes


def remote_url(directory: str | Path) -> str | None:
    """The URL of a knowledge base that does not lie on this machine, None for a folder."""
    match = _URL.match(str(directory))
    return None if match is None or match[1] in ("file", "local") else f"{match[1]}://{match[2].rstrip('/')}"


class RemoteFolder:
    """What is needed on this disk of the knowledge base at a URL. The cache is in `RADT_CACHE`, or ~/.cache/radt."""

    def __init__(self, url: str):
        self.url = url
        name = blake2b(url.encode(), digest_size=8).hexdigest()
        self.folder = Path(os.environ.get("RADT_CACHE") or Path.home() / ".cache" / "radt") / "knowledge-bases" / name
        self._seen: bytes | None = None
        # Lance has a client of its own, which wants to be told that an endpoint without TLS is meant.
        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            os.environ.setdefault("AWS_ALLOW_HTTP", "true")

    def refresh(self) -> Path:
        """Bring the copy up to date, and say where it is. KnowledgeBaseError when there is nothing to be had."""
        with self._one_sentence():
            fs, root = self._open()
            content = bytes(fs.cat_file(f"{root}/{MANIFEST}"))
            if content != self._seen:
                searcher = _inside(json.loads(content).get("searcher") or "")
                if searcher:
                    self._copy_folder(fs, f"{root}/{searcher}", self.folder / searcher)
                self.folder.mkdir(parents=True, exist_ok=True)
                write_bytes(self.folder / MANIFEST, content)
                self._drop_others(searcher)
                self._seen = content
        return self.folder

    def sizes(self) -> Iterator[tuple[tuple[str, ...], int]]:
        """Every file of it in the bucket: the parts of its path, and its bytes."""
        with self._one_sentence():
            fs, root = self._open()
            for path, info in fs.find(root, detail=True).items():
                yield tuple(path.removeprefix(root).strip("/").split("/")), int(info["size"] or 0)

    def url_of(self, path: Path) -> str:
        """Where that lies of which `path`, in the folder, is a copy."""
        return f"{self.url}/{path.relative_to(self.folder).as_posix()}"

    def refuse(self) -> KnowledgeBaseError:
        """The error for whoever wants to write to it."""
        return KnowledgeBaseError(
            f"{self.url} is read where it lies and cannot be changed from here; copy it to this machine, change the "
            "copy, and put that in its place"
        )

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(self.url)
        fs.invalidate_cache()
        return fs, root.rstrip("/")

    def _copy_folder(self, fs: Any, source: str, target: Path) -> None:
        """Copy a folder whole, unless the copy that is there was made of the same files."""
        found = {path.removeprefix(source).lstrip("/"): info for path, info in fs.find(source, detail=True).items()}
        files = {_inside(name): info for name, info in found.items() if ".lance/" not in name}
        listing = json.dumps({name: [info["size"], info.get("ETag")] for name, info in sorted(files.items())}).encode()
        if (target / LISTING).is_file() and (target / LISTING).read_bytes() == listing:
            return
        with new_folder(target) as folder:
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get([f"{source}/{name}" for name in files], [str(folder / name) for name in files])
            write_bytes(folder / LISTING, listing)

    def _drop_others(self, searcher: str) -> None:
        """Searchers that `kb.json` names no more."""
        if (self.folder / "searchers").is_dir():
            for folder in (self.folder / "searchers").iterdir():
                if f"searchers/{folder.name}" != searcher:
                    shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError as error:
            raise KnowledgeBaseError(f"{self.url} is not a knowledge base: it has no {MANIFEST}") from error
        except ImportError as error:
            raise KnowledgeBaseError(f"{self.url} cannot be opened: {error}") from error
        except Exception as error:  # every storage client has errors of its own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise KnowledgeBaseError(f"{self.url} cannot be read ({reason}); check URL and credentials") from error


def _inside(name: str) -> str:
    """A path in a folder of ours. KnowledgeBaseError for one that leads out of it: a bucket may be anybody's."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise KnowledgeBaseError(f"a knowledge base cannot name a file {name!r}, outside its folder; do not trust it")
    return name
