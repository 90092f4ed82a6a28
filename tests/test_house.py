"""Rules of the house: who imports whom, how long a script may be, what an import may do, and that tests are offline."""

import ast
import os
import pkgutil
import re
import socket
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import smolvla_shared

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "smolvla_shared"
# A module imports only modules above it.
ORDER = """
    ranges idle_options paths launch locks hashes refusals mixture command config
    laq_config teacher_config action_config
    batch normalization preprocess flow losses files cache run_processes run_signals
    video_source video_clips video_captions video_dataset video
    attention kernels trunk trunk_files model model_parts laq_layers laq laq_codebook laq_files
    data_columns data_frames data_rows data_info data_problems data_values data data_outliers data_views
    relative_actions robots data_split data_order data_table
    robot_preprocessor
    label_probe augmentation data_loader data_blocks label_cache labels
    action_decoder artifact label_health label_pictures
    label_check feature_cache
    lerobot_config lerobot_processor lerobot_card lerobot_files lerobot_smolvla_files lerobot_smolvla
    initial lerobot_policy evaluate run_sharding run_optimizer run_metrics run_checkpoint run grounding teacher
    comparison rollout_options environments rollouts rollout_results hub_upload hub serve
    train_stage2 train_stage3 rollout gpu_checks gpu_check data_pictures data_report data_check
""".split()
SCRIPTS = ["train_stage2", "train_stage3", "rollout"]
USES_LEROBOT = {
    *"augmentation data data_frames data_report environments rollouts rollout_results serve video_dataset".split(),
    *SCRIPTS,
}
USES_LEROBOT |= {name for name in ORDER if name.startswith("lerobot_")}

SOURCES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
SOURCES |= {name: ROOT / f"{name}.py" for name in SCRIPTS if (ROOT / f"{name}.py").exists()}


def imports(source: str) -> set[str]:
    """Full names of everything that a source imports, at any depth: `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [node.level * "smolvla_shared", node.module]))
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def at_run_time(source: str) -> str:
    """A source without its `if TYPE_CHECKING:` block."""
    return re.sub(r"^if TYPE_CHECKING:\n(?:\n*    .*\n)+", "", source, flags=re.M)


def own_modules(names: set[str]) -> set[str]:
    """Which modules of ours are among imported names: smolvla_shared.flow.euler gives flow."""
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "smolvla_shared" and len(p) > 1} | {p[0] for p in parts if p[0] in SCRIPTS}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
    )


def test_imports_are_read_from_every_form():
    source = (
        "import smolvla_shared.flow\ndef f():\n    from . import batch\n    from .config import A\n    import rollout"
    )
    assert own_modules(imports(source)) == {"flow", "batch", "config", "rollout"}


def test_every_module_has_its_place_in_the_order():
    assert set(SOURCES) <= set(ORDER), f"not in the order of imports: {sorted(set(SOURCES) - set(ORDER))}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_point_upwards(name):
    above = set(ORDER[: ORDER.index(name)])
    imported = own_modules(imports(at_run_time(SOURCES[name].read_text())))
    assert imported <= above, f"{name} imports {sorted(imported - above)}, which stand below it"


@pytest.mark.parametrize("name", sorted(set(SOURCES) - USES_LEROBOT))
def test_the_model_can_be_used_without_lerobot(name):
    assert not [n for n in imports(SOURCES[name].read_text()) if n.split(".")[0] == "lerobot"]


def functions(name: str) -> dict[str, int]:
    """Lines of every function of a module or script."""
    nodes = [node for node in ast.walk(ast.parse(SOURCES[name].read_text())) if isinstance(node, ast.FunctionDef)]
    return {f"{name}.{node.name}": node.end_lineno - node.lineno + 1 for node in nodes}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_function_fits_on_a_screen(name):
    """80 lines, and a script's main 60: a limit that is met by cutting the problem."""
    lengths = functions(name)
    bounds = {function: 60 if function.endswith(".main") else 80 for function in lengths}
    assert not {function: length for function, length in lengths.items() if length > bounds[function]}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_file_is_read_in_one_sitting(name):
    length = len(SOURCES[name].read_text().splitlines())
    assert length <= (200 if name in SCRIPTS else 400), f"{name} has {length} lines"


def test_the_training_step_stands_in_the_scripts():
    """The scripts call the model, take the loss and go backward themselves."""
    for name in ("train_stage2", "train_stage3", "teacher"):
        calls = {
            node.attr for node in ast.walk(ast.parse(SOURCES[name].read_text())) if isinstance(node, ast.Attribute)
        }
        assert {"steps", "passes", "core", "backward", "update"} <= calls, name


def rooms() -> list[list[str]]:
    """The modules of each list of the package's docstring, in its order: the method, what surrounds it, machinery."""
    lists = re.split(r"^\S.*:$", smolvla_shared.__doc__, flags=re.M)[1:]
    lines = [re.findall(r"^    ((?:\w+, )*\w+)(?:  .*)?$", text, re.M) for text in lists]
    return [[name for line in of for name in line.split(", ")] for of in lines]


def test_the_map_names_every_module_once():
    modules = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert sorted(name for room in rooms() for name in room) == sorted(modules)


def test_what_one_must_read_to_know_the_method_is_short():
    method = [*rooms()[0], "train_stage2", "train_stage3"]
    assert "model" in method and "run" not in method
    assert sum(len(SOURCES[name].read_text().splitlines()) for name in method) <= 3000


def test_config_imports_no_torch():
    done = run_python("import sys, smolvla_shared.config; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_importing_every_module_prints_nothing_and_asks_no_network():
    # LeRobot's --policy.discover_packages_path imports them all too. Without HF_HUB_OFFLINE only our own guard is left.
    modules = [f"smolvla_shared.{module.name}" for module in pkgutil.iter_modules(smolvla_shared.__path__)]
    done = run_python(f"import {', '.join(modules)}", HF_HUB_OFFLINE="0")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


CALL_OUT = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=0.1)"  # TEST-NET-1: never answers


def test_network_is_blocked_here():
    with pytest.raises(RuntimeError, match=r"offline.*192\.0\.2\.1"):
        exec(CALL_OUT)
    with pytest.raises(RuntimeError, match=r"offline.*huggingface\.co"):
        socket.getaddrinfo("huggingface.co", 443)


def test_network_is_blocked_in_child_processes():
    assert "the tests are offline, but something asked for 192.0.2.1" in run_python(CALL_OUT).stderr


def test_this_machine_may_talk_to_itself():
    with socket.create_server(("localhost", 0)) as server:  # processes of a distributed test do
        socket.create_connection(server.getsockname(), timeout=5).close()


@pytest.mark.slow
def test_lerobot_finds_policy_and_environment():
    """LeRobot's commands import every distribution lerobot_policy_*, as a module of the name in its metadata."""
    assert distribution("lerobot_policy_hlrp_smolvla_shared").metadata["Name"] == "lerobot_policy_hlrp_smolvla_shared"
    done = run_python(
        "from lerobot.utils.import_utils import register_third_party_plugins as register; register()\n"
        "from lerobot.configs.policies import PreTrainedConfig\n"
        "PreTrainedConfig.get_choice_class('hlrp_smolvla_shared')\n"
        "from lerobot.envs.configs import EnvConfig\n"
        "EnvConfig.get_choice_class('metaworld_plain')"
    )
    assert done.returncode == 0, done.stderr
