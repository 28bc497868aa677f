"""Settings that would be ignored are refused when they were named, and only then."""

from typing import Any

import pytest

from index.errors import ConfigError
from radt.idle import check_idle
from radt.settings import GenerateSettings


@pytest.mark.parametrize(
    ("named", "effective"),
    [
        ({"percentile": 0.9}, {"threshold": "dynamic"}),
        ({"oscillate_after": 3}, {"oscillate_to": 1.0}),
        ({"fusion": "sum", "by": "bm25"}, {"by": "hybrid"}),
        ({"order": "coin", "guidance": "joint"}, {"guidance": "interleaved"}),
        ({"text_share": 0.2, "guidance": "joint"}, {"guidance": "interleaved"}),
    ],
)
def test_what_has_no_effect_is_refused_when_it_was_named(named: dict[str, Any], effective: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(named))} has no effect"):
        check_idle(GenerateSettings(**named), named=named, num_stages=1)
    check_idle(GenerateSettings(**named), named=[], num_stages=1)
    check_idle(GenerateSettings(**{**named, **effective}), named=[*named, *effective], num_stages=1)


@pytest.mark.parametrize("name", ["sr_steps", "sr_text_guidance", "sr_neighbor_guidance", "augmentation_level"])
def test_what_is_of_the_upper_stages_needs_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} has no effect where one stage is run"):
        check_idle(GenerateSettings(), named=[name], num_stages=1)
    check_idle(GenerateSettings(), named=[name], num_stages=2)
