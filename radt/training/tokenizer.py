"""A small byte-level BPE tokenizer, trained on the captions that a model will be trained on.

A general vocabulary has a vector for `wolf` that stays random when no training caption says wolf, and its table would
outweigh this model. Here every piece comes from training captions, so that an unseen word falls apart into pieces that
were trained, down to single bytes: nothing is unknown. (Sennrich et al. 2016, Neural Machine Translation of Rare Words
with Subword Units.)
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from index.errors import ConfigError

PAD, START, END = "<pad>", "<start>", "<end>"
PAD_ID, START_ID = 0, 1
MIN_VOCAB_SIZE = 259  # 256 bytes and three marks


def train_tokenizer(captions: Iterable[str], *, vocab_size: int) -> Any:
    """Learn a `tokenizers.Tokenizer` of at most `vocab_size` pieces. Case and accents are folded.

    END has the highest id of all, because CLIP's text tower pools where the id is highest.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size is {vocab_size}: give at least {MIN_VOCAB_SIZE}, one piece for every byte and mark"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # the first word is as any other
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([END])
    end_id = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, START_ID), (END, end_id)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files from which transformers' `AutoTokenizer`, and so open_clip, loads this tokenizer."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def encode(tokenizer: Any, texts: list[str], *, context_length: int) -> list[list[int]]:
    """Token ids, cut or padded to `context_length`, as open_clip's tokenizer gives them for the same texts."""
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length, pad_id=PAD_ID, pad_token=PAD)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def load_tokenizer(path: Path) -> Any:
    """Read a tokenizer from its JSON file."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
