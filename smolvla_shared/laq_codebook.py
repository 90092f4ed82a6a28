"""The codebook of a teacher in training: how its codes are used, and placing codes so that it does not collapse."""

from typing import Any

import torch
from torch import Tensor

from smolvla_shared.laq import LAQ

# Rounds of k-means after k-means++.
KMEANS_ROUNDS = 3


def perplexity(counts: Tensor) -> Tensor:  # [S, C] -> [S]
    """Effective number of codes that each slot uses, exp(entropy). 1: collapsed, or no counts. C: uniform use."""
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1).exp()


def code_usage(indices: Tensor, codebook_size: int) -> dict[str, Any]:  # [N, S]
    """How each slot uses its codes, and how often code sequences repeat, as JSON values."""
    counts = torch.stack([torch.bincount(slot, minlength=codebook_size) for slot in indices.T])  # [S, C]
    sequences, repeats = torch.unique(indices, dim=0, return_counts=True)
    return {
        "perplexity": perplexity(counts.double()).tolist(),
        "counts": counts.tolist(),
        "distinct_sequences": len(sequences),
        "most_common_share": repeats.max().item() / len(indices),
    }


def spread_codes(codes: Tensor, is_free: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    """The codes [C, D], the free ones ([C] bool) moved to latents [N, D] that are far from every other code.

    k-means++ (Arthur and Vassilvitskii, 2007) takes a latent with a probability proportional to its squared distance to
    the nearest code. A few rounds of k-means follow. Codes that are not free stay where they are.
    """
    codes, placed = codes.clone(), ~is_free
    for code in is_free.nonzero().flatten().tolist():
        chance = torch.ones(len(latents))
        if placed.any():
            chance = torch.cdist(latents, codes[placed]).min(1).values.square()
        # 1e-12: if every latent lies on a code, any latent will do.
        codes[code] = latents[torch.multinomial(chance + 1e-12, 1, generator=generator)[0]]
        placed[code] = True
    for _ in range(KMEANS_ROUNDS):
        nearest = torch.cdist(latents, codes).min(1).indices
        for code in is_free.nonzero().flatten().tolist():
            if (nearest == code).any():
                codes[code] = latents[nearest == code].mean(0)
    return codes


@torch.no_grad()
def place_codes(laq: LAQ, is_free: Tensor, generator: torch.Generator) -> None:
    """Move the free codes ([C] bool) of the codebook to recent latents that have no code near (spread_codes).

    Equal arguments give equal codes on all processes: everything is drawn and computed on the CPU.
    """
    codes = laq.vq.codebooks
    codes.copy_(spread_codes(codes.cpu(), is_free, laq.vq.recent, generator))


def dead_codes(counts: Tensor, threshold: float) -> Tensor:  # [S, C] -> [C]
    """Codes that all slots together used less than `threshold` times as often as the average code, [C] bool."""
    counts = counts.cpu().float().reshape(-1, counts.shape[-1]).sum(0)
    return counts < threshold * counts.mean()
