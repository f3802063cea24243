"""`parallelotope keys`: every key of the models is listed, with what stands beside it in the source."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel

from data_pipeline.settings import UserError, models_in
from launch.keys import KINDS, Key, keys, keys_of


def fields_in(model: type[BaseModel]) -> set[str]:
    """Names of all fields of a model and of the models in it."""
    inner = {name for field in model.model_fields.values() for part in models_in(field.annotation)
             for name in fields_in(part)}  # fmt: skip
    return set(model.model_fields) | inner


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_listed_once(kind: str) -> None:
    paths = [key.path for key in keys_of(KINDS[kind])]
    assert len(set(paths)) == len(paths)
    assert {path.rpartition(".")[2] for path in paths} == fields_in(KINDS[kind])


def test_a_key_has_type_default_limits_and_comment() -> None:
    found = {key.path: key for kind in KINDS.values() for key in keys_of(kind)}
    comment = "samples a rank holds activations for at once; never changes the result"
    assert found["train.chunk"] == Key(path="train.chunk", kind="PositiveInt", default="32", comment=comment)
    assert found["data.augment.brightness"].kind == "float, ge 0, le 1"
    assert found["data.augment.brightness"].default == "0.1"
    assert found["schedule.num_steps"].default is None
    assert found["towers.video.freeze"].comment.startswith("keep the encoder as it is")  # of the class above it
    assert found["towers.video.encoder.width"].default == "128"
    assert found["hold_out"].comment.startswith("Shares of the rows that name no split")  # a line above it
    assert any(path.startswith("objective.N (gram).orientation") for path in found)


def test_the_command_answers_without_torch() -> None:
    program = "import sys; from pretrain.main import main; sys.argv[1:] = ['keys', 'pretrain']\ntry: main()\n" + (
        "except SystemExit as end: assert not end.code\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert "train.chunk: PositiveInt, default 32\n    samples a rank holds" in done.stdout


def test_another_kind_is_a_line() -> None:
    with pytest.raises(UserError, match="did you mean 'shard'"):
        keys("shards")
