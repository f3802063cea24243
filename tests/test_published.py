"""Encoders by name: folders written by transformers, timm's names, a cache without a network, what is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.settings import UserError
from pretrain.towers.torchvision_ops import allow_torchvision
from tests.towers import Towers, all_present, build_towers, draw_inputs, run_config

VOCABULARY = 8192  # as the shipped tokenizer
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with masked-token head as another project would leave it: named, and stored in half precision."""
    allow_torchvision()
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("published") / "a bert"
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **TINY)
    BertForMaskedLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ast_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of 2 s sounds."""
    allow_torchvision()
    from transformers import ASTConfig, ASTForAudioClassification

    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("published") / "ast"
    ASTForAudioClassification(ASTConfig(max_length=128, num_mel_bins=32, **TINY)).save_pretrained(folder)
    return folder


def text(folder: Path | str, **more: Any) -> dict[str, Any]:
    return {"encoder": f"hf:{folder}", **more}


def check_trains(towers: Towers) -> None:
    """Every trained parameter gets a gradient, and all compute and store float32."""
    present = {name: torch.zeros(2, dtype=torch.bool) for name in towers.names}
    for masks in (all_present(2), present):
        towers.zero_grad(set_to_none=True)
        torch.stack([rows[:, 0].sum() for rows in towers(draw_inputs(2), masks).values()]).sum().backward()
        assert [name for name, p in towers.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {p.dtype for p in towers.parameters()} == {torch.float32}


def test_a_folder_gives_its_weights_in_float32(bert_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    towers = build_towers(run_config(text=text(bert_folder)))
    stored = load_file(bert_folder / "model.safetensors")
    encoder = dict(towers.towers["text"].encoder.encoder.named_parameters())
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(p, stored[f"bert.{name}"].float()) for name, p in encoder.items() if "pooler" not in name)
    assert {name for name, p in encoder.items() if not p.requires_grad} == {"pooler.dense.weight", "pooler.dense.bias"}
    assert "not trained, because never used: encoder.encoder.pooler.dense.weight" in caplog.text
    check_trains(towers)


def test_pretrained_false_draws_weights_of_the_same_architecture(bert_folder: Path, ast_folder: Path) -> None:
    changes = {"text": text(bert_folder, pretrained=False), "audio": text(ast_folder, pretrained=False)}
    first, again, other = (build_towers(run_config(**changes), seed) for seed in (1, 1, 2))
    weights = [dict(towers.named_parameters()) for towers in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    word = "towers.text.encoder.encoder.embeddings.word_embeddings.weight"
    assert not torch.equal(weights[0][word], weights[2][word])
    assert not torch.equal(weights[0][word], load_file(bert_folder / "model.safetensors")[f"bert.{word[28:]}"].float())
    check_trains(first)


def test_a_published_ast_sees_the_spectrogram_it_was_made_for(ast_folder: Path) -> None:
    towers = build_towers(run_config(audio=text(ast_folder)))
    from transformers import ASTForAudioClassification

    tower = towers.towers["audio"].encoder
    stored = ASTForAudioClassification.from_pretrained(ast_folder).audio_spectrogram_transformer.state_dict()
    assert all(torch.equal(parameter, stored[name]) for name, parameter in tower.encoder.named_parameters())
    inputs = draw_inputs(2)["audio"]
    assert tower.log_mel(**inputs).shape == (2, 128, 32)
    check_trains(towers)


def copy_of(folder: Path, to: Path, **weights: torch.Tensor) -> Path:
    """The folder with other weights, or none."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    if weights:
        save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_weights_that_are_missing_are_not_drawn_at_random(bert_folder: Path, tmp_path: Path) -> None:
    stored = load_file(bert_folder / "model.safetensors")
    del stored["bert.encoder.layer.0.output.dense.weight"]
    folder = copy_of(bert_folder, tmp_path / "partial", **stored)
    with pytest.raises(UserError, match=r"lacks 1 of the parameters.*encoder\.layer\.0\.output\.dense\.weight"):
        build_towers(run_config(text=text(folder)))


def test_pickled_weights_are_not_read(bert_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(bert_folder, tmp_path / "pickled")
    torch.save(load_file(bert_folder / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"towers\.text\.encoder hf:.*cannot be had.*safetensors"):
        build_towers(run_config(text=text(folder)))


def test_code_beside_weights_is_not_run(bert_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(bert_folder, tmp_path / "code")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    for pretrained in (True, False):
        with pytest.raises(UserError, match="cannot be had"):
            build_towers(run_config(text=text(folder, pretrained=pretrained)))
    assert not (tmp_path / "ran").exists()


def test_encoders_that_do_not_fit_are_one_line(bert_folder: Path, ast_folder: Path, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    small = tmp_path / "small vocabulary"
    copy_of(bert_folder, small)
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 100}
    (small / "config.json").write_text(json.dumps(config))
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("text", text(bert_folder, max_tokens=17), r"max_tokens 17: .* takes at most 16"),
        ("text", text(small, pretrained=False), r"tokenizer default has 8192 tokens, .* knows 100"),
        ("text", text(tmp_path, pretrained=False), r"towers\.text\.encoder .*: cannot encode text .*of text alone"),
        ("text", text(f"{tmp_path}/nowhere"), r"nowhere: no such folder"),
        ("audio", text(bert_folder), r"expected an audio-spectrogram-transformer, found bert"),
        ("audio", text(ast_folder, num_mels=64), r"num_mels 64: .* was made for 32"),
        ("audio", text(ast_folder, hop_s=0.005), r"196 spectrogram steps; .* takes at most 128"),
    ]
    for tower, changes, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            build_towers(run_config(**{tower: changes}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("encoder", "pretrained", "message"),
    [
        ("timm:resnet81", False, r"towers\.video\.encoder timm:resnet81: no such model; did you mean 'resnet18'\?"),
        ("timm:resnet18.a1_in1", False, r"no such published weights; did you mean 'resnet18\.a1_in1k'\?"),
        ("timm:resnet18.", True, r"no such published weights; did you mean .resnet18\."),
        ("timm:maxvit_rmlp_pico_rw_256", False, r"cannot be built for pictures of 30 px"),
        ("timm:test_vit", False, r"size_px 30: expected a multiple of the encoder.s patches, 16"),
        ("timm:test_vit.r160_in1k_x", True, r"did you mean .test_vit\.r160_in1k."),
    ],
)
def test_names_and_sizes_timm_does_not_know(encoder: str, pretrained: bool, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_towers(run_config(video={"encoder": encoder, "pretrained": pretrained, "size_px": 30}))
    assert "\n" not in str(caught.value)


CACHED_ONLY = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from data_pipeline.settings import UserError
from pretrain.towers.published import timm_model, transformers_model

published = timm_model("test_vit", False, 160, "-")
snapshot = Path(sys.argv[1]) / "hub" / "models--timm--test_vit.r160_in1k" / "snapshots" / "1"
(snapshot.parent.parent / "refs").mkdir(parents=True)
(snapshot.parent.parent / "refs" / "main").write_text("1")
snapshot.mkdir(parents=True)
weights = {**published.state_dict(), "head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
save_file(weights, snapshot / "model.safetensors")
loaded = timm_model("test_vit", True, 64, "-")
same = [name for name, tensor in loaded.state_dict().items() if torch.equal(tensor, weights[name])]
print(len(loaded.state_dict()) - len(same), [name for name in loaded.state_dict() if name not in same])
for load in (
    lambda: timm_model("resnet18", True, 64, "towers.video.encoder"),
    lambda: transformers_model("nobody/nothing", True, "towers.text.encoder"),
    lambda: transformers_model("nobody/nothing", False, "towers.text.encoder"),
):
    try:
        load()
    except UserError as error:
        print(error)
"""


def test_without_a_network_the_cache_serves_and_the_rest_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", CACHED_ONLY, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    cached, *refused = done.stdout.splitlines()
    assert cached == "1 ['pos_embed']"  # all from the file; positions resampled from 160 to 64 px
    beginnings = (
        "towers.video.encoder timm:resnet18: its published weights cannot be had (not in the cache, and the hub",
        "towers.text.encoder hf:nobody/nothing: its published weights cannot be had (not in the cache, and the hub",
        "towers.text.encoder hf:nobody/nothing: its config cannot be had (not in the cache, and the hub gives: ",
    )
    assert len(refused) == 3
    assert all(line.startswith(beginning) for line, beginning in zip(refused, beginnings, strict=True))


FOREIGN_BUILD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
sys.path.insert(0, sys.argv[1])
try:
    import torchvision
except RuntimeError as error:
    print("before:", error)
from pretrain.towers.torchvision_ops import allow_torchvision
print(allow_torchvision(), allow_torchvision())
import gc; gc.collect()
import torchvision
print(torchvision.READY)
"""


def test_torchvision_of_another_build_imports(tmp_path: Path) -> None:
    """A stand-in with what breaks: operators that do not load, and an import that needs the schema of nms."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"made for CUDA")
    (package / "__init__.py").write_text(
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda dets, scores, iou_threshold: dets)\n"
        "READY = 'ready'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN_BUILD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    before, *after = done.stdout.splitlines()
    assert before == "before: operator torchvision::nms does not exist"
    assert after == [
        "torchvision's operators do not load with this torch: declared ('nms', 'qnms')",
        "True True",
        "ready",
    ]
