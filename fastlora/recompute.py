"""Layers that keep their input alone and run again in the backward: transformers' own checkpointing, without re-entry.

Running again gives the bits of the first run (everything in an exact step is a function of its inputs, dropout too, which
is drawn by name), so which layers do it changes time and memory and no byte. Fused layers do it by themselves, every n-th
if asked (``fastlora.fuse``); the others, all those of the CPU among them, by what stands here. Chen et al. 2016, Training
Deep Nets with Sublinear Memory Cost.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora.errors import InputError

if TYPE_CHECKING:
    from fastlora.invariant import Invariant

# No random number of torch's is drawn in a layer: the model's own dropouts are off, and LoRA's needs no state.
_RUN_AGAIN = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def check_every(every: int) -> None:
    """Refuse what is no number of layers.

    Raises:
        InputError: ``every`` is no integer from 0.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise InputError(f"activation_checkpointing = {every!r}: allowed is an integer from 0")


def recompute_layers(model: nn.Module, done: Invariant, every: int, fused: Collection[str]) -> int:
    """Let the layers of ``model`` that are not among ``fused`` (paths) keep their input alone.

    Args:
        every: 0: nothing is done; 1: all of them.

    Returns:
        How many layers that is.

    Raises:
        InputError: ``every`` above 1 while there is a layer that is not fused, or a model whose layers do not take
            transformers' checkpointing.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not every:
        return 0
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer) and n not in fused]
    if not layers and not fused:
        raise InputError(f"activation_checkpointing = {every}: the layers of {type(model).__name__} do not take "
                         "transformers' checkpointing; allowed is 0")
    if layers and every > 1:
        raise InputError(f"activation_checkpointing = {every}: {layers[0][0]} does not run as a fused layer; allowed are "
                         "0 (no layer runs again) and 1 (every layer does)")
    for _, layer in layers:
        done.put(layer, "_gradient_checkpointing_func", _RUN_AGAIN)
        done.put(layer, "gradient_checkpointing", True)
    return len(layers)
