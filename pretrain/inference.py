"""An exported model in a few lines of Python; nothing of the `train` extra is imported.

from pretrain.inference import load_model

model = load_model("exports/demo")
clips = model.encode(video=["a.mp4", "b.mp4"], audio=["a.mp4", "b.mp4"])
queries = model.encode(text=["a dog barks", "rain on a roof", "a slow piano"])
scores = model.similarity(queries, clips)  # [3, 2], higher is better
print(scores.argmax(dim=1))
found = model.search(queries, clips, top_k=1)  # the same without the matrix: found.indices, found.scores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.settings import UserError, nearest
from pretrain.export_format import WEIGHTS, ExportConfig, check_weights, read_export_config
from pretrain.inputs import Frames, InputReader, Values, Waveform
from pretrain.randomness import keyed_random
from pretrain.scoring import Matches, scores, search
from pretrain.towers.build import Towers

__all__ = ["Frames", "Model", "UnreadableInput", "Waveform", "load_model"]

Vectors = Mapping[str, Tensor]  # rows [n, D] by modality
EXPECTED: dict[str, tuple[tuple[type, ...], str]] = {
    "video": ((str, Path, bytes, Frames), "a path, bytes, Frames(pixels=, fps=) or None"),
    "audio": ((str, Path, bytes, Waveform), "a path, bytes, Waveform(samples=, sample_rate_hz=) or None"),
    "text": ((str,), "a str or None"),
}


class UnreadableInput(UserError):
    """An input that cannot be read: `modality` and `index` say which one, the message also why."""

    def __init__(self, modality: str, index: int, what: str, reason: str) -> None:
        super().__init__(f"{modality}[{index}] {what}: {reason}")
        self.modality = modality
        self.index = index


class Model:
    """The towers of an export. Embeddings are float32 unit rows on the CPU.

    config: of the export; config.modalities, config.embedding_dim, config.window_s, config.score.
    """

    def __init__(self, config: ExportConfig, towers: Towers, device: torch.device) -> None:
        self.config = config
        self.towers = towers
        self.device = device
        self._reader = InputReader(config.towers, config.window_s)

    @torch.no_grad()
    def encode(
        self,
        *,
        video: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        text: Sequence[str | None] | None = None,
        batch_size: int = 32,
        on_error: Callable[[UnreadableInput], None] | None = None,
        **unknown: Any,
    ) -> dict[str, Tensor]:
        """Embeddings {modality: [n, D]} of n samples, one row for each item, in their order.

        The lists belong together: item i of each is sample i, and its picture and sound are cut to one window of
        `config.window_s` seconds in the middle of the time they have in common. What does not belong together, texts
        that look for videos, is encoded in two calls. Where a sample lacks a modality the item is None and its row NaN.

        Args:
            video: each a path or the bytes of a video (or of a JPEG or PNG picture), or Frames.
            audio: each a path or the bytes of a sound, or of a video with a sound track, or a Waveform.
            text: each a string. A blank one has no meaning to a model: it counts as unreadable.
            batch_size: samples decoded and computed at once; bounds the memory, never changes the result.
            on_error: called for each input that cannot be read, whose row is then NaN too; None raises the first.

        Raises:
            UnreadableInput: no such file, not a medium, no such track; names the item.
            UserError: a modality the model has no tower for, lists of different lengths, an item of a wrong type,
                another argument.
        """
        for name in unknown:
            valid = [*self.config.modalities, "batch_size", "on_error"]
            raise UserError(f"encode: {name}: unknown argument; {nearest(name, valid)}")
        given = {
            name: items for name, items in (("video", video), ("audio", audio), ("text", text)) if items is not None
        }
        num = self._check(given)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: expected at least 1")
        found = {name: torch.full((num, self.config.embedding_dim), torch.nan) for name in given}
        for start in range(0, num, batch_size):
            rows: dict[str, list[tuple[int, Values]]] = {name: [] for name in given}
            for index in range(start, min(start + batch_size, num)):
                for name, values in self._read(given, index, on_error).items():
                    rows[name].append((index, values))
            for name, some in rows.items():
                if some:
                    found[name][[index for index, _ in some]] = self._embed(name, [values for _, values in some])
        return found

    def similarity(self, query: Vectors, candidates: Vectors, score: str | None = None) -> Tensor:
        """Scores [q, c] of queries against candidates, float64, higher is better.

        query, candidates: what `encode` returned; every modality in them counts, a row of NaN is missing. score: one of
        `pretrain.scoring.names`, where they are explained; None: as the model was trained to score. -inf where a query
        or a candidate has no vector at all. The arithmetic runs where the model is.

        Raises:
            UserError: an unknown score, an empty side, or rows of different dimensions.
        """
        return scores(query, candidates, score or self.config.score, device=self.device)

    def search(self, query: Vectors, candidates: Vectors, top_k: int = 10, score: str | None = None) -> Matches:
        """The best `top_k` candidates of each query: `indices` and `scores` [q, k], best first.

        For more candidates than a matrix of scores has room for: memory beside the embeddings does not grow with the
        number of pairs. Arguments as of `similarity`; where a query has fewer matches, the index is -1.

        Raises:
            UserError: as `similarity`, or `top_k` below 1.
        """
        return search(query, candidates, score or self.config.score, top_k=top_k, device=self.device)

    def _check(self, given: dict[str, Sequence[Any]]) -> int:
        """The number of samples."""
        if not given:
            raise UserError(f"encode: nothing given; expected lists for some of {', '.join(self.config.modalities)}")
        for name, items in given.items():
            if name not in self.config.modalities:
                raise UserError(f"encode: {name}: this model has towers for {', '.join(self.config.modalities)} only")
            if isinstance(items, str | bytes | Path | Frames | Waveform):
                raise UserError(f"encode: {name}: found one {type(items).__name__}, expected a list of them")
            kinds, expected = EXPECTED[name]
            for index, item in enumerate(items):
                if item is not None and not isinstance(item, kinds):
                    raise UserError(f"encode: {name}[{index}]: found {type(item).__name__}, expected {expected}")
        lengths = {name: len(items) for name, items in given.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(
                f"encode: {lengths} items; expected equally many, item i of each being the same sample (None where it "
                "lacks one); encode queries and candidates in two calls"
            )
        return next(iter(lengths.values()))

    def _read(
        self, given: dict[str, Sequence[Any]], index: int, on_error: Callable[[UnreadableInput], None] | None
    ) -> dict[str, Values]:
        sample = {name: items[index] for name, items in given.items() if items[index] is not None}
        blank = "text" in sample and not sample["text"].strip()
        if blank:
            del sample["text"]
        values, problems = self._reader.read(sample)
        if blank:
            problems["text"] = "blank"
        for name, reason in problems.items():
            error = UnreadableInput(name, index, _described(given[name][index]), reason)
            if on_error is None:
                raise error
            on_error(error)
        return values

    def _embed(self, name: str, values: list[Values]) -> Tensor:
        """Embeddings [n, D] of one modality's inputs."""
        inputs = {key: torch.from_numpy(np.stack([row[key] for row in values])).to(self.device) for key in values[0]}
        present = torch.ones(len(values), dtype=torch.bool, device=self.device)
        rows: Tensor = self.towers.towers[name](inputs, present)[""]
        return rows.float().cpu()


def load_model(folder: Path | str, device: torch.device | str | None = None) -> Model:
    """The model that `parallelotope export` wrote to `folder`; needs no network.

    device: None is the first GPU where there is one, else the CPU.

    Raises:
        UserError: no export there, of another version, or damaged.
    """
    folder = Path(folder)
    config = read_export_config(folder)
    check_weights(folder, config)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad(), keyed_random("load"):  # what is drawn here is replaced: leave the caller's generator alone
        towers = Towers(config)
    try:
        towers.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:  # names or shapes: other library versions build other architectures
        made = ", ".join(f"{name} {number}" for name, number in config.libraries.items())
        raise UserError(
            f"export {folder}: its weights do not fit what is built here (it was made with {made}): "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return Model(config, towers.eval().requires_grad_(False).to(device), torch.device(device))


def _described(item: Any) -> str:
    if isinstance(item, str | Path):
        return str(item) if str(item).strip() else repr(item)
    return f"({len(item)} bytes)" if isinstance(item, bytes) else type(item).__name__
