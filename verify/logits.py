"""How far the fp32 logits of two correct implementations of one LoRA model may lie apart: derived,
not picked.

Write every fp32 value as what exact arithmetic makes of its inputs, plus a local rounding error. To
first order the logits' error is the sum over all such values v of (d logits / d v) times v's local
error, so

    |logits - exact| <= sum over v of |d logits / d v| * local(v)

The Jacobian is taken by automatic differentiation of the whole model, the local errors are the
textbook ones (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1: gamma_n
= n u / (1 - n u), u = 2^-24):

    linear layer with adapter         gamma_(K + r + 4) (|x| |W|^T + s |x| |A|^T |B|^T + |bias|)
    linear layer                      gamma_(K + 1) (|x| |W|^T + |bias|)
    RMS norm over H elements          gamma_(H + 8) |out|
    gate * up after SiLU              gamma_8 |value|   (seen at down_proj's input)
    residual sums                     gamma_2 |value|   (at the second norm's input, at a layer's output)
    attention before o_proj           scores carry gamma_(D + 12) |q| |k| / sqrt(D), which moves every probability by
                                      twice that, relatively; then T products with values: in all
                                      (2 * scores + gamma_(T + 12)) * max |v|

A merged layer is inside too: W + s B A in fp32 is off by gamma_(r + 3) (|W| + s |B| |A|) at most, and its product with
x by gamma_K of the same terms.

Two implementations may err in opposite directions, so their distance is at most twice this; the
second-order terms are smaller than the first by a factor of about 1e-5 here, which the rounding up
of every gamma covers.
"""

from __future__ import annotations

import torch
from torch import nn

from verify import bounds


def gamma(terms: int) -> float:
    """gamma_n of fp32."""
    return float(bounds.gamma(terms, bounds.unit_roundoff(torch.float32)))


def logit_bound(model: nn.Module, ids: torch.Tensor, last: int = 0) -> torch.Tensor:
    """The bound on the difference of two models' logits [B, T, V]; ``model`` is the PEFT model
    (plain torch). With ``last`` only those of that many last tokens, [B, last, V], which costs less."""
    values: list[tuple[torch.Tensor, torch.Tensor]] = []
    attention: dict[str, tuple[float, float, int]] = {}
    hooks = []

    def note(value: torch.Tensor, local: torch.Tensor) -> None:
        values.append((value, local.detach().expand_as(value)))

    def after(name: str, module: nn.Module):
        def hook(_, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                note(output, _local(name, module, inputs[0] if inputs else None, output))

        hooks.append(module.register_forward_hook(hook))

    def before(module: nn.Module, local):
        hooks.append(
            module.register_forward_pre_hook(lambda _, inputs: note(inputs[0], local(inputs[0])))
        )

    for name, module in model.named_modules():
        ending = name.rpartition(".")[2]
        kind = type(module).__name__
        adapted = hasattr(module, "base_layer")
        inside = any(part in name for part in (".base_layer", ".lora_A", ".lora_B"))
        if (
            adapted
            or (isinstance(module, nn.Linear) and not inside)
            or kind.endswith(("Norm", "DecoderLayer"))
        ):
            after(name, module)
        if ending == "down_proj":
            before(module, lambda x: gamma(8) * x.abs())
        elif ending == "post_attention_layernorm":
            before(module, lambda x: gamma(2) * x.abs())
        elif ending == "self_attn":
            _watch_attention(module, attention, name, hooks)
            before(module.o_proj, lambda x, name=name: _attention_error(x, attention[name]))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    try:
        logits = model(ids).logits[:, -last:]
    finally:
        for hook in hooks:
            hook.remove()
    units = torch.eye(logits.numel(), device=logits.device).view(-1, *logits.shape)
    jacobians = torch.autograd.grad(
        logits, [value for value, _ in values], units, is_grads_batched=True
    )
    total = torch.zeros(logits.numel(), dtype=torch.float64)
    for jacobian, (_, local) in zip(jacobians, values, strict=True):
        total += (jacobian.flatten(1).abs().double() @ local.flatten().double()).cpu()
    return 2 * total.view(logits.shape)


def _local(name: str, module: nn.Module, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    kind = type(module).__name__
    if kind.endswith("Norm"):
        return gamma(out.shape[-1] + 8) * out.abs()
    if kind.endswith("DecoderLayer"):
        return gamma(2) * out.abs()
    base = getattr(module, "base_layer", module)
    size = x.abs() @ base.weight.abs().T + (0 if base.bias is None else base.bias.abs())
    terms = base.in_features + 1
    if base is not module:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        size = size + module.scaling["default"] * (x.abs() @ a.abs().T @ b.abs().T)
        terms += a.shape[0] + 3
    return gamma(terms) * size


def _watch_attention(module: nn.Module, seen: dict, name: str, hooks: list) -> None:
    width, found = module.head_dim, {}
    for short in ("q_proj", "k_proj", "v_proj"):

        def hook(_, __, output, short=short):
            heads = output.detach().unflatten(-1, (-1, width))
            found[short] = (heads.norm(dim=-1).max().item(), heads.abs().max().item())
            if len(found) == 3:
                scores = gamma(width + 12) * found["q_proj"][0] * found["k_proj"][0] * width**-0.5
                seen[name] = (scores, found["v_proj"][1], output.shape[1])

        hooks.append(getattr(module, short).register_forward_hook(hook))


def _attention_error(x: torch.Tensor, seen: tuple[float, float, int]) -> torch.Tensor:
    scores, largest, length = seen
    return torch.full_like(x, (2 * scores + gamma(length + 12)) * largest)
