"""Measurements of one loader in a process of its own: a JSON request on stdin, the answers in a file."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.clips import draw_clips
from benchmarks.loaders.contender import Contender, Setting

FROM_STOP = "of the stop"  # instead of a state: that of the epoch task that stopped before, in the same request
CONTENDERS = {
    "parallelotope": "ours:Parallelotope",
    "webdataset": "webdataset_tars:WebDataset",
    "webdataset, resampled": "webdataset_tars:ResampledWebDataset",
    "mosaicml-streaming": "streaming_mds:MosaicStreaming",
    "litdata": "litdata_chunks:LitData",
}


def contender(name: str) -> type[Contender]:
    """The class of a loader; its library is imported now."""
    module, kind = CONTENDERS[name].split(":")
    found: type[Contender] = getattr(importlib.import_module(f"benchmarks.loaders.{module}"), kind)
    return found


def write(kind: type[Contender], setting: Setting, task: dict[str, Any]) -> dict[str, Any]:
    """Write the samples in the loader's format."""
    setting.folder.mkdir(parents=True)
    clips = list(draw_clips(setting.num_samples))
    begin_s = time.perf_counter()
    kind.write(clips, setting.folder)
    num_bytes = sum(len(part) for clip in clips for part in clip.members.values())
    facts = {"version": kind.version(), "how": kind.how, "resume": kind.resume}
    return {**facts, "write_s": time.perf_counter() - begin_s, "sample_bytes": num_bytes / len(clips)}


def speed(kind: type[Contender], setting: Setting, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the first batch, then samples/s over `num_batches` after as many of a warm-up as are prefetched.

    cpu_ms: processor time a sample from construction to close, of this process and the workers that ended in it.
    """
    cpu_s, begin_s = processor_s(), time.perf_counter()
    with closing(kind(setting, None)) as loader, closing(loader.batches()) as batches:
        num_samples = next(batches).num_samples
        first_s = time.perf_counter() - begin_s
        num_samples += sum(batch.num_samples for batch in islice(batches, setting.num_workers * setting.prefetch))
        begin_s = time.perf_counter()
        num_timed = sum(batch.num_samples for batch in islice(batches, task["num_batches"]))
        rate = num_timed / (time.perf_counter() - begin_s)
    cpu_ms = 1000 * (processor_s() - cpu_s) / (num_samples + num_timed)
    return {"start_s": first_s, "samples_per_s": rate, "cpu_ms": cpu_ms}


def processor_s() -> float:
    """User and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resume(kind: type[Contender], setting: Setting, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the construction of a loader in the state at a step to its first batch."""
    found = {}
    for step in task["steps"]:
        state = kind.state_at(setting, step)
        begin_s = time.perf_counter()
        loader = kind(setting, state)
        with closing(loader):
            next(loader.batches())
            found[str(step)] = time.perf_counter() - begin_s
    return found


def epoch(kind: type[Contender], setting: Setting, task: dict[str, Any]) -> dict[str, Any]:
    """Keys of each batch of the first epoch, from `state` on, up to `stop_after` batches; and the state then."""
    loader = kind(setting, copy.deepcopy(task["state"]))
    with closing(loader):
        batches: Iterator[list[str]] = loader.rest_of_epoch()
        keys = list(islice(batches, task["stop_after"]))
        state = json.loads(json.dumps(loader.state()))  # some go on writing into theirs
        return {"keys": keys, "state": state, "stopped": task["stop_after"] is not None}


def first_tensors(kind: type[Contender], setting: Setting, task: dict[str, Any]) -> dict[str, Any]:
    """A sum for each tensor of each sample of the first batches, to see that all loaders decode the same."""
    with closing(kind(setting, None)) as loader:
        found = {}
        for batch in islice(loader.batches(), task["num_batches"]):
            for row, key in enumerate(batch.keys):
                tensors = {f"{m}.{name}": t[row] for m, parts in batch.inputs.items() for name, t in parts.items()}
                found[key] = {name: tensor.double().sum().item() for name, tensor in sorted(tensors.items())}
        return found


def main() -> None:
    """Do the tasks of the request, one after the other; one that fails is an error among the answers."""
    request = json.loads(sys.stdin.read())
    setting = Setting(**{**request["setting"], "folder": Path(request["setting"]["folder"])})
    torch.set_num_threads(1)
    if setting.world > 1:
        torch.distributed.init_process_group("gloo", rank=setting.rank, world_size=setting.world)
    kind = contender(request["contender"])
    known = {task.__name__: task for task in (write, speed, resume, epoch, first_tensors)}
    answers: list[dict[str, Any]] = []
    for task in request["tasks"]:
        try:
            if task.get("state") == FROM_STOP:
                task["state"] = next((answer["state"] for answer in answers if answer.get("stopped")), None)
                if task["state"] is None:
                    raise RuntimeError("there is no state to resume from")
            answers.append(known[task["name"]](kind, replace(setting, mode=task.get("mode", "raw")), task))
        except Exception as error:  # whatever a library raises is a result
            traceback.print_exc()
            answers.append({"error": (str(error).strip() or type(error).__name__).splitlines()[-1][:160]})
        Path(request["out"]).write_text(json.dumps(answers), encoding="utf-8")  # also what a later hang leaves
        if setting.world > 1:
            torch.distributed.barrier()
    if setting.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
