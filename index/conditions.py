"""Conditions: the SQL filters that we write ourselves, over columns of the table (`index/filters.py` has users')."""

from collections.abc import Collection, Iterable, Sequence

from index.records import ShardRecord


def id_in(ids: Sequence[int]) -> str:
    """Rows of these ids."""
    possible = possible_ids(ids)
    return f"id IN ({', '.join(map(str, possible))})" if possible else "false"


def possible_ids(ids: Sequence[int]) -> list[int]:
    """Without those of which Lance could not even be asked."""
    return [i for i in ids if -(2**63) <= i < 2**63]


def digest_in(digests: Iterable[str]) -> str:
    """Rows whose image has one of these SHA-256."""
    quoted = ", ".join(map(_quote, sorted(digests)))
    return f"image_sha256 IN ({quoted})" if quoted else "false"


def bad_where(where: str | None) -> str:
    """Samples in quarantine, or those of them that another filter lets through."""
    return f"kind = 'bad' AND ({where})" if where else "kind = 'bad'"


def of_shards(records: Collection[ShardRecord]) -> str | None:
    """All rows of these shards, ledger entries too; what was taken down stays so. None for no shards."""
    shards: dict[str, list[str]] = {}
    for record in records:
        shards.setdefault(record.dataset, []).append(_quote(record.shard))
    if not shards:
        return None
    named = [f"(dataset = {_quote(dataset)} AND shard IN ({', '.join(names)}))" for dataset, names in shards.items()]
    return f"kind <> 'removed' AND ({' OR '.join(named)})"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
