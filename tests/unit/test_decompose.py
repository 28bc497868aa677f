"""Decomposition: where a prompt is cut and where it is not, and greedy coverage beside every order there is."""

from itertools import permutations

import numpy as np
import pytest

from index.search.decompose import Corpus, cover_terms, phrases, pieces, subject
from index.search.lexical import RankBM25

CAPTIONS = [
    *("flag: Chad", "flag: Iceland", "white flag", "wolf: face", "dove: bird, fly, peace", "pink heart: cute, like"),
    *(
        "cat with wry smile: face",
        "sun behind cloud: weather",
        "person in bed: hotel, sleep",
        "house with garden: home",
    ),
    *("man with veil: wedding", "man", "page facing up: document", "tangerine: fruit, orange", "skateboard: board"),
    *("family: woman, boy", "left arrow curving right: return", "ON! arrow: mark", "black cat: animal", "bread: loaf"),
    *("woman and man holding hands: couple", "two hearts: love", "keycap: 3", "small airplane", "money bag: dollar"),
    *("shopping bags: bag", "man in lotus position: yoga", "strawberry: berry, fruit", "red square"),
]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    men = [f"man number {chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(400)]
    captions = [*CAPTIONS, *men]
    return Corpus(RankBM25(np.arange(len(captions)), captions))


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a wolf left of a flag of Chad", ["a wolf", "a flag of Chad"]),
        ("a wolf, to the left of a flag of Chad on a pink background", ["a wolf", "a flag of Chad"]),
        ("pink ground, a flag of Iceland over a wolf", ["a flag of Iceland", "a wolf"]),
        ("a picture of a dove on a pink background", ["a dove"]),
        ("dove against pink", ["dove"]),
        ("a dove in the top left corner", ["a dove"]),
        ("black ground, dove, two times", ["dove"]),
        ("a cat with wry smile", ["a cat with wry smile"]),
        ("a person in bed below a sun behind cloud", ["a person in bed", "a sun behind cloud"]),
        ("a sun above a cloud", ["a sun", "a cloud"]),
        ("a house with garden to the left", ["a house with garden"]),
        ("a page facing up, left of a man with veil on brown", ["a page facing up", "a man with veil"]),
        ("a wolf and a dove", ["a wolf", "a dove"]),
        ("a woman and man holding hands", ["a woman and man holding hands"]),
        ("a black cat on a skateboard", ["a black cat", "a skateboard"]),
        ("an orange next to bread", ["an orange", "bread"]),
        ("bread on orange", ["bread"]),
        ("left arrow curving right, purple ground", ["left arrow curving right"]),
        ("ON! arrow on teal", ["ON! arrow"]),
        ("family (woman, boy) against gray", ["family (woman, boy)"]),
        ("a wolf over a zorblax", ["a wolf over a zorblax"]),
        ("zorblax", ["zorblax"]),
        ("on a pink background", ["on a pink background"]),
        ("a black-and-white wolf", ["a black-and-white wolf"]),
        ("a wolf beside", ["a wolf"]),
        ("three wolves on pink", ["wolf"]),
        ("3 x wolf, purple ground", ["wolf"]),
        ("a picture of four of: dove against gray", ["dove"]),
        ("pink ground, 2 strawberries", ["strawberry"]),
        ("two small doves", ["dove"]),
        ("a pair of doves left of 3 wolves", ["dove", "wolf"]),
        ("a large wolf in the middle", ["wolf"]),
        ("two hearts on a red ground", ["two hearts"]),
        ("a small airplane on brown", ["a small airplane"]),
        ("two small airplanes", ["small airplane"]),
        ("3 x man in lotus position, brown ground", ["man in lotus position"]),
        ("four money bags", ["money bag"]),
        ("shopping bags", ["shopping bags"]),
        ("two red squares against teal", ["red square"]),
        ("three zorblaxes", ["three zorblaxes"]),
        ("3", ["3"]),
    ],
)
def test_a_prompt_is_cut_into_its_things(corpus: Corpus, prompt: str, parts: list[str]) -> None:
    assert phrases(prompt, corpus) == parts


def test_common_words_name_nothing(corpus: Corpus) -> None:
    assert corpus.names_something("a wolf")
    assert not corpus.names_something("a man"), "most captions have it"
    assert not corpus.names_something("a zorblax"), "no caption has it"
    assert phrases("a wolf near a man", corpus) == ["a wolf near a man"]


def test_pieces_lose_nothing_but_the_opening() -> None:
    prompt = "A photo of a Wolf, to the left of  a flag of Chad on pink"
    assert (
        "".join(piece.before + piece.text for piece in pieces(prompt))
        == "a Wolf, to the left of  a flag of Chad on pink"
    )
    assert [piece.kind for piece in pieces(prompt)] == ["first", "relation", "setting"]


def test_a_cut_is_made_where_no_caption_covers_both() -> None:
    apart = Corpus(RankBM25(np.arange(2), ["wolf", "dove"]))
    together = Corpus(RankBM25(np.arange(3), ["wolf", "dove", "a dove and a wolf"]))
    assert phrases("a wolf and a dove", apart) == ["a wolf", "a dove"]
    assert phrases("a wolf and a dove", together) == ["a wolf and a dove"]
    assert phrases("a wolf left of a dove", together) == ["a wolf", "a dove"], "none is said to be left of the other"


def test_the_subject_is_what_is_left_without_the_ground() -> None:
    assert subject("a wolf left of a flag of Chad on a pink background") == "a wolf, a flag of Chad"
    assert subject("on pink") == "on pink"


def test_coverage_takes_the_heaviest_first_and_then_what_is_not_covered() -> None:
    #                 flag   chad  wolf
    has = np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=bool)
    assert cover_terms(has, np.array([2.0, 6.0, 5.0])).tolist() == [0, 3, 1, 4, 2]
    assert cover_terms(has, np.array([0.1, 0.2, 5.0]))[:2].tolist() == [3, 4], "a tenth of 5 is more than 0.3"
    assert cover_terms(has[:, :0], np.array([1.0, 1.0, 1.0])).tolist() == []
    assert cover_terms(np.zeros((1, 3), dtype=bool), np.array([1.0])).tolist() == [0, 1, 2]


def test_greedy_coverage_is_within_its_bound_of_the_best_choice() -> None:
    """Nemhauser, Wolsey and Fisher 1978: greedy covers at least 1 - 1/e of what the best k cover."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        has = generator.random((6, 7)) < 0.4
        weights = generator.random(6)
        for k in (1, 2, 3):
            taken = cover_terms(has, weights)[:k]
            best = max(float(weights @ has[:, list(some)].any(axis=1)) for some in permutations(range(7), k))
            assert float(weights @ has[:, taken].any(axis=1)) >= (1 - 1 / np.e) * best - 1e-9
