"""What all tests run in: no network, empty caches, rendering without a screen, one thread a process."""

import os
import runpy
import tempfile
from importlib.resources import files
from pathlib import Path

import pytest

NO_NETWORK = str(Path(__file__).parent / "no_network")
EMPTY_CACHE = tempfile.TemporaryDirectory(prefix="hf_home_")  # removed at exit

# Set before torch, transformers, lerobot or mujoco are imported; the processes that tests start inherit it.
os.environ |= {
    "PYTHONPATH": os.pathsep.join([NO_NETWORK, *filter(None, [os.environ.get("PYTHONPATH")])]),
    "HF_HOME": EMPTY_CACHE.name,
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
os.environ.setdefault("MUJOCO_GL", "osmesa")

runpy.run_path(f"{NO_NETWORK}/sitecustomize.py")  # not an import: Ubuntu's Python has imported one of that name


@pytest.fixture(scope="session")
def tiny_vlm() -> Path:
    """Directory of the preset `tiny`: a SmolVLM's configuration and tokenizer."""
    return Path(str(files("smolvla_shared") / "assets" / "tiny_vlm"))
