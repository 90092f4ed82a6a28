"""The codebook of a teacher in training: how its codes are used, and placing codes so that it does not collapse."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from smolvla_shared.laq import LAQ

if TYPE_CHECKING:
    from smolvla_shared.teacher_config import TeacherConfig

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


class CodebookKeeper:
    """Places a fresh teacher's codes among the latents of the first batch and, every `replace_every` steps, dead codes
    among the newest latents. Reports how the codes are used, and warns of a collapse.
    """

    def __init__(self, laq: LAQ, config: "TeacherConfig"):
        self.laq, self.config = laq, config
        self.collapsed = 0  # reports of a collapse in a row

    def after_step(self, step: int) -> dict[str, float]:
        """Place codes if this step is due for it; returns the metrics to log."""
        config, vq = self.config, self.laq.vq
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        if step == 1 and config.init_from is None:
            # Latents are differences of similar frames, and far shorter than random codes. All latents would have the
            # same nearest code, and the decoder would see mostly noise.
            place_codes(self.laq, torch.ones(len(vq.codebooks), dtype=torch.bool), generator)
        if step % config.replace_every:
            return {}
        usage = vq._usage.clone()
        vq._usage.zero_()
        replaced = 0
        if step <= (1 - config.settle_share) * config.steps:
            dead = dead_codes(usage, config.dead_below)
            replaced = int(dead.sum())
            place_codes(self.laq, dead, generator)
        per_slot = perplexity(usage.float())
        self.collapsed = self.collapsed + 1 if per_slot.mean() < config.collapse_below else 0
        if self.collapsed == 3:
            tqdm.write(
                f"warning: at step {step} a slot effectively uses {per_slot.mean():.2f} codes of "
                f"{self.laq.config.codebook_size}: the codebook has collapsed. If it does not recover, fine-tune a "
                "healthy teacher (--init-from), lower --optim.lr, or replace dead codes more often (--replace-every)"
            )
        return {
            "usage/perplexity": per_slot.mean().item(),
            "usage/lowest_slot_perplexity": per_slot.min().item(),
            "usage/replaced_codes": replaced,
            **{f"usage/perplexity_of_slot_{slot}": value for slot, value in enumerate(per_slot.tolist())},
        }
