"""SQL filters: what a user is told of one that cannot be obeyed."""

import pytest

from index.errors import QueryError
from index.filters import BAD_FIELDS, PAIR_FIELDS, filter_errors, unknown_datasets
from index.records import table_schema
from index.store import PairStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    return PairStore.create(tmp_path_factory.mktemp("stores"), dim=4)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("colour = 3", "there is no field 'colour'; the fields are id, dataset,"),
        ("widht > 3", "no field 'widht' \\(did you mean width\\?\\)"),
        ("dataset = pets", "text is put in single quotes: 'pets'"),
        ("dataset IN ('a', pets)", "text is put in single quotes: 'pets'"),
        ("caption LIKE dog", "text is put in single quotes: 'dog'"),
        ("metadata.url = 'x'", "metadata LIKE '%"),
        ("width = 'x'", "is compared with a field of numbers"),
        ("metadata = 3", "3 is compared with a field of text"),
        ("width", "it is no condition"),
        ("width =", "an expression was expected before its end"),
        ("caption LIKE %dog%", "an expression was expected before %"),
        ("caption = 'a", "a quote is not closed"),
        ("nothing(width) = 1", "Invalid function 'nothing'"),
        (" ", "the filter is empty"),
    ],
)
def test_a_mistake_is_told_in_the_users_own_words(store: PairStore, where: str, told: str) -> None:
    with pytest.raises(QueryError, match=told) as error:
        store.count(where)
    assert "kind" not in str(error.value), "what the table has besides is no business of theirs"
    assert "rust" not in str(error.value)


@pytest.mark.parametrize("where", ["width > 3)", "width > 3) OR (kind = 'bad'", "(width > 3", "caption = ')'("])
def test_parentheses_that_do_not_match_are_refused_and_never_reach_the_table(store: PairStore, where: str) -> None:
    with pytest.raises(QueryError, match="parentheses do not match"):
        store.remove(where=where)


@pytest.mark.parametrize(
    "where", ["id = 1 /* ( */ ) OR (true /* ) */", "width > 3 -- wide", "caption = 'a' --' OR true", "width > /**/ 3"]
)
def test_comments_are_refused(store: PairStore, where: str) -> None:
    """Lance skips them, and with them a parenthesis that would be counted here."""
    with pytest.raises(QueryError, match="it has a comment"):
        store.remove(where=where)


def test_what_looks_like_a_comment_within_text_is_text(store: PairStore) -> None:
    assert store.count("caption = 'a -- b /* ( */ ''--'' c' AND width - -3 > 1") == 0


def test_parentheses_in_text_are_text(store: PairStore) -> None:
    assert store.count("caption = 'it''s :)' OR (width > 3)") == 0


def test_every_field_that_is_offered_is_there(store: PairStore) -> None:
    names = set(table_schema(4).names)
    assert {*PAIR_FIELDS, *BAD_FIELDS} <= names
    for field in PAIR_FIELDS:
        assert store.count(f"{field} IS NULL") == 0
    with pytest.raises(QueryError, match=r"the fields are dataset, source, shard, key, image_offset, reason$"):
        store.bad_samples("colour = 3")


def test_other_errors_are_let_through() -> None:
    with pytest.raises(OSError, match="disk"), filter_errors("width > 3"):
        raise OSError("the disk")
    with pytest.raises(ValueError, match="own"), filter_errors(None):
        raise ValueError("our own")


def test_a_dataset_that_is_not_there_is_told_with_those_that_are() -> None:
    there = {"pets": 1200, "wild": 3}
    assert unknown_datasets(["wild", "pets"], there) is None
    told = unknown_datasets(["pets", "pest"], there)
    assert (
        told == "there is no dataset 'pest' (did you mean 'pets'?); the datasets here are pets (1,200 pairs), wild (3)"
    )
    assert unknown_datasets(["x"], {}) == "there is no dataset 'x'; the knowledge base is empty"
    assert str(unknown_datasets(["x"], {f"d{i}": 1 for i in range(50)})).endswith("d19 (1), ...")
