"""What the benchmarks count by: activations kept, samples read twice or never, one decoding for all loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.clips import draw_clips
from benchmarks.loaders.contender import Collation, Setting
from benchmarks.loaders.ours import Parallelotope
from benchmarks.loading import check_tensors, losses
from benchmarks.loading_trial import epoch, first_tensors
from benchmarks.objective_trial import build_steps, draw_vectors
from benchmarks.objectives import READING, write_page
from benchmarks.saved_tensors import SavedBytes


def test_a_storage_that_two_nodes_keep_counts_once_and_until_backward() -> None:
    model = nn.Linear(8, 8, bias=False)
    inputs = torch.ones(4, 8)
    with SavedBytes(model) as saved:
        with saved.stage("forward"):
            hidden = model(inputs)  # keeps its input; its weight is a parameter
            loss = hidden.exp().sin().sum()  # exp keeps what it gives, sin keeps the same tensor
        assert saved.peak_bytes["forward"] == 2 * 4 * 8 * 4
        loss.backward()
        del loss, hidden
        with saved.stage("after"):
            pass
    assert saved.peak_bytes["after"] == 0


def test_losses_count_what_came_twice_and_what_never() -> None:
    whole = [{"keys": [["a", "b"], ["c", "d"]]}]
    assert losses([whole], None, 4) == "0 / 0"
    two_ranks = [{"keys": [["a"], ["d"]]}, {"keys": [["b"], ["c"]]}]
    assert losses([two_ranks], whole, 4) == "0 / 0, same batches"
    assert losses([[{"keys": [["a", "b"]]}], [{"keys": [["b", "c"]]}]], whole, 4) == "1 / 1, other batches"
    assert losses([[{"keys": []}, {"error": "refused"}]], whole, 4) == "error: refused"


def test_all_loaders_decode_as_ours_does_and_ours_resumes(tmp_path: Path) -> None:
    clips = list(draw_clips(5))
    setting = Setting(folder=tmp_path, num_samples=5, global_batch=2, num_workers=0, mode="decoded")
    Parallelotope.write(clips, tmp_path)
    ours = first_tensors(Parallelotope, setting, {"num_batches": 2})
    batch = Collation(setting)([clip.members for clip in clips])["batch"]
    tensors = {f"{m}.{name}": t for m, parts in batch.inputs.items() for name, t in parts.items()}
    theirs = {
        key: {name: tensor[row].double().sum().item() for name, tensor in sorted(tensors.items())}
        for row, key in enumerate(batch.keys)
    }
    check_tensors({"ours": ours, "theirs": theirs})
    first = next(iter(ours))
    with pytest.raises(RuntimeError, match="differently"):
        check_tensors({"ours": ours, "theirs": {first: {**theirs[first], "audio.waveform": 0.5}}})
    whole = [epoch(Parallelotope, setting, {"state": None, "stop_after": None})]
    stopped = [epoch(Parallelotope, setting, {"state": None, "stop_after": 1})]
    rest = [epoch(Parallelotope, setting, {"state": stopped[0]["state"], "stop_after": None})]
    assert losses([stopped, rest], whole, 5) == "0 / 0, same batches"


@pytest.mark.parametrize("objective", ["gram", "pmrl", "decomposition"])
def test_the_published_manner_finds_what_ours_finds(objective: str) -> None:
    steps = build_steps(objective, draw_vectors(24, 4, "cpu"))
    ours, published = steps["ours"](), steps["published"]()
    # Singular values far apart: the published softmax loses digits of a loss of 1e-4.
    assert ours[0] == pytest.approx(published[0], rel=1e-5, abs=1e-6)
    if objective != "pmrl":  # its contrast depends on the signs that the decomposition happens to return
        assert ours[1] == pytest.approx(published[1], rel=1e-4)


def test_a_page_keeps_what_was_written_below_its_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_page(page, "old\n")
    page.write_text(page.read_text() + f"\n{READING}\n\nBy hand.\n")
    write_page(page, "new\n")
    write_page(page, "newer\n")
    assert page.read_text() == f"newer\n\n{READING}\n\nBy hand.\n"
