"""The real commands, tiny: teacher, Stage 2, Stage 3, as examples/quickstart.sh chains them, and what they refuse."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from forked import run_forked
from safetensors.torch import load_file

import train_stage2
import train_stage3
from smolvla_shared import data_views, hub
from smolvla_shared.artifact import load_artifact
from smolvla_shared.laq_files import load_laq, teacher_id
from smolvla_shared.model import SmolVLASharedCore
from smolvla_shared.model_parts import PARTS

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
# Two checkpoints and two evaluations each.
SIZES = "--steps 4 --save-every 2 --eval-every 2 --log-every 1 --batch-size 4 --eval-samples 4".split()
SIZES += "--val-fraction 0.2 --optim.lr 1e-3 --optim.warmup-steps 1".split()
# Fine-tuning: a fresh codebook would need long to be used.
TEACHER_SIZES = "--steps 20 --save-every 10 --eval-every 10 --replace-every 4".split()
ARTIFACT = Path("artifacts") / "smolvla_shared_stage2_artifact.safetensors"
TEACHER = Path("checkpoints") / "last" / "pretrained_model" / "laq.safetensors"
POLICY = Path("checkpoints") / "last" / "pretrained_model"


@pytest.fixture(scope="session")
def run(server, tmp_path_factory) -> Callable[..., tuple[int, str]]:
    """Run `python <command>`: its exit code, and what it printed."""
    directory = tmp_path_factory.mktemp("printed")
    return lambda *command: run_forked(server, [*command], directory / "printed.txt")


@pytest.fixture(scope="session")
def run_well(run) -> Callable[..., str]:
    """Run `python <command>`, which must succeed: what it printed."""

    def run_it(*command: str | Path) -> str:
        code, printed = run(*command)
        assert code == 0, f"{command}\n{printed}"
        return printed

    return run_it


@pytest.mark.slow
def test_held_out_episodes_are_in_no_statistics(run_well, labelled_dataset, tmp_path):
    """Their actions are far away here; the policy's normaliser is that of the other episodes."""
    root, (path,) = tmp_path / "data", [*(labelled_dataset / "data").rglob("*.parquet")]
    shutil.copytree(labelled_dataset, root)
    (root / "meta" / "stats.json").unlink()  # which would contradict the rows
    held_out = {int(e) for e in np.random.default_rng([3, 8]).permutation(8)[:2]}  # --val-fraction 0.2 of 8, --seed 3
    table = pd.read_parquet(path)
    table["action"] = [a + 1e4 * (e in held_out) for a, e in zip(table["action"], table["episode_index"], strict=True)]
    table.to_parquet(root / path.relative_to(labelled_dataset))
    command = [
        "train_stage3.py",
        *SIZES,
        "--steps",
        "1",
        "--seed",
        "3",
        "--data.roots",
        root,
        "--data.num-workers",
        "0",
    ]
    command += ["--chunk-size", "6", "--n-action-steps", "3", "--model.preset", "tiny", "--run-dir", tmp_path / "s3"]
    run_well(*command)
    kept = np.stack(table["action"][~table["episode_index"].isin(held_out)].to_list()).astype(np.float64)
    found = load_file(tmp_path / "s3" / POLICY / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    assert np.allclose(found["action.mean"], kept.mean(0), atol=1e-5)
    varies = kept.std(0) > 1e-6
    assert np.allclose(found["action.std"][varies], kept.std(0)[varies], atol=1e-5) and np.abs(kept).max() < 100


@pytest.mark.slow
def test_a_run_on_named_episodes_is_of_these_alone(run_well, labelled_dataset, tmp_path):
    """As the table says, and the policy's normaliser."""
    command = ["train_stage3.py", *SIZES, "--steps", "1", "--data.roots", labelled_dataset, "--data.num-workers", "0"]
    command += ["--chunk-size", "6", "--n-action-steps", "3", "--model.preset", "tiny", "--run-dir", tmp_path / "s3"]
    printed = run_well(*command, "--data.episodes", "7", "0", "5", "2")
    held_out = [0, 2, 5, 7][np.random.default_rng([0, 4]).permutation(4)[0]]  # --val-fraction 0.2 of 4, --seed 0
    table = pd.concat(map(pd.read_parquet, (labelled_dataset / "data").rglob("*.parquet")))
    table = table[table["episode_index"].isin({0, 2, 5, 7} - {held_out})]
    kept = np.stack(table["action"].to_list()).astype(np.float64)
    assert re.search(rf"^{labelled_dataset} +3 of 8 +{len(kept)} ", printed, re.M)
    found = load_file(tmp_path / "s3" / POLICY / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    assert np.allclose(found["action.mean"], kept.mean(0), atol=1e-5)


@pytest.fixture(scope="session")
def runs(run, run_well, tmp_path_factory, video_dataset, labelled_dataset, laq_checkpoint) -> Path:
    """The chain, once: a directory with the runs, and what each command printed in <run>.txt."""
    runs = tmp_path_factory.mktemp("runs")

    def train(name: str, *command: str | Path) -> None:
        (runs / f"{name}.txt").write_text(run_well(*command, "--run-dir", runs / name))

    on_video = [*SIZES, "--data.roots", video_dataset, "--data.num-workers", "0"]
    labelled = [*SIZES, "--data.roots", labelled_dataset, "--data.num-workers", "0"]
    labelled += ["--chunk-size", "6", "--n-action-steps", "3"]
    teacher = ["--laq-ckpt", runs / "laq" / TEACHER]
    from_artifact = ["--stage2-artifact", runs / "s2" / ARTIFACT]
    fine_tuned = [*TEACHER_SIZES, "--init-from", laq_checkpoint]
    train("laq", "-m", "smolvla_shared.teacher", "train", *on_video, *fine_tuned)
    s2 = ["--model.freeze-trunk", "True", "--data.num-workers", "1"]  # the last of an option counts
    train("s2", *LAUNCH, "train_stage2.py", *on_video, *teacher, "--model.preset", "tiny", *s2)
    codes = ["--latent-head", "codes", "--latent-horizon", "2"]
    train("codes", "train_stage2.py", *on_video, *teacher, "--model.preset", "tiny", *codes)
    train("s3", "train_stage3.py", *labelled, *from_artifact, "--ema-decay", "0.5")
    train("scratch", "train_stage3.py", *labelled, "--model.preset", "tiny")
    cotrain = ["--latent-loss-weight", "0.1", "--video-roots", video_dataset]
    train("cotrain", "train_stage3.py", *labelled, *from_artifact, *teacher, *cotrain)
    check = [*teacher, "--data.roots", labelled_dataset, "--data.num-workers", "0", "--pairs", "60"]
    code, printed = run("-m", "smolvla_shared.teacher", "check", *check, "--out", runs / "check")
    assert f"label health: {'FAIL' if code else 'PASS'}" in printed
    task = ["--env.type", "metaworld", "--env.task", "plate-slide-v3", "--episodes", "1", "--max-steps", "4"]
    out = ["--out", runs / "rollout", "--num-envs", "1"]
    (runs / "rollout.txt").write_text(run_well("rollout.py", "--policy-path", runs / "s3" / POLICY, *task, *out))
    return runs


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, targets, every",
    [
        ("laq", ["reconstruction"], 10),
        ("s2", ["latent"], 2),
        ("s3", ["action"], 2),
        ("scratch", ["action"], 2),
        ("cotrain", ["action", "latent"], 2),
    ],
)
def test_every_run_leaves_the_same_directory(runs, name, targets, every):
    run_dir = runs / name
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoints"} <= {path.name for path in run_dir.iterdir()}
    assert json.loads((run_dir / "config.json").read_text())["batch_size"] == 4
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert checkpoints == [f"{every:06d}", f"{2 * every:06d}", "last"]
    assert (run_dir / "checkpoints" / "last").readlink() == Path(f"{2 * every:06d}")
    metrics = metrics_of(run_dir)
    assert [line["step"] for line in metrics] == list(range(1, 2 * every + 1))
    for line in metrics:
        losses = {key for key in line if key.startswith("loss/")}
        of_datasets = {key for key in losses if "_of_" in key}  # where a run reads several
        assert losses - of_datasets == {f"loss/{target}" for target in targets}
        assert bool(of_datasets) == (name == "cotrain")
        assert all(line[key] > 0 for key in losses)
        assert line["grad_norm"] > 0
        assert line["time/samples_per_s"] > 0
        assert line["samples"] == 4 * line["step"]
    evaluated = [line for line in metrics if any(key.startswith("val/") for key in line)]
    assert [line["step"] for line in evaluated] == [every, 2 * every]
    for target in targets:
        assert f"val/{target}" in evaluated[0]


@pytest.mark.slow
def test_the_policy_acts_and_the_chain_is_summed_up(runs, run_well):
    """4 training steps teach nothing: the episode fails, and the summary says so beside the runs' own figures."""
    assert (runs / "rollout.txt").read_text().splitlines()[-1].startswith("plate-slide-v3  0 of 1   0%")
    rates = (
        "WARNING: the policy was trained on 20 actions a second, metaworld takes 80: every motion is 4 times as fast"
    )
    assert rates in (runs / "rollout.txt").read_text()
    (runs / "steps.txt").write_text("1 teacher 0\n2 stage 2 90\nend 120\n")
    for name in ("stage2", "stage3"):
        (runs / name).symlink_to(runs / name.replace("tage", ""))
    for arm in ("scratch", "stage3"):
        (runs / f"rollout_{arm}").symlink_to(runs / "rollout")
    printed = run_well("examples/summarize.py", runs)
    summary = json.loads((runs / "summary.json").read_text())
    of_one = {"plate-slide-v3": "0 of 1", "all": "0 of 1, 0% to 79%"}
    assert summary["demonstrations alone"] == summary["video first"] == of_one
    assert summary["minutes"] == {"1 teacher": 1.5, "2 stage 2": 0.5, "total": 2.0}
    assert summary["stage2"]["held_out_latent_error"] == metrics_of(runs / "s2")[-1]["val/latent_error"]
    assert summary["labels"]["health"] == json.loads((runs / "check" / "label_health.json").read_text())["verdict"]
    assert "video first: plate-slide-v3" in printed


@pytest.mark.slow
def test_stage_2_writes_an_artifact_that_says_where_it_is_from(runs, video_dataset):
    artifact = load_artifact(runs / "s2" / ARTIFACT)
    manifest = artifact.manifest
    assert manifest.core.cameras == ("observation.image",)
    assert (manifest.core.model_name, manifest.core.state_dim, manifest.core.action_dim) == ("tiny", 4, 0)
    assert (manifest.core.latent_vector_dim, manifest.core.code_seq_len) == (32, 4)
    assert not any(key.startswith("action_head.") for key in artifact.state_dict)
    assert manifest.normalization.keys() == {"state", "latent"}
    assert len(manifest.normalization["latent"].mean) == 32
    assert manifest.latents.teacher_id == teacher_id(load_laq(runs / "laq" / TEACHER))
    assert (manifest.latents.frame_gap_s, manifest.latents.label_cameras) == (0.5, ("observation.image",))
    assert 0 < manifest.latents.valid_pair_share < 1
    assert (manifest.source.run, manifest.source.global_step) == ("s2", 4)
    assert manifest.source.datasets == (str(video_dataset),)
    assert manifest.source.versions["torch"] == version("torch")


@pytest.mark.slow
def test_every_checkpoint_of_stage_2_has_its_artifact(runs):
    last = load_artifact(runs / "s2" / "checkpoints" / "last" / "pretrained_model" / ARTIFACT.name)
    assert last.manifest == load_artifact(runs / "s2" / ARTIFACT).manifest
    first = load_artifact(runs / "s2" / "checkpoints" / "000002" / "pretrained_model" / ARTIFACT.name)
    assert first.manifest.source.global_step == 2
    assert first.manifest.weights.sha256 != last.manifest.weights.sha256


@pytest.mark.slow
def test_stage_2_classifies_codes_and_stage_3_goes_on_with_them(
    runs, run_well, video_dataset, labelled_dataset, tmp_path
):
    artifact = load_artifact(runs / "codes" / ARTIFACT)
    teacher = load_laq(runs / "laq" / TEACHER)
    assert artifact.manifest.core.codebook_size == 8
    statistics, codebook = artifact.manifest.normalization["latent"], artifact.state_dict["latent_head.codebook"]
    mean, std = (torch.tensor(values).view(8, 8) for values in (statistics.mean, statistics.std))  # 2 in a row of 4
    expected = (teacher.vq.codebooks - mean[:, None]) / std[:, None]
    torch.testing.assert_close(codebook, expected.clamp(-5, 5))
    assert artifact.manifest.latents.horizon == 2
    evaluated = [line for line in metrics_of(runs / "codes") if "val/latent" in line]
    assert all({"val/latent_error_1", "val/latent_error_2"} < line.keys() for line in evaluated)
    assert all(0 <= line["val/latent_code_accuracy"] <= 1 for line in evaluated)
    command = ["train_stage3.py", *SIZES, "--data.roots", labelled_dataset, "--data.num-workers", "0"]
    command += ["--chunk-size", "6", "--n-action-steps", "3", "--stage2-artifact", runs / "codes" / ARTIFACT]
    command += ["--latent-loss-weight", "0.1", "--laq-ckpt", runs / "laq" / TEACHER, "--video-roots", video_dataset]
    printed = run_well(*command, "--run-dir", tmp_path / "s3", "--data.max-episodes", "1")
    policy = load_file(tmp_path / "s3" / POLICY / "model.safetensors")
    assert torch.equal(policy["model.latent_head.codebook"], codebook)
    (frames,) = re.findall(rf"^{labelled_dataset} +1 of 8 +(\d+) ", printed, re.M)
    assert int(frames) in range(20, 28)  # of one episode; beside it the video's


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s2", "codes"])
def test_what_stage_2_expects_is_drawn(runs, run, video_dataset, laq_checkpoint, tmp_path, name):
    """With one latent action and with two in a row; another teacher than the artifact's is refused."""
    command = ["examples/imagine.py", "--stage2-artifact", runs / name / ARTIFACT, "--data.roots", video_dataset]
    command += ["--data.num-workers", "0", "--rows", "2", "--out", tmp_path / "imagined.png"]
    code, printed = run(*command, "--laq-ckpt", laq_checkpoint)
    assert code and "has learned other latent actions:\n  teacher (--laq-ckpt)" in printed
    assert not any(tmp_path.iterdir())
    code, printed = run(*command, "--laq-ckpt", runs / "laq" / TEACHER)
    assert not code, printed
    assert f"2 frames, {({'s2': 1, 'codes': 2})[name]} latent action(s) ahead" in printed
    assert (tmp_path / "imagined.png").stat().st_size > 10_000


@pytest.mark.slow
def test_stage_2_with_a_frozen_trunk_changes_what_it_should_and_nothing_else(runs):
    artifact = load_artifact(runs / "s2" / ARTIFACT)
    assert artifact.manifest.source.changed_parts == ("expert", "state projection", "latent head")
    torch.manual_seed(0)  # the run's --seed: its initial weights
    before = SmolVLASharedCore(artifact.manifest.core).state_dict()
    assert before.keys() == artifact.state_dict.keys()
    changed = {key for key in before if not torch.equal(before[key], artifact.state_dict[key])}
    for part, prefix in PARTS.items():
        of_part = {key for key in before if key.startswith(prefix)}
        if part in artifact.manifest.source.changed_parts:
            assert of_part & changed, part
        else:
            assert not of_part & changed, part
    printed = (runs / "s2.txt").read_text()
    for part in ("vision tower", "connector", "language layers"):
        assert any(line.split()[-2] == "0" for line in printed.splitlines() if line.startswith(part)), part


@pytest.mark.slow
def test_stage_2_stopped_and_resumed_is_the_uninterrupted_run(runs, run_well, video_dataset, tmp_path):
    """The run as it is when it is killed between its two checkpoints, in another place."""
    cut = tmp_path / "s2"
    shutil.copytree(runs / "s2", cut, symlinks=True)
    shutil.rmtree(cut / "artifacts")
    shutil.rmtree(cut / "checkpoints" / "000004")
    (cut / "checkpoints" / "last").unlink()
    (cut / "checkpoints" / "last").symlink_to("000002")
    command = ["train_stage2.py", "--run-dir", cut, "--laq-ckpt", runs / "laq" / TEACHER, "--model.preset", "tiny"]
    command += ["--model.freeze-trunk", "True", "--data.roots", video_dataset, "--data.num-workers", "0", *SIZES]
    run_well(*command, "--resume")
    found, expected = load_artifact(cut / ARTIFACT).manifest, load_artifact(runs / "s2" / ARTIFACT).manifest
    assert found.weights.sha256 == expected.weights.sha256
    assert asdict(found) == asdict(expected)
    assert len(metrics_of(cut)) == 4
    for one, other in zip(metrics_of(cut), metrics_of(runs / "s2"), strict=True):
        assert all(one[key] == other[key] for key in other if not key.startswith("time/"))


@pytest.mark.slow
@pytest.mark.parametrize("name, has_latent_head", [("s3", True), ("scratch", False), ("cotrain", True)])
def test_stage_3_writes_a_policy_that_acts(runs, labelled_dataset, name, has_latent_head):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.factory import make_pre_post_processors

    from smolvla_shared.lerobot_policy import HLRPSmolVLASharedPolicy

    policy = HLRPSmolVLASharedPolicy.from_pretrained(runs / name / POLICY)
    core = policy.config.core
    assert (core.chunk_size, core.action_dim, core.state_dim, policy.config.n_action_steps) == (6, 4, 4, 3)
    assert bool(core.latent_vector_dim) == has_latent_head
    preprocessor, postprocessor = make_pre_post_processors(policy.config, runs / name / POLICY)
    dataset = LeRobotDataset(labelled_dataset.name, root=labelled_dataset)
    item = {key: value for key, value in dataset[10].items() if key.startswith("observation") or key == "task"}
    actions = torch.cat([postprocessor(policy.select_action(preprocessor(item))) for _ in range(3)])
    assert actions.shape == (3, 4)
    mean, std = (torch.as_tensor(dataset.meta.stats["action"][key]) for key in ("mean", "std"))
    assert ((actions - mean).abs() < 10 * std).all()  # in the units of the recording


@pytest.mark.slow
def test_stage_3_starts_from_the_artifact(runs):
    """What Stage 3 leaves alone is still the artifact's; the average over its few steps is near it, scratch is not."""
    artifact = load_artifact(runs / "s2" / ARTIFACT).state_dict
    s3 = load_file(runs / "s3" / POLICY / "model.safetensors")
    scratch = load_file(runs / "scratch" / POLICY / "model.safetensors")
    for key, value in artifact.items():
        if key.startswith("latent_head."):
            assert torch.equal(s3[f"model.{key}"], value), key  # nobody trains it here
            assert f"model.{key}" not in scratch
    key = "expert.layers.0.mlp.down_proj.weight"
    s2_moved = (artifact[key] - scratch[f"model.{key}"]).norm()
    assert (s3[f"model.{key}"] - artifact[key]).norm() < s2_moved
    printed = (runs / "s3.txt").read_text()
    assert "(s2 step 4); cameras observation.image; freshly initialised: action head\n" in printed
    assert "standard deviations from the artifact's" in printed
    assert "loss {'action': 1.0}; statistics of the data" in printed
    assert "from the trunk's own weights (tiny); cameras" in (runs / "scratch.txt").read_text()


@pytest.mark.slow
def test_video_trains_the_action_head_with_decoded_actions(run_well, labelled_dataset, tmp_path):
    """Latent actions that are the executed actions are decoded into them; without a latent loss there is no head."""
    video, cache = shutil.copytree(labelled_dataset, tmp_path / "video"), tmp_path / "labels"
    (video / "meta" / "stats.json").unlink()  # a dataset and its copy are refused
    labels = ["--data.frame-gap-s", "0.1", "--label-cache", cache]
    run_well("examples/relabel.py", "--kind", "executed", "--data.roots", labelled_dataset, video, *labels)
    command = ["train_stage3.py", *SIZES, "--data.roots", labelled_dataset, "--data.num-workers", "0", *labels]
    command += ["--chunk-size", "6", "--n-action-steps", "3", "--model.preset", "tiny", "--labels", "cache"]
    command += ["--teacher-kind", "continuous", "--latent-horizon", "2", "--video-roots", video, "--decode-actions"]
    printed = run_well(*command, "--run-dir", tmp_path / "s3")
    arguments = [*map(str, command[1:]), "--run-dir", str(tmp_path / "not made")]
    config = tyro.cli(train_stage3.Stage3Config, args=arguments)
    _, (labelled, hidden) = data_views.open_recordings(config.data, config.video_data, False)
    assert "action" in labelled.features and "action" not in hidden.features  # video's own actions are not read
    decoded = "actions decoded from latent actions of teacher executed act, 2 steps each"
    assert f"{decoded}: R² on unseen parts 1.00, 1.00, 1.00, 1.00" in printed
    assert "loss {'action': 1.0}" in printed
    policy = load_file(tmp_path / "s3" / POLICY / "model.safetensors")
    assert not [name for name in policy if name.startswith("model.latent_head")]
    source = json.loads((tmp_path / "s3" / POLICY / "source.json").read_text())
    assert source["actions"].startswith(decoded)


@pytest.mark.slow
def test_co_training_moves_the_latent_head(runs):
    artifact = load_artifact(runs / "s2" / ARTIFACT).state_dict
    cotrain = load_file(runs / "cotrain" / POLICY / "model.safetensors")
    assert not torch.equal(cotrain["model.latent_head.out_proj.weight"], artifact["latent_head.out_proj.weight"])
    assert "loss {'action': 1.0, 'latent': 0.1}" in (runs / "cotrain.txt").read_text()


@pytest.mark.slow
def test_what_the_runs_leave_can_go_to_the_hub(runs, capsys):
    """With cards that say where it is from, as far back as the teacher."""
    manifest = load_artifact(runs / "s2" / ARTIFACT).manifest
    trained = {
        (runs / "s3" / POLICY): ["- Run `s3`, step 4, weights of the EMA", "- Command: `train_stage3.py --"],
        (runs / "s2" / ARTIFACT): ["- Run `s2`, step 4", "`teacher check` on these latent actions: not measured"],
        (runs / "laq" / TEACHER): ["- Run `laq`, step 20,", manifest.latents.teacher_id],
    }
    trained[runs / "s3" / POLICY] += [manifest.weights.sha256, f"- Teacher `{manifest.latents.teacher_id[:12]}`"]
    for path, said in trained.items():
        hub.main(["push", str(path), "me/repository", "--dry-run"])
        printed = capsys.readouterr().out
        assert all(text in printed for text in said), printed


# --- refused ----------------------------------------------------------------------------------------------------------


STAGES = {
    "2": (train_stage2.Stage2Config, train_stage2.main),
    "3": (train_stage3.Stage3Config, train_stage3.main),
}


@pytest.mark.parametrize(
    "stage, arguments, message",
    [
        ("2", "--data.roots {video} --laq-ckpt nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("2", "--data.roots nowhere --laq-ckpt {laq}", "no LeRobotDataset at nowhere"),
        (
            "2",
            "--data.roots {video} --laq-ckpt {laq} --data.cameras top",
            "asked for .'top'.*found .*observation.image",
        ),
        ("2", "--data.roots {video} --laq-ckpt {laq} --data.frame-gap-s 0.02", "not a whole number of frames"),
        ("2", "--data.roots {video} --laq-ckpt {laq} --data.frame-gap-s 5", "no episode is longer"),
        ("2", "--data.roots {video} --laq-ckpt {laq} --val-fraction 0.99", "too few to hold out"),
        ("2", "--data.roots {video} --laq-ckpt {laq} --accumulation-steps 3", "--batch-size 64 .* not divisible"),
        ("2", "--data.roots {video} --laq-ckpt {laq} --resume", "--resume: there is no run at"),
        ("3", "--data.roots {video}", "has no 'action' column.*action-free video goes into --video-roots"),
        ("3", "--data.roots {labelled} {images}", "labelled datasets have different rates"),
        (
            "3",
            "--data.roots {labelled} --latent-loss-weight 1 --laq-ckpt {laq} --video-roots {video} "
            "--data.frame-gap-s 5",
            "no episode is longer than --data.frame-gap-s",
        ),
        (
            "3",
            "--data.roots {labelled} --data.max-episodes 8 --val-fraction 0.1",
            "max-episodes 8: .* has 7 episode.* and 1 held out",
        ),
        ("3", "--data.roots {labelled} --normalization artifact", "starts from a trunk, which has no statistics"),
        (
            "3",
            "--data.roots {labelled} --stage2-artifact nowhere.safetensors",
            "there is no nowhere.safetensors of its three",
        ),
    ],
)
def test_wrong_inputs_are_named_and_leave_no_run_directory(
    stage, arguments, message, tmp_path, video_dataset, labelled_dataset, image_dataset, laq_checkpoint
):
    places = {"video": video_dataset, "labelled": labelled_dataset, "images": image_dataset, "laq": laq_checkpoint}
    config_class, main = STAGES[stage]
    given = arguments.format(**places).split()
    config = tyro.cli(config_class, args=[*given, "--run-dir", str(tmp_path / "run"), "--model.preset", "tiny"])
    with pytest.raises(ValueError, match=message):
        main(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "stage, arguments, message",
    [
        ("2", "--data.roots x", "whose latent actions? Pass --laq-ckpt, or --labels cache"),
        ("2", "--data.roots x --laq-ckpt x --labels cache", "--label-cache <directory> belong together"),
        ("2", "--data.roots x --laq-ckpt x --accept-label-health", "accepts a report: pass it with --label-health"),
        ("2", "--laq-ckpt x", "no dataset given: pass --data.repo-ids"),
        ("2", "--laq-ckpt x --data.roots x --steps 0", "--steps must be at least 1"),
        ("2", "--data.roots x --laq-ckpt x --latent-head codes --teacher-kind continuous", "continuous has none"),
        ("3", "--data.roots x --latent-head codes", "--latent-head codes has no effect without --latent-loss-weight"),
        ("3", "--data.roots x --chunk-size 4", "--n-action-steps 10 must be between 1 and --chunk-size 4"),
        ("3", "--data.roots x --latent-loss-weight 0.1", "--latent-loss-weight > 0 (got 0.1) or --decode-actions goes"),
        ("3", "--data.roots x --laq-ckpt x", "--latent-loss-weight > 0 (got 0.0) or --decode-actions goes with labels"),
        ("3", "--data.roots x --video-roots x", "need --latent-loss-weight, --decode-actions, or both"),
        ("3", "--data.roots x --latent-horizon 2", "--latent-horizon 2 has no effect without --latent-loss-weight"),
        ("3", "--data.roots x --laq-ckpt x --decode-actions", "decodes the actions of video: pass --video-roots or"),
        ("3", "--data.roots x --model.preset tiny --model.name x", "both name a trunk"),
        (
            "3",
            "--data.roots x --normalization artifact --normalization-mode quantiles",
            "--normalization-mode quantiles has no effect without --normalization data",
        ),
        ("3", "--data.roots x --stage2-artifact x --init-from y", "both give the weights: drop one"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(stage, arguments, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        tyro.cli(STAGES[stage][0], args=[*arguments.split(), "--run-dir", str(tmp_path / "run")])
    written = " ".join((capsys.readouterr().err + str(error.value)).replace("│", " ").split())
    assert message in written


@pytest.mark.slow
def test_what_contradicts_the_artifact_is_refused(runs, tmp_path, labelled_dataset, laq_checkpoint):
    given = ["--data.roots", str(labelled_dataset), "--stage2-artifact", str(runs / "s2" / ARTIFACT)]
    cotrain = ["--latent-loss-weight", "0.1", "--laq-ckpt"]
    own_teacher, another_gap = str(runs / "laq" / TEACHER), ["--data.frame-gap-s", "0.25"]
    for arguments, message in [
        (["--model.name", "my/trunk"], "model_name: command line my/trunk, artifact tiny"),
        (["--data.cameras", "top"], "asked for .'top'.*found .*observation.image"),
        ([*cotrain, str(laq_checkpoint)], r"teacher \(--laq-ckpt\): command line [0-9a-f]{64}, artifact [0-9a-f]{64}"),
        (
            [*cotrain, own_teacher, *another_gap],
            "command line 0.25, teacher 0.5(?s:.*)--accept-other-pairs",
        ),
        (
            [*cotrain, own_teacher, *another_gap, "--accept-other-pairs"],
            "frame-gap-s: command line 0.25, artifact 0.5",
        ),
        (["--normalization", "artifact", "--model.no-use-state"], "state: dimensions in the data 0, in the artifact 4"),
    ]:
        args = [*given, *arguments, "--run-dir", str(tmp_path / "run")]
        with pytest.raises(ValueError, match=message):
            train_stage3.main(tyro.cli(train_stage3.Stage3Config, args=args))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_refused_command_fails_and_says_why_last(run, tmp_path, video_dataset):
    code, printed = run("train_stage3.py", "--data.roots", video_dataset, "--run-dir", tmp_path / "run")
    assert code == 2
    assert printed.splitlines()[-1].startswith("error: ")
    assert "has no 'action' column" in printed.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train_stage2.py", "train_stage3.py"])
def test_help_is_worth_reading(run_well, command):
    text = run_well(command, "--help")
    for words in ("--run-dir", "--data.roots", "--data.frame-gap-s", "--optim.lr", "seconds"):
        assert words in text
