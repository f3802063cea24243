"""Second views of samples, independent projections, momentum towers: what some objectives need from data and model."""

from __future__ import annotations

import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from data_pipeline.settings import UserError, check_settings
from data_pipeline.shards import ShardedDataset
from pretrain.config import AugmentConfig, DataConfig, RunConfig
from pretrain.data.batch import Batch
from pretrain.data.loader import TrainLoader
from pretrain.data.transforms import Augmentation, chosen_caption
from pretrain.export import export_run
from pretrain.export_format import WEIGHTS
from pretrain.inference import load_model
from pretrain.model import PretrainModel
from pretrain.run_log import METRICS, read_lines
from tests.finished_run import run_config
from tests.small_dataset import write_dataset
from tests.test_resume import command, write_config

STRUCTURE = [
    {"name": "infonce", "within": 0.25},
    {"name": "feature_separation", "weight": 0.1},
    {"name": "brownian_bridge", "weight": 0.1},
    {"name": "geometric_consistency", "weight": 0.1, "normalizer": "pairs"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("views") / "data", {"train": 12, "val": 6})


def config_of(folder: Path, **changes: Any) -> RunConfig:
    values = run_config(Path("unused"), folder).model_dump()
    return RunConfig.model_validate({**values, "objective": STRUCTURE, **changes})


def batches(folder: Path, config: RunConfig, workers: int = 0, **changes: Any) -> list[Batch]:
    data = config.data.model_copy(update={"num_workers": workers})
    arguments: dict[str, Any] = {"global_batch": 12, "seed": 3, "second_view": True, **changes}
    loader = TrainLoader(ShardedDataset(folder, "train"), data, config.towers, **arguments)
    try:
        return [next(iter(loader)) for _ in range(2)]
    finally:
        loader.close()


def test_the_second_view_is_another_draw_of_the_same_samples(folder: Path) -> None:
    config = config_of(folder)
    first = batches(folder, config)[0]
    plain = batches(folder, config, second_view=False)[0]
    assert plain.augmented is None
    assert first.augmented is not None
    for modality, parts in first.inputs.items():
        here = first.present[modality]
        for name, tensor in parts.items():
            assert torch.equal(tensor, plain.inputs[modality][name]), "the first view does not depend on the second"
            assert not first.augmented[modality][name][~here].any()
        main = {"video": "frames", "audio": "waveform", "text": "token_ids"}[modality]
        differs = (parts[main] != first.augmented[modality][main]).flatten(1).any(dim=1)
        assert differs[here].float().mean() > (0.5 if modality == "text" else 0.9)


def test_views_depend_on_neither_workers_nor_ranks(folder: Path) -> None:
    config = config_of(folder)
    whole = batches(folder, config)[0]
    other = batches(folder, config, workers=1)[0]
    halves = [batches(folder, config, rank=rank, world=2)[0] for rank in range(2)]
    assert whole.augmented is not None
    assert other.augmented is not None
    for modality, parts in whole.augmented.items():
        for name, tensor in parts.items():
            assert torch.equal(tensor, other.augmented[modality][name])
            joined = torch.cat([half.augmented[modality][name] for half in halves if half.augmented is not None])
            assert torch.equal(tensor, joined)


def test_words_are_left_out_and_one_stays() -> None:
    row = {"captions": [{"text": "one two three four five six seven eight nine ten"}]}
    words = row["captions"][0]["text"].split()
    shares = []
    for key in range(300):
        text = chosen_caption(row, Augmentation(word_dropout=0.3, word_key=key))
        assert text is not None
        left = text.split()
        assert left == [word for word in words if word in left], "in their order"
        assert left
        shares.append(len(left) / len(words))
    assert sum(shares) / len(shares) == pytest.approx(0.7, abs=0.03)
    assert chosen_caption({"captions": [{"text": "word"}]}, Augmentation(word_dropout=0.9, word_key=1)) == "word"
    assert chosen_caption(row, Augmentation(word_key=1)) == " ".join(words)


def outputs_of(config: RunConfig, batch: Batch, model: PretrainModel | None = None) -> dict[str, torch.Tensor]:
    inputs, present = batch.chunk(0, batch.num_samples)
    model = PretrainModel(config) if model is None else model
    found: dict[str, torch.Tensor] = model(
        inputs, present, lambda _: nullcontext(), augmented=batch.augmented_chunk(0, batch.num_samples)
    )[0]
    return found


def test_the_model_returns_every_view(folder: Path) -> None:
    config = config_of(folder)
    batch = batches(folder, config)[0]
    found = outputs_of(config, batch)
    views = ("", "@independent", "@augmented", "@augmented@independent")
    assert set(found) == {f"{name}{view}" for name in config.towers.names for view in views}
    for name in config.towers.names:
        here = batch.present[name]
        for view in views:
            rows = found[f"{name}{view}"][here]
            assert rows.requires_grad
            assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
        assert not torch.allclose(found[name][here], found[f"{name}@independent"][here], atol=0.1)


def test_momentum_towers_embed_the_second_view_without_gradient(folder: Path) -> None:
    train = {"global_batch": 4, "chunk": 4, "ema_decay": 0.9, "second_view_by": "average"}
    config = config_of(folder, train=train)
    batch = batches(folder, config)[0]
    model = PretrainModel(config)
    assert model.average is not None
    with torch.no_grad():
        for parameter in model.average.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = outputs_of(config, batch, model)
    model.towers.load_state_dict(model.average.state_dict())
    model.augmented_by_average = False
    by_towers = outputs_of(config, batch, model)
    for name in config.towers.names:
        assert found[name].requires_grad
        assert not torch.equal(found[name], by_towers[name])
        for view in ("@augmented", "@augmented@independent"):
            assert not found[name + view].requires_grad
            assert torch.equal(found[name + view], by_towers[name + view])


def test_momentum_towers_need_an_average(folder: Path) -> None:
    values = config_of(folder).model_dump()
    with pytest.raises(UserError, match=r"second_view_by average needs train.ema_decay"):
        check_settings(RunConfig, {**values, "train": {"global_batch": 4, "second_view_by": "average"}}, "config")


def test_only_what_an_objective_wants_is_made(folder: Path) -> None:
    assert config_of(folder, objective=[{"name": "gram"}]).views == frozenset()
    assert config_of(folder, objective=[{"name": "infonce", "within": 0.5}]).views == {"augmented"}
    assert config_of(folder).views == {"augmented", "independent"}
    assert DataConfig.model_validate({"train": {"path": "x", "split": "y"}}).second_view == AugmentConfig(
        word_dropout=0.1
    )


@pytest.mark.parametrize(
    ("ranks", "train"),
    [
        pytest.param(1, {"ema_decay": 0.9, "second_view_by": "average", "zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param(2, {"zero_stage": 3, "chunk": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_resumes_and_exports(tmp_path: Path, folder: Path, ranks: int, train: dict[str, Any]) -> None:
    run = tmp_path / "run"
    changes: dict[str, Any] = {"objective": STRUCTURE, "train": train, "data": {"num_workers": 0}}
    config = write_config(tmp_path / "config.yaml", folder, run, **changes, schedule={"num_steps": 4})
    done = subprocess.run(command(config, ranks), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    write_config(config, folder, run, **changes, schedule={"num_steps": 5})
    done = subprocess.run(command(config, ranks), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = read_lines(run / METRICS)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    for part in (
        "infonce/video-audio",
        "infonce/video-text/text-augmented",
        "feature_separation/orthogonal/video-audio",
        "brownian_bridge/video-text",
        "geometric_consistency/matched/audio-text",
    ):
        assert all(part in record for record in records), part
    export_run(run, tmp_path / "export", "last", force=False)
    with safe_open(tmp_path / "export" / WEIGHTS, framework="pt") as weights:
        assert not any("independent" in name for name in weights.keys())  # noqa: SIM118 - not a dict
    assert load_model(tmp_path / "export").encode(text=["a red square"])["text"].shape == (1, 12)
