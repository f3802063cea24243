"""A configuration becomes a typed model, or one line a mistake; every config in the repository is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.config import ShardConfig
from data_pipeline.settings import Settings, UserError, load_settings, nearest
from pretrain.compare.config import CompareConfig
from pretrain.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
MODELS: dict[str, type[Settings]] = {
    "shard.yaml": ShardConfig,
    "pretrain.yaml": RunConfig,
    "small.yaml": RunConfig,
    "compare-synthetic.yaml": CompareConfig,
    "compare-orientation.yaml": CompareConfig,
    "compare-demo.yaml": CompareConfig,
}
MINIMAL: dict[str, Any] = {
    "run_dir": "run",
    "data": {"train": {"path": "data", "split": "train"}},
    "towers": {"text": {}, "video": {}, "audio": {}},
    "objective": [{"name": "gram"}],
    "schedule": {"num_steps": 10},
    "train": {"global_batch": 8},
}


def write(folder: Path, text: str | None = None) -> Path:
    """`text`, or the minimal config, as a file."""
    path = folder / "pretrain.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) if text is None else text)
    return path


def mistake(path: Path, *overrides: str) -> str:
    """The one line that `path` with `overrides` is answered with."""
    with pytest.raises(UserError) as caught:
        load_settings(RunConfig, path, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_minimal_config_loads(tmp_path: Path) -> None:
    config = load_settings(RunConfig, write(tmp_path))
    assert config.towers.names == ("video", "audio", "text")
    assert config.objective[0].name == "gram"


def test_overrides_change_values_and_add_blocks(tmp_path: Path) -> None:
    overrides = ["train.chunk=4", "optimizer.lr=3e-4", "data.validation.path=d", "data.validation.split=val"]
    config = load_settings(RunConfig, write(tmp_path), overrides)
    assert (config.train.chunk, config.optimizer.lr) == (4, 3e-4)
    assert config.data.validation is not None
    assert config.data.validation.split == "val"
    assert config.train.global_batch == 8


def test_override_reaches_into_a_list(tmp_path: Path) -> None:
    config = load_settings(
        RunConfig, write(tmp_path), ['objective=[{name: infonce, pairs: [["text", "video+audio"]]}]']
    )
    assert config.objective[0].name == "infonce"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, yaml.safe_dump(MINIMAL) + f"optimizer: {{lr: {text}}}\n")
    assert load_settings(RunConfig, path).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "place", "hint"),
    [
        ("sed=1", "sed", "'seed'"),
        ("train.chunks=4", "train.chunks", "'chunk'"),
        ("towers.video.num_frame=4", "towers.video.num_frame", "'num_frames'"),
        ("towers.video.encoder.widht=4", "widht", "'width'"),
        ("towers.smell.width=4", "towers.smell", "audio, text, video"),
        ("data.augment.flips=true", "data.augment.flips", "'flip'"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, override: str, place: str, hint: str) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError) as caught:
        load_settings(RunConfig, path, [override])
    lines = [line for line in str(caught.value).splitlines() if "unknown key" in line]
    assert len(lines) == 1
    assert str(path) in lines[0]
    assert place in lines[0]
    assert hint in lines[0]


def test_unknown_key_in_an_objective(tmp_path: Path) -> None:
    line = mistake(write(tmp_path), "objective=[{name: gram, temprature: 0.1}]")
    assert "did you mean 'temperature'?" in line


def test_unknown_objective(tmp_path: Path) -> None:
    line = mistake(write(tmp_path), "objective=[{name: gramm}]")
    assert "objective.0" in line
    assert "gramm" in line
    assert "infonce" in line


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("train.global_batch=many", "train.global_batch"),
        ("train.global_batch=0", "train.global_batch"),
        ("train.global_batch=1.5", "train.global_batch"),
        ("train.precision=fp8", "train.precision"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("data.augment.flip=perhaps", "data.augment.flip"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("seed=null", "seed"),
        ("towers.text=7", "towers.text"),
    ],
)
def test_wrong_value_is_named_with_its_place(tmp_path: Path, override: str, place: str) -> None:
    path = write(tmp_path)
    line = mistake(path, override)
    assert line.startswith(f"config {path}: {place}: ")
    value = override.partition("=")[2]
    assert value in line or value in ("null", "7")


def test_fewer_dimensions_than_modalities(tmp_path: Path) -> None:
    line = mistake(write(tmp_path), "embedding_dim=2")
    assert "embedding_dim 2 is smaller than the number of modalities 3" in line
    assert load_settings(RunConfig, write(tmp_path), ["embedding_dim=3"]).embedding_dim == 3


def test_one_tower_is_too_few(tmp_path: Path) -> None:
    line = mistake(write(tmp_path), "towers.video=null", "towers.audio=null")
    assert "at least two towers" in line


def test_missing_key(tmp_path: Path) -> None:
    short = {key: value for key, value in MINIMAL.items() if key != "schedule"}
    assert "schedule: missing" in mistake(write(tmp_path, yaml.safe_dump(short)))


def test_two_mistakes_are_two_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(RunConfig, write(tmp_path), ["sed=1", "train.chunk=no"])
    assert len(str(caught.value).splitlines()) == 2


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path)
    assert "no such file; did you mean 'pretrain.yaml'?" in mistake(tmp_path / "pretran.yaml")
    assert "no .yaml file there" in mistake(tmp_path / "nowhere" / "x.yaml")


@pytest.mark.parametrize(
    "text", ["run_dir: [1, 2", "a: b: c", "\tx: 1", "- 1\n- 2", "just words", "seed: ${nothing.there}", "seed: '???'"]
)
def test_what_is_no_config_is_one_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_settings(RunConfig, path)
    for line in str(caught.value).splitlines():
        assert line.startswith(f"config {path}: ")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_bytes(b"\xff\xfe\x00\x9d")
    assert mistake(path).startswith(f"config {path}: ")


def test_override_without_a_value(tmp_path: Path) -> None:
    assert "override 'train.chunk': expected key=value" in mistake(write(tmp_path), "train.chunk")


def test_settings_are_frozen(tmp_path: Path) -> None:
    config = load_settings(RunConfig, write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_resolved_config_loads_again(tmp_path: Path) -> None:
    config = load_settings(RunConfig, write(tmp_path))
    again = write(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))
    assert load_settings(RunConfig, again) == config


def test_a_key_of_a_block_is_named_with_its_block(tmp_path: Path) -> None:
    line = mistake(write(tmp_path), "data.path=elsewhere")
    assert "data.path: unknown key; did you mean 'data.train.path' or 'data.validation.path'? (valid here: " in line
    assert "chunk: unknown key; did you mean 'train.chunk'?" in mistake(write(tmp_path), "chunk=4")


def test_nearest_lists_what_is_valid() -> None:
    assert nearest("val", []) == "there is none"
    assert nearest("lrr", ["lr", "seed"]) == "did you mean 'lr'? (valid: lr, seed)"
    assert nearest("xyz", ["lr", "seed"]) == "(valid: lr, seed)"


# Shipped configs


def test_configs_are_shipped() -> None:
    found = {path.relative_to(ROOT / "configs").as_posix() for path in SHIPPED}
    assert found >= {
        f"{folder}/{name}" for folder in ("demo", "your-videos") for name in ("shard.yaml", "pretrain.yaml")
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_shipped_config_loads(path: Path) -> None:
    assert path.name in MODELS, f"expected one of {sorted(MODELS)}"
    load_settings(MODELS[path.name], path)


def test_demo_config_trains_what_the_demo_promises() -> None:
    config = load_settings(RunConfig, ROOT / "configs" / "demo" / "pretrain.yaml")
    assert config.train.zero_stage == 2
    assert config.train.global_batch / 2 / config.train.chunk >= 4  # gradient-cache chunks of each of 2 ranks
    assert "gram" in [part.name for part in config.objective]
    assert config.schedule.num_steps > 2 * config.checkpoint.every_steps  # a kill in the middle loses part of it only


def test_a_config_of_another_kind_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        load_settings(ShardConfig, ROOT / "configs" / "demo" / "pretrain.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert "of another kind: run_dir, seed, data" in str(caught.value)
    assert "which needs manifest, out_dir" in str(caught.value)


def test_override_of_a_list_entry_that_is_wrong_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(UserError) as caught:
        load_settings(RunConfig, tmp_path / "c.yaml", ["objective.0.orientaton=1"])
    assert "objective.0.gram.orientaton: unknown key; did you mean 'orientation'?" in str(caught.value)


def test_tuples_of_all_candidates_are_counted_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    all_tuples = "objective=[{name: symile, candidates: all}]"
    load_settings(RunConfig, tmp_path / "c.yaml", [all_tuples, "train.global_batch=1024"])
    with pytest.raises(UserError) as caught:
        load_settings(RunConfig, tmp_path / "c.yaml", [all_tuples, "train.global_batch=1032"])
    assert "objective.0.candidates all: train.global_batch ** 2 = 1,065,024 tuples" in str(caught.value)
    assert "expected at most max_tuples 1,048,576; candidates shuffled takes 1,032" in str(caught.value)


def test_valid_keys_are_those_of_the_chosen_objective(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(UserError) as caught:
        load_settings(RunConfig, tmp_path / "c.yaml", ["objective=[{name: infonce, orientation: 1.0}]"])
    assert "orientation: unknown key" in str(caught.value)
    assert "orientation," not in str(caught.value).split("(valid:")[1]
