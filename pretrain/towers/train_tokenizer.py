"""How tokenizer.json was made: `python -m pretrain.towers.train_tokenizer OUT.json TEXT...`

A byte-level BPE of 8192 tokens over NFKC-normalised, lower-cased text: any Unicode string has ids, none is unknown.
The shipped file was trained on

    the glosses and example sentences of WordNet 3.0      general English, 1.5 million words
    docstrings of the Python standard library             0.3 million words
    Debian's wamerican word list (SCOWL)                  0.1 million words
    captions of the demo corpus                           0.2 million words

Training again may give other ids for the same text, so the file is shipped, and this script is part of no run. A run
trained with one tokenizer.json means nothing with another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_SIZE = 8192
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 3


def train(texts: Sequence[Path], out: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Train on UTF-8 text files, read line by line, and write the tokenizer to `out`.

    vocab_size: special tokens, the 256 bytes and the merges together; fewer where the texts have no more merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text) for text in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
    )
    tokenizer.save(str(out), pretty=False)


def main() -> None:
    """Train on the files named on the command line."""
    if len(sys.argv) < 3:
        sys.exit("usage: python -m pretrain.towers.train_tokenizer OUT.json TEXT...")
    out, *texts = (Path(argument) for argument in sys.argv[1:])
    for text in texts:
        if not text.is_file():
            sys.exit(f"train_tokenizer: {text}: no such file; expected a UTF-8 text file")
    train(texts, out)


if __name__ == "__main__":
    main()
