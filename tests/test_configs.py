"""configs/: accelerate accepts the .yaml files, several nodes find each other, and each .sbatch file starts, resumes
and requeues a run whose options are its script's. SLURM's commands are stand-ins that note what they are asked."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import train_stage2
import train_stage3
from smolvla_shared import run_sharding, teacher

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "accelerate"


@pytest.mark.parametrize("name", ["cpu", "gpu_bf16", "ddp_8gpu", "fsdp2_8gpu", "multinode", "fsdp2_multinode"])
def test_accelerate_accepts_our_configurations(name):
    path = str(CONFIGS / f"{name}.yaml")
    args = launch_command_parser().parse_args(["--config-file", path, "train_stage2.py"])
    config, args = load_config_from_file(path), _validate_launch_command(args)[0]
    assert args.num_processes == config.num_processes
    assert args.use_fsdp == name.startswith("fsdp2")
    assert args.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert name == "cpu" or args.gpu_ids == "all"  # a number would override CUDA_VISIBLE_DEVICES


@pytest.mark.parametrize("name", ["fsdp2_8gpu", "fsdp2_multinode"])
def test_fsdp_settings_are_those_that_we_follow(name, monkeypatch):
    for setting, value in load_config_from_file(str(CONFIGS / f"{name}.yaml")).fsdp_config.items():
        monkeypatch.setenv(setting.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    state = SimpleNamespace(fsdp_plugin=plugin)
    run_sharding.check_plugin(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state))
    assert plugin.fsdp_version == 2


@pytest.mark.slow
def test_two_nodes_find_each_other(tmp_path):
    """multinode.yaml as its comment says, each launcher for a node of this machine."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom smolvla_shared.command import run_command\n"
        "from smolvla_shared.run_processes import make_accelerator\ndef main():\n    a = make_accelerator()\n"
        "    print('found', a.num_processes, a.process_index, a.reduce(torch.ones(1), 'sum').item())\n"
        "run_command(main)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config-file", str(CONFIGS / "multinode.yaml")]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "29637"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), script], stdout=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(2)
    ]
    found = [node.communicate(timeout=120)[0] for node in nodes]
    assert found == [f"found 2 {rank} 2.0\n" for rank in range(2)]
    assert [node.wait() for node in nodes] == [0, 0]


# --- SLURM ------------------------------------------------------------------------------------------------------------

STAGES = {
    "teacher": (teacher.TeacherConfig, ["-m", "smolvla_shared.teacher", "train"], []),
    "stage2": (train_stage2.Stage2Config, ["train_stage2.py"], ["--laq-ckpt", "laq.safetensors"]),
    "stage3": (train_stage3.Stage3Config, ["train_stage3.py"], ["--chunk-size", "20", "--data.cameras", "a b"]),
}
# srun starts its command once a node; the rest is taken down.
SRUN = """#!{python}
import json, os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
codes = [subprocess.run(command, env=os.environ | {{"SLURM_NODEID": str(node)}}).returncode
         for node in range(int(os.environ["SLURM_NNODES"]))]
sys.exit(max(codes))
"""
ACCELERATE = """#!{python}
import json, os, signal, sys
from pathlib import Path
note = {{"args": sys.argv[1:], "usr1": str(signal.getsignal(signal.SIGUSR1))}}
with open("{notes}/accelerate", "a") as file:
    file.write(json.dumps(note) + "\\n")
if os.environ.get("STOPS"):
    Path(os.environ["STOPS"]).write_text("{{}}")
sys.exit(int(os.environ["CODE"]))
"""
SCONTROL = """#!{python}
import sys
if sys.argv[1] == "show":
    print("node-a\\nnode-b")
else:
    open("{notes}/scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs an .sbatch file on two nodes of eight GPUs: its exit code, what accelerate was asked, what scontrol was."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, source in (("srun", SRUN), ("accelerate", ACCELERATE), ("scontrol", SCONTROL)):
        (commands / name).write_text(source.format(python=sys.executable, notes=tmp_path))
        (commands / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "64"}
    job |= {"SLURM_JOB_NODELIST": "node-[a-b]", "PATH": f"{commands}:{os.environ['PATH']}"}

    def run(stage: str, run_dir: Path, *options: str, code: int = 0, stops: bool = False):
        for note in ("accelerate", "scontrol"):
            (tmp_path / note).unlink(missing_ok=True)
        environment = os.environ | job | {"CODE": str(code), "STOPS": str(run_dir / "stopped.json") if stops else ""}
        script = ROOT / "configs" / "slurm" / f"{stage}.sbatch"
        done = subprocess.run(["bash", script, run_dir, *options], cwd=ROOT, env=environment)
        asked = [json.loads(line) for line in (tmp_path / "accelerate").read_text().splitlines()]
        scontrol = tmp_path / "scontrol"
        return done.returncode, asked, scontrol.read_text().splitlines() if scontrol.exists() else []

    return run


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_starts_resumes_and_requeues_its_run(stage, slurm, tmp_path):
    config_class, command, options = STAGES[stage]
    run_dir = tmp_path / "runs" / "a run"
    given = ["--data.repo-ids", "my/data", *options]

    code, asked, scontrol = slurm(stage, run_dir, *given)
    assert (code, scontrol) == (0, [])
    assert len(asked) == 2
    for node, note in enumerate(asked):
        assert note["usr1"] == str(signal.SIG_IGN)
        assert note["args"][0] == "launch"
        launch = launch_command_parser().parse_args(note["args"][1:])
        assert Path(launch.config_file).is_file()
        assert (launch.machine_rank, launch.num_machines, launch.num_processes) == (node, 2, 16)
        assert (launch.main_process_ip, launch.main_process_port) == ("node-a", 24711)
        asked_command = [*(["-m"] if launch.module else []), launch.training_script, *launch.training_script_args]
        assert asked_command[: len(command)] == command
        config = tyro.cli(config_class, args=asked_command[len(command) :])
        assert (config.run_dir, config.data.repo_ids, config.resume) == (run_dir, ("my/data",), False)
        assert config.precision is None  # it stands in one place
        assert load_config_from_file(launch.config_file).mixed_precision == "bf16"

    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    code, asked, scontrol = slurm(stage, run_dir, *given, code=1, stops=True)
    assert all(note["args"][-1] == "--resume" for note in asked)
    assert (code, scontrol) == (0, ["requeue 4711"])

    assert (run_dir / "stopped.json").exists()  # this job's is not taken for the next one's
    code, asked, scontrol = slurm(stage, run_dir, *given, code=1)
    assert (code, scontrol) == (1, [])  # it failed: in the queue again it would fail again


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "slurm").iterdir()), ids=lambda path: path.name)
def test_job_scripts_are_sound(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if path.suffix == ".sbatch":
        lines = path.read_text().splitlines()
        assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@300", "#SBATCH --open-mode=append"} <= set(lines)
