"""label_health.py: every measurement against a case with a known answer, and the right reason for every bad teacher."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import drawn_figures, lerobot_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from smolvla_shared import data, label_health, label_probe
from smolvla_shared.config import DataConfig, OptimConfig
from smolvla_shared.label_check import CheckConfig, check, observe
from smolvla_shared.label_health import Observations, Target, Verdict, judge, measure
from smolvla_shared.label_probe import DISPLACEMENT
from smolvla_shared.labels import OnlineLabels
from smolvla_shared.laq import LAQ, LAQConfig, LatentActions, PairBatch
from smolvla_shared.laq_codebook import dead_codes, place_codes
from smolvla_shared.laq_files import load_laq, save_laq
from smolvla_shared.run_optimizer import learning_rate
from smolvla_shared.teacher import main

CAMERA = "observation.image"
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def same_draws():
    """A test's data does not depend on the tests before it."""
    GENERATOR.manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


# --- measurements -----------------------------------------------------------------------------------------------------


def test_code_usage_of_known_codes():
    indices = torch.tensor([[0, 1], [1, 1], [2, 1], [3, 1]])
    assert label_health.code_usage(indices, 8) == {
        "perplexity": pytest.approx([4.0, 1.0]),
        "counts": [[1, 1, 1, 1, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0, 0, 0]],
        "distinct_sequences": 4,
        "most_common_share": 0.25,
    }


def test_the_probe_finds_what_is_linear_and_nothing_else():
    features, episodes = normal(600, 5), torch.arange(600) // 20
    targets = torch.stack([features[:, 0] - 2 * features[:, 3], normal(600), torch.ones(600)], 1)
    exact, noise, constant = label_probe.r2(label_probe.out_of_fold(features, targets, episodes), targets)
    assert exact > 0.999
    assert -0.05 < noise < 0.05
    assert constant is None


def test_the_probe_is_split_by_episode():
    """A feature that only names the episode explains the episodes' means in them, but not those of others."""
    episodes = torch.arange(400) // 20
    features = torch.nn.functional.one_hot(episodes).double()
    targets = normal(20)[episodes][:, None]
    (by_episode,) = label_probe.r2(label_probe.out_of_fold(features, targets, episodes), targets)
    (by_row,) = label_probe.r2(label_probe.out_of_fold(features, targets, torch.arange(400)), targets)
    assert by_episode < 0.05
    assert by_row > 0.9
    assert label_probe.out_of_fold(features, targets, torch.zeros(400, dtype=torch.int64)) is None


def textured(count: int, size: int = 64) -> torch.Tensor:
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def test_the_shift_of_a_picture_is_found_and_that_of_an_object_is_not():
    frames = textured(4)
    shifts = [(0, 0), (3, -5), (-7, 2), (10, 10)]
    moved = torch.stack([frame.roll(shift, (1, 2)) for frame, shift in zip(frames, shifts)])
    assert label_health.image_shift(frames, moved).tolist() == [list(shift) for shift in shifts]
    one, other = frames.clone(), frames.clone()
    one[:, :, 20:36, 20:36] = 1
    other[:, :, 26:42, 24:40] = 1
    assert label_health.image_shift(one, other).tolist() == [[0, 0]] * 4


def test_the_change_of_a_picture_is_that_of_its_liveliest_cell():
    frames = torch.zeros(2, 3, 64, 64)
    frames[1, :, 8:16, 16:24] = 0.5  # one of the 8 x 8 cells
    change = label_health.cell_change(frames[:1], frames[1:])
    assert change.shape == (1, 64)
    assert (change.amax().item(), change[0, 10].item(), (change > 0).sum().item()) == (0.5, 0.5, 1)


def observations(count: int = 400, **changes: torch.Tensor) -> Observations:
    """Of a good teacher: latents are the actions, with noise."""
    actions, still = normal(count, 2), 0.1 * normal(count, 6)
    latents = torch.cat([actions, normal(count, 4)], 1)
    fields = {
        "episodes": torch.arange(count) // 20,
        "indices": torch.randint(8, (count, 4), generator=GENERATOR),
        "latents": latents,
        "random_latents": normal(count, 6),
        "change": torch.full((count,), 0.2),
        "shift": torch.zeros(count, 1, 2, dtype=torch.int64),
        "targets": {DISPLACEMENT: Target(actions, ("x", "y"))},
        "still_latents": still,
        "past_to_now": latents,
        "future_to_now": -latents,
        "own_error": torch.full((count,), 0.7),
        "other_error": torch.full((count,), 1.0),
    }
    return Observations(**fields | changes)


def verdict_of(seen: Observations, kind="quantized", invalid_share=0.0) -> tuple[list[str], list[str]]:
    found = measure(seen, codebook_size=8) | {"invalid_share": invalid_share}
    json.dumps(found, allow_nan=False)
    assert label_health.summary(found, Verdict("pass", (), "0", kind, 0.5, (CAMERA,)), [])
    return judge(found, kind)


def test_a_good_teacher_passes():
    found = measure(observations(), codebook_size=8)
    row = found["probe"][DISPLACEMENT]
    assert min(row["latents"]) > 0.99
    assert max(row["shuffled"] + row["random_teacher"]) < 0.1
    assert row["ceiling"] is None
    assert min(row["gained_share"]) > 0.98
    assert found["leakage"] == pytest.approx(-1)
    assert found["reconstruction"]["gain"] == pytest.approx(0.3)
    assert found["still_variance"] < 0.1
    assert verdict_of(observations()) == ([], [])


def test_every_failure_has_its_reason():
    rows = torch.arange(400)
    shift = torch.randint(-5, 6, (400, 2), generator=GENERATOR)
    one_code = torch.zeros(400, 4, dtype=torch.int64)
    constant_slot = observations().indices
    constant_slot[:, 2] = 5
    cases = {
        "collapsed": {"indices": one_code},
        "one code sequence is the label of 60%": {
            "indices": torch.where(rows[:, None] < 240, 0, torch.randint(1, 8, (400, 4), generator=GENERATOR))
        },
        "the latents tell nothing about the second frame": {"own_error": torch.ones(400)},
        "hardly more about the displacement of observation.state than a random teacher's": {"latents": normal(400, 6)},
        "slots [2] of the latent action are constants": {"indices": constant_slot},
        "camera motion: a shift of the whole frame": {
            "shift": shift[:, None],
            "latents": shift.double().repeat(1, 3),
            "targets": {DISPLACEMENT: Target(shift.double(), ("x", "y"))},
        },
        "appearance, not motion": {"future_to_now": observations().latents, "past_to_now": observations().latents},
    }
    cases["appearance, not motion"]["past_to_now"] = cases["appearance, not motion"]["future_to_now"] + 0.1
    for reason, changes in cases.items():
        failures, _ = verdict_of(observations(**changes))
        assert any(reason in failure for failure in failures), (reason, failures)
        assert len(failures) == 1 or reason == "collapsed", failures  # a constant is also the most common sequence
    assert verdict_of(observations(indices=one_code), kind="continuous")[0] == []  # its codes are not the labels


def test_what_only_warns():
    warnings = {
        "pairs (x, x) without motion vary": {"still_latents": observations().latents},
        "nothing moves in 100% of the pairs": {"change": torch.zeros(400)},
    }
    for text, changes in warnings.items():
        failures, (warning,) = verdict_of(observations(**changes))
        assert not failures
        assert text in warning
    assert "40% of the frames have no pair" in verdict_of(observations(), invalid_share=0.4)[1][0]


def test_a_missed_dimension_is_named():
    seen = observations()
    seen.latents[:, 1] = normal(400)
    failures, warnings = verdict_of(seen)
    assert not failures
    assert warnings == [
        "displacement of observation.state: y no better than with a random teacher (less than 10% of what there is to "
        "gain)"
    ]


def test_the_ceiling_is_what_the_displacement_tells_of_the_actions():
    """Actions of which half the variance is no motion: latents that are the motion gain all there is to gain."""
    seen = observations()
    moved = seen.targets[DISPLACEMENT]
    actions = Target(moved.values + normal(400, 2), ("dx", "dy"))
    row = measure(replace(seen, targets={"executed_action": actions, DISPLACEMENT: moved}), 8)["probe"][
        "executed_action"
    ]
    assert row["ceiling"] == pytest.approx([0.5, 0.5], abs=0.1)
    assert row["latents"] == pytest.approx(row["ceiling"], abs=0.03)
    assert row["gained_share"] == pytest.approx([1, 1], abs=0.06)
    assert row["dimensions"] == ("dx", "dy")
    # With a random teacher that tells as much there is nothing to gain, and nothing to tell.
    known = replace(seen, targets={"executed_action": actions, DISPLACEMENT: moved}, random_latents=seen.latents)
    failures, warnings = verdict_of(known)
    assert not failures
    assert ["cannot be judged" in warning for warning in warnings] == [True, True]


def test_without_targets_the_probe_is_not_measured():
    nothing = Target(torch.full((400, 2), torch.nan), ("x", "y"))
    for targets in ({}, {"action": nothing}):
        seen = observations(targets=targets)
        assert measure(seen, 8)["probe"] == {}
        assert verdict_of(seen) == ([], [])


# --- teachers on video ------------------------------------------------------------------------------------------------


class SeesTheSquare(LAQ):
    """A teacher whose latent action is how far the bright square moved: what the recordings' action says."""

    def encode(self, frames: torch.Tensor) -> LatentActions:
        bright = (frames[:, :, 0] > 0.6).float()  # [B, 2, H, W]
        side = torch.arange(frames.shape[-1]) / frames.shape[-1]
        rows, columns = bright.sum(3) @ side, bright.sum(2) @ side
        place = torch.stack([rows, columns], -1) / bright.sum((2, 3))[..., None].clamp(min=1)  # [B, 2, 2]
        latent = torch.zeros(len(frames), self.config.code_seq_len, self.config.quant_dim)
        latent[:, 0, :2] = place[:, 1] - place[:, 0]
        indices = self.vq.nearest(latent)
        return LatentActions(indices, self.vq.codebooks[indices], latent)


@pytest.fixture
def laq(laq_checkpoint) -> LAQ:
    return load_laq(laq_checkpoint)


class Recorded(SimpleNamespace):
    """A dataset of six episodes of 20 frames, in memory, with these columns."""

    gap, num_frames, episode_from, episode_to = 3, 120, np.arange(0, 120, 20), np.arange(20, 140, 20)
    rows, episode_of = data.RobotDataset.rows, data.RobotDataset.episode_of
    rows_with_pairs = data.RobotDataset.rows_with_pairs


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("kind", ["sum", "change"])
def test_velocities_and_positions_are_told_apart(monkeypatch, kind, has_state):
    """Positions are reached a frame later, velocities are what moves; smooth motions of both."""
    time = torch.arange(120, dtype=torch.float64)
    position = torch.stack([(time / 17).sin(), (time / 23).cos()], 1) + 0.01 * normal(120, 2).cumsum(0)
    velocity = torch.diff(position, dim=0, append=position[-1:]) + 0.03 * normal(120, 2)
    columns = {"action": velocity if kind == "sum" else torch.cat([position[1:], position[-1:]])}
    columns |= {"observation.state": position} if has_state else {}
    monkeypatch.setattr(label_probe, "column", lambda dataset, key: columns[key])
    mode, reason = label_probe.action_mode(Recorded(features=columns))
    assert mode == kind
    assert ("displacement explains" if has_state else "correlate by") in reason


def test_a_teacher_that_encodes_the_action_scores_near_1(laq, laq_checkpoint, labelled_dataset, tmp_path):
    sees = SeesTheSquare(laq.config)
    config = CheckConfig(
        out=tmp_path,
        data=DataConfig(roots=(labelled_dataset,), frame_gap_s=0.2, num_workers=0),
        pairs=400,
        laq_ckpt=laq_checkpoint,
    )
    datasets = data.open_datasets(config.data)
    seen, triples, latents = observe(
        OnlineLabels(sees, "continuous", (CAMERA,)), datasets, replace(config, detailed_pairs=40)
    )
    by_hand = np.array(lerobot_dataset(datasets[0]).hf_dataset["action"])
    actions = seen.targets["action"].values
    assert actions.shape[1] == 4
    rows = datasets[0].rows_with_pairs(datasets[0].rows()).numpy()  # all of them: there are fewer than asked for
    assert np.allclose(actions, [by_hand[row : row + 4].sum(0) for row in rows], atol=1e-5)
    assert len(triples) == len(latents) == 40
    scores = label_probe.probe(seen.latents, actions, seen.episodes)
    assert min(scores[:2]) > 0.95  # the square's velocity
    assert abs(scores[3]) < 0.2  # noise
    found = measure(seen, 8) | {"invalid_share": 0.0}
    failures, warnings = judge(found, "continuous")
    assert any("cannot be judged" in text or "no better" in text for text in failures + warnings), found["probe"]


def run_check(tmp_path, *arguments) -> tuple[int, dict]:
    with pytest.raises(SystemExit) as exit_:
        main(["check", *map(str, arguments), "--out", str(tmp_path / "check"), "--data.num-workers", "0"])
    return exit_.value.code, json.loads((tmp_path / "check" / "label_health.json").read_text())


def test_a_random_teacher_fails(laq_checkpoint, labelled_dataset, tmp_path, capsys, monkeypatch):
    figures = drawn_figures(monkeypatch)
    code, report = run_check(tmp_path, "--laq-ckpt", laq_checkpoint, "--data.roots", labelled_dataset, "--pairs", 120)
    assert code == 1
    assert report["verdict"] == "fail"
    assert any("the latents tell nothing about the second frame" in reason for reason in report["reasons"])
    printed = capsys.readouterr().out
    assert "label health: FAIL" in printed
    assert all(reason in printed for reason in report["reasons"])
    assert_drawn(figures, report["measured"])


def test_the_check_of_two_cameras_probes_the_codes_of_both(laq_checkpoint, image_dataset, tmp_path):
    """Its latents are those of each camera's own check, side by side, and errors are means over the pairs of both."""
    cameras, laq = (CAMERA, "observation.images.wrist"), load_laq(laq_checkpoint)
    options = {"data": DataConfig(roots=(image_dataset,), num_workers=0), "laq_ckpt": laq_checkpoint, "pairs": 60}
    config = CheckConfig(out=tmp_path, **options)
    datasets, seen = data.open_datasets(config.data), {}
    for chosen in (cameras, cameras[:1], cameras[1:]):
        seen[chosen], triples, latents = observe(OnlineLabels(laq, "continuous", chosen), datasets, config)
        assert triples.shape[1] == latents.shape[1] == len(chosen)
    both, front, wrist = seen.values()
    for name in ("indices", "latents", "random_latents", "shift", "still_latents"):
        each = torch.cat([getattr(front, name), getattr(wrist, name)], dim=1)
        torch.testing.assert_close(getattr(both, name), each, rtol=1e-4, atol=1e-5)
    assert torch.equal(both.change, torch.maximum(front.change, wrist.change))
    torch.testing.assert_close(both.own_error.view(-1, 2), torch.stack([front.own_error, wrist.own_error], 1))
    assert measure(both, 8)["probe"].keys() == measure(front, 8)["probe"].keys() != set()


def assert_drawn(figures, found) -> None:
    """The pictures show the report's numbers, and frames of pairs that differ."""
    for axis, counts in zip(figures["codes.png"].axes, found["codes"]["counts"], strict=True):
        assert [bar.get_height() for bar in axis.patches] == pytest.approx([c / sum(counts) for c in counts])
    for axis, (name, row) in zip(figures["probe.png"].axes, found["probe"].items(), strict=True):
        heights = [bar.get_height() for bars in axis.containers for bar in bars]
        shown = [row[key] for key in ("ceiling", "latents", "random_teacher", "shuffled") if row[key]]
        assert axis.get_title() == name
        assert heights == pytest.approx([value or 0.0 for values in shown for value in values])
    axes = figures["transfer.png"].axes
    columns = [axis.get_title() for axis in axes if axis.get_title()]
    for row in range(0, len(axes), len(columns)):
        images = [axis.images[0].get_array() for axis in axes[row : row + len(columns)]]
        assert len({image.shape for image in images}) == 1 and min(image.std() for image in images) > 0
        assert np.abs(images[0] - images[1]).max() > 0.1, columns


def test_episodes_too_short_for_a_past_leave_the_leakage_unmeasured(laq_checkpoint, video_dataset, tmp_path):
    """20 to 27 frames and a gap of 18: no frame has another a gap before it and a gap behind."""
    gap = ["--data.frame-gap-s", 0.9, "--detailed-pairs", 5]
    _, report = run_check(tmp_path, "--laq-ckpt", laq_checkpoint, "--data.roots", video_dataset, *gap)
    assert report["measured"]["leakage"] is None
    assert report["measured"]["reconstruction"]["own_latent"] > 0
    assert report["measured"]["pairs"] == sum(n - 18 for n in range(20, 28))


def test_a_collapsed_teacher_fails(laq, video_dataset, tmp_path):
    with torch.no_grad():
        laq.vq.codebooks[1:] = laq.vq.codebooks[0] + 100
    save_laq(laq, tmp_path / "laq.safetensors")
    code, report = run_check(
        tmp_path, "--laq-ckpt", tmp_path / "laq.safetensors", "--data.roots", video_dataset, "--pairs", 60
    )
    assert code == 1
    assert report["reasons"][0].startswith("collapsed: a slot effectively uses 1.00 codes")
    assert list(report["measured"]["probe"]) == [DISPLACEMENT]  # video without actions, but with a state


def shake(scenes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:  # [N, 3, 32, 32]
    """Still scenes, each before a camera that has jumped by up to 3 pixels; uint8."""
    shifts = torch.randint(-3, 4, (len(scenes), 2), generator=generator).tolist()
    return (torch.stack([s.roll(tuple(shift), (1, 2)) for s, shift in zip(scenes, shifts)]) * 255).to(torch.uint8)


@pytest.mark.slow
def test_a_teacher_of_a_shaking_camera_fails(tmp_path):
    """It predicts the second frame well, and uses its codes: what it has learned is the camera."""
    torch.manual_seed(0)
    generator, steps = torch.Generator().manual_seed(0), 200
    coarse = torch.rand(8, 3, 4, 4, generator=generator)
    scenes = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    sizes = {"dim": 48, "quant_dim": 8, "codebook_size": 8, "image_size": 32, "patch_size": 4, "heads": 2}
    # As a fresh teacher is, which learns it in a third of the steps that LAPA's shape would need.
    shape = {"temporal_depth": 0, "predicts_change": True, "moves_pixels": True, "sees_change": True}
    shaken = LAQ(LAQConfig(**sizes, **shape, spatial_depth=1, dim_head=16))
    optimizer = torch.optim.AdamW(shaken.parameters(), betas=(0.9, 0.95))
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, OptimConfig(lr=2e-3, warmup_steps=20))
        seen = scenes[torch.randint(8, (16,), generator=generator)]
        frames = torch.stack([shake(seen, generator), shake(seen, generator)], dim=1)
        noise = torch.randn(16, 4, 8, generator=generator)
        batch = PairBatch(frames, torch.ones(16, dtype=torch.bool), noise)
        optimizer.zero_grad()
        shaken(batch)["reconstruction"].mean().backward()
        torch.nn.utils.clip_grad_norm_(shaken.parameters(), 10.0)
        optimizer.step()
        if step % 20 == 0:
            if step < 0.8 * steps:
                place_codes(shaken, dead_codes(shaken.vq._usage, 0.05), generator)
            shaken.vq._usage.zero_()
    save_laq(shaken, tmp_path / "laq.safetensors")

    features = {CAMERA: {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}}
    root = tmp_path / "shaking"
    recorded = LeRobotDataset.create("shaking", fps=10, features=features, root=root, use_videos=False)
    for scene in scenes:
        for frame in shake(scene.expand(50, -1, -1, -1), generator):
            recorded.add_frame({CAMERA: frame.permute(1, 2, 0).numpy(), "task": "look"})
        recorded.save_episode()
    recorded.finalize()
    code, report = run_check(
        tmp_path, "--laq-ckpt", tmp_path / "laq.safetensors", "--data.roots", root, "--data.frame-gap-s", 0.1
    )
    assert code == 1
    assert [reason.split(":")[0] for reason in report["reasons"]] == ["camera motion"], report


def test_what_a_user_can_get_wrong(laq_checkpoint, video_dataset, tmp_path):
    config = CheckConfig(out=tmp_path, laq_ckpt=laq_checkpoint, data=DataConfig(roots=(video_dataset,)))
    with pytest.raises(ValueError, match=r"--out .* exists: name a new directory"):
        check(config, [])
    for command, directory in {"check": "--out", "label": "--label-cache"}.items():
        with pytest.raises(ValueError, match=f"Missing from .* {command}: --laq-ckpt PATH"):
            main([command, "--data.roots", "x", directory, "y"])
    with pytest.raises(ValueError, match="--pairs must be at least 2, got 1"):
        replace(config, pairs=1)
    with pytest.raises(ValueError, match=r"no such file; `python -m smolvla_shared.teacher check` writes it"):
        label_health.read_verdict(tmp_path / "label_health.json")
