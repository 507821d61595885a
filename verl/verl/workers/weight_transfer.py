"""The policy's weights on their way to rollout engines in other processes: one broadcast for each bucket of bytes."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from verl.models.fsdp import local_device
from xbai.engine.weight_check import checksum
from xbai.errors import UserError

BUCKET_BYTES = 512 * 2**20
"""What each end holds beside a tensor. A broadcast of so many bytes takes much longer than starting one."""
SENDER = 0
"""Its rank among sender and receivers."""


class Sent(NamedTuple):
    """What is said of a tensor in the bucket in which it begins."""

    name: str
    dtype: str
    """As torch has it."""
    shape: list[int]
    checksum: int | None

    @classmethod
    def of(cls, name: str, tensor: Tensor, check: bool) -> Sent:
        """With `check` with its checksum."""
        summed = int(checksum(tensor, tensor.dtype)) if check else None
        return cls(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), summed)

    def empty(self, device: torch.device) -> Tensor:
        """Room for it."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device)


class Bucket(NamedTuple):
    """What is said of a bucket before it comes; the last one is empty."""

    size: int
    """Bytes."""
    begun: list[Sent]


class _End:
    """One end of a transfer: a process group of its own, beside the default groups of the processes at both ends.

    Args:
        store: where both ends find each other, and what is said of each bucket.
        rank, ends: `SENDER`, or from 1 on below the number of `ends`. All of them make theirs at once.
        timeout_s: how long to wait for the others.
        bucket_bytes: the same at all ends.
    """

    def __init__(self, store: dist.Store, rank: int, ends: int, timeout_s: float, bucket_bytes: int = BUCKET_BYTES):
        store.set_timeout(timeout := timedelta(seconds=timeout_s))
        self._bytes, self._device = bucket_bytes, local_device()
        self._store, self._keys = dist.PrefixStore("weights", store), map("bucket/{}".format, count())
        of_group = dist.PrefixStore("weights_group", store)
        if self._device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            # What torch says of their types lacks the collectives.
            self._group: Any = dist.ProcessGroupNCCL(of_group, rank, ends, options)
        else:
            self._group = dist.ProcessGroupGloo(of_group, rank, ends, timeout)

    def _bucket(self) -> Tensor:
        return torch.empty(self._bytes, dtype=torch.uint8, device=self._device)

    def _broadcast(self, data: Tensor) -> None:
        if len(data):
            self._group.broadcast(data, SENDER).wait()


class WeightSender(_End):
    """The end where the weights are; arguments as of `_End`, rank `SENDER`."""

    def __init__(self, store: dist.Store, ends: int, timeout_s: float, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(store, SENDER, ends, timeout_s, bucket_bytes)
        self._said: list[str] = []

    def send(self, weights: Iterable[tuple[str, Tensor]], check: bool = False) -> None:
        """Send all; with `check` say the checksum of each, too. All receivers have what was sent before."""
        while self._said:
            self._store.delete_key(self._said.pop())
        bucket, filled, begun = self._bucket(), 0, list[Sent]()
        for name, tensor in weights:
            begun.append(Sent.of(name, tensor, check))
            data = _bytes(tensor.contiguous())
            while len(data):
                part, data = data[: len(bucket) - filled], data[len(bucket) - filled :]
                bucket[filled : filled + len(part)] = part
                filled += len(part)
                if filled == len(bucket):
                    self._flush(bucket, begun)
                    filled, begun = 0, []
        if filled or begun:
            self._flush(bucket[:filled], begun)
        self._say(Bucket(0, []))

    def _flush(self, data: Tensor, begun: list[Sent]) -> None:
        self._say(Bucket(len(data), begun))
        self._broadcast(data)

    def _say(self, bucket: Bucket) -> None:
        self._said.append(key := next(self._keys))
        self._store.set(key, json.dumps(bucket))


class WeightReceiver(_End):
    """The end of a rollout engine; arguments as of `_End`."""

    def receive(self) -> Iterator[tuple[str, Tensor]]:
        """What one `send` sends; to be run to its end.

        Raises:
            UserError: a tensor's checksum is not what was said.
        """
        bucket, coming, arrived = self._bucket(), deque[tuple[Sent, Tensor]](), 0
        while (said := self._next()) != Bucket(0, []):
            data = bucket[: said.size]
            self._broadcast(data)
            coming.extend((one, one.empty(self._device)) for one in said.begun)
            while coming:
                sent, tensor = coming[0]
                missing = _bytes(tensor)[arrived:]
                part, data = data[: len(missing)], data[len(missing) :]
                missing[: len(part)] = part
                if len(part) < len(missing):
                    arrived += len(part)
                    break
                _compare(*coming.popleft())
                arrived = 0
                yield sent.name, tensor

    def _next(self) -> Bucket:
        size, begun = json.loads(self._store.get(next(self._keys)))
        return Bucket(size, [Sent(*one) for one in begun])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _compare(sent: Sent, tensor: Tensor) -> None:
    if sent.checksum is not None and int(checksum(tensor, tensor.dtype)) != sent.checksum:
        raise UserError(f"weight sync: {sent.name} did not arrive as it was sent (the checksums differ)")
