"""run_all.sh and the environment it shares with tests/run.sh, with stubs in place of the seven stages."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

STAGES = [
    "download_models.py", "prepare_data.py", "add_memory.py --seed 0", "train.py --baseline --seed 0",
    "train.py --with-ltm --seed 0", "eval.py", "plot_eval.py",
]

# notes down how it was called, fails or hangs where it is told to, and makes what the real stage makes
STUB = '''
import os, pathlib, signal, sys, time
flags = sys.argv[1:]
root = pathlib.Path(flags[flags.index("--root") + 1])
name = pathlib.Path(__file__).name
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join([name, *flags]) + "\\n")
if name == os.environ.get("FAILING"):
    sys.exit(7)
if name == os.environ.get("HANGING"):
    def stop(number, frame):
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(f"{name} got {signal.Signals(number).name}\\n")
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print("hanging", flush=True)
    time.sleep(60)
made = {
    "download_models.py": ["data/tokenizer/vocab.json", "data/tokenizer/merges.txt"],
    "prepare_data.py": ["data/train.bin", "data/val.bin", "data/meta.json"],
    "eval.py": ["results.json"],
    "plot_eval.py": ["results.png", "results_memory.png", "results_controls.png"],
}
if "--seed" in flags:
    seed = flags[flags.index("--seed") + 1]
    arm = "init" if name == "add_memory.py" else flags[0].strip("-").replace("-", "_")
    arms = "trained" if seed == "0" else f"trained/seed{seed}"
    made[name] = [f"{arms}/{arm}/model.safetensors", f"{arms}/{arm}/config.json"]
text = open(flags[flags.index("--text") + 1]).read() if "--text" in flags else ""
for path in made[name]:
    if path != os.environ.get("FORGOTTEN"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{path} {text}")
'''


class Project:
    """A copy of run_all.sh with stub stages, needing no packages."""

    def __init__(self, folder):
        self.folder = folder / "a project"      # a path with a space in it, always
        (self.folder / "tests").mkdir(parents=True)
        shutil.copy(PROJECT / "run_all.sh", self.folder)
        shutil.copy(PROJECT / "tests" / "setup.bash", self.folder / "tests")
        (self.folder / "models.py").touch()
        (self.folder / "requirements.txt").touch()
        for command in STAGES:
            (self.folder / command.split()[0]).write_text(STUB)
        self.calls = folder / "calls"
        (folder / "bin").mkdir()
        python = folder / "bin" / "python3"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self.environment = {**os.environ, "CALLS": str(self.calls), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def command(self, *flags):
        self.calls.write_text("")
        return [str(self.folder / "run_all.sh"), *map(str, flags)]

    def run(self, *flags, cwd=None, **environment):
        return subprocess.run(self.command(*flags), cwd=cwd, env={**self.environment, **environment},
                              capture_output=True, text=True, timeout=60)

    def called(self, root="."):
        """The stages called since the last run began, in order, without what is the same for all of them."""
        lines = self.calls.read_text().splitlines()
        assert all(f" --root {root}" in line for line in lines if " got " not in line), lines
        return [line.replace(f" --root {root}", "").replace(" --resume", "") for line in lines]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def finished(project):
    assert project.run().returncode == 0
    return project


def test_seven_stages_in_order(project):
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert project.called() == STAGES
    for number, command in enumerate(STAGES, 1):
        assert f"[{number}/7] {command}\n" in done.stdout
        assert re.search(rf"\[{number}/7\] {command}: done in \d+ s\n", done.stdout)
    assert "--resume" in project.calls.read_text()


def test_finished_stages_are_skipped(finished):
    again = finished.run()
    assert again.returncode == 0
    assert finished.called() == []
    for number, command in enumerate(STAGES, 1):
        assert f"[{number}/7] {command}: skipped" in again.stdout


def test_fresh_redoes_everything(finished):
    assert finished.run("--fresh").returncode == 0
    assert finished.called() == [c + " --fresh" * c.startswith("train.py") for c in STAGES]
    assert finished.run().returncode == 0 and finished.called() == []


def test_failing_stage_stops_the_run(project):
    """Fault 21: it stops, names the stage, returns its code; the next run goes on with that stage."""
    failed = project.run(FAILING="add_memory.py")
    assert failed.returncode == 7
    assert failed.stderr.splitlines() == [
        "run_all.sh: stage [3/7] add_memory.py --seed 0 failed with exit code 7; nothing after it was run"]
    assert project.called() == STAGES[:3]
    assert project.run().returncode == 0
    assert project.called() == STAGES[2:]


def test_stage_that_makes_nothing_is_a_failure(project):
    failed = project.run(FORGOTTEN="data/val.bin")
    assert failed.returncode == 1 and "[2/7] prepare_data.py" in failed.stderr
    assert project.called() == STAGES[:2]


@pytest.mark.parametrize("change, rerun", [
    (lambda folder: (folder / "eval.py").write_text(STUB + "# changed"), ["eval.py"]),
    (lambda folder: (folder / "models.py").write_text("# changed"), STAGES),
    (lambda folder: (folder / "results.png").unlink(), ["plot_eval.py"]),
    (lambda folder: (folder / "data/val.bin").write_text("damaged"), ["prepare_data.py"]),
    (lambda folder: (folder / "trained/baseline/model.safetensors").unlink(), ["train.py --baseline --seed 0"]),
    (lambda folder: (folder / "trained/init/config.json").write_text("{}"), ["add_memory.py --seed 0"]),
    (lambda folder: (folder / "trained/baseline/history.jsonl").write_text("{}"), ["plot_eval.py"]),
], ids=["script", "models.py", "result", "data", "weights", "start", "history"])
def test_a_change_reruns_only_what_depends_on_it(finished, change, rerun):
    """The stubs make the same files whatever they read, so that nothing later depends on a remade one."""
    change(finished.folder)
    assert finished.run().returncode == 0
    assert finished.called() == rerun


def test_text_is_an_input_of_all_that_follows_from_it(project, tmp_path):
    (tmp_path / "my text.txt").write_text("one")
    assert project.run("--text", "my text.txt", cwd=tmp_path).returncode == 0
    prepare = f"prepare_data.py --text {tmp_path / 'my text.txt'}"
    assert project.called() == [STAGES[0], prepare, *STAGES[2:]]
    assert project.run("--text", "my text.txt", cwd=tmp_path).returncode == 0
    assert project.called() == []

    (tmp_path / "my text.txt").write_text("two")
    assert project.run("--text", "my text.txt", cwd=tmp_path).returncode == 0
    assert project.called() == [prepare, *STAGES[2:6]]      # not the picture: the stub's results are the same


def test_seeds(project):
    assert project.run("--seeds", 3).returncode == 0
    per_seed = [c.replace("--seed 0", f"--seed {seed}") for seed in range(3) for c in STAGES[2:5]]
    assert project.called() == STAGES[:2] + per_seed + STAGES[5:]
    assert (project.folder / "trained/seed2/with_ltm/model.safetensors").is_file()
    assert project.run("--seeds", 4).returncode == 0
    assert project.called() == [c.replace("--seed 0", "--seed 3") for c in STAGES[2:5]] + ["eval.py"]


def test_controls_are_measured_when_asked_for(finished):
    assert finished.run("--controls").returncode == 0
    assert finished.called() == ["eval.py --controls", "plot_eval.py"]
    done = finished.run("--controls")
    assert finished.called() == [] and "results_controls.png" in done.stdout
    (finished.folder / "results_controls.png").unlink()
    done = finished.run("--controls", FORGOTTEN="results_controls.png")
    assert done.returncode == 1 and "without making all of" in done.stderr


def test_every_seed_is_an_input_of_the_evaluation(project):
    project.run("--quick", "--seeds", 2)
    (project.folder / "quick/trained/seed1/with_ltm/config.json").write_text("{}")
    assert project.run("--quick").returncode == 0       # one seed now, but the evaluation takes all that it finds
    assert project.called("quick") == ["eval.py --quick"]


def test_quick_has_a_root_of_its_own(project):
    assert project.run("--quick").returncode == 0
    assert project.called("quick") == [c + " --quick" for c in STAGES]
    assert (project.folder / "quick/results.png").is_file() and not (project.folder / "data").exists()


def test_root_is_relative_to_the_caller(project, tmp_path):
    assert project.run("--root", "some where", "--quick", cwd=tmp_path).returncode == 0
    assert project.called(tmp_path / "some where") == [c + " --quick" for c in STAGES]
    assert (tmp_path / "some where/results.png").is_file() and not (project.folder / "quick").exists()


@pytest.mark.parametrize("flags", [
    ["--seeds", "0"], ["--seeds", "x"], ["--seeds", "-1"], ["--seeds", "1.5"], ["--seeds", "9" * 30], ["--seeds", ""],
    ["--seeds"], ["--text"], ["--text", "no such file"], ["--text", "."], ["--root", "run_all.sh"], ["--root"],
    ["--fast"], ["extra"], ["--quick", "-x"],
], ids=" ".join)
def test_bad_flags(project, flags):
    bad = project.run(*flags, cwd=project.folder)
    assert bad.returncode == 2 and bad.stdout == ""
    assert re.fullmatch(r"run_all.sh: .*\n", bad.stderr), bad.stderr
    assert project.called() == []


def test_help(project):
    shown = project.run("--help")
    assert shown.returncode == 0 and project.called() == []
    for flag in ("--quick", "--text FILE", "--seeds N", "--controls", "--fresh", "--root DIR"):
        assert flag in shown.stdout
    assert "set -e" not in shown.stdout


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signals_reach_the_stage(project, number, whole_group):
    """A terminal signals the whole process group, `kill` this shell alone: the stage stops either way."""
    running = subprocess.Popen(project.command(), env={**project.environment, "HANGING": "prepare_data.py"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while running.stdout.readline() != "hanging\n":
        assert running.poll() is None
    (os.killpg if whole_group else os.kill)(running.pid, number)
    began = time.monotonic()
    _, error = running.communicate(timeout=20)
    assert running.returncode == 128 + number and time.monotonic() - began < 10
    assert error == ("run_all.sh: stage [2/7] prepare_data.py failed with exit code "
                     f"{128 + number}; nothing after it was run\n")
    assert [line for line in project.called() if " got " in line]
    assert project.run().returncode == 0 and project.called() == STAGES[1:]


def test_second_run_in_the_same_folder_is_refused(project):
    running = subprocess.Popen(project.command(), env={**project.environment, "HANGING": "prepare_data.py"},
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    while running.stdout.readline() != "hanging\n":
        assert running.poll() is None
    second = project.run()
    assert second.returncode == 1 and "another run_all.sh is at work" in second.stderr
    assert project.called() == []
    os.killpg(running.pid, signal.SIGKILL)      # and a run that was killed leaves no lock behind
    running.communicate()
    assert project.run().returncode == 0


def test_environment_is_made_once_and_mended(project, tmp_path):
    """Without the packages a .venv is made; it is kept as long as it is whole, and made again when it was cut short."""
    pytest.importorskip("ensurepip")
    for version in ("1.0", "2.0"):
        with zipfile.ZipFile(tmp_path / f"revena_probe-{version}-py3-none-any.whl", "w") as wheel:
            info = f"revena_probe-{version}.dist-info"
            wheel.writestr("revena_probe.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: revena-probe\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_EXTRA_INDEX_URL": ""}
    (project.folder / "requirements.txt").write_text("revena-probe==1.0\npytest==9999\n")   # pytest: the tests' only
    (project.folder / "download_models.py").write_text("import revena_probe, sys\nprint('from', sys.prefix)\n" + STUB)
    environment = project.folder / ".venv"
    installing = "Installing the packages"

    failed = project.run(**offline)             # there is no pytest 9999 to install
    assert failed.returncode == 1 and "could not be installed" in failed.stderr and installing in failed.stdout
    assert project.called() == []

    (project.folder / "requirements.txt").write_text("revena-probe==1.0\n")
    (environment / "left over").touch()
    first = project.run(**offline)
    assert first.returncode == 0, first.stderr
    assert installing in first.stdout and f"from {environment}" in first.stdout
    assert not (environment / "left over").exists()     # the one that failed is not trusted
    second = project.run("--fresh", **offline)
    assert second.returncode == 0 and installing not in second.stdout and f"from {environment}" in second.stdout

    (project.folder / "requirements.txt").write_text("revena-probe==2.0\n")
    third = project.run("--fresh", **offline)   # completed, not made again
    assert third.returncode == 0 and installing in third.stdout
    assert list(environment.glob("lib/*/site-packages/revena_probe-2.0.dist-info"))


@pytest.mark.parametrize("version, complaint", [
    ("3.9.2", "Python 3.10 or later is needed, python3 is 3.9.2"),
    ("3.12.1", "sudo apt install python3-venv"),
    (None, "Python 3.10 or later is needed, there is no python3"),
], ids=["old", "no venv module", "dead shim"])
def test_unfit_python(project, tmp_path, version, complaint):
    """What it asks a python, answered as an unfit one would."""
    (project.folder / "requirements.txt").write_text("revena-probe==1.0\n")
    stub = "#!/bin/sh\nexit 0\n" if version is None else f"""#!/bin/sh
case "$*" in
    *platform*) echo {version} ;;
    *_base_executable*) echo {'' if version == '3.9.2' else '"$0"'} ;;
    *) exit 1 ;;
esac
"""
    for name in ("python3", "python"):
        (tmp_path / "bin" / name).write_text(stub)
        (tmp_path / "bin" / name).chmod(0o755)
    refused = project.run()
    assert refused.returncode == 1 and complaint in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
    assert not (project.folder / ".venv").exists()
