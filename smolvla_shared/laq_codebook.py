"""The codebook of a teacher in training: how its codes are used, and where they go so that it does not collapse."""

from typing import Any

import torch
from torch import Tensor

from smolvla_shared.laq import LAQ

# Rounds of k-means after codes were placed.
KMEANS_ROUNDS = 3


def perplexity(counts: Tensor) -> Tensor:  # [S, C] -> [S]
    """Effective number of codes that each slot uses, exp(entropy): 1 is collapse, C is uniform; 1 without counts."""
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1).exp()


def code_usage(indices: Tensor, codebook_size: int) -> dict[str, Any]:  # [N, S]
    """How many codes each slot uses, and how many sequences of codes there are."""
    counts = torch.stack([torch.bincount(slot, minlength=codebook_size) for slot in indices.T])  # [S, C]
    sequences, repeats = torch.unique(indices, dim=0, return_counts=True)
    return {
        "perplexity": perplexity(counts.double()).tolist(),
        "used_codes": (counts > 0).sum(1).tolist(),
        "counts": counts.tolist(),
        "distinct_sequences": len(sequences),
        "most_common_share": repeats.max().item() / len(indices),
    }


def spread_codes(codes: Tensor, is_free: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    """The codes [C, D], with the free ones [C] moved to where latents [N, D] are far from every other code.

    k-means++ (Arthur and Vassilvitskii, 2007), which takes a latent in proportion to its squared distance to the
    nearest code, then a few rounds of k-means; the codes that are not free stay as they are.
    """
    codes, placed = codes.clone(), ~is_free
    for code in is_free.nonzero().flatten().tolist():
        chance = torch.ones(len(latents))
        if placed.any():
            chance = torch.cdist(latents, codes[placed]).min(1).values.square()
        # Where every latent has a code already, any latent will do.
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
    """Move the free codes [C] of the codebook to where recent latents have none near (spread_codes).

    Processes that agree on the arguments agree on the result: the draws come from the CPU `generator`.
    """
    codes = laq.vq.codebooks
    codes.copy_(spread_codes(codes.cpu(), is_free, laq.vq.recent, generator))


def dead_codes(counts: Tensor, threshold: float) -> Tensor:  # [S, C] -> [C]
    """Which codes were used less than `threshold` times as often as the average code; the slots share the codebook."""
    counts = counts.cpu().float().reshape(-1, counts.shape[-1]).sum(0)
    return counts < threshold * counts.mean()
