"""Shards on a real S3 server: the batches of the local ones, through a bounded cache that survives kills and damage."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from data_pipeline.settings import UserError
from data_pipeline.shards import GIB, ShardCache, ShardedDataset, ShardUnavailable, read_dataset_json
from data_pipeline.verify import verify_dataset
from pretrain.config import DataConfig
from pretrain.data import tokenize
from pretrain.data.batch import Batch
from pretrain.data.loader import EvalLoader, TrainLoader
from pretrain.data.pins import current_pins, open_pinned
from tests.s3_server import BUCKET, S3Server, s3_server
from tests.test_architecture import COMMAND_LINE, loaded_heavy
from tests.test_loader import assert_equal
from tests.test_resume import drawn, finish, losses, write_config
from tests.test_shards import write_accounted_dataset
from tests.tiny_dataset import TOWERS, data_config, make_sample, noisy_members, write_dataset, write_tokenizer

NUM_SHARDS, SAMPLES_A_SHARD, BLOCK_SHARDS, GLOBAL_BATCH = 12, 3, 2, 4
NUM_SAMPLES = NUM_SHARDS * SAMPLES_A_SHARD


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "DEFAULT_PATH", write_tokenizer(base / "tokenizer.json"))
        samples = [make_sample(number, noisy_members(number, 1.1), 1.1) for number in range(NUM_SAMPLES)]
        del samples[4].members["audio"]  # a ragged one
        yield write_dataset(base / "local", samples, SAMPLES_A_SHARD)


@pytest.fixture
def url(server: S3Server, folder: Path, request: pytest.FixtureRequest) -> str:
    """The dataset below a URL of this test's own."""
    return server.upload(folder, request.node.name.replace("[", "-").replace("]", ""))


def shard_bytes(folder: Path) -> int:
    """Size of the largest tar."""
    return max(path.stat().st_size for path in folder.glob("*.tar"))


def config_of(url: str, cache: Path, num_shards: float, folder: Path, num_workers: int = 0) -> DataConfig:
    """Room for `num_shards` of the largest shards in `cache`."""
    return data_config(
        train={"path": url, "split": "train"}, num_workers=num_workers, block_shards=BLOCK_SHARDS, cache_dir=str(cache),
        cache_gib=num_shards * shard_bytes(folder) / GIB,
    )  # fmt: skip


def read_batches(config: DataConfig, count: int, **changes: int) -> list[Batch]:
    """The first batches of a loader; cached shards counted after each."""
    arguments = {"global_batch": GLOBAL_BATCH, "seed": 5, **changes}
    mixture = open_pinned(current_pins(config), config)
    loader = TrainLoader(mixture, config, TOWERS, **arguments)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()
        mixture.close()


def cached(cache: Path) -> set[str]:
    return {path.name for path in (cache / "shards").iterdir()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_local_dataset(
    folder: Path, url: str, server: S3Server, tmp_path: Path, num_workers: int
) -> None:
    """Two epochs through a cache of two thirds of the dataset: each shard about once an epoch."""
    count = 2 * NUM_SAMPLES // GLOBAL_BATCH
    local = read_batches(data_config(train={"path": str(folder), "split": "train"}, block_shards=BLOCK_SHARDS), count)
    # Two batches are under way at once, which is more than a block of this small dataset: they reach over three.
    config = config_of(url, tmp_path / "cache", 4 * BLOCK_SHARDS + 0.1, folder, num_workers)
    remote = read_batches(config.model_copy(update={"prefetch_batches": 1}), count)
    for left, right in zip(local, remote, strict=True):
        assert_equal(left, right)
    name = url.removeprefix(f"s3://{BUCKET}/")
    mine = {key: number for key, number in server.gets(".tar").items() if key.startswith(f"{name}/")}
    assert len(mine) == NUM_SHARDS
    assert NUM_SHARDS < sum(mine.values()) <= 2 * NUM_SHARDS + 3 * BLOCK_SHARDS  # some for the third epoch
    used = sum((tmp_path / "cache" / "shards" / name).stat().st_size for name in cached(tmp_path / "cache"))
    assert used <= config.cache_gib * GIB
    assert not [name for name in cached(tmp_path / "cache") if "partial" in name]


def test_a_node_needs_few_shards_at_a_time(folder: Path, url: str, server: S3Server, tmp_path: Path) -> None:
    """Two ranks on one cache that holds everything: a shard of an epoch is live from its first row to its last."""
    config = config_of(url, tmp_path / "cache", 2 * NUM_SHARDS, folder)
    mixture = open_pinned(current_pins(config), config)
    ranks = [TrainLoader(mixture, config, TOWERS, global_batch=4, seed=5, rank=r, world=2) for r in range(2)]
    num_steps = 2 * NUM_SAMPLES // 4
    uses: dict[tuple[int, int], list[int]] = {}  # (epoch, shard) -> steps
    num_cached = []
    for step, batches in enumerate(islice(zip(*ranks, strict=True), num_steps)):
        for batch in batches:
            for epoch, sample in zip(batch.epochs.tolist(), batch.ids.tolist(), strict=True):
                uses.setdefault((epoch, sample // SAMPLES_A_SHARD), []).append(step)
        num_cached.append(len(cached(tmp_path / "cache")))
    assert len(uses) == 2 * NUM_SHARDS
    live = [sum(min(steps) <= step <= max(steps) for steps in uses.values()) for step in range(num_steps)]
    assert max(live) <= 2 * BLOCK_SHARDS
    # Fetched when the order comes to them, neither long before nor all at once.
    seen = [len({shard for (_, shard), steps in uses.items() if min(steps) <= step}) for step in range(num_steps)]
    assert num_cached == seen
    mixture.close()


READ_ALL = """
import sys
from pathlib import Path
from data_pipeline.shards import GIB, ShardCache, ShardedDataset
cache = ShardCache(folder=Path(sys.argv[2]), max_bytes=GIB)
dataset = ShardedDataset(sys.argv[1], "train", cache=cache, max_open_files=1)
for position in [*range(len(dataset)), *range(len(dataset))]:
    assert dataset.read_member(position, "video")
"""


def test_a_node_fetches_each_shard_once(folder: Path, url: str, server: S3Server, tmp_path: Path) -> None:
    """Three processes at once, each reading the whole split twice: one request a shard and index."""
    command = [sys.executable, "-c", READ_ALL, url, str(tmp_path / "cache")]
    readers = [subprocess.Popen(command) for _ in range(3)]
    assert [reader.wait(timeout=120) for reader in readers] == [0] * 3
    name = url.removeprefix(f"s3://{BUCKET}/")
    for ending in (".tar", ".parquet"):
        fetched = {key: count for key, count in server.gets(ending).items() if key.startswith(f"{name}/")}
        assert fetched == {f"{name}/shard-{number:06d}{ending}": 1 for number in range(NUM_SHARDS)}


def read_slowly(url: str, cache: ShardCache, tell: Connection) -> None:
    """Fetch a shard whose download stops in the middle."""
    from data_pipeline import shard_store

    def stuck(path: Path) -> str:
        os.truncate(path, path.stat().st_size // 2)
        tell.send(str(path))
        time.sleep(600)
        return ""

    dataset = ShardedDataset(url, "train", cache=cache)
    shard_store.file_sha256 = stuck  # type: ignore[assignment]
    dataset.read_member(0, "video")


def test_a_killed_download_is_done_again(folder: Path, url: str, tmp_path: Path) -> None:
    size = shard_bytes(folder)
    cache = ShardCache(folder=tmp_path / "cache", max_bytes=3 * size)
    listen, tell = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=read_slowly, args=(url, cache, tell))
    process.start()
    assert listen.poll(120)
    left = Path(listen.recv())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert left.stat().st_size > 0
    dataset = ShardedDataset(url, "train", cache=cache)
    local = ShardedDataset(folder, "train")
    # Another shard's room is made: what the dead process left is counted no more, and removed.
    assert dataset.read_member(NUM_SAMPLES - 1, "video") == local.read_member(NUM_SAMPLES - 1, "video")
    assert not left.exists()
    assert dataset.read_member(0, "video") == local.read_member(0, "video")
    dataset.close()
    for path in (cache.folder / "shards").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    assert dataset.read_member(0, "video") == local.read_member(0, "video")
    dataset.close()
    local.close()


def test_what_is_open_stays_and_what_was_used_longest_ago_goes(folder: Path, url: str, tmp_path: Path) -> None:
    size = shard_bytes(folder)
    cache = ShardCache(folder=tmp_path / "cache", max_bytes=int(3.1 * size))
    dataset = ShardedDataset(url, "train", cache=cache, max_open_files=1)
    names = [f"{shard.sha256}.tar" for shard in dataset.shards]

    def use(shard: int, reader: ShardedDataset = dataset) -> None:
        assert reader.read_member(shard * SAMPLES_A_SHARD, "video") is not None
        time.sleep(0.02)

    for shard in (0, 1, 2, 0, 3):
        use(shard)
    assert cached(cache.folder) == {names[0], names[2], names[3]}
    holder = ShardedDataset(url, "train", cache=cache)
    use(2, holder)
    for shard in (0, 3, 0, 4, 5, 6):
        use(shard)
    assert cached(cache.folder) == {names[2], names[5], names[6]}
    for shard in (5, 6):
        use(shard, holder)
    use(7)  # all three are open: the bound gives way
    assert cached(cache.folder) == {names[2], names[5], names[6], names[7]}
    holder.close()
    use(8)
    assert len(cached(cache.folder)) == 3
    dataset.close()


@pytest.mark.slow
def test_a_missing_or_broken_object_is_a_line(folder: Path, url: str, server: S3Server, tmp_path: Path) -> None:
    name = url.removeprefix(f"s3://{BUCKET}/")
    cache = ShardCache(folder=tmp_path / "cache", max_bytes=GIB)
    dataset = ShardedDataset(url, "train", cache=cache)
    client = server.client()
    client.delete_object(Bucket=BUCKET, Key=f"{name}/shard-000000.tar")
    with pytest.raises(ShardUnavailable, match=rf"^{url}/shard-000000.tar: no such object; dataset.json names it$"):
        dataset.read_member(0, "video")
    whole = (folder / "shard-000001.tar").read_bytes()
    for body, said in ((whole[:-512], "bytes found"), (whole[:-1] + b"x", "SHA-256 differs from dataset.json")):
        client.put_object(Bucket=BUCKET, Key=f"{name}/shard-000001.tar", Body=body)
        before = server.gets("shard-000001.tar")[f"{name}/shard-000001.tar"]
        with pytest.raises(ShardUnavailable, match=said):
            dataset.read_member(SAMPLES_A_SHARD, "video")
        assert server.gets("shard-000001.tar")[f"{name}/shard-000001.tar"] == before + 3
    assert cached(cache.folder) == set()
    loader = EvalLoader(dataset, data_config(num_workers=1), TOWERS, batch_size=4)
    with pytest.raises(UserError) as caught:  # the same line through a worker process
        list(loader)
    assert str(caught.value) == f"{url}/shard-000000.tar: no such object; dataset.json names it"


def test_mistakes_are_a_line(folder: Path, url: str, server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^dataset {url}x: no dataset.json"):
        read_dataset_json(url + "x")
    with pytest.raises(UserError, match=r"^dataset s4://a/b: Protocol not known: s4; expected"):
        read_dataset_json("s4://a/b")
    with pytest.raises(UserError, match=rf"^dataset {url}: no split 'trian'; did you mean 'train'"):
        ShardedDataset(url, "trian")
    config = config_of(url, tmp_path, 2 * BLOCK_SHARDS - 1, folder)
    with pytest.raises(UserError, match=r"^data.cache_gib .*: two blocks of 2 shards .*; expected at least that much"):
        open_pinned(current_pins(config), config)
    assert ShardCache.of().max_bytes == int(data_config().cache_gib * GIB)


def test_a_server_that_is_gone_is_a_line(tmp_path: Path) -> None:
    program = "from data_pipeline.shards import read_dataset_json\nread_dataset_json('s3://bucket/x')"
    server = S3Server(endpoint="http://127.0.0.1:9", log=tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | server.environment | {"AWS_MAX_ATTEMPTS": "1"},  # of the library, below our own attempts
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ShardUnavailable: s3://bucket/x/dataset.json: cannot be read: " in done.stderr.splitlines()[-1]


def test_a_digest_from_elsewhere_is_no_path(folder: Path, url: str, server: S3Server, tmp_path: Path) -> None:
    description = json.loads((folder / "dataset.json").read_text())
    description["shards"][0]["index_sha256"] = "../../" + "0" * 58
    name = url.removeprefix(f"s3://{BUCKET}/")
    server.client().put_object(Bucket=BUCKET, Key=f"{name}/dataset.json", Body=json.dumps(description).encode())
    with pytest.raises(UserError, match="is no SHA-256"):
        ShardedDataset(url, "train", cache=ShardCache(folder=tmp_path / "cache", max_bytes=GIB))


def test_verify_reads_a_url(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    folder = write_accounted_dataset(tmp_path / "data", tmp_path / "media")
    url = server.upload(folder, "accounted")
    here, there = verify_dataset(folder), verify_dataset(url)
    assert (there.problems, there.counts) == ([], here.counts)
    client = server.client()
    client.delete_object(Bucket=BUCKET, Key="accounted/shard-000001.tar")
    client.put_object(Bucket=BUCKET, Key="accounted/shard-000009.tar", Body=b"?")
    client.put_object(Bucket=BUCKET, Key="accounted/shard-000000.tar", Body=b"?")
    problems = verify_dataset(url).problems
    for words in ("shard-000001.tar: not readable", "shard-000009.tar: in no record", "has 1 bytes; expected"):
        assert any(words in problem for problem in problems), problems


@pytest.mark.slow
def test_the_commands_read_urls(server: S3Server, small_dataset: Path, tmp_path: Path) -> None:
    """A run on a URL is the run on the folder; evaluate, export, embed and inspect take a URL too."""
    url, cache = server.upload(small_dataset, "small"), str(tmp_path / "cache")
    for name, place in (("local", str(small_dataset)), ("remote", url)):
        parts = {split: {"path": place, "split": split} for split in ("train", "val")}
        data = {"train": parts["train"], "validation": parts["val"], "num_workers": 2, "cache_dir": cache}
        config = write_config(
            tmp_path / f"{name}.yaml", small_dataset, tmp_path / name, data=data, schedule={"num_steps": 3}
        )
        finish(config, 1)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert drawn(tmp_path / "remote") == drawn(tmp_path / "local")
    run, model = str(tmp_path / "remote"), str(tmp_path / "model")
    for arguments in (
        ["evaluate", run, "--data", url, "--split", "val"],
        ["export", run, "--out", model],
        ["embed", model, "--data", url, "--split", "val", "--out", str(tmp_path / "embedded")],
        ["inspect", url, "--sheet", "2", "--samples", "1", "--out", str(tmp_path / "inspection")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pretrain.main", *arguments], capture_output=True, text=True,
            env=os.environ | {"XDG_CACHE_HOME": cache},
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "inspection" / "contact-sheet.png").is_file()


def test_preflight_reads_a_url_without_torch(url: str, folder: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.yaml", folder, tmp_path / "run", data={"train": {"path": url, "split": "trian"}}
    )
    loaded, said, code = loaded_heavy(COMMAND_LINE, "pretrain", str(config))
    assert (loaded, code) == (set(), 2)
    assert said == f"error: data.train: dataset {url} has no split 'trian'; did you mean 'train'? (valid: train)\n"
