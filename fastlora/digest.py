"""What a set of tensors is, in 32 hex characters: an MD5 of its bytes, and a fingerprint made on the device.

MD5 is what ``md5sum`` users trust, and slow for a base model; the fingerprint reads the same bytes where
they lie (for frozen weights, and for the adapter at each step). Both are equal for equal bytes on any device.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from fastlora.callable_module import make_callable
from fastlora.errors import InputError
from fastlora.exact import lora_modules

PREFIX = "base_model.model."  # what PEFT's files put before a module's path
CHUNK = 2**18  # 32-bit words that share one row of weights
BLOCK = 2**9  # words of it that are summed first
GROUP = 32  # chunks a GPU takes at once: 134 MB of products


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A and B of every LoRA linear under the names of the adapter file
    (``base_model.model.<path>.lora_A.weight`` [r,K] and ``.lora_B.weight`` [N,r]); the path is that of the injection, whatever wraps
    the model now."""
    tensors = {}
    for place, module in lora_modules(model):
        path = getattr(module, "path", "") or place
        tensors[f"{PREFIX}{path}.lora_A.weight"] = module.lora_A.weight.detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = module.lora_B.weight.detach()
    if not tensors:
        raise InputError("model: got one without LoRA linears; call fastlora.inject(model, config) first")
    return tensors


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every stored tensor of ``model`` but A and B of its LoRA linears; one shared by two modules once."""
    stored = set(model.state_dict(keep_vars=True))
    adapter = {id(p) for _, m in lora_modules(model) for p in (m.lora_A.weight, m.lora_B.weight)}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach() for n, t in named if n in stored and id(t) not in adapter}


def tensor_md5(tensor: torch.Tensor) -> str:
    """MD5 of the tensor's raw little-endian bytes in row-major order."""
    data = _bytes(tensor).cpu().numpy()
    if sys.byteorder == "big" and data.size:
        data = np.ascontiguousarray(data.reshape(-1, tensor.element_size())[:, ::-1])
    return hashlib.md5(data.reshape(-1), usedforsecurity=False).hexdigest()


def tensor_md5s(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """:func:`tensor_md5` of every tensor, in parallel (hashing releases Python's lock)."""
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(tensor_md5, tensors.values()), strict=True))


def combine(tensors: Mapping[str, torch.Tensor], md5s: Mapping[str, str]) -> str:
    """The digest from tensors whose MD5s are known already (only their headers are read)."""
    lines = sorted(f"{_header(n, t)} {md5s[n]}" for n, t in tensors.items())
    text = "".join(line + "\n" for line in lines)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def digest(model_or_tensors: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """The adapter's digest: MD5 over the sorted lines ``name dtype shape md5(raw little-endian bytes)``.

    Args:
        model_or_tensors: a model with LoRA linears, whose A and B (fp32) go by their names in the adapter
            file; or a dict of named tensors, for instance the loaded file itself: both give one digest.

    Returns:
        32 hex characters. A line reads ``<name> float32 [16,576] <md5>`` and ends with a newline.

    Raises:
        InputError: no LoRA linear in the model, or a tensor without data (device "meta").
    """
    tensors = model_or_tensors
    if isinstance(tensors, nn.Module):
        tensors = adapter_tensors(tensors)
    return combine(tensors, tensor_md5s(tensors))


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A 128-bit fingerprint of named tensors, computed where they lie; for integrity, not against forgery.

    The tensors, sorted by name and each padded with zero bytes to 32 bits, are one stream of words x_i. Two
    sums of w_i x_i modulo 2**64, with fixed odd random weights w_i for every position, are taken on the
    device: integer sums, so any order and any device give the same. The result is the MD5 of the two sums
    and the lines ``name dtype shape``. A multilinear hash (Carter and Wegman 1979).

    Returns:
        32 hex characters.

    Raises:
        InputError: a tensor without data (device "meta").
    """
    return Fingerprint(tensors).and_codes()[0]


class Fingerprint:
    """:func:`fingerprint` of tensors that stay where they lie, taken again and again: where each word goes is worked out once.

    Args:
        tensors: named; their bytes are read at each call, so those that are not contiguous, or end inside a word, are for one call.

    Raises:
        InputError: a tensor without data (device "meta").
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        ordered = {n: tensors[n] for n in sorted(tensors)}
        self._heads = [f"{_header(n, t)}\n" for n, t in ordered.items()]
        chunks = list(_chunks(ordered.values()))
        # a slice's tensor and chunk; both only grow, so the slices of one tensor are neighbours
        owners = np.array([place for chunk in chunks for place, _ in chunk], np.int64)
        numbers = np.array([number for number, chunk in enumerate(chunks) for _ in chunk], np.int64)
        self._owners, self._firsts = np.unique(owners, return_index=True)
        self._begins = np.diff(numbers, prepend=-1) > 0
        factors = [(_mix(2 * number), _mix(2 * number + 1)) for number in range(len(chunks))]
        self._factors = np.array(factors, np.uint64).reshape(-1, 2)[numbers]
        self._groups = [_Group(group) for group in _grouped(chunks)]

    def and_codes(self) -> tuple[str, str]:
        """The fingerprint, and what tells which tensor it was that changed.

        The two sums of the fingerprint are sums over tensors as well; each tensor's share, hashed, is cut to 16 bits.

        Returns:
            The fingerprint, and four hex characters a tensor, in the order of sorted names. Equal tensors at equal places have
            equal codes; one that differs is missed once in 65,536 times, which the fingerprint is not.
        """
        shares = np.zeros((len(self._heads), 2), np.uint64)
        if self._groups:
            running = _on_host([group.running_sums() for group in self._groups])
            own = running.copy()
            own[1:] -= np.where(self._begins[1:, None], np.uint64(0), running[:-1])
            shares[self._owners] = np.add.reduceat(own * self._factors, self._firsts)
        codes = [_hash(share, head)[:4] for share, head in zip(shares.tolist(), self._heads, strict=True)]
        return _hash(shares.sum(0).tolist(), "".join(self._heads)), "".join(codes)


def _hash(sums: list[int], head: str) -> str:
    text = "".join(f"{s:016x}" for s in sums) + "\n" + head
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def frozen_fingerprint(model: nn.Module) -> str:
    """:func:`fingerprint` of everything in ``model`` that training must not change: all stored weights and
    buffers but A and B."""
    return fingerprint(frozen_tensors(model))


def _header(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name} {dtype} [{','.join(map(str, tensor.shape))}]"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        raise InputError(f"tensor: got one of shape {tuple(tensor.shape)} without data (device meta)")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as int32 words, the last one padded with zero bytes."""
    data = _bytes(tensor)
    if data.numel() % 4:  # pad() copies even where it adds nothing
        data = nn.functional.pad(data, (0, -data.numel() % 4))
    if data.storage_offset() % 4:
        data = data.clone()
    return data.view(torch.int32)


_Chunk = list[tuple[int, torch.Tensor]]


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[_Chunk]:
    """Cut the stream of words into chunks of ``CHUNK``, each a list of (number of the tensor, slice of it)."""
    chunk: _Chunk = []
    free = CHUNK
    for number, tensor in enumerate(tensors):
        words = _words(tensor)
        start = 0
        while start < words.numel():
            piece = words[start : start + free]
            chunk.append((number, piece))
            start += piece.numel()
            free -= piece.numel()
            if free == 0:
                yield chunk
                chunk, free = [], CHUNK
    if chunk:
        yield chunk


def _grouped(chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks that are summed together, all on one device: a GPU would mostly wait for launches if it got one at a time."""
    for device, some in itertools.groupby(chunks, key=lambda chunk: chunk[0][1].device):
        together, most = list(some), GROUP if device.type == "cuda" else 1
        yield from (together[i : i + most] for i in range(0, len(together), most))


class _Group:
    """Chunks that are summed together, on the device of the first slice."""

    def __init__(self, chunks: list[_Chunk]) -> None:
        self.count = len(chunks)
        self.pieces = [piece for chunk in chunks for _, piece in chunk]
        self.device = self.pieces[0].device
        self.size = math.gcd(CHUNK, BLOCK)
        if len(self.pieces) > self.count:
            last = [end - 1 for chunk in chunks for end in itertools.accumulate(piece.numel() for _, piece in chunk)]
            owner = [number for number, chunk in enumerate(chunks) for _ in chunk]
            table = [owner, [i // self.size for i in last], [i % self.size for i in last]]
            self.owner, self.block, place = torch.tensor(table).to(self.device)
            self.within = (torch.arange(self.size, device=self.device) <= place[:, None])[:, None]

    def running_sums(self) -> torch.Tensor:
        """The two weighted sums of each chunk up to the end of each of its slices, int64 [slices, 2]."""
        weights = _weights(self.device)
        pieces = [piece.to(self.device) for piece in self.pieces]
        if len(pieces) == 1:
            (words,) = pieces  # as it lies: a copy to pad it would cost as much as the sums
            return torch.stack([(words * row).sum() for row in weights[:, : words.numel()]])[None]
        words = torch.cat(pieces)
        words = nn.functional.pad(words, (0, -words.numel() % CHUNK)).view(self.count, 1, CHUNK)
        products = (words * weights).view(self.count, 2, CHUNK // self.size, self.size)
        if len(pieces) == self.count:
            return products.sum((2, 3))
        # Whole blocks before a slice's last word, and the part of its own block: a scan of a few long rows is slow on a GPU.
        blocks = products.sum(3)
        before = blocks.cumsum(2) - blocks
        part = products[self.owner, :, self.block] * self.within
        return before[self.owner, :, self.block] + part.sum(2)


def _on_host(parts: list[torch.Tensor]) -> np.ndarray:
    """The rows of all parts, uint64, in order, with one wait per device in a row."""
    groups = itertools.groupby(parts, key=lambda part: part.device)
    return np.concatenate([torch.cat(list(some)).cpu().numpy() for _, some in groups]).view(np.uint64)


@functools.lru_cache(maxsize=16)
def _weights(device: torch.device) -> torch.Tensor:
    """Odd int64 weights [2, CHUNK]: splitmix64 (Steele, Lea, Flood 2014) of the position, on the host."""
    state = np.arange(1, 2 * CHUNK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(state.view(np.int64).reshape(2, CHUNK)).to(device)


def _mix(index: int) -> int:
    """An odd 64-bit factor for a chunk, so that equal chunks in other places count differently."""
    seed = hashlib.md5(f"chunk {index}".encode(), usedforsecurity=False).digest()
    return int.from_bytes(seed[:8], "little") | 1


make_callable(digest)
