"""How tokenizer.json was made: `python -m pretrain.towers.train_tokenizer OUT.json TEXT...`

A byte-level BPE of 8192 tokens over lower-cased text: any Unicode string has ids, none is unknown. The shipped file was
trained on captions of procedural and everyday scenes, an English word list (SCOWL) and docstrings of the Python
standard library.
Training again may give other ids for the same text, so the file is shipped and this script is not part of any run.
"""

from __future__ import annotations

import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_SIZE = 8192
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def train(texts: list[str], out: str) -> None:
    """Train on text files and write the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(texts, trainer)
    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.save(out, pretty=False)


if __name__ == "__main__":
    train(sys.argv[2:], sys.argv[1])
