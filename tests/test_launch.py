"""The launch files: shells parse them, linters pass them, and what they run exists."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SKY = sorted((LAUNCH / "sky").glob("*.yaml"))
SHELLCHECK = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
PLACE = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z", "TYPE": "v6e-16", "IMAGE": "r/palign"}
RUN = ("configs/dpo.py", "gs://b/pairs.jsonl", "gs://b/runs/dpo")

# The part of SkyPilot's schema that the files use; where SkyPilot is installed its own check runs too.
SKY_KEYS = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"},
    "resources": {"infra", "accelerators", "accelerator_args", "use_spot", "job_recovery"},
    "accelerator_args": {"runtime_version"},
    "job_recovery": {"recover_on_exit_codes"},
}


def name_of(file):
    return str(file.relative_to(LAUNCH))


def scripts():
    """Every shell text: the scripts, and what SkyPilot's files run."""
    texts = {name_of(file): file.read_text() for file in SHELL}
    for file in SKY:
        task = yaml.safe_load(file.read_text())
        texts |= {f"{name_of(file)} {part}": "#!/usr/bin/env bash\n" + task[part] for part in ("setup", "run")}
    return texts


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Commands on the path that write their arguments, one a line, to `NAME.args`, and exit with `NAME_CODE`."""
    for name in ("xpk", "gcloud", "srun", "scontrol"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/{name}.args\nexit ${{{name}_CODE:-0}}\n')
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda name: (tmp_path / f"{name}.args").read_text().splitlines()


def bash(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize("name", scripts())
def test_bash_parses_every_script(name):
    done = subprocess.run(["bash", "-n"], input=scripts()[name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(SHELLCHECK is None, reason="needs the extra `launch`")
@pytest.mark.parametrize("name", scripts())
def test_shellcheck_has_nothing_to_say(name):
    done = subprocess.run([str(SHELLCHECK), "-"], input=scripts()[name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", SKY, ids=name_of)
def test_skypilots_files_have_known_keys(file):
    def check(group, key):
        assert set(group) <= SKY_KEYS[key], f"{key}: {set(group) - SKY_KEYS[key]}"
        for name, value in group.items():
            if name in SKY_KEYS:
                check(value, name)

    task = yaml.safe_load(file.read_text())
    check(task, "")
    used = set(re.findall(r"\$([A-Z]+)", task["setup"] + task["run"]))
    assert used == set(task["envs"])


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="needs SkyPilot")
@pytest.mark.parametrize("file", SKY, ids=name_of)
def test_skypilot_takes_its_files(file):
    import sky

    sky.Task.from_yaml_str(file.read_text().replace(": null", ": x"))


def test_every_command_of_palign_in_the_files_exists_with_its_flags():
    texts = scripts() | {"Dockerfile": (LAUNCH / "Dockerfile").read_text()}
    for file in [ROOT / "docs" / "processes.md", LAUNCH / "README.md"]:
        texts[file.name] = file.read_text()
    found = set()
    for name, text in texts.items():
        joined = re.sub(r"\\\n\s*", " ", text).replace('", "', " ")
        for module, rest in re.findall(r"-m palign\.cli\.(\w+)([^\n`]*)", joined):
            flags = {flag for flag in re.findall(r"(--\w+)", rest) if not flag.startswith("--config.")}
            found |= {(module, flag) for flag in flags - {"--help"}}
            assert (ROOT / "palign" / "cli" / f"{module}.py").is_file(), f"{name}: no command {module}"
    helps = {}
    for module, flag in sorted(found):
        if module not in helps:
            command = [sys.executable, "-m", f"palign.cli.{module}", "--help"]
            helps[module] = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        own = helps[module] + (helps["evaluate"] if module == "launch" and "evaluate" in helps else "")
        inner = module == "launch" and flag in ("--config", "--workdir")  # of the command behind --
        assert inner or re.search(rf"{flag}\b", own), f"palign.cli.{module} has no {flag}"
    assert ("train", "--workdir") in found


def test_the_image_holds_what_it_copies():
    text = (LAUNCH / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, flags=re.M):
        assert all((ROOT / source).exists() for source in sources.split()), sources


@pytest.mark.parametrize("value", ["plain", "with space", "quo'te", 'dou"ble', "$(touch x)", "a;b", "`id`", "*"])
def test_what_gke_runs_is_what_was_asked_for_whatever_is_in_it(value, stubs):
    done = bash("gke.sh", "dpo-1", value, *RUN[1:], f"--config.data.seed={value}", **PLACE)
    assert done.returncode == 0, done.stderr
    given = stubs("xpk")
    (command,) = [line.removeprefix("--command=") for line in given if line.startswith("--command=")]
    expected = ["exec", "python", "-m", "palign.cli.train", f"--config={value}", f"--config.data.path={RUN[1]}"]
    assert shlex.split(command) == [*expected, f"--workdir={RUN[2]}", f"--config.data.seed={value}"]
    assert given[:3] == ["workload", "create", "--workload=dpo-1"] and "--tpu-type=v6e-16" in given


def test_gke_names_gpus_by_device_type_and_a_dry_run_asks_no_cluster(stubs):
    assert (
        bash("gke.sh", "--dry-run", "dpo", *RUN, **PLACE | {"TYPE": "h100-mega-80gb-8", "SLICES": "2"}).returncode == 0
    )
    given = stubs("xpk")
    assert {"--device-type=h100-mega-80gb-8", "--num-nodes=2", "--dry-run", "--output-manifest-file=dpo.yaml"} <= set(
        given
    )


@pytest.mark.parametrize("script", ["gke.sh", "tpu_vm.sh"])
@pytest.mark.parametrize("name", ["", "Upper", "a b", "-x", "a" * 64, "x;y", "$(id)", "a/b", "a\nb"])
def test_names_that_a_cloud_would_refuse_are_refused_here(name, script, stubs):
    arguments = ("train", name, *RUN) if script == "tpu_vm.sh" else (name, *RUN)
    done = bash(script, *arguments, **PLACE)
    assert done.returncode == 2 and "expected at most" in done.stderr


def test_a_tpu_vm_dry_run_prints_its_commands_and_runs_none(stubs, tmp_path):
    done = bash("tpu_vm.sh", "--dry-run", "train", "dpo", *RUN, "--config.x=a b", **PLACE)
    assert done.returncode == 0, done.stderr
    copy, ssh = (shlex.split(line) for line in done.stdout.splitlines())
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    (command,) = [word.removeprefix("--command=") for word in ssh if word.startswith("--command=")]
    inner = shlex.split(command)
    flags = [f"--config={RUN[0]}", f"--config.data.path={RUN[1]}", f"--workdir={RUN[2]}", "--config.x=a b"]
    assert inner[inner.index("palign.cli.train") + 1 :] == flags
    for action in ("create", "delete"):
        assert bash("tpu_vm.sh", "--dry-run", action, "dpo", **PLACE).stdout.startswith("gcloud compute tpus queued-")
    assert not (tmp_path / "gcloud.args").exists()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (77, False)])
def test_slurm_queues_again_what_was_told_to_stop(code, requeued, stubs, tmp_path):
    given = dict(CONFIG=RUN[0], DATA="d d.jsonl", WORKDIR="w", SLURM_JOB_ID="7", PYTHON="python3", srun_CODE=str(code))
    done = bash("slurm.sbatch", **given)
    assert done.returncode == code, done.stderr
    flags = [f"--config={RUN[0]}", "--config.data.path=d d.jsonl", "--workdir=w"]
    assert stubs("srun") == ["--kill-on-bad-exit=1", "python3", "-m", "palign.cli.train", *flags]
    assert (tmp_path / "scontrol.args").exists() == requeued


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("gke.sh", ("dpo",), "usage: bash launch/gke.sh"),
        ("tpu_vm.sh", (), "bash launch/tpu_vm.sh [--dry-run] create NAME"),
        ("tpu_vm.sh", ("train", "dpo"), "bash launch/tpu_vm.sh [--dry-run] train NAME CONFIG"),
        ("slurm.sbatch", (), "slurm.sbatch: CONFIG must be set"),
    ],
)
def test_what_is_missing_is_said(script, arguments, message, stubs):
    done = bash(script, *arguments, PROJECT="p", ZONE="z")
    assert done.returncode == 2 and message in done.stderr


def test_a_missing_cluster_is_said(stubs):
    done = bash("gke.sh", "dpo", *RUN, **PLACE | {"CLUSTER": ""})
    assert done.returncode == 2 and "CLUSTER must be set" in done.stderr


def test_a_local_run_that_was_told_to_stop_is_started_again(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho x >> {tmp_path}/runs\n[ "$(wc -l < {tmp_path}/runs)" -ge 3 ] || exit 75\n')
    python.chmod(0o755)
    done = bash("local.sh", "c.py", "w", PYTHON=str(python))
    assert done.returncode == 0 and (tmp_path / "runs").read_text() == "x\n" * 3
    assert done.stderr.count("ended with code 75; starting again") == 2
