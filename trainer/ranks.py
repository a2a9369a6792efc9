"""The ranks of one trainer: start-up, orders from rank 0 to the others, sums over all. Tensors only, no pickle.

Rank 0 sends an order at least every few seconds (WAIT while there is no batch), so no collective runs into its timeout.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist


class Order(IntEnum):
    """What rank 0 tells all ranks to do next."""

    WAIT = 0
    TRAIN = 1
    EXPORT = 2
    STOP = 3


class Ranks:
    """This process among its peers. Made by `start`."""

    def __init__(self, rank: int, size: int, device: torch.device, control: dist.ProcessGroup) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._control = control

    @staticmethod
    def start(collective_s: float) -> Ranks:
        """Join the process group that torchrun's environment describes; alone without it."""
        device = _device()
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        if "RANK" not in os.environ:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it logs to stdout
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of compiling at first use
        timeout = timedelta(seconds=collective_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if not dist.is_initialized():
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)
        return Ranks(dist.get_rank(), dist.get_world_size(), device, control)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def order(self, order: Order = Order.WAIT, payload: bytes = b"") -> tuple[Order, bytes]:
        """Rank 0 gives the order, the others wait for it; all return it with its payload."""
        if self.size == 1:
            return order, payload
        head = torch.tensor([order, len(payload)], dtype=torch.int64)
        dist.broadcast(head, 0, group=self._control)
        order, size = Order(int(head[0])), int(head[1])
        if not size:
            return order, b""
        body = torch.empty(size, dtype=torch.uint8)
        if self.leads:
            body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        dist.broadcast(body, 0, group=self._control)
        return order, payload if self.leads else body.numpy().tobytes()

    def total(self, values: Mapping[str, float], *, largest: bool = False) -> dict[str, float]:
        """Sum (or maximum) of each value over the ranks, in float64. All ranks pass the same names."""
        tensor = torch.tensor(list(values.values()), dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._control)
        return dict(zip(values, tensor.tolist(), strict=True))

    def all(self, flag: bool) -> bool:
        """Whether it is true on every rank."""
        return self.total({"false": float(not flag)})["false"] == 0.0

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _device() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
