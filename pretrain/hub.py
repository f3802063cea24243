"""The local cache of the Hugging Face hub first, the hub itself only for what is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

HUB_TIMEOUT_S = 10.0
Loaded = TypeVar("Loaded")


def cache_then_hub(repository: str, load: Callable[[bool], Loaded]) -> Loaded:
    """`load(local files only)`: from the cache, else from the hub if that answers.

    The hub is asked once first, because downloads retry for most of a minute where there is no network.
    """
    from huggingface_hub import HfApi

    try:
        return load(True)
    except Exception:  # not in the cache, or not whole; what the hub says then is what is reported
        try:
            HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
        except Exception as error:
            raise OSError(f"not in the cache, and the hub gives: {error}") from error
        return load(False)
