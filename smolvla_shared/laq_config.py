"""The shape of a LAQ, the teacher: its options, and which of them go together."""

from dataclasses import dataclass

from smolvla_shared import ranges

# (kernel, stride, padding) of the slot CNN's convolutions. The first halves the grid, the second depends on S.
FIRST_CONV = ((3, 3), 2, 1)
SECOND_CONV = {
    1: ((4, 4), 1, 0),
    2: ((3, 4), 1, 0),
    4: ((3, 3), 1, 0),
    16: ((3, 3), 2, 1),
    64: None,
    256: None,
}


def slots_of_grid(code_seq_len: int, grid: int) -> int:
    """Number of slots that the CNN for `code_seq_len` makes of grid x grid patches; 0 if a kernel does not fit."""
    size = [grid, grid]
    for conv in filter(None, (FIRST_CONV, SECOND_CONV[code_seq_len])):
        kernel, stride, padding = conv
        size = [max(0, (n + 2 * padding - k) // stride + 1) for n, k in zip(size, kernel, strict=True)]
    return size[0] * size[1]


@dataclass(frozen=True)
class LAQConfig:
    """The shape of a LAQ. The defaults are those of LAPA's released Open-X weights."""

    # Width of the tokens.
    dim: ranges.Size = 1024
    # D, width of a code and of one latent token.
    quant_dim: ranges.Size = 32
    # C, codes in the codebook, which all slots share.
    codebook_size: ranges.Codes = 8
    # Side of the square that both frames are resized to (aspect ratio not kept), pixels.
    image_size: ranges.Size = 256
    # Side of a square patch, pixels.
    patch_size: ranges.Size = 32
    # Layers of the spatial transformers, encoder and decoder each.
    spatial_depth: ranges.LayersSome = 8
    # Layers of the encoder's temporal transformer.
    temporal_depth: ranges.Layers = 8
    # Width of an attention head.
    dim_head: ranges.Size = 64
    # Attention heads.
    heads: ranges.Few = 16
    # S, codes of a latent action: 1, 2, 4, 16, 64 or 256. The latent vector has S * quant_dim dimensions.
    code_seq_len: int = 4
    # Decode the change from the first frame instead of the second frame, and take the mean error of repeating the first
    # frame as the unit of the loss. LAPA's teachers do neither.
    predicts_change: bool = False
    # The decoder also moves the pixels of the first frame (an optical flow) before it adds the change. LAPA's do not.
    moves_pixels: bool = False
    # Embed each frame's difference to the first frame, too. LAPA's teachers do not.
    sees_change: bool = False

    def __post_init__(self):
        ranges.check(self)
        if self.moves_pixels and not self.predicts_change:
            raise ValueError("moves_pixels moves the first frame's pixels: it needs predicts_change")
        if self.code_seq_len not in SECOND_CONV:
            raise ValueError(f"code_seq_len must be one of {sorted(SECOND_CONV)}, got {self.code_seq_len}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if slots_of_grid(self.code_seq_len, self.grid) != self.code_seq_len:
            sizes = [
                g * self.patch_size for g in range(1, 65) if slots_of_grid(self.code_seq_len, g) == self.code_seq_len
            ]
            raise ValueError(
                f"image_size {self.image_size} with patch_size {self.patch_size} is a grid of {self.grid}x{self.grid}, "
                f"which does not reduce to code_seq_len {self.code_seq_len}; "
                f"with this patch_size, image_size must be one of {sizes}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.patch_size

    @property
    def latent_vector_dim(self) -> int:
        """S * D, the width of a flattened latent action."""
        return self.code_seq_len * self.quant_dim
