import open_clip
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from index.errors import ConfigError, ModelError
from radt.text_encoder import (
    ClipTextEncoder,
    TransformersTextEncoder,
    cut_by,
    masked_mean,
)
from tests.text_models import CONTEXT, WORDS, save_clip, save_t5, save_tokenizer

TEXTS = ["a red wolf", "two foxes on blue ground", ""]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("models") / "t5")


FORMS = {
    "one class, words": {},
    "one class, open_clip's tokenizer": {"own_tokenizer": True},
    "text tower, words": {"custom_text": True},
    "text tower, pooled at eos": {"custom_text": True, "pool_type": "eos"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_clip_pooled_is_encode_text_and_tokens_are_the_penultimate_states(tmp_path, form):
    folder = save_clip(tmp_path / "clip", **form)
    encoder = ClipTextEncoder.load(folder)
    condition = encoder.encode(TEXTS)

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS, context_length=CONTEXT)
    tower = model.text if form.get("custom_text") else model
    with torch.inference_mode():
        pooled = model.encode_text(ids, normalize=False)
        # The slow twin: run all blocks but the last by hand.
        x = tower.token_embedding(ids) + tower.positional_embedding
        for block in list(tower.transformer.resblocks)[:-1]:
            x = block(x, attn_mask=tower.attn_mask)
        tokens = tower.ln_final(x)
    torch.testing.assert_close(condition.pooled, pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(condition.tokens, tokens, rtol=1e-5, atol=1e-5)
    assert (encoder.width, encoder.pooled_width) == (24, 16)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_clip_mask_covers_start_words_and_end(tmp_path, form):
    encoder = ClipTextEncoder.load(save_clip(tmp_path / "clip", **form))
    lengths = encoder.encode(TEXTS).mask.sum(dim=1).tolist()
    assert lengths == [5, 7, 2]


def test_clip_last_pooling_masks_the_padding(tmp_path):
    encoder = ClipTextEncoder.load(save_clip(tmp_path / "clip", custom_text=True, pool_type="last"))
    assert encoder.encode(TEXTS).mask.sum(dim=1).tolist() == [5, 7, 2]


def test_clip_layer_is_a_choice_within_the_tower(clip):
    last, penultimate = ClipTextEncoder.load(clip, layer=-1), ClipTextEncoder.load(clip)
    assert not torch.allclose(last.encode(TEXTS).tokens, penultimate.encode(TEXTS).tokens)
    assert torch.equal(last.encode(TEXTS).pooled, penultimate.encode(TEXTS).pooled)
    assert last.fingerprint != penultimate.fingerprint
    assert ClipTextEncoder.load(clip, layer=1).fingerprint == penultimate.fingerprint
    with pytest.raises(ConfigError, match="layer 3"):
        ClipTextEncoder.load(clip, layer=3)


def test_clip_text_does_not_depend_on_its_batch(clip):
    encoder = ClipTextEncoder.load(clip)
    together = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = encoder.encode([text])
        torch.testing.assert_close(alone.tokens[0], together.tokens[row], rtol=1e-5, atol=1e-5)


def test_t5_is_transformers_own_output(t5):
    condition = TransformersTextEncoder.load(t5, max_length=10).encode(TEXTS)
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    for row, text in enumerate(TEXTS):  # one at a time and without padding
        batch = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state[0]
        assert condition.mask[row].sum() == len(states)
        torch.testing.assert_close(condition.tokens[row, : len(states)], states, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(condition.pooled[row], states.mean(dim=0), rtol=1e-5, atol=1e-5)
    assert condition.tokens.shape == (3, 10, 16)


def test_t5_in_a_batch_is_transformers_own_batch_to_the_last_bit(t5):
    """Padded as T5Tokenizer pads and masked as T5EncoderModel masks: the same ids, mask and states."""
    condition = TransformersTextEncoder.load(t5, max_length=10).encode(TEXTS)
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    batch = tokenizer(TEXTS, padding="max_length", max_length=10, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
    assert torch.equal(condition.tokens, states)
    assert torch.equal(condition.mask, batch.attention_mask.bool())
    assert torch.equal(condition.pooled, masked_mean(states, batch.attention_mask.bool()))


def test_t5_does_not_read_its_padding(t5):
    """The mask at work: real tokens are the same whatever is padded behind them, up to rounding."""
    short, long = (TransformersTextEncoder.load(t5, max_length=length).encode(TEXTS) for length in (7, 40))
    for row, length in enumerate(short.mask.sum(dim=1).tolist()):
        torch.testing.assert_close(short.tokens[row, :length], long.tokens[row, :length], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short.pooled, long.pooled, rtol=1e-5, atol=1e-5)


def test_t5_in_the_released_forms(tmp_path, t5):
    """Version 1.1 (gated GELU, untied) and an encoder saved from an encoder-decoder give what transformers gives."""
    torch.manual_seed(5)
    config = transformers.T5Config.from_pretrained(t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    condition = TransformersTextEncoder.load(tmp_path, max_length=9).encode(TEXTS)
    model = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        TEXTS, padding="max_length", max_length=9, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert torch.equal(condition.tokens, states)


def test_an_encoder_decoder_saved_whole_gives_its_encoder(tmp_path, t5):
    torch.manual_seed(3)
    config = transformers.T5Config.from_pretrained(t5)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = TransformersTextEncoder.load(tmp_path, max_length=6)
    whole = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path)("two foxes", return_tensors="pt")
    with torch.inference_mode():
        states = whole.encoder(input_ids=batch.input_ids).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(["two foxes"]).tokens[0, :4], states, rtol=1e-5, atol=1e-5)


def test_another_kind_of_text_model(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    condition = TransformersTextEncoder.load(tmp_path, max_length=9).encode(TEXTS)
    assert condition.tokens.shape == (3, 9, 16)
    assert condition.mask.sum(dim=1).tolist() == [5, 7, 2]


@pytest.mark.parametrize("kind", ["clip", "t5"])
class TestBoth:
    @pytest.fixture
    def encoder(self, kind, clip, t5):
        return ClipTextEncoder.load(clip) if kind == "clip" else TransformersTextEncoder.load(t5, max_length=CONTEXT)

    def test_frozen_and_ready_for_a_training_step(self, encoder):
        first, second = encoder.encode(TEXTS), encoder.encode(TEXTS)
        assert torch.equal(first.tokens, second.tokens)
        assert first.tokens.dtype == first.pooled.dtype == torch.float32
        assert not first.tokens.requires_grad
        weight = torch.ones(first.tokens.shape[-1], requires_grad=True)
        (first.tokens * weight).sum().backward()  # autograd refuses tensors made in inference mode
        assert weight.grad is not None

    def test_many_texts_and_none(self, encoder):
        many = encoder.encode(["a red wolf"] * 70)
        assert len(many.tokens) == 70
        torch.testing.assert_close(many.tokens[69], many.tokens[0], rtol=1e-5, atol=1e-5)
        none = encoder.encode([])
        assert none.tokens.shape == (0, *many.tokens.shape[1:])
        assert none.pooled.shape == (0, encoder.pooled_width)

    def test_what_is_cut_is_told_in_words(self, encoder):
        long = "Two foxes on  blue ground and a wolf"
        texts = ["a red wolf", long, long]
        (cut,) = encoder.truncations(texts)
        assert (cut.num_tokens, cut.num_read) == (8, CONTEXT - 2)
        assert cut.left_out == "a wolf"
        assert cut.sentence.startswith("only the first 6 of 8 tokens were read of ")
        assert cut.sentence.endswith('left out was "a wolf"')
        assert encoder.truncations(texts[:1]) == []

    def test_what_is_left_out_changes_nothing_and_what_is_read_does(self, encoder):
        """Slow twin of `truncations`: change the text on either side of the cut and see what the embedding does."""
        long = "two foxes on blue ground and a wolf"
        (cut,) = encoder.truncations([long])
        read = long.removesuffix(cut.left_out)
        tokens = encoder.encode([long, read + "red red", long.replace("ground", "red"), read]).tokens
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[0], tokens[3])
        assert not torch.equal(tokens[0], tokens[2])

    def test_fingerprint_follows_the_weights(self, encoder, kind, clip, t5, tmp_path):
        if kind == "clip":
            again, other = ClipTextEncoder.load(clip), ClipTextEncoder.load(save_clip(tmp_path / "other", seed=1))
        else:
            again = TransformersTextEncoder.load(t5, max_length=CONTEXT)
            other = TransformersTextEncoder.load(save_t5(tmp_path / "other", seed=1), max_length=CONTEXT)
        assert encoder.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize("load", [ClipTextEncoder.load, TransformersTextEncoder.load], ids=["clip", "transformers"])
def test_a_folder_without_a_model_is_one_sentence(load, tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        load(tmp_path)


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(ModelError, match="ViT-B-33"):
        ClipTextEncoder.load("ViT-B-33")
    with pytest.raises(ModelError, match="nobody/no-such-model"):
        TransformersTextEncoder.load("nobody/no-such-model", local_only=True)


def test_masked_mean_by_hand():
    tokens = torch.tensor([[[1.0], [3.0], [100.0]], [[5.0], [6.0], [7.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(tokens, mask).tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize(
    ("text", "left_out"),
    [
        ("a red un|believable wolf", "unbelievable wolf"),
        ("a wolf, don|'t", "don't"),
        ("a wolf on|, red", ", red"),
        ("a wolf on| red", "red"),
        ("a \u4e8c\u533a|\u72d0", "\u72d0"),  # no spaces to go back to
    ],
)
def test_what_is_left_out_begins_with_a_whole_word(text, left_out):
    """Cut at the bar, by a tokenizer of one token a character."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    (cut,) = cut_by(tokenizer, [text.replace("|", "")], text.index("|"))
    assert (cut.num_read, cut.left_out) == (text.index("|"), left_out)


def test_open_clips_own_tokenizer_leaves_out_whole_words(tmp_path):
    encoder = ClipTextEncoder.load(save_clip(tmp_path / "clip", own_tokenizer=True))
    (cut,) = encoder.truncations(["a red wolf on a qwzxvkjqpzw"])
    assert cut.left_out == "qwzxvkjqpzw"


def test_open_clips_own_tokenizer_tells_what_is_cut(tmp_path):
    encoder = ClipTextEncoder.load(save_clip(tmp_path / "clip", own_tokenizer=True))
    (cut,) = encoder.truncations(["a red wolf", "A dog, a cat, a mouse and a very large elephant"])
    assert (cut.num_read, cut.left_out) == (CONTEXT - 2, "a mouse and a very large elephant")
