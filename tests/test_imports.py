from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cascadevl.cli.main import make_parser
from cascadevl.cli.train import STAGES, read_config
from cascadevl.config import load_config
from cascadevl.workflows.cascade_config import CascadeConfig
from cascadevl.workflows.mixture_config import MixtureSearchConfig

ROOT = Path(__file__).parents[1]

EXTRAS = {
    "av",
    "datasets",
    "sklearn",
    "easy_vqa",
    "vega_datasets",
    "pandas",
    "sentencepiece",
    "llguidance",
    "fastapi",
    "uvicorn",
    "zmq",
    "msgspec",
    "prometheus_client",
    "gradio",
    "simpy",
    "ray",
}
"""What only an extra of pyproject.toml installs."""

HEAVY = {"torch", "transformers", "accelerate", "peft", "matplotlib", "tensorboard", "numpy", "PIL"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after running some code."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy_and_no_extra():
    loaded = modules_after("import cascadevl; cascadevl.__version__")
    assert "cascadevl" in loaded
    assert not loaded & (HEAVY | EXTRAS)


def test_help_of_the_command_line_loads_nothing_heavy_and_no_extra():
    code = """
from cascadevl.cli.main import main
for words in ([], ["train", "sft"], ["chat"], ["serve"], ["web"], ["plan"]):
    try:
        main([*words, "--help"])
    except SystemExit as done:
        assert done.code == 0"""
    loaded = modules_after(code)
    assert "argparse" in loaded
    assert not loaded & (HEAVY | EXTRAS | {"rich", "jsonargparse"})


def test_loading_training_and_the_commands_need_no_extra():
    code = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # as if it were not installed
import cascadevl, cascadevl.train.sft, cascadevl.workflows.dry_run, cascadevl.workflows.show
cascadevl.load"""
    assert "torch" in modules_after(code)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import cascadevl

    with pytest.raises(AttributeError, match="lod"):
        cascadevl.lod  # noqa: B018


def test_every_public_name_is_there():
    import cascadevl

    assert all(getattr(cascadevl, name) is not None for name in cascadevl.__all__)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.name
)
def test_every_configuration_file_loads(file: Path):
    if file.name.startswith("mixture_search_"):
        load_config(MixtureSearchConfig, files=[file])
        return
    if file.name.startswith("cascade_"):
        load_config(CascadeConfig, files=[file])
        return
    stage = file.name.partition("_")[0]
    assert stage in STAGES, f"{file.name} does not begin with the stage that runs it"
    read_config(make_parser().parse_args(["train", stage, str(file)]))
