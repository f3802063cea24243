"""Captions to token ids, behind one door for the shipped tokenizer and those of published encoders."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.settings import UserError
from pretrain.hub import cache_then_hub

DEFAULT_PATH = Path(__file__).parent.parent / "towers" / "tokenizer.json"
PLACE = "towers.text.tokenizer"


class Tokenizer:
    """Texts as rows of a fixed length.

    name: `default`, hf:NAME_OR_FOLDER, or file:PATH of a tokenizer.json with [PAD]. max_tokens: longer texts are cut,
    shorter ones padded with `pad_id`.

    Raises:
        UserError: a name of another form, or a tokenizer that cannot be had.
    """

    def __init__(self, name: str, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        source, _, location = name.partition(":")
        self._is_file = name == "default" or (source == "file" and bool(location))
        if self._is_file:
            self._encoder: Any = _from_file(location or DEFAULT_PATH)
            self.vocab_size = int(self._encoder.get_vocab_size())
            self.pad_id = int(self._encoder.token_to_id("[PAD]") or 0)
            self._encoder.no_padding()
            self._encoder.enable_truncation(max_tokens)
        elif source == "hf" and location:
            self._encoder = _from_transformers(location)
            self.vocab_size = len(self._encoder)
            self.pad_id = int(self._encoder.pad_token_id or 0)
        else:
            raise UserError(f"{PLACE}: expected 'default' or 'hf:NAME_OR_FOLDER' or 'file:PATH', found '{name}'")

    def encode(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids int64 [max_tokens] and which of them are no padding, bool [max_tokens]."""
        if self._is_file:
            tokens = self._encoder.encode(text).ids
        else:
            tokens = self._encoder(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        ids = np.full(self.max_tokens, self.pad_id, dtype=np.int64)
        ids[: len(tokens)] = tokens
        return ids, np.arange(self.max_tokens) < len(tokens)

    @property
    def digest(self) -> str:
        """A short hash of all tokens and their ids: equal digests, equal meaning of an id."""
        vocabulary = sorted(self._encoder.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, for people to read."""
        return [self._encoder.decode([number], skip_special_tokens=False) for number in ids]

    def save(self, folder: Path) -> str:
        """Write the tokenizer's files into `folder`; returns the name, relative to it, under which they are found."""
        if self._is_file:
            self._encoder.save(str(folder / "tokenizer.json"))
            return "file:tokenizer.json"
        self._encoder.save_pretrained(folder / "tokenizer")
        return "hf:tokenizer"


def _from_file(path: Path | str) -> Any:
    from tokenizers import Tokenizer as FastTokenizer

    path = Path(path)
    if not path.is_file():
        which = f"the shipped tokenizer {path} is missing; reinstall parallelotope"
        raise UserError(f"{PLACE}: {which if path == DEFAULT_PATH else f'file:{path}: no such file'}")
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise UserError(f"{PLACE}: file:{path}: not a tokenizer ({textwrap.shorten(str(error), 200)})") from error


def _from_transformers(location: str) -> Any:
    """The tokenizer of a folder, of the local cache, or else of the Hugging Face hub."""
    from transformers import AutoTokenizer

    is_folder = Path(location).is_dir()
    if not is_folder and location.startswith((".", "/", "~")):
        raise UserError(f"{PLACE}: no tokenizer can be had from 'hf:{location}': no such folder")

    def load(cached: bool) -> Any:
        return AutoTokenizer.from_pretrained(location, local_files_only=cached)

    try:
        return load(True) if is_folder else cache_then_hub(location, load)
    except Exception as error:  # which classes a hub, a cache and a parser raise is nowhere written
        failure = error
    reason = textwrap.shorten(str(failure), 200) or type(failure).__name__
    expected = (
        "a tokenizer in that folder" if is_folder else "a folder, or a name in the cache or on the Hugging Face hub"
    )
    raise UserError(
        f"{PLACE}: no tokenizer can be had from 'hf:{location}' ({reason}); expected {expected}"
    ) from failure
