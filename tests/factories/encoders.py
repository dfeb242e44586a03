"""Small tokenizers, and bundles that were damaged or edited."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from encoders.calibration import calibration_items
from encoders.digests import file_sha256
from encoders.preprocess import join_text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def flip_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def seal(folder: Path, *names: str) -> None:
    """Make the checksums of a bundle fit again, as someone who edits it by hand would."""
    (folder / "SHA256SUMS").write_text("".join(f"{file_sha256(folder / name)}  {name}\n" for name in names))


def write_tokenizer(folder: Path) -> int:
    """A lower-casing word-level tokenizer over calibration words, written into `folder`. Returns its size."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    lines = [join_text(item, max_characters=200) for item in calibration_items(200)]
    words = [*SPECIALS, *sorted({word for line in lines for word in line.lower().split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return len(words)
