"""The digest's rule, and the fingerprint: what changes it, what must not."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from lora_standin import StandInModel

import fastlora.digest as module
from fastlora.adapter import adapter_state
from fastlora.config import LoraConfig
from fastlora.digest import (
    Fingerprint,
    adapter_tensors,
    digest,
    fingerprint,
    frozen_fingerprint,
    frozen_tensors,
)
from fastlora.errors import InputError
from fastlora.inject import inject
from tests.unit.tiny_run import tiny_model


def test_digest_is_md5_over_sorted_lines() -> None:
    tensors = {
        "b": torch.tensor([[1.0, -2.0]]),
        "a": torch.tensor([1, 2, 3], dtype=torch.int64),
        "c": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    raw = {
        "a": b"".join(i.to_bytes(8, "little") for i in (1, 2, 3)),
        "b": bytes.fromhex("0000803f000000c0"),
        "c": bytes.fromhex("c03f"),
    }
    md5 = {n: hashlib.md5(b).hexdigest() for n, b in raw.items()}
    text = f"a int64 [3] {md5['a']}\nb float32 [1,2] {md5['b']}\nc bfloat16 [] {md5['c']}\n"
    assert digest(tensors) == hashlib.md5(text.encode()).hexdigest()


def test_digest_of_a_model_is_that_of_its_file() -> None:
    model = StandInModel()
    names = [f"{m}.lora_{x}.weight" for m, x in itertools.product(("v_proj", "q_proj"), "BA")]
    file = {f"base_model.model.{n}": model.get_parameter(n).detach().clone() for n in names}
    assert digest(model) == digest(file)
    assert module(model) == digest(model)  # the module itself answers the call


def test_digest_ignores_strides_and_sees_the_sign_of_zero() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert digest({"x": x.T.contiguous().T}) == digest({"x": x})
    assert digest({"x": torch.tensor([0.0])}) != digest({"x": torch.tensor([-0.0])})


@pytest.mark.parametrize("function", [digest, fingerprint])
def test_no_data_is_refused(function) -> None:
    with pytest.raises(InputError, match="meta"):
        function({"x": torch.empty(2, device="meta")})


@pytest.mark.parametrize("function", [digest, fingerprint])
def test_empty_sets_and_tensors_have_a_value(function) -> None:
    assert len({function({}), function({"x": torch.empty(0)}), function({"x": torch.empty(0, 3)})}) == 3


def test_digest_needs_lora_linears() -> None:
    with pytest.raises(InputError, match="fastlora.inject"):
        digest(torch.nn.Linear(2, 2))


def oracle(tensors: dict[str, torch.Tensor], chunk: int) -> str:
    """The documented rule in Python's own integers."""
    def splitmix(position: int) -> int:
        z = position * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return (z ^ (z >> 31)) | 1

    words, head = [], ""
    for name in sorted(tensors):
        t = tensors[name]
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        raw += bytes(-len(raw) % 4)
        words += [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]
        head += f"{name} {str(t.dtype)[6:]} [{','.join(map(str, t.shape))}]\n"
    sums = [0, 0]
    for i, x in enumerate(words):
        at, index = i % chunk, i // chunk
        for which in range(2):
            seed = hashlib.md5(f"chunk {2 * index + which}".encode()).digest()
            factor = int.from_bytes(seed[:8], "little") | 1
            sums[which] += splitmix(1 + at + which * chunk) * factor * x
    text = f"{sums[0] % 2**64:016x}{sums[1] % 2**64:016x}\n{head}"
    return hashlib.md5(text.encode()).hexdigest()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    module._weights.cache_clear()
    monkeypatch.setattr(module, "CHUNK", 16)
    yield 16
    module._weights.cache_clear()


def mixed() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(5, 9, generator=g),
        "a.weight": torch.randn(7, generator=g).bfloat16(),
        "c": torch.randint(0, 255, (13,), generator=g).to(torch.uint8)[1:],
        "d": torch.tensor(True),
        "e": torch.randn(16, 2, generator=g).T,
    }


def test_fingerprint_equals_python_integers(small_chunks: int) -> None:
    assert fingerprint(mixed()) == oracle(mixed(), small_chunks)


def test_fingerprint_has_no_order_of_names_and_ignores_threads() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(700, 401, generator=g), "y": torch.randn(33, generator=g)}
    want, before = fingerprint(tensors), torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert fingerprint(dict(reversed(tensors.items()))) == want
    finally:
        torch.set_num_threads(before)


def test_fingerprint_sees_every_small_change() -> None:
    base = mixed()
    seen = {fingerprint(base)}
    changed = []
    for name, index, bit in [("b.weight", 0, 0), ("b.weight", 44, 31), ("e", 31, 30)]:
        t = base[name].clone().contiguous()
        # 1 << 31 does not fit an int32; the same bits are the smallest one
        t.view(-1).view(torch.int32)[index] ^= (1 << bit) if bit < 31 else -(2**31)
        changed.append({**base, name: t})
    flipped = base["b.weight"].clone()
    flipped.view(-1)[[1, 3]] *= -1  # two sign bits must not cancel
    swapped = base["b.weight"].clone()
    swapped.view(-1)[[1, 3]] = swapped.view(-1)[[3, 1]]
    changed += [{**base, "b.weight": flipped}, {**base, "b.weight": swapped}]
    changed += [{**base, "b.weight": base["b.weight"].T.contiguous().view(5, 9)}]
    changed += [{**base, "b.weight": base["b.weight"].view(9, 5)}]  # the same bytes, another shape
    renamed = dict(base)
    renamed["d2"] = renamed.pop("d")
    changed.append(renamed)
    seen |= {fingerprint(c) for c in changed}
    assert len(seen) == 1 + len(changed)


def test_fingerprint_sees_swapped_chunks(small_chunks: int) -> None:
    x = torch.arange(48, dtype=torch.int32)
    y = torch.cat([x[16:32], x[:16], x[32:]])
    assert fingerprint({"x": x}) != fingerprint({"x": y})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_fingerprint_and_digest_are_equal_on_cuda() -> None:
    tensors = {**mixed(), "big": torch.randn(1000, 999)}
    on_device = {n: t.cuda() for n, t in tensors.items()}
    assert fingerprint(on_device) == fingerprint(tensors)
    assert digest(on_device) == digest(tensors)


def test_frozen_fingerprint_leaves_out_the_adapter_only() -> None:
    model = StandInModel()
    want = frozen_fingerprint(model)
    model.fill_b()
    assert frozen_fingerprint(model) == want
    assert sorted(frozen_tensors(model)) == [
        "embed.weight", "norm.bias", "norm.weight", "q_proj.weight", "v_proj.weight"
    ]
    model.v_proj.weight.data[9, 11] += 1e-3
    assert frozen_fingerprint(model) != want
    assert all("lora" in n for n in adapter_tensors(model))


def test_fingerprint_and_codes_name_the_tensor_that_changed(monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    module._weights.cache_clear()
    draw = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(size, generator=draw) for n, size in (("b", 150), ("a", 3), ("c", 64), ("d", 0), ("e", 9))}
    whole, codes = Fingerprint(tensors).and_codes()
    assert whole == fingerprint(tensors) and len(codes) == 4 * len(tensors)
    for name, tensor in tensors.items():
        for place in {0, len(tensor) - 1} if len(tensor) else ():
            other = tensor.clone()
            other[place] += 1
            changed, theirs = Fingerprint(tensors | {name: other}).and_codes()
            odd = [n for i, n in enumerate(sorted(tensors)) if codes[4 * i :][:4] != theirs[4 * i :][:4]]
            assert changed != whole and odd == [name]
    module._weights.cache_clear()


def test_chunks_summed_together_give_the_sums_of_each(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 64)
    module._weights.cache_clear()
    draw = torch.Generator().manual_seed(0)
    for sizes in ([5, 300, 7, 64, 1, 131], [64, 64, 64], [700], [3] * 50):
        tensors = [torch.randn(n, generator=draw) for n in sizes]
        chunks = list(module._chunks(tensors))
        together = module._Group(chunks).running_sums()
        assert torch.equal(together, torch.cat([module._Group([chunk]).running_sums() for chunk in chunks]))
    module._weights.cache_clear()


def test_a_model_has_one_digest_whatever_wraps_it():
    model = inject(tiny_model(), LoraConfig(r=4), seed=1)
    wrapped = torch.nn.ModuleDict({"module": model})
    assert adapter_tensors(wrapped).keys() == adapter_tensors(model).keys() == adapter_state(wrapped).keys()
    assert digest(wrapped) == digest(model)
