"""LAQ against what LAPA's own model gives (tests/data/laq), its released shapes, and closed forms."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file, save_file

from smolvla_shared.command import is_mistake
from smolvla_shared.files import public_state
from smolvla_shared.laq import LAQ, RECENT_PAIRS, LAQConfig, PairBatch, move_pixels
from smolvla_shared.laq_codebook import dead_codes, perplexity, place_codes, spread_codes
from smolvla_shared.laq_files import load_laq, save_laq, teacher_id

DATA = Path(__file__).parent / "data" / "laq"
LAPA_FILE = DATA / "laq_small.pt"
TINY = LAQConfig(
    dim=32,
    quant_dim=8,
    codebook_size=4,
    image_size=16,
    patch_size=2,
    spatial_depth=1,
    temporal_depth=1,
    dim_head=16,
    heads=2,
    code_seq_len=4,
)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(DATA / "laq_small_expected.safetensors")


@pytest.fixture(scope="module")
def laq_small() -> LAQ:
    return load_laq(LAPA_FILE, image_size=64)


@pytest.fixture
def tiny() -> LAQ:
    torch.manual_seed(0)
    return LAQ(TINY)


@pytest.fixture
def tiny_change() -> LAQ:
    """One that sees and predicts changes."""
    torch.manual_seed(0)
    return LAQ(replace(TINY, predicts_change=True, sees_change=True))


def random_pairs(n: int, config: LAQConfig = TINY, seed: int = 0) -> PairBatch:
    g = torch.Generator().manual_seed(seed)
    return PairBatch(
        frames=torch.randint(256, (n, 2, 3, config.image_size, config.image_size), generator=g, dtype=torch.uint8),
        mask=torch.ones(n, dtype=torch.bool),
        noise=torch.randn(n, config.code_seq_len, config.quant_dim, generator=g),
    )


# The model


def test_reference_values(laq_small, expected):
    frames = expected["frames"] / 255
    latents = laq_small.encode(frames)
    assert torch.equal(latents.indices, expected["indices"])
    assert torch.equal(latents.vectors, expected["vectors"])
    torch.testing.assert_close(latents.continuous, expected["continuous"], rtol=0, atol=1e-5)
    torch.testing.assert_close(laq_small.reconstruct(frames), expected["reconstruction"], rtol=0, atol=1e-4)


def test_latents_of_other_pairs_are_used_as_given(laq_small, expected):
    frames = expected["frames"] / 255
    own, other = expected["vectors"], expected["vectors"].roll(1, dims=0)
    torch.testing.assert_close(laq_small.reconstruct(frames, own), expected["reconstruction"], rtol=0, atol=1e-4)
    assert (laq_small.reconstruct(frames, other) - expected["reconstruction"]).abs().max() > 1e-2
    # Nothing of the second frame but its latent reaches the decoder.
    frozen = frames[:, :1].expand(-1, 2, -1, -1, -1)
    assert torch.equal(laq_small.reconstruct(frozen, own), laq_small.reconstruct(frames, own))


def test_config_of_the_reference_is_inferred(laq_small):
    assert laq_small.config == LAQConfig(**json.loads((DATA / "laq_small_config.json").read_text()))
    assert not laq_small.config.predicts_change and not laq_small.config.sees_change
    assert laq_small.config.latent_vector_dim == 32
    assert not laq_small.training
    assert not any(p.requires_grad for p in laq_small.parameters())


def test_released_shapes():
    with torch.device("meta"):
        laq = LAQ(LAQConfig())
    released = json.loads((DATA / "laq_openx_shapes.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in public_state(laq.state_dict()).items()} == released
    assert len(released) == 493
    assert round(sum(p.numel() for p in laq.parameters()) / 1e6) == 344


@pytest.mark.parametrize(("code_seq_len", "grid"), [(1, 8), (2, 8), (4, 7), (4, 8), (16, 16), (64, 16), (256, 32)])
def test_every_code_length(code_seq_len, grid):
    laq = LAQ(replace(TINY, code_seq_len=code_seq_len, patch_size=2, image_size=2 * grid))
    frames = torch.rand(2, 2, 3, 20, 30)
    latents = laq.encode(frames)
    assert latents.indices.shape == (2, code_seq_len)
    assert latents.vectors.shape == latents.continuous.shape == (2, code_seq_len, 8)
    assert laq.reconstruct(frames).shape == (2, 3, 2 * grid, 2 * grid)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"code_seq_len": 3}, r"one of \[1, 2, 4, 16, 64, 256\], got 3"),
        ({"image_size": 17}, "image_size 17 is not a multiple of patch_size 2"),
        ({"image_size": 32}, r"grid of 16x16.*code_seq_len 4; .*image_size must be one of \[14, 16\]"),
        ({"code_seq_len": 64}, r"grid of 8x8.*code_seq_len 64; .*one of \[30, 32\]"),
        ({"code_seq_len": 1, "image_size": 4}, "grid of 2x2"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_frames_are_resized_like_pil_does():
    frame = torch.randint(256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    by_pil = torch.from_numpy(np.array(Image.fromarray(frame.numpy()).resize((16, 16), Image.Resampling.BILINEAR)))
    resized = LAQ(TINY).resize(frame.permute(2, 0, 1)[None, None] / 255)
    torch.testing.assert_close(resized[0, 0].permute(1, 2, 0) * 255, by_pil.float(), rtol=0, atol=1.01)  # PIL rounds


# Training


def test_every_trainable_parameter_gets_a_gradient(tiny):
    # DistributedDataParallel waits for each of them.
    batch = random_pairs(16)
    tiny(batch)["reconstruction"].mean().backward()
    trainable = {name: p for name, p in tiny.named_parameters() if p.requires_grad}
    assert not [name for name, p in trainable.items() if p.grad is None]
    for part in ("vq.codebooks", "vq.cnn_encoder.0.weight", "enc_", "dec_", "to_patch_emb", "spatial_rel_pos_bias"):
        assert any(p.grad.abs().max() > 0 for name, p in trainable.items() if name.startswith(part)), part


def test_a_fresh_teacher_of_changes_repeats_the_first_frame(tiny_change):
    batch = random_pairs(6)
    frames = batch.frames / 255
    assert torch.equal(tiny_change.reconstruct(frames), frames[:, 0])
    error = (frames[:, 0] - frames[:, 1]).square().mean((1, 2, 3))
    torch.testing.assert_close(tiny_change(batch)["reconstruction"], error)
    tiny_change._repeat_error.fill_(0.5)  # the unit of the loss
    torch.testing.assert_close(tiny_change(batch)["reconstruction"], error / 0.5)
    moving = LAQ(replace(tiny_change.config, moves_pixels=True))
    torch.testing.assert_close(moving.reconstruct(frames), frames[:, 0], atol=1e-5, rtol=0)


def test_flow_moves_pixels():
    """A flow of whole pixels shifts the image; half a pixel is the mean of two; beyond the border it is repeated."""
    image = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))

    def flow(x: float, y: float) -> torch.Tensor:  # pixels
        return torch.tensor([2 * x / 16, 2 * y / 8]).view(1, 2, 1, 1).expand(2, 2, 8, 16)

    right = move_pixels(image, flow(3, 0))
    torch.testing.assert_close(right[..., :13], image[..., 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(right[..., 13:], image[..., 15:].expand(-1, -1, -1, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(move_pixels(image, flow(0, -2))[..., 2:, :], image[..., :6, :], atol=1e-5, rtol=0)
    half = move_pixels(image, flow(0.5, 0))[..., :15]
    torch.testing.assert_close(half, (image[..., :15] + image[..., 1:]) / 2, atol=1e-5, rtol=0)


def test_moving_pixels_without_predicting_the_change_is_refused():
    with pytest.raises(ValueError, match="it needs predicts_change"):
        replace(TINY, moves_pixels=True)


def test_a_pair_without_change_has_the_embedding_of_its_frames(tiny_change):
    frames = random_pairs(2).frames[:, :1].expand(-1, 2, -1, -1, -1) / 255
    torch.testing.assert_close(tiny_change._embed(frames), tiny_change.to_patch_emb_first_frame(frames))


def test_grounding_reads_the_actions_from_the_latent(tiny):
    tiny.ground(3)
    batch = random_pairs(5)
    batch.actions = torch.randn(5, 3)
    batch.actions[2] = torch.nan
    batch.mask[4] = False
    errors = tiny(batch)
    assert batch.masks["grounding"].tolist() == [True, True, False, True, False]
    latents = tiny.encode(batch.frames / 255)
    vectors = tiny.vq.substitute(latents.continuous, latents.indices, batch.noise).flatten(1)
    by_hand = (tiny._grounding(vectors) - batch.actions).square().mean(1)
    torch.testing.assert_close(errors["grounding"][[0, 1, 3, 4]], by_hand[[0, 1, 3, 4]])
    assert errors["grounding"].isfinite().all()
    errors["grounding"][batch.masks["grounding"]].sum().backward()
    assert tiny.to_patch_emb_first_frame[2].weight.grad.abs().max() > 0
    assert not [key for key in public_state(tiny.state_dict()) if "grounding" in key]  # only for training


def test_noise_substitution_keeps_the_length_of_the_error(tiny):
    g = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, 5, 4, 8, generator=g)
    latent.requires_grad_()
    indices = tiny.vq.nearest(latent)
    substituted = tiny.vq.substitute(latent, indices, noise)
    error = (latent - tiny.vq.codebooks[indices]).norm(dim=-1)
    torch.testing.assert_close((substituted - latent).norm(dim=-1), error)
    torch.testing.assert_close(torch.cosine_similarity(substituted - latent, noise, dim=-1), torch.ones(5, 4))
    # With v = noise / |noise| and loss = sum(x_q), the derivative by code c is -(x - c) / |x - c| * sum(v).
    substituted.sum().backward()
    direction = (latent - tiny.vq.codebooks[indices]) / error[..., None]
    by_hand = torch.zeros(4, 8).index_add(
        0,
        indices.flatten(),
        (-direction * (noise / noise.norm(dim=-1, keepdim=True)).sum(-1, keepdim=True)).flatten(0, 1),
    )
    torch.testing.assert_close(tiny.vq.codebooks.grad, by_hand, rtol=1e-4, atol=1e-5)


def test_nearest_code_is_the_one_of_cdist(tiny):
    latent = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiny.vq.nearest(latent), torch.cdist(latent, tiny.vq.codebooks).argmin(-1))


def test_forward_is_a_function_of_its_batch(tiny):
    batch = random_pairs(4)
    first = tiny(batch)["reconstruction"]
    assert torch.equal(first, tiny(batch)["reconstruction"])
    other = tiny(replace(batch, noise=-batch.noise))["reconstruction"]
    assert not torch.equal(first, other)
    alone = tiny(PairBatch(batch.frames[:1], batch.mask[:1], batch.noise[:1]))["reconstruction"]
    torch.testing.assert_close(alone, first[:1])


def test_without_quantisation_error_training_and_inference_agree(tiny):
    batch = random_pairs(4)
    latents = tiny.encode(batch.frames / 255)
    tiny.vq.codebooks = torch.nn.Parameter(latents.continuous.detach().flatten(0, 1))  # every latent is a code
    error = (tiny.reconstruct(batch.frames / 255) - batch.frames[:, 1] / 255).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(tiny.eval()(batch)["reconstruction"], error)


def test_usage_counts_valid_training_pairs_only(tiny):
    batch = random_pairs(6)
    batch.mask[[1, 4]] = False
    losses = tiny(batch)["reconstruction"]
    indices = tiny.encode(batch.frames / 255).indices
    by_hand = torch.stack([torch.bincount(indices[batch.mask, s], minlength=4) for s in range(4)])
    assert torch.equal(tiny.vq._usage, by_hand)
    assert losses.shape == (6,)
    assert batch.masks["reconstruction"] is batch.mask and len(batch) == 6
    tiny.eval()(batch)
    assert torch.equal(tiny.vq._usage, by_hand)


def count_in_a_process(directory: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    laq = LAQ(TINY)
    laq(random_pairs(3, seed=rank))
    torch.save((laq.vq._usage, laq.vq._recent), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_usage_and_latents_are_those_of_all_processes(server, tiny, tmp_path):
    call = f"import test_laq; test_laq.count_in_a_process({str(tmp_path)!r})"
    code, printed = run_forked(server, ["-c", call], tmp_path / "printed.txt", processes=2)
    assert code == 0, printed
    for rank in range(2):  # one process that sees both batches counts the same
        tiny(random_pairs(3, seed=rank))
    for rank in range(2):
        usage, recent = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(usage, tiny.vq._usage)
        torch.testing.assert_close(recent, tiny.vq._recent, equal_nan=True)


def test_dead_codes_are_those_that_are_hardly_used():
    counts = torch.tensor([[50, 0, 1, 20], [30, 0, 0, 20]])  # 121 uses, 30 a code
    assert dead_codes(counts, 0.1).tolist() == [False, True, True, False]
    assert dead_codes(counts.sum(0), 0.1).tolist() == [False, True, True, False]  # summed over the slots
    assert not dead_codes(torch.zeros(2, 4), 0.1).any()


def test_free_codes_go_where_no_code_is():
    """Four far clusters of latents, and codes at two of them: the free ones get the other two."""
    g = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(4)
    latents = (centres[:, None] + 0.1 * torch.randn(4, 25, 4, generator=g)).flatten(0, 1)
    codes = torch.stack([centres[0], torch.zeros(4), centres[2], torch.zeros(4)])
    is_free = torch.tensor([False, True, False, True])
    found = spread_codes(codes, is_free, latents, torch.Generator().manual_seed(7))
    assert torch.equal(found[[0, 2]], codes[[0, 2]])
    assert torch.cdist(found[[1, 3]], centres[[1, 3]]).min(1).values.max() < 0.2
    assert sorted(torch.cdist(found, centres).argmin(1).tolist()) == [0, 1, 2, 3]
    # A function of its arguments, and with every code free as well.
    torch.manual_seed(99)
    assert torch.equal(found, spread_codes(codes, is_free, latents, torch.Generator().manual_seed(7)))
    fresh = spread_codes(torch.randn(4, 4), torch.ones(4, dtype=torch.bool), latents, g)
    assert sorted(torch.cdist(fresh, centres).argmin(1).tolist()) == [0, 1, 2, 3]


def test_codes_are_placed_by_recent_latents_of_valid_pairs(tiny):
    batch = random_pairs(6)
    batch.mask[[1, 4]] = False
    tiny(batch)
    latents = tiny.encode(batch.frames / 255).continuous[batch.mask].flatten(0, 1)
    torch.testing.assert_close(tiny.vq.recent, latents)
    place_codes(tiny, torch.ones(4, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert (torch.cdist(tiny.vq.codebooks, latents).min(1).values < latents.norm(dim=1).max()).all()
    assert (
        perplexity(torch.bincount(tiny.vq.nearest(latents[:, None]).flatten(), minlength=4).float()[None]) > 2
    ).all()
    for _ in range(RECENT_PAIRS // 6):
        tiny(batch)
    assert len(tiny.vq._recent) == RECENT_PAIRS  # the newest
    torch.testing.assert_close(tiny.vq.recent[-16:], latents)
    tiny.eval()(random_pairs(6, seed=1))
    torch.testing.assert_close(tiny.vq.recent[-16:], latents)


def test_perplexity():
    counts = torch.tensor([[5, 5, 5, 5], [7, 0, 0, 0], [3, 3, 0, 0], [0, 0, 0, 0], [1, 3, 0, 0]])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(perplexity(counts), torch.tensor([4.0, 1.0, 2.0, 1.0, math.exp(entropy)]))


def moving_squares(n: int, g: torch.Generator) -> torch.Tensor:  # [n, 2, 3, 16, 16] uint8
    """A white square of 4 pixels on black, which moves by its side to the left or right."""
    pixel = torch.arange(16)
    row, column = torch.randint(4, 9, (2, n, 1), generator=g)
    step = torch.tensor([4, -4])[torch.randint(2, (n, 1), generator=g)]
    frames = []
    for x in (column, column + step):
        inside = ((pixel >= row) & (pixel < row + 4))[:, :, None] & ((pixel >= x) & (pixel < x + 4))[:, None]
        frames.append(inside[:, None].expand(-1, 3, -1, -1) * 255)
    return torch.stack(frames, dim=1).to(torch.uint8)


@pytest.mark.slow
def test_training_learns_the_motion(tiny):
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=6e-3, betas=(0.9, 0.99), weight_decay=0)
    for step in range(1, 301):
        batch = PairBatch(moving_squares(16, g), torch.ones(16, dtype=torch.bool), torch.randn(16, 4, 8, generator=g))
        optimizer.zero_grad()
        tiny(batch)["reconstruction"].mean().backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            place_codes(tiny, dead_codes(tiny.vq._usage, 0.1), g)
            tiny.vq._usage.zero_()
    with torch.no_grad():
        frames = moving_squares(128, g) / 255
        vectors = tiny.encode(frames).vectors
        error = (tiny.reconstruct(frames, vectors) - frames[:, 1]).square().mean()
        error_with_others_codes = (tiny.reconstruct(frames, vectors.roll(1, dims=0)) - frames[:, 1]).square().mean()
    # Copying the first frame is wrong on 32 of 256 pixels. A decoder that ignores the codes gets to 0.43 of that.
    assert error < 0.4 * 32 / 256
    assert error < 0.85 * error_with_others_codes


# Files


def lapa_file(tmp_path: Path, change=lambda state: None, prefix: str = "") -> Path:
    """laq_small.pt with a change to its state dict."""
    state = torch.load(LAPA_FILE, weights_only=True)
    change(state)
    path = tmp_path / "changed.pt"
    torch.save({prefix + key: tensor for key, tensor in state.items()}, path)
    return path


def test_ddp_prefix(laq_small, tmp_path):
    assert teacher_id(load_laq(lapa_file(tmp_path, prefix="module."), image_size=64)) == teacher_id(laq_small)


def test_round_trip_through_our_own_files(laq_small, tmp_path, expected):
    path = tmp_path / "laq.safetensors"
    laq_small.vq._usage += 3  # private, stays behind
    save_laq(laq_small, path, extra={"run": "lapa"})
    laq_small.vq._usage.zero_()
    loaded = load_laq(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["laq.json", "laq.safetensors"]
    assert loaded.config == laq_small.config
    state = public_state(laq_small.state_dict())
    assert state.keys() == load_file(path).keys() == torch.load(LAPA_FILE, weights_only=True).keys()
    assert all(torch.equal(tensor, public_state(loaded.state_dict())[key]) for key, tensor in state.items())
    assert loaded.vq._usage.sum() == 0 and not len(loaded.vq.recent)
    assert teacher_id(loaded) == teacher_id(laq_small)
    frames = expected["frames"] / 255
    assert torch.equal(loaded.reconstruct(frames), laq_small.reconstruct(frames))
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert (manifest["schema_version"], manifest["kind"]) == ("smolvla_shared.laq.v1", "laq")
    assert manifest["source"] == {"run": "lapa"}
    assert load_laq(path, code_seq_len=4, image_size=64).config == laq_small.config


def test_teacher_id_tells_teachers_apart(laq_small):
    smaller_frames = load_laq(LAPA_FILE, image_size=56)
    changed = load_laq(LAPA_FILE, image_size=64)
    changed.vq.codebooks[0, 0] += 1e-6
    assert len({teacher_id(laq) for laq in (laq_small, smaller_frames, changed)}) == 3


def drop(key):
    return lambda state: state.pop(key)


def put(key, *shape):
    return lambda state: state.update({key: torch.zeros(*shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("vq.project_out.bias"), r"missing: vq\.project_out\.bias \[64\]"),
        (drop("vq.codebooks"), r"vq\.codebooks is missing; this is not a LAQ"),
        (put("vq.surprise", 3), r"unknown: vq\.surprise \[3\]"),
        (put("vq.project_in.weight", 8, 60), r"wrong shape: vq\.project_in\.weight \[8, 60\], expected \[8, 64\]"),
        (put("dec_spatial_transformer.layers.2.0.dsconv.bias", 64), r"unknown: dec_spatial_transformer\.layers\.2"),
    ],
)
def test_weights_that_do_not_match_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_laq(lapa_file(tmp_path, change), image_size=64)


def test_all_mismatches_are_listed_at_once(tmp_path):
    def change(state):
        state.pop("vq.project_out.bias")
        state["vq.surprise"] = torch.zeros(3)

    with pytest.raises(ValueError, match=r"missing: vq\.project_out\.bias(.|\n)*unknown: vq\.surprise"):
        load_laq(lapa_file(tmp_path, change), image_size=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"grid of 32x32.*image_size must be one of \[56, 64\]"),
        ({"image_size": 65}, "image_size 65 is not a multiple of patch_size 8"),
        ({"image_size": 64, "code_seq_len": 16}, "code-seq-len 16.*grid of 8x8"),
        ({"image_size": 64, "code_seq_len": 2}, r"--laq-code-seq-len 2, but .* kernel of \(3, 3\).* 4 or 16"),
        ({"image_size": 64, "code_seq_len": 3}, r"--laq-code-seq-len 3, but .* 4 or 16"),
    ],
)
def test_options_that_contradict_a_lapa_file_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_laq(LAPA_FILE, **options)


def test_code_length_follows_from_image_size_and_shapes(tmp_path):
    for code_seq_len, image_size in [(1, 16), (2, 16), (4, 16), (16, 32), (64, 32), (256, 64)]:
        laq = LAQ(replace(TINY, code_seq_len=code_seq_len, image_size=image_size))
        path = tmp_path / f"{code_seq_len}.pt"
        torch.save(public_state(laq.state_dict()), path)
        assert load_laq(path, image_size=image_size).config == laq.config


@pytest.mark.parametrize("options", [{"code_seq_len": 2}, {"image_size": 32}])
def test_options_that_contradict_our_file_are_refused(options, tiny, tmp_path):
    save_laq(tiny, tmp_path / "laq.safetensors")
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"--laq-{name.replace('_', '-')} {value}, but .*laq.json says"):
        load_laq(tmp_path / "laq.safetensors", **options)


def test_changed_files_are_refused(tiny, tmp_path):
    path, manifest = tmp_path / "laq.safetensors", tmp_path / "laq.json"
    save_laq(tiny, path)
    weights, text = path.read_bytes(), manifest.read_text()

    path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"has sha256 .* but laq\.json says"):
        load_laq(path)
    path.write_bytes(weights)

    for old, new, message in [
        (
            "laq.v1",
            "laq.v0",
            r"schema_version is 'smolvla_shared\.laq\.v0', this version reads 'smolvla_shared\.laq\.v1'",
        ),
        ('"heads"', '"head_count"', r"config\.heads: missing\n *config\.head_count: unknown"),
        ('"codebook_size": 4', '"codebook_size": 5', r"laq\.json does not match its own manifest_sha256"),
        ('"code_seq_len": 4', '"code_seq_len": 3', "code_seq_len must be one of"),
    ]:
        assert old in text
        manifest.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            load_laq(path)

    manifest.unlink()
    with pytest.raises(ValueError, match=r"laq\.json is missing beside it"):
        load_laq(path)


def test_private_keys_in_a_file_are_refused(tiny, tmp_path):
    path = tmp_path / "laq.pt"
    torch.save(tiny.state_dict(), path)  # of a training checkpoint
    with pytest.raises(ValueError, match=r"unknown: vq\._usage"):
        load_laq(path, image_size=16)


def test_files_that_cannot_be_a_laq(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.pt: no such file; pass LAPA's laq_openx\.pt"):
        load_laq(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file of this package or a \.pt file of LAPA"):
        load_laq(tmp_path / "laq.ckpt")


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"vq.codebooks": Path("evil")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt is no weights file of LAPA \(UnpicklingError\)"):
        load_laq(tmp_path / "evil.pt")


LAPA_STATE = torch.load(LAPA_FILE, weights_only=True)


@pytest.mark.parametrize(
    "content, said",
    [
        ([torch.zeros(3)], "holds a list, expected tensors by name: save the LAQ's state_dict"),
        (torch.zeros(3), "holds a Tensor, expected tensors by name"),
        (LAPA_STATE | {"epoch": 3}, r"holds other things beside tensors: epoch \(int\): save the LAQ's state_dict"),
        ({"model": LAPA_STATE}, r"holds other things beside tensors: model \(dict\)"),
        (LAPA_STATE | {7: torch.zeros(3)}, r"holds other things beside tensors: 7 \(Tensor\)"),
        *(
            (LAPA_STATE | {key: torch.zeros(shape)}, rf"{key} has shape .*\], a LAQ's has {dimensions} dimensions")
            for key, dimensions in [
                ("to_patch_emb_first_frame.2.weight", 2),
                ("enc_spatial_transformer.layers.0.1.null_kv", 3),
                ("vq.codebooks", 2),
                ("vq.cnn_encoder.2.weight", 4),
            ]
            for shape in [(), (5,), (1,) * (dimensions + 1)]
        ),
    ],
)
def test_a_file_of_something_else_than_lapas_tensors_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "laq.pt")
    with pytest.raises(ValueError, match=rf"laq\.pt:? {said}") as error:
        load_laq(tmp_path / "laq.pt", image_size=64)
    assert is_mistake(error.value)


def test_lapas_tensors_without_a_number_are_refused(tmp_path):
    torch.save(LAPA_STATE | {"to_patch_emb_first_frame.2.weight": torch.zeros(64, 0)}, tmp_path / "laq.pt")
    with pytest.raises(ValueError, match=r"laq\.pt does not go with .*patch_size must be at least 1"):
        load_laq(tmp_path / "laq.pt", image_size=64)


def test_empty_tensors_survive_safetensors(tmp_path):
    save_file({"null_kv": torch.zeros(16, 0, 64)}, tmp_path / "empty.safetensors")
    assert load_file(tmp_path / "empty.safetensors")["null_kv"].shape == (16, 0, 64)
