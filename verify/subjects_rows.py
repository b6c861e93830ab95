"""fastlora's operations for the claim ``invariance``, one by one through the functions that its models call."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch

import fastlora
from fastlora import blocks, stream
from fastlora.invariant import make_invariant
from fastlora.ops import backend
from fastlora.ops.attention import attention
from fastlora.ops.frozen_linear import frozen_linear
from fastlora.ops.glu import ACTIVATIONS, glu
from fastlora.ops.linear_cross_entropy import LossRecord, linear_cross_entropy
from fastlora.ops.rms_norm import STYLES, rms_norm
from verify.subject import DOCUMENT, ROW, Operation, Packed

SEED = 7  # of the streams that name dropout masks
HEADS, KEY_HEADS, HEAD = 4, 2, 16
IGNORED = -100

# What an operation's body gets: the inputs, which want a gradient, the case, and the stream's places.
Body = Callable[[torch.Tensor, Packed, stream.Stream], torch.Tensor]


class FastloraOperations:
    """Every row-wise and per-document operation of a training step on one device.

    Args:
        device: "cpu" or "cuda".
        dtypes: working dtypes.
        forced: "triton" for the kernels in the interpreter, on a CPU.
    """

    def __init__(self, device: str, dtypes: tuple[torch.dtype, ...], forced: str | None = None) -> None:
        self.device, self.dtypes, self.forced = device, dtypes, forced
        self.kernels = forced == "triton" or device == "cuda"
        self.alignment = stream.alignment_for("cuda" if self.kernels else device)
        # The interpreter runs a program at a time, so its cases are few and short.
        self.streams = (128, 256) if forced else (128, 256, 8192 if device == "cuda" else 1024)
        self.documents = 1 if forced else 3
        self.operations = tuple(self._operations())

    def _operations(self) -> Iterator[Operation]:
        # A row of a kernel knows no neighbours; on CPU a tile of rows is one product.
        sees = ROW if self.kernels else DOCUMENT
        deep = {"cpu": (576, 48), "cuda": (4096, 1024)}[self.device]
        yield self._of("frozen linear", 96, 80, functools.partial(_frozen, True), sees)
        yield self._of("frozen linear, deep", *deep, functools.partial(_frozen, False), sees)
        yield self._of("LoRA linear", 96, 80, functools.partial(_lora, 8, 0.0), sees)
        yield self._of("LoRA linear, dropout", 64, 33, functools.partial(_lora, 16, 0.1), DOCUMENT)
        for style in STYLES:
            yield self._of(f"RMSNorm, {style}", 72, 72, functools.partial(_norm, style), sees)
        yield self._of("RoPE", (HEADS + KEY_HEADS) * HEAD, (HEADS + KEY_HEADS) * HEAD,
                       _rotate_by_kernel if self.kernels else _rotate_by_model, DOCUMENT)  # fmt: skip
        for name in ACTIVATIONS:
            yield self._of(f"gate, {name}", 2 * 88, 88, functools.partial(_gate, name), sees)
        kinds = {"": (None, None), ", window": (40, None), ", soft-cap": (None, 5.0), ", both": (24, 9.0)}
        for name, (window, softcap) in kinds.items():
            body = functools.partial(_attend, window, softcap)
            yield self._of(f"attention{name}", (HEADS + 2 * KEY_HEADS) * HEAD, HEADS * HEAD, body, DOCUMENT)
        losses = {"": {}, ", soft-cap": {"softcap": 4.0}, ", smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3}}
        for name, keywords in losses.items():
            yield Operation(f"head and loss{name}", 64, 1, functools.partial(self._head, keywords), DOCUMENT)
        width = 256 if self.device == "cuda" else 32
        # A whole layer in the interpreter takes a minute a case.
        for family in () if self.forced else ("llama", "qwen3", "gemma3_text", "olmo2"):
            # OLMo 2 has its norms after the products.
            garbage = 2.0**-8 if family == "olmo2" else 1.0
            yield self._of(f"decoder layer, {family}", width, width, functools.partial(_layer, family), DOCUMENT, garbage)

    def _of(self, name: str, features: int, outputs: int, body: Body, sees: str, garbage: float = 1.0) -> Operation:
        return Operation(name, features, outputs, functools.partial(self._run, body), sees, garbage)

    @contextlib.contextmanager
    def _place(self, packed: Packed) -> Iterator[stream.Stream]:
        made = stream.Stream(packed.lengths, packed.alignment, packed.ids, SEED, 0)
        forced = backend.use(self.forced) if self.forced else contextlib.nullcontext()
        one = blocks.single_thread() if self.device == "cpu" and not self.kernels else contextlib.nullcontext()
        with stream.use(made), forced, one:
            yield made

    def _run(self, body: Body, packed: Packed) -> dict[str, list[torch.Tensor]]:
        x = packed.x.detach().clone().requires_grad_()
        with self._place(packed) as made:
            y = body(x, packed, made)
            (dx,) = torch.autograd.grad(y, (x,), packed.dy)
        return {"y": packed.cut(y.detach()), "dx": packed.cut(dx)}

    def _head(self, keywords: dict[str, float], packed: Packed) -> dict[str, list[torch.Tensor]]:
        """Each document's loss, and the gradient of its hidden rows; one row in five is not supervised."""
        hidden = packed.x.detach().clone().requires_grad_()
        (weight,) = _weights(packed, (131, hidden.shape[1]))
        labels = torch.full((len(hidden),), IGNORED, device=hidden.device)
        for name, (start, stop) in zip(packed.ids, packed.spans):
            place = torch.arange(stop - start, device=hidden.device)
            labels[start:stop] = torch.where((place % 5) == 1, IGNORED, (place * 37 + name) % len(weight))
        record = LossRecord()
        with self._place(packed):
            loss, _ = linear_cross_entropy(hidden, weight, labels, record=record, **keywords)
            (dx,) = torch.autograd.grad(loss, (hidden,))
        return {"loss": list(record.documents.cpu()), "dx": packed.cut(dx)}


def _weights(packed: Packed, *shapes: tuple[int, ...], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Frozen tensors drawn from the case's seed, scaled by their last size."""
    draw = torch.Generator().manual_seed(packed.seed)
    like = packed.x
    return [
        (torch.randn(shape, generator=draw) / math.sqrt(shape[-1])).to(like.device, dtype or like.dtype)
        for shape in shapes
    ]


def _frozen(has_bias: bool, x, packed, made):
    weight, bias = _weights(packed, (packed.dy.shape[1], x.shape[1]), (packed.dy.shape[1],))
    return frozen_linear(x, weight, bias if has_bias else None)


def _lora(rank: int, dropout: float, x, packed, made):
    outer, inner = packed.dy.shape[1], x.shape[1]
    (weight,) = _weights(packed, (outer, inner))
    a, b = _weights(packed, (rank, inner), (outer, rank), dtype=torch.float32)
    key = fastlora.DropoutKey(packed.seed, made.token_keys(x.device)) if dropout else None
    return fastlora.lora_linear(x, weight, a, b, 2.0, dropout=dropout, key=key)


def _norm(style: str, x, packed, made):
    (weight,) = _weights(packed, (x.shape[1],))
    return rms_norm(x, weight * math.sqrt(x.shape[1]), 1e-6, style)


def _gate(activation: str, x, packed, made):
    gate, up = x.chunk(2, dim=1)
    return glu(gate.contiguous(), up.contiguous(), activation)


def _attend(window: int | None, softcap: float | None, x, packed, made):
    widths = [heads * HEAD for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (t.view(1, len(x), -1, HEAD).transpose(1, 2) for t in x.split(widths, dim=1))
    return attention(q, k, v, made.spans, HEAD**-0.5, window, softcap).reshape(len(x), -1)


@functools.cache
def _rotary():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=HEADS * HEAD, num_attention_heads=HEADS))


def _angles(x, made):
    rotary = _rotary().to(x.device)
    return rotary(x, made.positions(x.device)[None])


def _rotate_by_model(x, packed, made):
    """transformers' own, which the CPU path leaves in the model."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    widths = [heads * HEAD for heads in (HEADS, KEY_HEADS)]
    q, k = (t.view(1, len(x), -1, HEAD).transpose(1, 2) for t in x.split(widths, dim=1))
    turned = apply_rotary_pos_emb(q, k, *_angles(x, made))
    return torch.cat([t.transpose(1, 2).reshape(len(x), -1) for t in turned], dim=1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        from fastlora.kernels.rope import rotate  # triton is absent on macOS and Windows

        ctx.save_for_backward(cos, sin)
        y = x.clone()
        rotate(y, cos, sin, HEADS + KEY_HEADS, HEAD)
        return y

    @staticmethod
    def backward(ctx, dy):
        from fastlora.kernels.rope import rotate

        dx = dy.clone()
        rotate(dx, *ctx.saved_tensors, HEADS + KEY_HEADS, HEAD, inverse=True)
        return dx, None, None


def _rotate_by_kernel(x, packed, made):
    return _Rotate.apply(x, *_angles(x, made))


@functools.lru_cache(maxsize=16)
def _decoder(family: str, device: str, dtype: torch.dtype, width: int):
    """A decoder of one layer with adapters, made invariant (on a GPU: fused)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, hidden_size=width, intermediate_size=width + width // 2, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, vocab_size=96, max_position_embeddings=16384, sliding_window=40,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        fastlora.inject(model.to(device, dtype), fastlora.LoraConfig(r=4), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    done = make_invariant(model).fused
    if done is not None and not done.layers:
        raise RuntimeError(f"the layer of {family} is not fused: {done.refused}")
    return model.get_decoder()


def _layer(family: str, x, packed, made):
    """One whole decoder layer with the final norm."""
    decoder = _decoder(family, x.device.type, x.dtype, x.shape[1])
    places = made.positions(x.device)[None]
    return decoder(inputs_embeds=x[None], position_ids=places, use_cache=False).last_hidden_state[0]
