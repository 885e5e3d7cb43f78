"""Launchers: the configs for accelerate, what they start, and the script for Slurm."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import TINY_VIT, draw_folder, tiny_recipe
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

from vit_finetune.recipe import bundled_recipes, load_recipe
from vit_finetune.run import Run
from vit_finetune.training.arguments import build_arguments
from vit_finetune.training.checkpoints import list_checkpoints
from vit_finetune.training.hardware import Hardware
from vit_finetune.training.loading import Loading, Speeds

CHECKOUT = Path(__file__).parents[1]
CONFIGS = sorted((next(iter(bundled_recipes().values())).parent / "accelerate").iterdir())
SBATCH = CHECKOUT / "scripts" / "slurm" / "train.sbatch"


# --------------------------------------------------------------------------- configs


def validated(config: Path) -> Any:
    """What `accelerate launch --config_file` makes of a config."""
    words = ["--config_file", str(config), "-m", "vit_finetune", "train", "digits"]
    return _validate_launch_command(launch_command_parser().parse_args(words))


def test_the_configs_are_these() -> None:
    assert [path.name for path in CONFIGS] == [
        f"{name}.yaml" for name in ("cpu", "ddp", "deepspeed", "fsdp", "multi_node")
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_a_config(config: Path) -> None:
    load_config_from_file(str(config))  # refuses keys that it does not know
    args, _, says_precision = validated(config)
    assert not says_precision, "the recipe decides on the precision"
    assert args.module
    assert [args.multi_gpu, args.use_fsdp, args.use_deepspeed].count(True) == 1
    values = yaml.safe_load(config.read_text())
    known = {"use_cpu"} | vars(launch_command_parser().parse_args(["script"])).keys()
    sections = [values.pop(name) for name in list(values) if isinstance(values[name], dict)]
    for name, value in [*values.items(), *(pair for section in sections for pair in section.items())]:
        if name not in ("compute_environment", "distributed_type"):
            # accelerate says nothing of keys below a section that it does not know, and sets them all the same.
            assert name in known, name
            assert getattr(args, name) == value, name
    assert f"--config_file recipes/accelerate/{config.name}" in config.read_text()


def test_the_commands_of_the_page_are_valid() -> None:
    page = (CHECKOUT / "docs" / "processes.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^accelerate launch (.*)$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        args = launch_command_parser().parse_args(shlex.split(command))
        args.config_file = str(CHECKOUT / args.config_file)
        _validate_launch_command(args)
        assert (args.module, args.training_script) == (True, "vit_finetune")
        verb, name, *overrides = args.training_script_args
        assert verb == "train"
        load_recipe(name.replace("RECIPE", "digits"), overrides)


def test_a_launchers_precision_does_not_go_before_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    recipe = tiny_recipe("photos", tmp_path)
    arguments = build_arguments(
        recipe.training,
        Hardware(True, False, False, "sdpa", 4),
        Loading(0, None, False, None, Speeds(*[1.0] * 5)),
        tmp_path,
        8,
    )
    assert arguments.mixed_precision == "no"


def test_fsdp_divides_layer_by_layer() -> None:
    args, *_ = validated(next(path for path in CONFIGS if path.stem == "fsdp"))
    with patch_environment(**prepare_multi_gpu_env(args)):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"  # what checkpoints and `model/` are read from
    assert not plugin.cpu_ram_efficient_loading  # other processes would be checked against empty weights
    model = ViTForImageClassification(ViTConfig(**TINY_VIT))
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [type(module).__name__ for module in model.modules() if is_unit(module)] == ["ViTLayer"] * 2


def test_deepspeed_leaves_to_the_recipe_what_the_recipe_says() -> None:
    args, *_ = validated(next(path for path in CONFIGS if path.stem == "deepspeed"))
    args.deepspeed_fields_from_accelerate_config = ""
    with patch_environment(**prepare_deepspeed_cmd_env(args)[1]):
        config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == 2
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto"


# --------------------------------------------------------------------------- what they start


def launch(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch`, on the CPU."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def write_recipe(path: Path, photos: Path, output_dir: Path) -> Path:
    training = {
        "use_cpu": False,  # the program notices that there is nothing else
        "num_train_epochs": 4,
        "save_total_limit": None,
        "dataloader_num_workers": 0,
        "adam_epsilon": 1e-3,  # the usual one turns the rounding of gradients near zero into steps
        "metric_for_best_model": "loss",
    }
    recipe = tiny_recipe(photos, output_dir, model={"drop_path_rate": 0.3}, training=training)
    path.write_text(recipe.to_yaml(resolved=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("launching") / "photos")


@pytest.fixture(scope="module")
def ddp_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run of two processes that cpu.yaml started, and what they said."""
    folder = tmp_path_factory.mktemp("cpu")
    recipe = write_recipe(folder / "tiny.yaml", photos, folder / "run")
    done = launch("--config_file", CONFIGS[0], "-m", "vit_finetune", "train", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder / "run"), done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_cpu_yaml_trains_two_processes(ddp_run: tuple[Run, str]) -> None:
    run, said = ddp_run
    assert said.count("2 processes × 4 images × 1 accumulation = 8 images per step") == 1
    assert run.report_html.is_file()
    assert run.read_provenance()["hardware"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp_trains_what_ddp_trains_and_resumes_exactly(
    ddp_run: tuple[Run, str], photos: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", photos, tmp_path / "run")
    config = next(path for path in CONFIGS if path.stem == "fsdp")
    script = Path(__file__).with_name("launched_fsdp.py")
    done = launch(
        "--config_file",
        config,
        "--num_processes",
        2,
        script,
        recipe,
        tmp_path / "first",
        PYTHONPATH=path_of_package(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    uninterrupted, resumed = Run(tmp_path / "first"), Run(tmp_path / "run")
    assert (list_checkpoints(resumed.checkpoints)[-1] / "pytorch_model_fsdp.bin").is_file(), (
        "this was no FSDP"
    )
    for one, other, tolerance in ((uninterrupted, resumed, 0.0), (uninterrupted, ddp_run[0], 1e-5)):
        assert [path.name for path in list_checkpoints(one.checkpoints)] == [
            path.name for path in list_checkpoints(other.checkpoints)
        ]
        for name in ("model", f"checkpoints/{list_checkpoints(one.checkpoints)[-1].name}"):
            expected, found = (load_file(run.path / name / "model.safetensors") for run in (one, other))
            assert list(expected) == list(found)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, atol=tolerance, rtol=0)


def path_of_package() -> str:
    """PYTHONPATH with which a script elsewhere imports this package."""
    return os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_in_place_of_two_is_refused(photos: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", photos, tmp_path / "run")
    done = launch("--cpu", "--num_processes", 2, "-m", "vit_finetune", "train", recipe)
    assert done.returncode == 1
    assert "recipes/accelerate/cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- Slurm

STUBS = {
    "srun": """
        printf '%s\\n' "$@" > said/srun
        case $ENDS in itself) exit 3;; well) trap 'exit 0' TERM;; told) trap 'exit 1' TERM;; esac
        echo $$ > said/step && touch said/running
        while :; do sleep 0.05; done""",
    "scancel": 'echo "$*" > said/scancel; kill -TERM "$(cat said/step)"; sleep 0.3',
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$*" > said/scontrol; fi',
}
"""Slurm's commands: they note what they are told; a step ends by itself, or when it is told to, well or not."""


def run_batch(folder: Path, ends: str, *words: str) -> tuple[int, dict[str, str]]:
    """The script's exit code and what it told Slurm's commands, by command."""
    for name, text in STUBS.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "said").mkdir()
    path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {"PATH": os.pathsep.join(path), "PYTHONPATH": path_of_package(), "ENDS": ends}
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "[x]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    with subprocess.Popen(
        ["bash", SBATCH, *words],
        cwd=folder,
        env={**os.environ, **environment, **slurm},
        stdout=subprocess.DEVNULL,
    ) as script:
        try:
            if ends != "itself":
                while not (folder / "said" / "running").exists():
                    assert script.poll() is None
                    time.sleep(0.02)
                script.send_signal(signal.SIGUSR1)  # what `--signal=B:USR1@120` sends
            code = script.wait(60)
        finally:
            if script.poll() is None:
                script.kill()
                os.kill(int((folder / "said" / "step").read_text()), signal.SIGKILL)
    return code, {file.name: file.read_text() for file in (folder / "said").iterdir()}


def test_a_slurm_job_whose_time_is_up_is_requeued_and_resumes(tmp_path: Path) -> None:
    words = ["digits", "training.output_dir=a run", "training.seed=3"]
    code, said = run_batch(tmp_path, "told", *words)
    assert code == 1
    assert said["scancel"] == "--signal=TERM 7\n"  # SIGUSR1 would kill the launcher
    assert said["scontrol"] == "requeue 7\n"
    told = said["srun"].splitlines()
    assert told[told.index("-m") :] == ["-m", "vit_finetune", "train", *words]
    options = dict(itertools.pairwise(told))
    assert options["--num_machines"] == "2"
    assert options["--num_processes"] == "8"
    assert options["--main_process_ip"] == "first"
    assert options["--config_file"] == "recipes/accelerate/multi_node.yaml"

    shutil.rmtree(tmp_path / "said")
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "recipe.yaml").touch()
    code, said = run_batch(tmp_path, "well", *words, "--resume")  # as whoever stops a run is told to say
    assert code == 0
    assert "scontrol" not in said  # it was finished in the time that was left
    told = said["srun"].splitlines()
    assert told[told.index("-m") :] == ["-m", "vit_finetune", "train", *words, "--resume"]


def test_a_slurm_job_that_fails_is_not_requeued(tmp_path: Path) -> None:
    code, said = run_batch(tmp_path, "itself", "digits")
    assert code == 3
    assert set(said) == {"srun"}


def test_the_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", SBATCH], check=True)
    lines = SBATCH.read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(
        line.startswith("#") for line in lines[: last + 1]
    )  # sbatch reads no further than the first command
    (words,) = [line for line in lines if line.startswith("words=(") and "$@" not in line]
    assert words.split("(")[1].split()[0] in bundled_recipes()
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, SBATCH], check=True)
