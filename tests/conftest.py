"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.small_dataset import write_dataset
from tests.test_resume import finish, write_config


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded dataset: 23 training samples and 12 for validation, of one second each."""
    return write_dataset(tmp_path_factory.mktemp("small") / "dataset", {"train": 23, "val": 12})


@pytest.fixture(scope="session")
def trained_run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on the small dataset, text by a transformers BERT of a folder that is gone afterwards."""
    from pretrain.towers.torchvision_ops import allow_torchvision

    allow_torchvision()
    from transformers import BertConfig, BertModel

    home = tmp_path_factory.mktemp("trained")
    bert = home / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=8192, max_position_embeddings=16, **sizes)).save_pretrained(bert)
    config = write_config(home / "config.yaml", small_dataset, home / "run", schedule={"num_steps": 3})
    content = yaml.safe_load(config.read_text())
    content["towers"]["text"]["encoder"] = f"hf:{bert}"
    config.write_text(yaml.safe_dump(content))
    finish(config, ranks=1)
    return home / "run"


@pytest.fixture(scope="session")
def export_folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, evaluated and exported; the folder its encoder came from is hidden."""
    from pretrain.export import export_run

    folder = tmp_path_factory.mktemp("exported") / "a model"
    export_run(trained_run, folder, "last", force=False)
    return folder
