"""A fused layer launches and keeps what the committed table says; one more launch or kept tensor shows."""

from __future__ import annotations

import pytest
import torch

from bench import layer_cost
from fastlora.ops import decoder_layer

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("kind", layer_cost.KINDS)
def test_fused_layer_launches_and_keeps_what_the_table_says(kind):
    assert layer_cost.differences({kind: layer_cost.measure(kind)}, {kind: layer_cost.load()[kind]}) == []


def test_a_kept_activation_and_a_launch_more_are_told(monkeypatch):
    plain = decoder_layer._forward

    def forward(plan, h, place, drops):
        out, kept = plain(plan, h, place, drops)
        decoder_layer.norm_forward(h, plan.before_mlp.weight, 1e-6, "round_first")  # a launch too many
        kept.y = torch.empty_like(h)  # an activation too many
        return out, kept

    monkeypatch.setattr(decoder_layer, "_forward", forward)
    lines = layer_cost.differences({"llama": layer_cost.measure("llama")}, {"llama": layer_cost.load()["llama"]})
    assert any("norm_forward_kernel" in line for line in lines) and any("kept_bytes_a_token" in line for line in lines)
