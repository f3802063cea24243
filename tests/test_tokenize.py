"""The tokenizer door: rows of one length, cut and padded; one line when a tokenizer cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.settings import UserError
from pretrain.data import tokenize
from pretrain.data.tokenize import Tokenizer
from tests.tiny_dataset import CAPTION, write_tokenizer


def test_texts_become_rows_of_one_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "DEFAULT_PATH", write_tokenizer(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer("default", 6)
    assert tokenizer.pad_id == 0
    assert tokenizer.vocab_size > 256  # every byte, and what was learned
    ids, mask = tokenizer.encode("a red")
    assert ids.shape == mask.shape == (6,)
    assert 0 < mask.sum() < 6
    assert (ids[mask] != 0).all()
    assert (ids[~mask] == 0).all()
    assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    long_ids, long_mask = tokenizer.encode(CAPTION * 3)
    assert long_mask.all()
    assert (long_ids[: mask.sum()] == ids[mask]).all()
    assert (tokenizer.encode("\u4f60 \U0001f941")[1]).any()  # bytes: nothing is unknown


def test_a_folder_of_a_published_tokenizer_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    path = write_tokenizer(tmp_path / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="[PAD]").save_pretrained(tmp_path / "published")
    monkeypatch.setattr(tokenize, "DEFAULT_PATH", path)
    ours, theirs = Tokenizer("default", 6), Tokenizer(f"hf:{tmp_path / 'published'}", 6)
    assert theirs.vocab_size == ours.vocab_size
    for text in ("a red", CAPTION):
        assert [row.tolist() for row in theirs.encode(text)] == [row.tolist() for row in ours.encode(text)]


def test_the_shipped_tokenizer_is_there_or_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "DEFAULT_PATH", tmp_path / "none.json")
    with pytest.raises(UserError, match=r"none.json is missing; reinstall parallelotope$"):
        Tokenizer("default", 6)


@pytest.mark.parametrize("name", ["", "hf:", "bert-base-uncased", "timm:vit"])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^towers.text.tokenizer: expected 'default' or 'hf:NAME_OR_FOLDER'"):
        Tokenizer(name, 6)


def test_a_tokenizer_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    empty = tmp_path / "empty"
    empty.mkdir()
    for location in (str(empty), str(tmp_path / "no such folder"), "no-such-owner/no-such-model"):
        with pytest.raises(UserError, match=r"^towers.text.tokenizer: no tokenizer can be had from 'hf:") as caught:
            Tokenizer(f"hf:{location}", 6)
        assert "\n" not in str(caught.value)
        assert location in str(caught.value)


def test_the_shipped_tokenizer_gives_the_ids_it_was_shipped_with() -> None:
    tokenizer = Tokenizer("default", 16)
    ids, mask = tokenizer.encode("A crimson triangle slides to the left, Ünïcode 漢")
    assert tokenizer.vocab_size == 8192
    assert ids.tolist() == [1, 260, 2388, 2396, 748, 778, 297, 268, 674, 15, 224, 131, 124, 81, 131, 2]
    assert mask.all()
