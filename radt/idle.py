"""What was typed and would be ignored is refused: a setting that has no effect beside the others (DESIGN section 4)."""

from collections.abc import Collection

from index.errors import ConfigError
from radt.settings import GenerateSettings

UPPER = ("sr_steps", "sr_text_guidance", "sr_neighbor_guidance", "augmentation_level")


def check_idle(settings: GenerateSettings, *, named: Collection[str], num_stages: int) -> None:
    """A ConfigError for the first of the `named` settings that has no effect; `num_stages` is how many are run."""
    idle = {
        "percentile": (settings.threshold != "dynamic", "without --threshold dynamic"),
        "oscillate_after": (settings.oscillate_to is None, "without --oscillate-to"),
        "order": (settings.guidance == "joint", "with --guidance joint, which has no branches"),
        "text_share": (settings.guidance == "joint", "with --guidance joint, which has no branches"),
        "fusion": (settings.by != "hybrid", f"by {settings.by} alone: it joins the scores of hybrid"),
        **dict.fromkeys(UPPER, (num_stages == 1, "where one stage is run: it is of those above the first")),
    }
    for name, (is_idle, why) in idle.items():
        if name in named and is_idle:
            raise ConfigError(f"{name} has no effect {why}; leave it out")
