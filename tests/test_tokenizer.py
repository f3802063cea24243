"""The shipped tokenizer: its ids never change, and every text has some."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_pipeline.demo_corpus.corpus import plan
from pretrain.data.tokenize import DEFAULT_PATH
from pretrain.towers.train_tokenizer import SPECIAL, VOCAB_SIZE, train

ROOT = Path(__file__).resolve().parent.parent
ODD_TEXTS = (
    "plain",
    "\u00dcn\u00efc\u00f6d\u00e9 na\u00efve \u00c6sop",
    "\u4f60\u597d, \u043c\u0438\u0440 \u0645\u0631\u062d\u0628\u0627 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f941 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1ee",
    "tab\tnewline\nnul\x00 bell\x07",
    "combining e\u0301 ligature \ufb01 \u2460 \uff21",
    "\ufeff\u200b\u202e\U000e0041\U0010fffd",
    "x" * 500,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEFAULT_PATH))


def test_ids_are_those_that_weights_were_trained_with(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode("A young woman pours coffee; two dogs bark.")
    assert encoded.ids == [1, 260, 1796, 1737, 562, 1278, 4962, 30, 799, 5360, 3382, 17, 2]
    assert encoded.tokens[:4] == ["[CLS]", "\u0120a", "\u0120young", "\u0120woman"]


def test_special_tokens_come_first_and_enclose_a_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(name) for name in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == 8192
    assert tokenizer.token_to_id("[UNK]") is None  # nothing is unknown
    assert tokenizer.encode("").ids == [1, 2]
    assert tokenizer.truncation is None
    assert tokenizer.padding is None


def test_case_makes_no_difference(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("A RED Disc").ids == tokenizer.encode("a red disc").ids


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert len(ids) > 2
    assert tokenizer.decode(ids).removeprefix(" ") == unicodedata.normalize("NFKC", text).lower()


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        points = generator.integers(0, 0x110000, 20)
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        expected = tokenizer.normalizer.normalize_str(text)
        assert tokenizer.decode(tokenizer.encode(text).ids).removeprefix(" ") == expected


def test_demo_captions_are_short(tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(text).ids) for clip in plan(300, 0) for text in clip.captions]
    assert max(lengths) <= 32
    assert np.mean(lengths) < 24


def test_training_again_gives_the_same_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a red disc moves left\na blue disc moves right\n" * 5, encoding="utf-8")
    train([text], tmp_path / "one.json", vocab_size=270)
    train([text], tmp_path / "two.json", vocab_size=270)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert Tokenizer.from_file(str(tmp_path / "one.json")).get_vocab_size() == 270


def test_a_text_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain.towers.train_tokenizer", str(tmp_path / "none.json"), "no-such.txt"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 1
    assert failed.stderr == "train_tokenizer: no-such.txt: no such file; expected a UTF-8 text file\n"


def test_file_is_small() -> None:
    assert DEFAULT_PATH.stat().st_size < 700_000
