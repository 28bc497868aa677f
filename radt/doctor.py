"""`radt doctor`: what is installed, what is missing, and the line that would bring it. Changes nothing."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from index.errors import UserError
from radt.finding import AnyFinding

FONT = "colour-emoji font"
GIB = 2**30
ROOM = 2 * GIB  # a demonstration run takes a fraction of this


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding(AnyFinding):
    """One thing looked at of a machine."""

    state: Literal["ok", "absent", "broken"]  # absent: optional, or only some commands need it


def examine(model: str | Path | None = None, out: Path = Path()) -> list[Finding]:
    """Look at Python, packages, extras, font, model, device and disk, in the order they are needed."""
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": lambda: [_python()],
        "packages": _packages,
        FONT: lambda: [_font()],
        "model": lambda: [_model(model)],
        "device": lambda: [_device()],
        "disk": lambda: [_disk(out)],
    }
    return [finding for name, check in checks.items() for finding in _looked_at(name, check)]


def _looked_at(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What a check finds; that it cannot even look, for want of a package or a library, is a finding too."""
    try:
        return list(check())
    except (ImportError, OSError) as error:
        detail = f"cannot look: {error}"
        return [
            Finding(name=name, state="broken", detail=detail, remedy="mend the packages: pip install . in the clone")
        ]


def is_healthy(findings: list[Finding]) -> bool:
    """Whether nothing that every command needs is broken."""
    return all(finding.state != "broken" for finding in findings)


def lines(findings: list[Finding]) -> list[str]:
    """For people: a mark, a name, what was found, and below it the remedy."""
    marks = {"ok": "ok      ", "absent": "absent  ", "broken": "MISSING "}
    width = max(len(finding.name) for finding in findings)
    text = []
    for finding in findings:
        text.append(f"{marks[finding.state]}{finding.name:<{width}}  {finding.detail}")
        if finding.remedy:
            text.append(f"{'':8}{'':<{width}}  -> {finding.remedy}")
    missing = sum(finding.state == "broken" for finding in findings)
    return [*text, f"{missing} of these must be mended" if missing else "everything that radt must have is here"]


def _python() -> Finding:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return Finding(name="python", state="ok", detail=detail)


def _packages() -> Iterator[Finding]:
    """Every requirement of the installed radt whose marker holds here; extras are optional."""
    for requirement, extra in _requirements():
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        where = f" (extra {extra})" if extra else ""
        try:
            yield Finding(name=name, state="ok", detail=f"{version(name)}{where}")
        except PackageNotFoundError:
            line = (
                f"pip install 'radt[{extra}]'"
                if extra
                else f"pip install {'.' if requirement == 'radt' else requirement!r}"
            )
            yield Finding(name=name, state="absent" if extra else "broken", detail=f"not installed{where}", remedy=line)


def _requirements() -> list[tuple[str, str]]:
    """(requirement, extra or "") pairs, as the installed metadata or else pyproject.toml lists them."""
    from packaging.requirements import Requirement

    try:
        lines = requires("radt") or []
    except PackageNotFoundError:
        return [("radt", "")]  # a checkout that was never installed has no list
    found = []
    for line in lines:
        requirement = Requirement(line)
        extra = next(iter(re.findall(r"extra == ['\"]([^'\"]+)", line)), "")
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found.append((f"{requirement.name}{requirement.specifier}", extra))
    return found


def _font() -> Finding:
    from radt.corpora.emoji import find_font

    try:
        return Finding(name=FONT, state="ok", detail=str(find_font()))
    except UserError:
        remedy = "sudo apt-get install fonts-noto-color-emoji"
        return Finding(name=FONT, state="absent", detail="not found; `radt corpus` needs one", remedy=remedy)


def _model(model: str | Path | None) -> Finding:
    from radt.bundle import changed_files, find_bundle, read_info

    try:
        folder = find_bundle(model)
        info = read_info(folder)
        changed = changed_files(folder, info)
    except UserError as error:
        return Finding(name="model", state="absent", detail=str(error), remedy="name a model folder with --model")
    if changed:
        detail = f"{folder}: {', '.join(changed[:3])} changed or missing"
        return Finding(name="model", state="broken", detail=detail, remedy="copy or install the model again")
    return Finding(name="model", state="ok", detail=f"{info.name} ({info.digest}) in {folder}")


def _device() -> Finding:
    import torch

    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        return Finding(name="device", state="ok", detail=f"{torch.cuda.get_device_name()}; CPU: {threads}")
    return Finding(name="device", state="ok", detail=f"CPU: {threads}")


def _disk(out: Path) -> Finding:
    free = shutil.disk_usage(out).free
    detail = f"{free / GIB:.1f} GiB free at {out.resolve()}"
    if free < ROOM:
        return Finding(name="disk", state="absent", detail=detail, remedy=f"make room: {ROOM / GIB:.0f} GiB is plenty")
    return Finding(name="disk", state="ok", detail=detail)
