"""What a fused decoder layer costs apart from time: launches by kernel, forward and backward, and bytes kept for the backward.

Counted in Triton's interpreter, no GPU needed, and held against ``bench/gate/layer.json`` by tests/interpreter: a change that adds a
launch or a saved activation shows as a difference there. ``TRITON_INTERPRET=1 python -m bench.layer_cost --update`` accepts it.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys

import torch
from torch import nn

import fastlora
from bench.gate_table import FOLDER
from fastlora import exact, stream
from fastlora.exact import discard
from fastlora.files import atomic_write_text
from fastlora.fuse import fuse
from fastlora.kernels import launch
from fastlora.ops import backend
from fastlora.ops import decoder_layer as layer_file

PATH = FOLDER / "layer.json"
TOKENS = 128
# Llama's layer, one with norms of heads and four norms, and one with norms over all heads and after the blocks alone: the kinds the
# families are made of. Checkpointed ones run again in the backward, as far as it reads.
KINDS = ("llama", "gemma3_text", "olmo2", "llama checkpointed", "gemma3_text checkpointed")


def tiny(kind: str) -> nn.Module:
    """One decoder layer of a family at the smallest sizes that keep every kernel in use."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    return fastlora.inject(model, fastlora.LoraConfig(r=4), seed=0)


def kept_bytes(kept) -> int:
    """Bytes of the storages a forward keeps, its input left out: the layer before holds that one."""
    tensors = []
    for name in kept.__slots__:
        value = getattr(kept, name, None)
        tensors += value if isinstance(value, list) else [value]
    own = kept.h.untyped_storage().data_ptr()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(size for at, size in storages.items() if at != own)


def measure(kind: str) -> dict:
    """Launches of one exact step through one layer, and bytes kept for each token (none but h when ``kind`` is a checkpointed one)."""
    family, _, checkpointed = kind.partition(" ")
    model, counts, kept = tiny(family), collections.Counter(), []
    with backend.use("triton"):
        fused = fuse(model, checkpoint_every=int(bool(checkpointed)))
    if fused.refused:
        raise RuntimeError(f"{kind}: {fused.refused[0][1]}")
    plain_launch, plain_forward = launch.Launch.__call__, layer_file._forward

    def counted(self, *arguments):
        counts[self.kernel.fn.__name__] += 1
        plain_launch(self, *arguments)

    def forward(*arguments):
        out, saved = plain_forward(*arguments)
        kept.append(kept_bytes(saved))
        return out, saved

    one = stream.Stream((TOKENS,), TOKENS, (0,))
    h = torch.randn(1, TOKENS, 32, requires_grad=True)
    launch.Launch.__call__, layer_file._forward = counted, forward
    try:
        with backend.use("triton"), stream.use(one), exact(model):
            y = model.get_decoder()(inputs_embeds=h, position_ids=one.positions()[None], use_cache=False).last_hidden_state
            forwards = dict(counts)
            counts.clear()
            y.backward(torch.ones_like(y))
    finally:
        launch.Launch.__call__, layer_file._forward = plain_launch, plain_forward
    discard(model)
    fused.undo()
    found = {
        "forward": dict(sorted(forwards.items())),
        "backward": dict(sorted(counts.items())),
        "launches": sum(forwards.values()) + sum(counts.values()),
    }
    return found if checkpointed else found | {"kept_bytes_a_token": kept[0] // TOKENS}


def differences(found: dict, table: dict) -> list[str]:
    """One line for each figure that is not the table's."""
    lines = []
    for kind in sorted(found.keys() | table.keys()):
        new, old = found.get(kind, {}), table.get(kind, {})
        for what in sorted(new.keys() | old.keys()):
            if new.get(what) != old.get(what):
                lines.append(f"{kind}, {what}: {old.get(what)} -> {new.get(what)}")
    return lines


def load(path: pathlib.Path = PATH) -> dict:
    """The committed figures."""
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Compare with the committed figures, or with ``--update`` replace them."""
    found = {kind: measure(kind) for kind in KINDS}
    if sys.argv[1:] == ["--update"]:
        atomic_write_text(PATH, json.dumps(found, indent=1) + "\n")
        print(f"written: {PATH}")
        return
    lines = differences(found, load())
    print("\n".join(lines) or "launches and kept bytes are the table's")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
