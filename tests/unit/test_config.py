"""Config: dataclasses to plain values and back, and one sentence for what does not fit."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.config import digest, from_dict, override, to_dict
from index.errors import ConfigError, UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    is_on: bool = True
    inner: Inner = field(default_factory=Inner)


@given(
    st.builds(
        Outer,
        name=st.text(),
        kind=st.sampled_from(["a", "b"]),
        limit=st.none() | st.integers(),
        is_on=st.booleans(),
        inner=st.builds(
            Inner, rate=st.floats(allow_nan=False, allow_infinity=False), sizes=st.lists(st.integers()).map(tuple)
        ),
    )
)
def test_there_and_back(config: Outer) -> None:
    again = from_dict(Outer, to_dict(config))
    assert again == config
    assert digest(again) == digest(config)


def test_an_unknown_field_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'limit'"):
        from_dict(Outer, {"name": "x", "limt": 3})
    with pytest.raises(ConfigError, match="did you mean 'rate'"):
        override(Outer(name="x"), "inner.rat=1")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": 3},
        {"name": "x", "kind": "c"},
        {"name": "x", "limit": "many"},
        {"name": "x", "inner": {"sizes": "3"}},
    ],
)
def test_values_of_another_type_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError):
        from_dict(Outer, values)


def test_override() -> None:
    config = Outer(name="x")
    assert override(config, "inner.rate=1").inner.rate == 1.0
    assert override(config, "inner.sizes=[4, 5]").inner.sizes == (4, 5)
    assert override(config, "inner.sizes=4").inner.sizes == (4,)
    assert override(config, "limit=7").limit == 7
    assert override(override(config, "limit=7"), "limit=null").limit is None
    assert override(config, "name=a=b").name == "a=b"
    assert override(config, "limit=7", "inner.rate=1") == override(override(config, "limit=7"), "inner.rate=1")
    assert override(config, "is_on=false").is_on is False
    assert config == Outer(name="x")
    with pytest.raises(ConfigError, match="expected key=value"):
        override(config, "limit")
    with pytest.raises(ConfigError, match="expected int or null, got True"):
        override(Outer(name="x", limit=1), "limit=true")


def test_a_digest_tells_values_apart() -> None:
    assert digest(Outer(name="x")) != digest(Outer(name="y"))
    assert digest(Outer(name="x")) != digest(Outer(name="x", inner=Inner(rate=0.25)))
