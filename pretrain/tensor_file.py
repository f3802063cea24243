"""safetensors files written in pieces, hashed on the way, without holding up the process.

The library's own writer copies every tensor into Python bytes while no other thread can run, and the file would have to
be read again for its checksum. Reading is the library's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

PIECE_BYTES = 1 << 24
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write contiguous CPU tensors to a new file and make it durable; returns its SHA-256.

    Source of the layout: github.com/huggingface/safetensors, README, "Format".

    Raises:
        OSError: it cannot be written.
        KeyError: a dtype that the format lacks.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # aligned without holes
    header: dict[str, object] = {}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as stream:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            stream.write(piece)
        for name in order:
            content = tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data
            for begin in range(0, len(content), PIECE_BYTES):
                digest.update(content[begin : begin + PIECE_BYTES])
                stream.write(content[begin : begin + PIECE_BYTES])
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()
