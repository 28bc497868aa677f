"""Small text models with random weights, saved as people save real ones."""

import json

import open_clip
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ("<pad>", "<start>", "<unk>", "a", "red", "wolf", "on", "blue", "ground", "two", "foxes", "<end>")
PAD, START, UNKNOWN, END = 0, 1, 2, len(WORDS) - 1
CONTEXT = 8


def save_tokenizer(folder):
    """Whole words, as AutoTokenizer and open_clip's HFTokenizer load them."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder)


def save_clip(folder, *, seed=0, custom_text=False, own_tokenizer=False, pool_type="argmax"):
    """A random open_clip model as `local-dir:` loads it, with open_clip's own tokenizer or one for WORDS beside it."""
    folder.mkdir()
    text = {
        "context_length": CONTEXT,
        "vocab_size": 49408,
        "width": 24,
        "heads": 2,
        "layers": 3,
        "pool_type": pool_type,
    }
    if not own_tokenizer:
        text |= {"vocab_size": len(WORDS), "hf_tokenizer_name": "beside", "eos_id": END}
        save_tokenizer(folder)
    model_config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": text,
    }
    torch.manual_seed(seed)
    model = (open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP)(**model_config)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = {"model_cfg": model_config | ({"custom_text": True} if custom_text else {}), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def save_t5(folder, *, seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    transformers.T5EncoderModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
