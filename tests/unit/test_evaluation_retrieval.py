"""What `radt evaluate retrieval` counts: the hits that a search for k gives, and not the first k of a deeper one."""

from types import SimpleNamespace
from typing import Any

from radt.evaluation.retrieval import Question, evaluate_retrieval


class Shifting:
    """A knowledge base of ten pairs whose search puts the right pair, 7, first only when one hit is asked for."""

    name = "shifting"

    def __init__(self) -> None:
        self.store = SimpleNamespace(get=lambda ids: [SimpleNamespace(id=each) for each in ids])

    def __len__(self) -> int:
        return 10

    def search(self, text: str, *, k: int, by: str, **options: Any) -> list[SimpleNamespace]:
        order = [7, 1, 2] if k == 1 else [1, 2, 3, 4, 7, 5, 6, 8, 9, 0]
        return [SimpleNamespace(id=each) for each in order[:k]]


def test_each_k_is_what_a_search_for_k_finds() -> None:
    """Fused ranks depend on how many candidates there are, so the best of many hits may not be the best of few."""
    question = Question(text="a wolf", source="query 1", ids=(7,))
    report = evaluate_retrieval(Shifting(), [question], by=["hybrid"], ks=(1, 3, 5), depth=10)  # type: ignore[arg-type]
    found = {name: score.value for name, score in report.scores["hybrid"].items()}
    assert found == {"recall@1": 1, "hit@1": 1, "recall@3": 0, "hit@3": 0, "recall@5": 1, "hit@5": 1, "mrr": 1 / 5}
