"""hub.py, lerobot_card.py: a policy says what it is and where it is from, on disk, on the hub and after LeRobot's save.

The hub is a directory: FakeHub takes uploads from HfApi and serves downloads, both at the client's last call before
the network.
"""

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import names_in
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from lerobot.configs.policies import PreTrainedConfig
from safetensors.torch import load_file, save_file
from test_artifact import LATENTS, ORIGIN, save
from test_artifact import make_core as make_artifact_core
from test_lerobot_policy import CAMERA, STATISTICS, WRIST, make_core

import rollout
from rollout import EnvironmentConfig, RolloutConfig
from smolvla_shared import files, hub
from smolvla_shared.artifact import load_artifact
from smolvla_shared.config import ModelConfig
from smolvla_shared.initial import open_initial
from smolvla_shared.laq_files import load_laq, teacher_id
from smolvla_shared.lerobot_card import NOT_EVALUATED, add_results, policy_card
from smolvla_shared.lerobot_files import of_robot, save_policy
from smolvla_shared.lerobot_policy import HLRPSmolVLASharedConfig, HLRPSmolVLASharedPolicy
from smolvla_shared.normalization import Statistics
from smolvla_shared.trunk_files import load_trunk_tokenizer

FILES = ["README.md", "config.json", "manifest.json", "model.safetensors", "policy_postprocessor.json"]
FILES += ["policy_postprocessor_step_0_unnormalizer_processor.safetensors", "policy_preprocessor.json"]
FILES += ["policy_preprocessor_step_2_hlrp_smolvla_shared_tokenizer.safetensors"]
FILES += ["policy_preprocessor_step_4_normalizer_processor.safetensors", "source.json"]


def make_source(artifact: Path) -> dict:
    """What train_stage3.py records of a run that started from an artifact."""
    provenance = open_initial(ModelConfig(), artifact).provenance
    run = {"run": "s3", "global_step": 600, "datasets": ["me/teleop", "/data/more"], "weights": "last step"}
    more = {"actions": "actions as recorded", "command": "train_stage3.py --steps 600", "hub_datasets": ["me/teleop"]}
    return run | {"versions": {"torch": "2.11.0"}} | provenance | more


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    failed = {"health": "fail", "health_reasons": ("collapsed: a slot effectively uses 1.02 codes",)}
    latents = type(LATENTS)(**vars(LATENTS) | failed)
    return save(tmp_path_factory.mktemp("artifacts"), make_artifact_core(), latents)


@pytest.fixture(scope="module")
def original(artifact, tmp_path_factory):
    directory, core = tmp_path_factory.mktemp("run") / "pretrained_model", make_core((CAMERA, WRIST))
    umask = os.umask(0o027)
    tokenizer = load_trunk_tokenizer("tiny", None)
    source, weights = make_source(artifact), core.state_dict()
    save_policy(
        directory,
        core.config,
        weights,
        tokenizer,
        STATISTICS,
        3,
        source,
        image_shapes={CAMERA: (3, 48, 80)},
        optional_cameras=(WRIST,),
        fps=20,
    )
    os.umask(umask)
    return directory


@pytest.fixture
def policy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "pretrained_model")


class FakeHub:
    def __init__(self, root: Path):
        self.root, self.private = root, {}

    def create_repo(self, api, repo_id, private=None, exist_ok=False):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.private[repo_id] = private
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, api, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)  # the contents, as the client's

    def snapshot_download(self, repo_id, *, allow_patterns=None, **options):
        source, copy = self.root / repo_id, self.root / "downloads" / repo_id
        paths = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for name in filter_repo_objects(paths, allow_patterns=allow_patterns):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, copy / name)
        return str(copy)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: fake.create_repo(*a, **k))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *a, **k: fake.upload_folder(*a, **k))
    monkeypatch.setattr(files, "snapshot_download", fake.snapshot_download)
    return fake


def run_hub(*arguments):
    hub.main([str(argument) for argument in arguments])


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_saved_policy_says_where_it_is_from(original, artifact):
    card = ModelCard.load(original / "README.md")
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "lerobot", "hlrp_smolvla_shared", "vision-language-action", "flow-matching"],
        "datasets": ["me/teleop"],
        "base_model": "nobody/nothing",
    }
    for said in (
        "# s3\n",
        f"| `{CAMERA}` | [3, 48, 80] |",
        f"Cameras that may be missing: {WRIST}.",
        "| `action` | [4] | not recorded |",
        '--rename_map=\'{"observation.images.<camera of the robot>": "observation.image"}\'\n',
        "chunks of 12 actions",
        "- Run `s3`, step 600, weights of the last step",
        "- Datasets: `me/teleop`, `/data/more`",
        "- Command: `train_stage3.py --steps 600`",
        "- With torch 2.11.0",
        f"artifact sha256 `{load_artifact(artifact).manifest.weights.sha256}`",
        "- Datasets of Stage 2: `my/videos`, `other`",
        "- Teacher `000000000000`: quantized latent actions of `observation.images.top` over 0.5 s, 1 in a row",
        "on these latent actions: fail\n  - collapsed: a slot effectively uses 1.02 codes",
        f"It was trained on 20 actions a second. Cameras that may be missing: {WRIST}.",
        NOT_EVALUATED,
        "MIT. The trunk's weights come from nobody/nothing",
    ):
        assert said in card.text, said


def test_a_card_says_nothing_that_is_not_recorded():
    config = HLRPSmolVLASharedConfig(core=make_core().config, device="cpu")
    config.action_feature_names = ["x", "y", "z", "gripper"]  # as LeRobot sets it from a dataset
    card = policy_card(config, {})
    assert "Nothing is recorded." in card and "No Stage 2" in card and "eacher `" not in card
    assert "| `action` | [4] | x, y, z, gripper |" in card


def make_results(policy, outcomes, **changes):
    """A results.json of rollout.py. outcomes: successes and interval by task, of 20 episodes each."""
    by_task = {
        task: {"successes": number, "episodes": 20, "wilson_95": interval}
        for task, (number, interval) in outcomes.items()
    }
    results = {"environment": {"type": "metaworld", "tasks": list(outcomes)}, "by_task": by_task, "seed": 7}
    results |= {"max_steps": 500, "n_action_steps": 3, "flow_steps": 10}
    return results | {"policy_sha256": files.policy_sha256(policy)} | changes


def test_results_go_into_the_table(policy, tmp_path):
    """By command; another number for the same conditions replaces a row, and what people wrote stays."""
    readme, perfect = policy / "README.md", (20, [0.84, 1.0])
    readme.write_text(readme.read_text().replace("# s3\n", "# My policy\n"))
    for name, outcomes, changes in [
        ("two", {"reach-v3": perfect, "push-v3": perfect}, {}),
        ("other", {"reach-v3": (5, [0.112, 0.469])}, {"flow_steps": 1}),
        ("again", {"reach-v3": (19, [0.764, 0.991])}, {}),
    ]:
        (tmp_path / f"{name}.json").write_text(json.dumps(make_results(policy, outcomes, **changes)))
    run_hub("card", policy, "--results", tmp_path / "two.json", tmp_path / "other.json")
    run_hub("card", policy, "--results", tmp_path / "again.json")
    text = readme.read_text()
    assert [line for line in text.splitlines() if line.startswith("| metaworld")] == [
        "| metaworld push-v3 | 7 to 26 | 500 | 3 | 10 | 20 of 20 | 84% to 100% |",
        "| metaworld reach-v3 | 7 to 26 | 500 | 3 | 1 | 5 of 20 | 11% to 47% |",
        "| metaworld reach-v3 | 7 to 26 | 500 | 3 | 10 | 19 of 20 | 76% to 99% |",
    ]
    assert "# My policy\n" in text and NOT_EVALUATED not in text and text.count("| task | seeds |") == 1
    HLRPSmolVLASharedPolicy.from_pretrained(policy)


def test_results_of_another_policy_are_refused(policy, tmp_path):
    before, results = (policy / "README.md").read_text(), make_results(policy, {}, policy_sha256="0" * 64)
    (tmp_path / "other.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"other.json is about the policy with sha256 0000.* roll this one out"):
        run_hub("card", policy, "--results", tmp_path / "other.json")
    assert (policy / "README.md").read_text() == before
    with pytest.raises(ValueError, match=r"no section between <!-- evaluation: begin"):
        add_results(before.replace("<!-- evaluation: end -->", ""), results)


def test_results_that_are_not_whole_are_refused(policy, tmp_path):
    path, outcomes = tmp_path / "results.json", {"reach-v3": (5, [0.112, 0.469])}
    whole = make_results(policy, outcomes)
    of_task = whole["by_task"]["reach-v3"]
    before = (policy / "README.md").read_text()
    for changes, message in [
        ({"seed": None}, "results.json.*seed"),
        ({"flow_steps": "many"}, "results.json.*flow_steps"),
        ({"environment": {}}, "results.json, environment.*type"),
        ({"by_task": [1]}, "results.json.*by_task"),
        ({"by_task": {"reach-v3": of_task | {"wilson_95": [0.1]}}}, "results.json, reach-v3.*wilson_95"),
        ({"by_task": {"reach-v3": of_task | {"episodes": 0}}}, "results.json, reach-v3.*episodes"),
        ({"by_task": {"reach-v3": None}}, "results.json, reach-v3"),
    ]:
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match=f"(?s){message}"):
            run_hub("card", policy, "--results", path)
    assert (policy / "README.md").read_text() == before


# --- LeRobot's save ---------------------------------------------------------------------------------------------------


def test_the_umask_says_who_can_read_a_policy(original):
    assert names_in(original) == FILES
    assert {stat.S_IMODE(path.stat().st_mode) for path in original.iterdir()} == {0o640}


@pytest.mark.parametrize("given", [False, True], ids=["0.6.1, main", "0.6.1 with FSDP's weights"])
def test_lerobots_save_keeps_where_the_weights_are_from(original, tmp_path, given):
    policy = HLRPSmolVLASharedPolicy.from_pretrained(original)
    weights = {"state_dict": policy.state_dict()} if given else {}
    policy._save_pretrained(tmp_path, **weights)
    for name in ("model.safetensors", "source.json", "README.md"):
        assert (tmp_path / name).read_bytes() == (original / name).read_bytes(), name
    assert PreTrainedConfig.from_pretrained(tmp_path) == policy.config


def test_weights_that_lerobot_has_trained_say_so(original, tmp_path):
    """However often the training is resumed, and with LeRobot's own card."""
    before = json.loads((original / "source.json").read_text())
    for run, start in [("one", original), ("resumed", tmp_path / "one")]:
        policy = HLRPSmolVLASharedPolicy.from_pretrained(start)
        with torch.no_grad():
            policy.model.state_proj.bias += 1
        policy.save_pretrained(tmp_path / run)
        source = json.loads((tmp_path / run / "source.json").read_text())
        assert source["trained_by"].startswith("LeRobot 0.") and source["started_from"] == before
        assert source["weights_sha256"] == files.file_sha256(tmp_path / run / "model.safetensors")
    for card in (
        ModelCard.load(tmp_path / run / "README.md"),
        policy.generate_model_card("you/teleop", policy.config.type, "apache-2.0", ["so101"]),
    ):
        assert "- Trained by LeRobot 0." in card.text and "- Before that:\n- Run `s3`, step 600" in card.text
    assert card.data.license == "apache-2.0" and "so101" in card.data.tags
    assert card.data.datasets == ["me/teleop", "you/teleop"]


@pytest.mark.slow
def test_lerobot_train_keeps_where_a_policy_is_from(server, labelled_dataset, tmp_path):
    core, source = make_core(), {"run": "s3", "global_step": 4, "weights": "last step"}
    policy, tokenizer = tmp_path / "pretrained_model", load_trunk_tokenizer("tiny", None)
    save_policy(policy, core.config, core.state_dict(), tokenizer, STATISTICS, 3, source)
    command = ["-m", "lerobot.scripts.lerobot_train", f"--policy.path={policy}", "--policy.device=cpu", "--steps=1"]
    command += ["--dataset.repo_id=me/labelled", f"--dataset.root={labelled_dataset}", "--num_workers=0"]
    command += [f"--output_dir={tmp_path / 'tuned'}", "--batch_size=2", "--save_freq=1"]
    code, printed = run_forked(server, command, tmp_path / "output.txt")
    assert code == 0, printed
    tuned = tmp_path / "tuned" / "checkpoints" / "last" / "pretrained_model"
    assert json.loads((tuned / "source.json").read_text())["started_from"]["run"] == "s3"
    assert "- Run `s3`, step 4, weights of the last step" in (tuned / "README.md").read_text()


# --- to the hub and back ----------------------------------------------------------------------------------------------


def test_a_policy_goes_to_the_hub_and_comes_back(policy, fake_hub, capsys):
    (policy / "notes.txt").touch()  # not a policy's
    run_hub("push", policy, "me/my_policy", "--private")
    assert "uploaded: https://huggingface.co/me/my_policy" in capsys.readouterr().out
    there = fake_hub.root / "me" / "my_policy"
    assert names_in(there) == FILES and fake_hub.private == {"me/my_policy": True}
    assert "hf download me/my_policy --local-dir policy" in (there / "README.md").read_text()

    # What else is in a repository, such as LeRobot's --save_checkpoint_to_hub, is not fetched.
    shutil.copytree(there, there / "checkpoints" / "000100" / "pretrained_model")
    (there / "rollout.mp4").touch()
    again = HLRPSmolVLASharedPolicy.from_pretrained("me/my_policy")
    assert names_in(fake_hub.root / "downloads" / "me" / "my_policy") == FILES[1:]
    assert all(torch.equal(w, again.state_dict()[k]) for k, w in load_file(policy / "model.safetensors").items())
    assert again.source == json.loads((policy / "source.json").read_text())


@pytest.fixture
def of_two_robots(tmp_path):
    """The directory of a policy of two robots, as train_stage3.py writes it."""
    directory, core, tokenizer = tmp_path / "pretrained_model", make_core(), load_trunk_tokenizer("tiny", None)
    about = core.state_dict(), tokenizer
    save_policy(directory, core.config, *about, {}, 3, {"run": "s3"}, robots=("wide", "so100"))
    for robot, state, action in (("wide", 4, 4), ("so100", 3, 2)):
        config = replace(core.config, state_dim=state, action_dim=action)
        widths = {"state": state, "action": action}
        of = {name: Statistics(s.mean[: widths[name]], s.std[: widths[name]]) for name, s in STATISTICS.items()}
        rest = {"robot": robot, "weights_of": directory}
        save_policy(directory / "robots" / robot, config, *about, of, 3, {"run": "s3"}, **rest)
    return directory


def test_the_policy_of_one_robot_comes_from_the_hub(of_two_robots, fake_hub):
    run_hub("push", of_two_robots, "me/two")
    robot, copy = of_two_robots / "robots" / "so100", fake_hub.root / "downloads" / "me" / "two"
    assert of_robot("me/two", "so100") == copy / "robots" / "so100"
    assert names_in(copy / "robots") == ["so100"] and not (copy / "model.safetensors").exists()
    assert files.policy_sha256(copy / "robots" / "so100") == files.policy_sha256(robot)
    # Elsewhere it is a name.
    local, of_hub = (HLRPSmolVLASharedPolicy.from_pretrained(name) for name in (robot, "me/two/robots/so100"))
    assert of_hub.config == local.config and of_hub.config.robot == "so100" and of_hub.config.core.action_dim == 2
    assert all(torch.equal(weight, of_hub.state_dict()[key]) for key, weight in local.state_dict().items())
    initial = open_initial(ModelConfig(init_from="me/two/robots/so100"))
    assert initial.statistics == open_initial(ModelConfig(init_from=str(robot))).statistics


def test_a_policy_of_the_hub_whose_robot_is_open_is_refused(of_two_robots, fake_hub):
    run_hub("push", of_two_robots, "me/two")
    for load in (HLRPSmolVLASharedPolicy.from_pretrained, lambda name: of_robot(name, None)):
        with pytest.raises(ValueError, match=r"which robot\? .* wide, so100: pass --robot <name> to rollout.py"):
            load("me/two")
    with pytest.raises(ValueError, match=r"there is no robot arm in me/two, it acts with wide, so100"):
        of_robot("me/two", "arm")
    with pytest.raises(ValueError, match=r"no policy in .*arm: config.json is missing, found no such directory"):
        HLRPSmolVLASharedPolicy.from_pretrained("me/two/robots/arm")
    (of_two_robots / "robots" / "so100" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"so100 is not what was written: config.json was changed"):
        run_hub("push", of_two_robots, "me/again")


@pytest.mark.slow
def test_a_rollout_takes_a_robots_policy_from_the_hub(of_two_robots, fake_hub, tmp_path):
    run_hub("push", of_two_robots, "me/two")
    what = {"policy_path": "me/two", "robot": "wide", "out": tmp_path / "out"}
    env = EnvironmentConfig(task=("reach-v3",))
    rollout.main(RolloutConfig(**what, env=env, episodes=1, num_envs=1, max_steps=2))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["policy_path"] == str(fake_hub.root / "downloads" / "me" / "two" / "robots" / "wide")
    assert results["policy_sha256"] == files.policy_sha256(of_two_robots / "robots" / "wide")


def test_an_artifact_and_a_teacher_go_to_the_hub(artifact, laq_checkpoint, fake_hub):
    run_hub("push", artifact.parent, "me/stage2")
    run_hub("push", laq_checkpoint, "me/teacher")
    there = fake_hub.root / "me"
    again = load_artifact(there / "stage2" / artifact.name)
    assert again.manifest == load_artifact(artifact).manifest and len(names_in(there / "stage2")) == 4
    card = ModelCard.load(there / "stage2" / "README.md")
    assert f"- Run `{ORIGIN.run}`, step 500" in card.text and "latent actions: fail\n  - collapsed" in card.text
    assert f"--stage2-artifact downloaded/{artifact.name}" in card.text
    assert names_in(there / "teacher") == ["README.md", "laq.json", "laq.safetensors"]
    card = ModelCard.load(there / "teacher" / "README.md")
    assert f"`{teacher_id(load_laq(laq_checkpoint))}`" in card.text and card.data.license == "mit"
    assert not (laq_checkpoint.parent / "README.md").exists()


def test_a_dry_run_uploads_nothing(policy, fake_hub, capsys):
    run_hub("push", policy, "me/my_policy", "--dry-run")
    printed = capsys.readouterr().out
    assert not fake_hub.root.exists()
    assert all(name in printed for name in FILES)
    assert f"{(policy / 'config.json').stat().st_size:,} bytes  config.json" in printed


def test_what_is_not_whole_is_not_uploaded(policy, artifact, tmp_path, fake_hub):
    with pytest.raises(ValueError, match=r"holds no policy .* found: \['pretrained_model'.*\]; a run has them in"):
        run_hub("push", tmp_path, "me/run")
    with pytest.raises(ValueError, match=r"found: no such file or directory"):
        run_hub("push", tmp_path / "nowhere", "me/run")
    with pytest.raises(ValueError, match="Repo id"):
        run_hub("push", policy, "not/a/repository")
    weights = load_file(policy / "model.safetensors")
    save_file(weights | {"model.state_proj.bias": weights["model.state_proj.bias"] + 1}, policy / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not what was written: model.safetensors was changed"):
        run_hub("push", policy, "me/my_policy")
    shutil.copy(artifact, tmp_path / artifact.name)
    with pytest.raises(ValueError, match=r"json is missing beside it"):
        run_hub("push", tmp_path / artifact.name, "me/my_artifact")
    assert not fake_hub.root.exists()
