"""PEFT in the loop that people write: a padded batch, the loss of its tokens over the batch's count, torch's AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch.nn import functional

from verify.oracle.digest import md5_of_tensor
from verify.subject import Cut

IGNORED = -100


def train(
    model: torch.nn.Module,
    batches: Sequence[Sequence],
    cuts: dict[str, Cut],
    targets: list[str],
    seed: int,
    rate: float,
) -> dict[str, list[dict[str, str]]]:
    """MD5 of every adapter tensor after each step, by cut.

    Args:
        model: a causal model; gets PEFT's adapters of rank 16 on ``targets``.
        batches: the rows of each step; a row has ``input_ids`` and unshifted ``labels``, -100 where not supervised.
        cuts: for each name, the indices of each micro-batch's rows.
    """
    import peft

    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks transformers for this by its old name: nothing that who reads verify's words could change
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    found = {}
    for cut_name, cut in cuts.items():
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
        optimizer, digests = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0), []
        for rows in batches:
            supervised = sum(label != IGNORED for row in rows for label in row.labels[1:])
            for part in cut:
                _loss(model, [rows[i] for i in part], device).div(int(supervised)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            digests.append({name: md5_of_tensor(p) for name, p in trained.items()})
        found[cut_name] = digests
    return found


def _loss(model: torch.nn.Module, rows: Sequence, device: torch.device) -> torch.Tensor:
    """Summed loss of one padded batch."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length], labels[i, :length] = torch.as_tensor(row.input_ids), torch.as_tensor(row.labels)
        mask[i, :length] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    wanted = labels[:, 1:].reshape(-1).to(device)
    return functional.cross_entropy(
        logits[:, :-1].reshape(len(wanted), -1).float(), wanted, ignore_index=IGNORED, reduction="sum"
    )
