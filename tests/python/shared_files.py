"""What ranks read of each other's memory, on the CPU: files that all of them map, and barriers for agreements."""

import contextlib

import torch
import torch.distributed as dist

from sparse24.distributed import Peers


class FilePeers(Peers):
    """Put it in the place of `Peers`, with a `folder` that all ranks see."""

    folder = None
    made = 0

    def __init__(self, group):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.number, self.agreements, self.grown = FilePeers.made, 0, 0
        FilePeers.made += 1
        self.shared = torch.empty(0, dtype=torch.uint8)

    def _file(self, rank, count):
        name = f"{self.folder}/{self.number}.{self.grown}.{rank}"
        return torch.from_file(name, shared=True, size=count, dtype=torch.uint8)

    def share(self, count):
        if self.shared.numel() < count:
            self.grown += 1
            self.shared = self._file(self.rank, count)
        return self.shared[:count]

    def read(self, rank, begin, count):
        return self._file(rank, self.shared.numel())[begin : begin + count]

    def agree(self):
        self.agreements += 1
        dist.barrier(self.group)

    def wait(self):
        pass

    in_order = contextlib.nullcontext
