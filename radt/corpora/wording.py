"""English for the captions of scenes: nouns, articles and plurals of emoji names."""

from radt.corpora.emoji import Entity

COUNT_WORDS = {1: "one", 2: "two", 3: "three", 4: "four"}

_PEOPLE = frozenset({"man", "woman", "person", "boy", "girl", "baby", "child", "princess", "prince"})
_PLURAL_PEOPLE = frozenset({"men", "women", "people"})
_ENDS_HEAD = frozenset({
    "with",
    "of",
    "in",
    "on",
    "behind",
    "over",
    "from",
    "without",
    "showing",
    "facing",
    "up",
    "and",
    "&",
})
_UNCOUNTED = frozenset(  # mass nouns, games, and what is no noun at all
    (  # noqa: SIM905 - a list would be sixty lines
        "angry asleep bacon badminton beans bread broccoli butter cheese cricket crossed dizzy done down fire fog free "
        "garlic golf good hair hockey honey ice information infinity karaoke lacrosse lightning locked luggage milk "
        "money music open playing pong popcorn rice right sake salt snow soccer soon spaghetti sushi sweat tennis "
        "thread tofu underline unlocked voltage water wood yarn zzz"
    ).split()
)
_ING_NOUNS = frozenset({"ring", "wing", "king", "building", "painting", "dumpling", "string", "earring"})
_THE = (
    "Emirates",
    "Islands",
    "Kingdom",
    "Nations",
    "Philippines",
    "Republic",
    "States",
    "Territories",
    "Territory",
    "Union",
)
_IRREGULAR = {
    "buffalo": "buffalo",
    "deer": "deer",
    "fish": "fish",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "moose": "moose",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "scarf": "scarves",
    "sheep": "sheep",
    "squid": "squid",
    "tooth": "teeth",
    "wolf": "wolves",
}


def noun(entity: Entity) -> str:
    """The name as it stands in a sentence: `flag of Germany` for `flag: Germany`."""
    head, colon, rest = entity.name.partition(": ")
    if not colon:
        return entity.name
    if head == "flag":
        return f"flag of the {rest}" if rest.endswith(_THE) else f"flag of {rest}"
    if rest.endswith("hair"):
        return f"{head} with {rest}"
    return f"{head} {rest}" if head == "keycap" else f"{head} ({rest})"


def is_countable(phrase: str) -> bool:
    """Whether `a` reads well before the phrase. In doubt, no: a missing article is smaller than a wrong one."""
    if not phrase[0].isalpha() or phrase[0].isupper():
        return False
    words = phrase.split()
    if words[0] in _PEOPLE:
        return True
    head = _head(words)
    if words[0] in _PLURAL_PEOPLE or head in _UNCOUNTED:
        return False
    if head.endswith("s") and not head.endswith(("ss", "us")):
        return False
    return not head.endswith("ing") or head in _ING_NOUNS


def with_article(phrase: str) -> str:
    """`a wolf`, `an owl`, `grapes`."""
    if not is_countable(phrase):
        return phrase
    is_vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "uku", "one", "eu"))
    return f"{'an' if is_vowel or phrase.startswith(('hour', 'x-ray')) else 'a'} {phrase}"


def plural(phrase: str) -> str | None:
    """`wolves`, or None where a plural cannot be formed by rule."""
    words = phrase.split()
    head = _head(words)
    if not is_countable(phrase) or head != words[-1] or not head.isalpha() or words[0] in _PEOPLE - {head}:
        return None
    return " ".join([*words[:-1], _plural_word(head)])


def _head(words: list[str]) -> str:
    """The word that carries the noun: the last one before a preposition or a parenthesis."""
    for i, word in enumerate(words):
        if i and (word in _ENDS_HEAD or word.startswith("(")):
            return words[i - 1]
    return words[-1]


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("man"):
        return word[:-3] + "men"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("tomato", "potato", "mango")) else "s")
