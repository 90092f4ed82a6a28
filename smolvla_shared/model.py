"""SmolVLASharedCore: one prefix pass, then one pass of the shared expert for each head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolvla_shared import flow, losses
from smolvla_shared.batch import Batch, FlowTarget
from smolvla_shared.config import CoreConfig
from smolvla_shared.normalization import Statistics
from smolvla_shared.preprocess import nearest_codes, normalize_codebook, pad_width
from smolvla_shared.trunk import Expert, Prefix, Trunk


class FlowHead(nn.Module):
    """Noisy tokens and time -> expert tokens, and expert tokens -> velocity; always float32.

    There are two instances: the latent head (S tokens of D) and the action head (T tokens of A, padded).

    dims: of a token, with and without padding; noisy: whether the padding of noisy tokens is read, else it is zeros
    """

    def __init__(self, num_tokens: int, dims: tuple[int, int], width: int, periods: tuple[float, float], noisy=False):
        super().__init__()
        self.num_tokens, (self.token_dim, self.real_dim) = num_tokens, dims
        self.noisy_padding, self.periods = noisy, periods
        self.in_proj = nn.Linear(self.token_dim, width)
        self.time_mlp_in = nn.Linear(2 * width, width)
        self.time_mlp_out = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, self.token_dim)

    def embed(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Noisy tokens [B, K, T, A] at times [B, K] -> expert tokens [B, K, T, width]."""
        with torch.autocast(x_t.device.type, enabled=False):
            if not self.noisy_padding:
                x_t = pad_width(x_t[..., : self.real_dim], self.token_dim)
            tokens = self.in_proj(x_t)
            time = flow.time_embedding(time, tokens.shape[-1], *self.periods)[:, :, None].expand_as(tokens)
            return self.time_mlp_out(F.silu(self.time_mlp_in(torch.cat([tokens, time], dim=-1))))

    def velocity(self, hidden: Tensor) -> Tensor:
        """Expert output [B, K, T, width] -> velocity [B, K, T, A]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out_proj(hidden.float())


class CodeHead(nn.Module):
    """The latent head that classifies: S learned tokens -> logits of the teacher's C codes; always float32.

    Its targets and samples are those of a FlowHead of latents. The code of a target is the nearest row of its codebook;
    a sample, the predicted mean, is the codebook weighted by the probabilities.
    """

    def __init__(self, num_tokens: int, codebook_size: int, token_dim: int, width: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.tokens = nn.Parameter(torch.randn(num_tokens, width))
        self.out_proj = nn.Linear(width, codebook_size)
        # The codes as targets (preprocess.normalize_codebook); `learn_codes` sets them.
        self.register_buffer("codebook", torch.zeros(num_tokens, codebook_size, token_dim))

    def logits(self, hidden: Tensor) -> Tensor:
        """Expert output [B, 1, S, width] -> logits [B, S, C]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out_proj(hidden[:, 0].float())


class SmolVLASharedCore(nn.Module):
    """The shared policy: SmolVLM prefix, expert, and a flow-matching head each for latent and real actions. The latent
    one may be a CodeHead.

    A head exists if the config has its dimensions. `core(batch)` is the only training entry: DDP and FSDP act in
    `__call__`.
    """

    def __init__(self, config: CoreConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.expert = Expert(config)
        self.state_proj = nn.Linear(config.max_state_dim, self.trunk.hidden_size)
        width, periods = self.expert.width, (config.min_period, config.max_period)
        if config.codebook_size:
            self.latent_head = CodeHead(config.code_seq_len, config.codebook_size, config.latent_dim, width)
        elif config.latent_vector_dim:
            self.latent_head = FlowHead(config.code_seq_len, (config.latent_dim, config.latent_dim), width, periods)
        if config.action_dim:
            dims = config.max_action_dim, config.action_dim
            self.action_head = FlowHead(config.chunk_size, dims, width, periods, config.noisy_padding)

    def learn_codes(self, codebook: Tensor, statistics: Statistics) -> None:
        """Tell a latent head that classifies which codes [C, D] there are; their latents have these statistics."""
        if self.config.codebook_size:
            self.latent_head.codebook.copy_(normalize_codebook(codebook, self.config.code_seq_len, statistics))

    def head(self, name: str) -> FlowHead | CodeHead:
        return self.get_submodule(f"{name}_head")

    def encode(self, batch: Batch) -> Prefix:
        """The one pass over images, text and state."""
        with self.trunk.own_precision():
            return self.trunk(batch, self.state_proj(batch.state))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The error of every target token: {head: [B, T]}. A FlowHead's is the flow-matching error, averaged over draws
        and real dimensions; a CodeHead's the cross-entropy.

        batch.masks says which tokens count; the caller applies the masks and averages (losses.masked_mean).
        """
        prefix = self.encode(batch)
        return {name: self.error(self.head(name), target, prefix) for name, target in batch.targets.items()}

    def error(self, head: FlowHead | CodeHead, target: FlowTarget, prefix: Prefix) -> Tensor:  # [B, T]
        if isinstance(head, FlowHead):
            return self.flow_error(head, target, prefix)
        logits = self.code_logits(head, prefix, len(target.value))
        return F.cross_entropy(logits.transpose(1, 2), nearest_codes(target.value, head.codebook), reduction="none")

    def code_logits(self, head: CodeHead, prefix: Prefix, batch_size: int) -> Tensor:  # [B, S, C]
        return head.logits(self.expert(head.tokens.expand(batch_size, 1, -1, -1), prefix))

    def flow_error(self, head: FlowHead, target: FlowTarget, prefix: Prefix) -> Tensor:
        known = ~target.value.isnan()[..., : head.real_dim]
        value = target.value.nan_to_num()[:, None].expand_as(target.noise)  # [B, K, T, A]
        x_t, u_t = flow.interpolate(value, target.noise, target.time)
        v_t = head.velocity(self.expert(head.embed(x_t, target.time), prefix))
        # A loss on the padded action dimensions would only teach the head to output their noise.
        return losses.token_error(v_t[..., : head.real_dim], u_t[..., : head.real_dim], known)  # [B, T]

    @torch.no_grad()
    def sample(
        self, batch: Batch, name: str, noise: Tensor, num_steps: int | None = None, guide: flow.Guide | None = None
    ) -> Tensor:
        """Generate one head's tokens from noise [B, T, A] by Euler integration: [B, T, real A], still normalised.

        guide: changes the velocity of each step (flow.euler_sample)

        A CodeHead draws nothing: its tokens are its codes, weighted by their probabilities.
        """
        head = self.head(name)
        prefix = self.encode(batch)
        if isinstance(head, CodeHead):
            probabilities = self.code_logits(head, prefix, len(noise)).softmax(-1)
            return torch.einsum("bsc, scd -> bsd", probabilities, head.codebook)

        def velocity(x_t: Tensor, time: Tensor) -> Tensor:
            return head.velocity(self.expert(head.embed(x_t[:, None], time[:, None]), prefix))[:, 0]

        return flow.euler_sample(velocity, noise, num_steps or self.config.flow_steps, guide)[..., : head.real_dim]
