"""The parts of CLIP training: vocabulary, pairs, measures, and the handling of Ctrl-C."""

import os
import re
import signal

import numpy as np
import pytest
import torch

from index.errors import ConfigError
from radt.corpora.emoji import Entity, GlyphRenderer, load_entities, select
from radt.training.clip import (
    ClipTrainConfig,
    clip_emoji,
    in_batch_accuracy,
    recall_by_class,
    to_pixels,
)
from radt.training.emoji_pairs import EmojiPairs, vary_caption, vocabulary_captions
from radt.training.interrupt import StopOnInterrupt
from radt.training.optim import OptimConfig
from radt.training.tokenizer import END, PAD_ID, START_ID, encode, train_tokenizer

CAPTIONS = ["a red apple on a blue ground", "two owls on white", "apple: fruit, red"] * 4


@pytest.fixture(scope="module")
def training() -> tuple[Entity, ...]:
    return select(load_entities(), "train")


@pytest.fixture(scope="module")
def pairs(training: tuple[Entity, ...]) -> EmojiPairs:
    return EmojiPairs(training[::40], GlyphRenderer(), image_size=32, renditions=2, seed=3)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def entity_words(entity: Entity) -> set[str]:
    return words(" ".join([entity.name, *entity.keywords]))


class TestTokenizer:
    def test_trained_word_is_one_piece_and_unseen_word_falls_apart(self) -> None:
        tokenizer = train_tokenizer(CAPTIONS, vocab_size=320)
        assert len(tokenizer.encode("apple", add_special_tokens=False)) == 1
        assert len(tokenizer.encode("zyx", add_special_tokens=False)) > 1

    def test_no_text_is_unknown(self) -> None:
        tokenizer = train_tokenizer(CAPTIONS, vocab_size=300)
        text = "a wolf, 東京 \u2764 \u0416 #7"
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text.lower()

    def test_case_and_accents_do_not_matter(self) -> None:
        tokenizer = train_tokenizer(CAPTIONS, vocab_size=300)
        assert tokenizer.encode("C\u00f4te d'Ivoire").ids == tokenizer.encode("cote d'ivoire").ids

    def test_end_is_the_highest_id_of_every_row_however_long_the_text(self) -> None:
        tokenizer = train_tokenizer(CAPTIONS, vocab_size=300)
        ids = np.array(encode(tokenizer, ["owl", "apple " * 50, ""], context_length=8))
        assert ids.shape == (3, 8)
        assert (ids[:, 0] == START_ID).all()
        assert (ids.max(axis=1) == tokenizer.token_to_id(END)).all()
        assert tokenizer.token_to_id(END) == tokenizer.get_vocab_size() - 1
        assert (ids[0, ids[0].argmax() + 1 :] == PAD_ID).all()

    def test_training_again_gives_the_same(self) -> None:
        one, two = (train_tokenizer(CAPTIONS, vocab_size=330).to_str() for _ in range(2))
        assert one == two

    def test_vocabulary_without_room_for_the_bytes_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="vocab_size is 100"):
            train_tokenizer(CAPTIONS, vocab_size=100)


class TestVocabulary:
    def test_words_of_held_out_entities_alone_are_never_read(self, training: tuple[Entity, ...]) -> None:
        held_out = select(load_entities(), "heldout")
        shared = set().union(*map(entity_words, training))
        read = set().union(*(words(caption) for caption in vocabulary_captions(training, num_scenes=1000, seed=0)))
        secret = set().union(*map(entity_words, held_out)) - shared
        assert len(secret) > 100
        # what the wording of scenes brings ("gray", "corner") may be in a held-out name too
        scene_words = words(" ".join(_scene_wording()))
        assert not (secret & read) - scene_words

    def test_held_out_entity_is_refused(self, training: tuple[Entity, ...]) -> None:
        held_out = select(load_entities(), "heldout")[0]
        with pytest.raises(AssertionError, match="held-out"):
            next(vocabulary_captions([*training[:3], held_out], num_scenes=0, seed=0))


def _scene_wording() -> list[str]:
    from radt.corpora import scenes, wording

    texts = ["in the middle", *scenes.PALETTE, *scenes.PLACES, *wording.COUNT_WORDS.values(), *scenes.SCENE_TEMPLATES]
    texts += [*scenes.GROUND_TEMPLATES, *scenes.CORNER_TEMPLATES, *scenes.COUNT_TEMPLATES, *scenes.TWO_TEMPLATES]
    for table in (scenes.PLACE_TEMPLATES, scenes.SIZE_WORDS, scenes.RELATION_WORDS):
        texts += [text for options in table.values() for text in options]
    return texts


class TestPairs:
    def test_a_step_is_always_the_same_and_another_step_another(self, pairs: EmojiPairs) -> None:
        (pictures, captions), (again, captions_again) = pairs.batch(5, 12), pairs.batch(5, 12)
        assert pictures.shape == (12, 32, 32, 3)
        np.testing.assert_array_equal(pictures, again)
        assert captions == captions_again
        assert captions != pairs.batch(6, 12)[1]

    def test_no_two_pairs_of_a_batch_are_of_one_class(
        self, training: tuple[Entity, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # classes of several members, so that drawing entities instead of classes would show
        members: dict[int, list[Entity]] = {}
        for entity in training:
            members.setdefault(entity.class_id, []).append(entity)
        twins = [entity for same in members.values() if len(same) > 1 for entity in same]
        drawn: list[Entity] = []
        pairs = EmojiPairs(twins, GlyphRenderer(), image_size=32, renditions=1, seed=0)
        num_classes = len({entity.class_id for entity in twins})
        batch_size = 2 * (num_classes // 3)
        monkeypatch.setattr("radt.training.emoji_pairs.vary_caption", lambda _, entity: drawn.append(entity) or "x")
        monkeypatch.setattr(pairs, "_scene", lambda _, two: drawn.extend(two) or (np.zeros((32, 32, 3), np.uint8), "x"))
        for step in range(10):
            drawn.clear()
            pairs.batch(step, batch_size)
            assert len(drawn) == len({entity.class_id for entity in drawn}) == 3 * batch_size // 2

    def test_batch_larger_than_the_classes_is_refused(self, pairs: EmojiPairs) -> None:
        with pytest.raises(ConfigError, match="batch_size 400"):
            pairs.batch(0, 400)

    def test_held_out_entity_is_refused(self, training: tuple[Entity, ...]) -> None:
        held_out = select(load_entities(), "heldout")[0]
        with pytest.raises(AssertionError, match="held-out"):
            EmojiPairs([*training[:4], held_out], GlyphRenderer(), image_size=32, renditions=1, seed=0)

    def test_caption_varies_but_says_nothing_new(self, training: tuple[Entity, ...]) -> None:
        entity = next(entity for entity in training if len(entity.keywords) > 2)
        rng = np.random.default_rng(0)
        captions = {vary_caption(rng, entity) for _ in range(100)}
        assert entity.name in captions
        assert len(captions) > 10
        assert all(words(caption) <= entity_words(entity) for caption in captions)


class TestMeasures:
    def test_recall_counts_a_class_once_found(self) -> None:
        classes = torch.tensor([7, 8, 7, 9] + [10] * 12)
        scores = -torch.arange(16.0).expand(3, 16)  # ranks the pictures in order
        recall = recall_by_class(scores, torch.tensor([7, 9, 11]), classes)
        assert recall == pytest.approx({"recall_at_1": 1 / 3, "recall_at_10": 2 / 3})

    def test_accuracy_of_a_batch(self) -> None:
        eye = torch.eye(4)
        assert in_batch_accuracy(eye, eye) == 1.0
        assert in_batch_accuracy(eye, eye[[0, 1, 3, 2]]) == 0.5

    def test_pixels_span_minus_one_to_one(self) -> None:
        pixels = to_pixels(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8))
        torch.testing.assert_close(pixels, torch.tensor([-1.0, 1.0, -0.6]).reshape(1, 3, 1, 1))


class TestConfig:
    def test_preset_is_whole(self) -> None:
        assert clip_emoji().num_steps > 0

    @pytest.mark.parametrize(("field", "value"), [("num_steps", 0), ("batch_size", 0), ("patch_size", 5), ("heads", 3)])
    def test_impossible_values_are_named(self, field: str, value: int) -> None:
        values = {"num_steps": 1, "batch_size": 2, "optim": OptimConfig(), field: value}
        with pytest.raises(ConfigError, match=f"{field}.* {value}"):
            ClipTrainConfig(**values)


class TestInterrupt:
    def test_first_is_noted_second_interrupts_and_the_handler_is_put_back(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopOnInterrupt() as interrupt:
            assert not interrupt.requested
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
