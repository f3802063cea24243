"""The shard contract: what sharding writes and training reads. Disk is the border between the two halves.

A dataset folder holds

    dataset.json             schema version, counts, shards with hashes, config; written last
    shard-000042.tar         a standard WebDataset tar: KEY.mp4 | KEY.jpg, KEY.flac | KEY.opus, KEY.json
    shard-000042.parquet     one row a sample: member offsets and sizes, checksums, captions, durations
    shard-000042_01.tar ...  further tars of the same task, when the first was full
    rejects.parquet          one row for every manifest row or clip that is in no shard, with the reason
    tasks/                   the ledger: one record a finished task

A sample's member in slot `video` or `audio` is read by offset, without reading the tar before it.
"""

from data_pipeline.location import dataset_name, is_url, join_location
from data_pipeline.published_file import file_sha256, partial_path, publish, write_json
from data_pipeline.shard_cache import DEFAULT_CACHE_GIB, GIB, ShardCache
from data_pipeline.shard_reader import (
    ShardedDataset,
    read_dataset_json,
    read_file,
    sample_name,
    shards_digest,
    shards_of,
)
from data_pipeline.shard_schema import (
    INDEX_SCHEMA,
    REJECTS_SCHEMA,
    SCHEMA_VERSION,
    SLOTS,
    DamagedMember,
    Sample,
    ShardInfo,
)
from data_pipeline.shard_store import ShardUnavailable
from data_pipeline.shard_writer import ShardWriter

__all__ = [
    "DEFAULT_CACHE_GIB",
    "GIB",
    "INDEX_SCHEMA",
    "REJECTS_SCHEMA",
    "SCHEMA_VERSION",
    "SLOTS",
    "DamagedMember",
    "Sample",
    "ShardCache",
    "ShardInfo",
    "ShardUnavailable",
    "ShardWriter",
    "ShardedDataset",
    "dataset_name",
    "file_sha256",
    "is_url",
    "join_location",
    "partial_path",
    "publish",
    "read_dataset_json",
    "read_file",
    "sample_name",
    "shards_digest",
    "shards_of",
    "write_json",
]
