"""One line of a doctor: what `radt doctor` says of a machine (`radt/doctor.py`), or of a run (`radt/training/`)."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyFinding:
    """One thing looked at. `remedy` is what to do, or to type, where it is not well."""

    name: str
    state: str  # each doctor names its own
    detail: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """All four fields."""
        return {"name": self.name, "state": self.state, "detail": self.detail, "remedy": self.remedy}
