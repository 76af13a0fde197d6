"""run_all.sh and the environment it shares with tests/run.sh, with stubs in place of the seven stages."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import stages

PROJECT = Path(__file__).resolve().parent.parent

STAGES = [
    "download_models.py", "prepare_data.py", "add_memory.py --seed 0", "train.py --baseline --seed 0",
    "train.py --with-ltm --seed 0", "eval.py --report", "plot_eval.py",
]
PATIENCE = 300          # seconds: what takes so long, also on a busy machine, never ends
FURTHER = [arm for arm, about in stages.ARMS.items() if not about.control and arm not in stages.SPECIFIED]

# notes down how it was called, fails or hangs where it is told to, and makes what the real stage makes; it imports
# little, for there are a thousand calls of it
STUB = '''
import os, sys
flags = sys.argv[1:]
root = flags[flags.index("--root") + 1]
name = os.path.basename(__file__)
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join([name, *flags]) + "\\n")
if name == os.environ.get("FAILING"):
    sys.exit(7)
if name == os.environ.get("HANGING"):
    import signal
    def stop(number, frame):
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(f"{name} got {signal.Signals(number).name}\\n")
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print("hanging", flush=True)
    signal.pause()
made = {
    "download_models.py": ["data/tokenizer/vocab.json", "data/tokenizer/merges.txt"],
    "prepare_data.py": ["data/train.bin", "data/val.bin", "data/meta.json"],
    "eval.py": ["results.json"],
    "plot_eval.py": ["results.html", "results.png", "results_memory.png", "results_controls.png"],
}
if "--study" in flags:
    made |= {"eval.py": ["results_study.json"], "plot_eval.py": ["results_study.png"]}
if flags[0] == "--study" and "--seed" in flags:
    arm = f"init_{flags[1]}" if name == "add_memory.py" else flags[1]
    made[name] = [f"trained/{arm}/{file}" for file in ("model.safetensors", "config.json")]
elif "--seed" in flags:
    seed = flags[flags.index("--seed") + 1]
    arm = flags[0].strip("-").replace("-", "_")
    further = arm not in ("seed", "baseline", "with_ltm")
    if name == "add_memory.py":
        arm = f"init_{arm}" if further else "init"
    arms = "trained" if seed == "0" else f"trained/seed{seed}"
    files = ["model.safetensors", "config.json"] + ["memories.py"] * further
    made[name] = [f"{arms}/{arm}/{file}" for file in files]
text = open(flags[flags.index("--text") + 1]).read() if "--text" in flags else ""
for path in made[name]:
    if path != os.environ.get("FORGOTTEN"):
        os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
        with open(os.path.join(root, path), "w") as file:
            file.write(f"{path} {text}")
'''


class Project:
    """A copy of run_all.sh with stub stages, needing no packages."""

    def __init__(self, folder):
        self.folder = folder / "a project"      # a path with a space in it, always
        self.folder.mkdir()
        shutil.copy(PROJECT / "run_all.sh", self.folder)
        shutil.copy(PROJECT / "stages.py", self.folder)
        for name in ("models.py", "memories.py", "requirements.txt"):
            (self.folder / name).touch()
        for command in STAGES:
            (self.folder / command.split()[0]).write_text(STUB)
        self.calls = folder / "calls"
        (folder / "bin").mkdir()
        self.use_python(sys.executable)
        self.environment = {**os.environ, "CALLS": str(self.calls), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def use_python(self, path):
        """Let this be the Python that is found on the PATH."""
        for name in ("python3", "python"):
            python = self.folder.parent / "bin" / name
            python.write_text(f'#!/bin/sh\nexec "{path}" "$@"\n')
            python.chmod(0o755)

    def command(self, *flags):
        self.calls.write_text("")
        return [str(self.folder / "run_all.sh"), *map(str, flags)]

    def run(self, *flags, cwd=None, by=(), **environment):
        """./run_all.sh with these flags and variables; `by`: the shell that is told to read it."""
        return subprocess.run([*by, *self.command(*flags)], cwd=cwd, env={**self.environment, **environment},
                              capture_output=True, text=True, timeout=PATIENCE)

    def start(self, *flags, **environment):
        return subprocess.Popen(self.command(*flags), env={**self.environment, **environment}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def called(self, root="."):
        """The stages called since the last run began, in order, without what is the same for all of them."""
        lines = self.calls.read_text().splitlines()
        assert all(f" --root {root}" in line for line in lines if " got " not in line), lines
        return [line.replace(f" --root {root}", "").replace(" --resume", "") for line in lines]

    def called_anywhere(self):
        """(root, stage) of each that was called since the last run began."""
        found = [re.fullmatch(r"(.*) --root (\S+)(.*)", line) for line in self.calls.read_text().splitlines()]
        return [(line[2], (line[1] + line[3]).replace(" --resume", "")) for line in found]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """after(*flags): the folder of a project after such a run, to be copied."""
    made = {}

    def make(*flags):
        if flags not in made:
            project = Project(tmp_path_factory.mktemp("after"))
            assert project.run(*flags).returncode == 0
            made[flags] = project.folder
        return made[flags]
    return make


@pytest.fixture
def finished(project, after):
    shutil.copytree(after(), project.folder, dirs_exist_ok=True)
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
    (lambda folder: (folder / "eval.py").write_text(STUB + "# changed"), ["eval.py --report"]),
    (lambda folder: (folder / "models.py").write_text("# changed"), STAGES[2:6]),
    (lambda folder: (folder / "stages.py").open("a").write("# changed"), STAGES[2:]),
    (lambda folder: (folder / "memories.py").write_text("# changed"), []),
    (lambda folder: (folder / "results.png").unlink(), ["plot_eval.py"]),
    (lambda folder: (folder / "data/val.bin").write_text("damaged"), ["prepare_data.py"]),
    (lambda folder: (folder / "trained/baseline/model.safetensors").unlink(), ["train.py --baseline --seed 0"]),
    (lambda folder: (folder / "trained/init/config.json").write_text("{}"), ["add_memory.py --seed 0"]),
    (lambda folder: (folder / "trained/baseline/history.jsonl").write_text("{}"), ["plot_eval.py"]),
], ids=["script", "models.py", "stages.py", "memories.py", "result", "data", "weights", "start", "history"])
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
    # not the start, which knows no text, nor the picture: the stub's results are the same
    assert project.called() == [prepare, *STAGES[3:6]]


def test_seeds(project):
    assert project.run("--seeds", 3).returncode == 0
    per_seed = [c.replace("--seed 0", f"--seed {seed}") for seed in range(3) for c in STAGES[2:5]]
    assert project.called() == STAGES[:2] + per_seed + STAGES[5:]
    assert (project.folder / "trained/seed2/with_ltm/model.safetensors").is_file()
    assert project.run("--seeds", 4).returncode == 0
    assert project.called() == [c.replace("--seed 0", "--seed 3") for c in STAGES[2:5]] + ["eval.py --report"]


def test_controls_are_measured_when_asked_for(finished):
    assert finished.run("--controls").returncode == 0
    assert finished.called() == ["eval.py --report --controls", "plot_eval.py"]
    done = finished.run("--controls")
    assert finished.called() == [] and "results_controls.png" in done.stdout
    (finished.folder / "results_controls.png").unlink()
    done = finished.run("--controls", FORGOTTEN="results_controls.png")
    assert done.returncode == 1 and "without making all of" in done.stderr


def test_every_seed_is_an_input_of_the_evaluation(project):
    project.run("--quick", "--seeds", 2)
    (project.folder / "quick/trained/seed1/with_ltm/config.json").write_text("{}")
    assert project.run("--quick").returncode == 0       # one seed now, but the evaluation takes all that it finds
    assert project.called("quick") == ["eval.py --report --quick"]


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
    ["--fast"], ["extra"], ["--quick", "-x"], ["--steps", "0"], ["--steps", "1e3"], ["--steps"],
    ["--python", "no such file"], ["--memories", "6"],
], ids=" ".join)
def test_bad_flags(project, flags):
    bad = project.run(*flags, cwd=project.folder)
    assert bad.returncode == 2 and bad.stdout == ""
    assert re.fullmatch(r"run_all.sh: .*\n", bad.stderr), bad.stderr
    assert project.called() == []


def test_help(project):
    shown = project.run("--help")
    assert shown.returncode == 0 and project.called() == []
    for flag in ("--quick", "--text FILE", "--memories", "--seeds N", "--steps N", "--controls", "--fresh",
                 "--root DIR", "--python [LIST]"):
        assert flag in shown.stdout
    assert "set -e" not in shown.stdout and "BASH_VERSION" not in shown.stdout


@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signals_reach_the_stage(project, number, whole_group):
    """A terminal signals the whole process group, `kill` this shell alone: the stage stops either way."""
    running = project.start(HANGING="prepare_data.py")
    while running.stdout.readline() != "hanging\n":
        assert running.poll() is None
    (os.killpg if whole_group else os.kill)(running.pid, number)
    _, error = running.communicate(timeout=PATIENCE)
    assert running.returncode == 128 + number
    assert error == "run_all.sh: stopped in stage [2/7] prepare_data.py; the same command again goes on from there\n"
    assert [line for line in project.called() if " got " in line]
    assert project.run().returncode == 0 and project.called() == STAGES[1:]


def test_second_run_in_the_same_folder_is_refused(project):
    running = project.start(HANGING="prepare_data.py")
    while running.stdout.readline() != "hanging\n":
        assert running.poll() is None
    second = project.run()
    assert second.returncode == 1 and "another run_all.sh is at work" in second.stderr
    assert project.called() == []
    os.killpg(running.pid, signal.SIGKILL)      # and a run that was killed leaves no lock behind
    running.communicate()
    assert project.run().returncode == 0


# ---------------------------------------------------------------------- all memories

def commands(seeds=1, further=FURTHER, more=""):
    """What --memories does in its own root, in order."""
    found = []
    for seed in range(seeds):
        how = f"--seed {seed}"
        found += [f"add_memory.py {how}"]
        found += [f"add_memory.py {stages.arm_flag(arm)} {how}" for arm in further]
        found += [f"train.py {stages.arm_flag(arm)} --chained {how}{more}" for arm in [*stages.SPECIFIED, *further]]
    return found + ["eval.py --report", "plot_eval.py"]


@pytest.fixture
def compared(project, after):
    shutil.copytree(after("--memories"), project.folder, dirs_exist_ok=True)
    return project


def test_memories_compares_all_arms_in_a_root_of_their_own(project):
    done = project.run("--memories")
    assert done.returncode == 0, done.stderr
    assert FURTHER and project.called_anywhere() == [
        (".", "download_models.py"), (".", "prepare_data.py"), *(("memories", command) for command in commands())]
    for arm in [*stages.SPECIFIED, *FURTHER]:
        assert (project.folder / "memories/trained" / arm / "model.safetensors").is_file()
        assert (project.folder / "memories/trained" / stages.init_name(arm) / "model.safetensors").is_file()
    for file in ("tokenizer/vocab.json", "train.bin", "val.bin", "meta.json"):
        assert (project.folder / "memories/data" / file).read_bytes() == (project.folder / "data" / file).read_bytes()
    assert not (project.folder / "trained").exists()
    assert "memories/results.json, results.html, results.png" in done.stdout
    assert project.run("--memories").returncode == 0 and project.called_anywhere() == []


def test_memories_and_the_seven_stages_share_the_data_alone(finished):
    assert finished.run("--memories").returncode == 0
    assert finished.called_anywhere() == [("memories", command) for command in commands()]
    assert finished.run().returncode == 0 and finished.called_anywhere() == []


@pytest.mark.parametrize("flags, base", [
    (["--quick"], "quick"), (["--root", "else where"], None),
], ids=["quick", "root"])
def test_memories_lie_in_the_root(project, tmp_path, flags, base):
    assert project.run("--memories", *flags, cwd=tmp_path).returncode == 0
    base = project.folder / base if base else tmp_path / "else where"
    assert (base / "data/train.bin").is_file() and (base / "memories/results.png").is_file()
    assert not (base / "trained").exists() and not (project.folder / "memories").exists()


def test_the_study_trains_each_of_its_arms_in_a_root_of_its_own(project):
    """The data are those of the seven stages; a second run does what the first did not come to."""
    done = project.run("--study")
    assert done.returncode == 0, done.stderr
    wanted = ["add_memory.py --seed 0"]
    for name, arm in stages.STUDY.items():
        wanted += [f"add_memory.py --study {name} --seed 0"] if arm.backbone else []
        wanted += [f"train.py --study {name} --seed 0"]
    wanted += ["eval.py --study --report", "plot_eval.py --study"]
    assert project.called_anywhere() == [(".", "download_models.py"), (".", "prepare_data.py"),
                                         *(("study", command) for command in wanted)]
    assert "study/results_study.json" in done.stdout and not (project.folder / "trained").exists()
    (project.folder / "study/trained/window_512/model.safetensors").unlink()
    assert project.run("--study").returncode == 0
    assert [command for _, command in project.called_anywhere()] == ["train.py --study window_512 --seed 0"]


@pytest.mark.parametrize("flags", [["--memories"], ["--controls"], ["--steps", 5], ["--seeds", 2]])
def test_the_study_takes_no_other_experiments_flags(project, flags):
    done = project.run("--study", *flags)
    assert done.returncode == 2 and "--study has arms, steps and seeds of its own" in done.stderr


def test_seeds_and_steps_of_all_arms(compared):
    assert compared.run("--memories", "--seeds", 2, "--steps", 40000).returncode == 0
    called = [command for _, command in compared.called_anywhere()]
    wanted = [command for command in commands(2, more=" --steps 40000")
              if "add_memory" not in command or "--seed 1" in command]
    assert called == wanted[:-1]                            # the stub's results are the same
    assert compared.run("--steps", 300).returncode == 0
    assert "train.py --with-ltm --seed 0 --steps 300" in [command for _, command in compared.called_anywhere()]


def test_arms_come_from_the_table(compared):
    """A new arm needs one line there, and nothing is done again but what all arms share; a control is left out."""
    with open(compared.folder / "stages.py", "a") as table:
        table.write('\nARMS["with_toy"] = Arm("toy", "a toy")\nARMS["wide"] = Arm(None, "wider", control=True)\n')
    assert compared.run("--memories", "--controls").returncode == 0
    wanted = commands(further=[*FURTHER, "with_toy"])
    wanted[-2] += " --controls"
    assert compared.called_anywhere() == [("memories", command) for command in wanted]


@pytest.mark.parametrize("change, rerun", [
    (lambda base: (base / "memories.py").write_text("# changed"),
     [command for command in commands() if any(stages.arm_flag(arm) in command for arm in FURTHER)] + ["eval.py --report"]),
    (lambda base: (base / "memories/trained/with_store/model.safetensors").unlink(),
     ["train.py --with-store --chained --seed 0"]),
    (lambda base: (base / "memories/trained/init_with_gru/config.json").write_text("{}"),
     ["add_memory.py --with-gru --seed 0"]),
    (lambda base: (base / "memories/data/val.bin").write_text("damaged"), []),
    (lambda base: (base / "memories/data/meta.json").unlink(), []),
], ids=["memories.py", "weights", "start", "copied data", "no data"])
def test_a_change_in_a_comparison_reruns_only_what_depends_on_it(compared, change, rerun):
    change(compared.folder)
    assert compared.run("--memories").returncode == 0
    assert compared.called_anywhere() == [("memories", command) for command in rerun]
    for file in ("val.bin", "meta.json"):
        assert (compared.folder / "memories/data" / file).read_text() == (compared.folder / "data" / file).read_text()


def test_other_data_are_handed_on(compared, tmp_path):
    (tmp_path / "other.txt").write_text("other")
    assert compared.run("--memories", "--text", tmp_path / "other.txt").returncode == 0
    assert "other" in (compared.folder / "memories/data/train.bin").read_text()
    called = compared.called_anywhere()
    assert called[0] == (".", f"prepare_data.py --text {tmp_path / 'other.txt'}")
    assert [command for _, command in called[1:]] == [c for c in commands() if c.startswith(("train.py", "eval.py"))]


def test_table_that_cannot_be_read_is_one_line(compared):
    (compared.folder / "stages.py").write_text("ARMS = {")
    failed = compared.run("--memories")
    assert failed.returncode == 1 and "run_all.sh: the table of arms in stages.py cannot be read" in failed.stderr


# ---------------------------------------------------------------------- the environment

INSTALLING = "Installing the packages"


@pytest.fixture
def offline(tmp_path):
    """Variables that let pip find a few packages that hold nothing, and no others."""
    for name, version in (("revena_probe", "1.0"), ("revena_probe", "1.1"), ("other_probe", "2.0")):
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(f"{name}.py", f"version = {version!r}\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_EXTRA_INDEX_URL": ""}


def put_package(folder, version="1.0", name="revena_probe"):
    """A package as an installer leaves it, in a folder of modules."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(f"version = {version!r}\n")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def make_environment(folder):
    """An environment made by someone else, with a file of theirs in it; returns its folder of packages."""
    venv.create(folder, symlinks=True)
    (folder / "theirs").write_text("theirs")
    return next(folder.glob("lib/*/site-packages"))


@pytest.fixture
def bare(project):
    """A project that needs a package which the Python on the PATH has not."""
    (project.folder / "requirements.txt").write_text("revena-probe==1.0\n")
    (project.folder / "download_models.py").write_text(
        "import revena_probe, sys\nprint('from', sys.prefix, revena_probe.version)\n" + STUB)
    return project


def put_pip(folder, code):
    """A pip that does this instead, in a folder of modules."""
    (folder / "pip").mkdir()
    (folder / "pip/__init__.py").touch()
    (folder / "pip/__main__.py").write_text(code)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_environment_is_mended_and_then_kept(bare, offline):
    """One of ours that an installation was cut short in is made again; a complete one is used as it is."""
    pytest.importorskip("ensurepip")
    environment = bare.folder / ".venv"
    put_pip(make_environment(environment), "raise SystemExit(1)")
    (environment / ".made_by_run_all").write_text("what was asked for before")
    failed = bare.run(**offline)
    assert failed.returncode == 1 and "could not be installed" in failed.stderr and INSTALLING in failed.stderr
    assert bare.called() == [] and failed.stdout == ""

    first = bare.run(**offline)
    assert first.returncode == 0, first.stderr
    assert INSTALLING in first.stderr and f"from {environment} 1.0" in first.stdout
    assert not (environment / "theirs").exists()        # nothing in the one that failed is trusted
    shutil.rmtree(next(environment.glob("lib/*/site-packages/pip")))
    second = bare.run("--fresh", **offline)             # and nothing more is needed of pip
    assert second.returncode == 0 and INSTALLING not in second.stderr
    assert f"from {environment} 1.0" in second.stdout


@pytest.mark.parametrize("found, wanted, least", [
    ("5.3.1", "5.23.0,>=5.3", None), ("5.2.9", "5.23.0,>=5.3", "5.3"), ("6.0", "5.23.0,>=5.3", None),
    ("2.1", "2.13.0", None), ("1.9", "2.13.0", "2"),
])
def test_least_versions(bare, found, wanted, least):
    """An environment that is there is used where it has the pinned major versions, or what is asked for by >=."""
    put_package(make_environment(bare.folder / ".venv"), found)
    (bare.folder / "requirements.txt").write_text(f'revena-probe=={wanted}; python_version >= "3.10"\n')
    asked = bare.run("--python")
    if least is None:
        assert asked.returncode == 0 and asked.stderr == ""
    else:
        assert asked.returncode == 1 and f"lacks revena-probe {least}, and pip" in asked.stderr


def test_python_is_asked_for(bare, offline, tmp_path):
    """--python prints the Python and nothing else; what is missing is installed, also when more is wanted later."""
    pytest.importorskip("ensurepip")
    environment, more = bare.folder / ".venv", tmp_path / "more.txt"
    asked = bare.run("--python", **offline)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == f"{environment}/bin/python\n" and INSTALLING in asked.stderr
    assert bare.called() == [] and not (bare.folder / "data").exists()

    (environment / "kept").touch()
    more.write_text("other-probe==2.0\n")
    # told to install elsewhere, which is meant for other installations
    elsewhere = {"PIP_TARGET": str(tmp_path / "elsewhere"), "PIP_USER": "1"}
    wanted = bare.run("--python", "more.txt", cwd=tmp_path, **offline, **elsewhere)
    assert wanted.stdout == asked.stdout and f"Installing the packages of {more}" in wanted.stderr
    wanted = bare.run("--python", "more.txt", cwd=tmp_path, **offline)
    assert wanted.stdout == asked.stdout and wanted.stderr == ""

    (bare.folder / "requirements.txt").write_text("revena-probe==1.1\n")      # which 1.0 could pass for
    assert INSTALLING in bare.run("--python", **offline, **elsewhere).stderr
    assert [len(list(environment.glob(f"lib/*/site-packages/{name}.dist-info")))
            for name in ("other_probe-2.0", "revena_probe-1.1", "revena_probe-1.0")] == [1, 1, 0]
    assert (environment / "kept").exists() and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0", bytes(99), "caf\u00e9==1\n".encode("latin-1"),
                                  "probe==1\n".encode("utf-16")], ids=["picture", "NULs", "Latin-1", "UTF-16"])
def test_list_that_is_no_text_is_one_line(project, tmp_path, data):
    """pip would end in a traceback."""
    (tmp_path / "list").write_bytes(data)
    asked = project.run("--python", "list", cwd=tmp_path)
    assert asked.returncode == 2 and asked.stdout == ""
    assert re.fullmatch(r"run_all.sh: '.*/list' is no text: .*\n", asked.stderr), asked.stderr


def test_active_environment_that_was_cut_short_is_not_used(bare, tmp_path):
    put_package(make_environment(bare.folder / ".venv"))
    (bare.folder / ".venv/.made_by_run_all").touch()
    python = tmp_path / "bin/python3"
    python.write_text('#!/bin/sh\ncase "$*" in *_base_executable*) echo "$0"; exit ;; *ensurepip*) exit 1 ;; esac\n'
                      f'exec "{bare.folder}/.venv/bin/python" "$@"\n')
    refused = bare.run()
    assert refused.returncode == 1 and "cannot make environments" in refused.stderr


def test_packages_that_went_elsewhere_are_missed(bare):
    """As by a pip.conf that names another target."""
    put_pip(make_environment(bare.folder / ".venv"), "")
    failed = bare.run()
    assert failed.returncode == 1 and "pip is done, yet" in failed.stderr and bare.called() == []


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


# ---------------------------------------------------------------------- kinds of faults: what is not ours

def without_pip(environment):
    """As `uv venv` makes it."""
    make_environment(environment)


def broken(environment):
    """Its Python was taken away, as by an update of the system."""
    make_environment(environment)
    for python in (environment / "bin").glob("python*"):
        python.unlink()
        python.symlink_to("/nowhere/python")


def marked(environment):
    """Marked by an earlier run_all.sh, which marked everybody's."""
    broken(environment)
    (environment / "installing").touch()


def no_environment(environment):
    (environment / "papers").mkdir(parents=True)
    (environment / "papers/theirs").write_text("theirs")


def link(environment):
    no_environment(environment.parent / "elsewhere")
    environment.symlink_to("elsewhere")


def link_to_nothing(environment):
    environment.symlink_to("/nowhere/at/all")


def file(environment):
    environment.write_text("theirs")


@pytest.mark.parametrize("make, cause", [
    (without_pip, "lacks revena-probe, and pip to get it with; try: uv pip install"),
    (broken, "has no Python that starts, and run_all.sh did not make it"),
    (marked, "has no Python that starts, and run_all.sh did not make it"),
    (no_environment, "has no Python that starts, and run_all.sh did not make it"),
    (link, "has no Python that starts, and run_all.sh did not make it"),
    (link_to_nothing, "has no Python that starts, and run_all.sh did not make it"),
    (file, "has no Python that starts, and run_all.sh did not make it"),
])
def test_an_environment_of_the_users_is_left_alone(bare, make, cause):
    """Kind 3: whatever fails, however often, every byte of it is there afterwards and the line names the cause."""
    make(bare.folder / ".venv")
    before = files(bare.folder)
    for _ in range(2):
        failed = bare.run()
        assert failed.returncode == 1 and failed.stdout == ""
        assert cause in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr
        (bare.folder / ".run_all/environment").unlink()
        (bare.folder / ".run_all/lock").unlink(missing_ok=True)
        assert files(bare.folder) == before and os.path.lexists(bare.folder / ".venv")


def test_an_environment_of_the_users_is_completed(bare):
    """Kind 3: a failing installation costs nothing, and one that succeeds adds the packages and no mark."""
    environment = bare.folder / ".venv"
    packages = make_environment(environment)
    put_pip(packages, "raise SystemExit(1)")
    before = files(environment)
    for _ in range(2):
        failed = bare.run()
        assert failed.returncode == 1 and "could not be installed (see above)" in failed.stderr
        assert files(environment) == before
    put_package(packages.parent / "wheel")
    (packages / "pip/__main__.py").write_text(
        f"import shutil\nshutil.copytree({str(packages.parent / 'wheel')!r}, {str(packages)!r}, dirs_exist_ok=True)\n")
    assert bare.run().returncode == 0
    assert (environment / "theirs").read_text() == "theirs" and not list(environment.glob(".made*"))
    assert INSTALLING not in bare.run().stderr


@pytest.mark.parametrize("flags, root", [
    (["--root", "mine"], "mine"), (["--memories"], "memories"), (["--quick", "--fresh"], "quick"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (["--memories", "--root", "mine"], "mine/memories"), (["--quick"], "quick"),
        (["--memories", "--quick", "--fresh"], "quick/memories"))),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_folders_of_the_users_are_left_alone(project, flags, root):
    """Kind 3: a root that is there already keeps what is in it."""
    for name in ("theirs", "trained/theirs", "data/theirs", ".run_all/theirs"):
        (project.folder / root / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / root / name).write_text("theirs")
    before = files(project.folder)
    for _ in range(2):
        assert project.run(*flags, cwd=project.folder, FAILING="plot_eval.py").returncode == 7
        assert before.items() <= files(project.folder).items()


# ---------------------------------------------------------------------- kinds of faults: the surroundings

# a stage that notices what a shell or a Python was told
NOTICES = """
import os, sys, warnings
import models
warnings.warn("of no importance")
try:
    assert False
except AssertionError:
    pass
else:
    sys.exit("asserts do not count")
for name, value in {"MPLBACKEND": "Agg", "WORLD_SIZE": None, "PYTHONHOME": None}.items():
    if os.environ.get(name) != value:
        sys.exit(f"{name} is {os.environ.get(name)}")
"""


@pytest.mark.parametrize("name, value", [
    ("PYTHONHOME", "/nowhere"), ("PYTHONSAFEPATH", "1"), ("PYTHONINSPECT", "1"), ("PYTHONOPTIMIZE", "2"),
    ("PYTHONWARNINGS", "error"), ("MPLBACKEND", "Qt4Agg"), ("WORLD_SIZE", "2"), ("CDPATH", "elsewhere"),
    ("GLOBIGNORE", "*"), ("SHELLOPTS", "noclobber"), ("SHELLOPTS", "noglob"), ("BASHOPTS", "nullglob"),
    ("BASHOPTS", "failglob"), ("BASH_ENV", "profile"), ("POSIXLY_CORRECT", "1"), ("VIRTUAL_ENV", "/nowhere"),
    ("GIT_DIR", "/nowhere"),
])
def test_variables_that_are_meant_for_others(project, tmp_path, name, value):
    """Kind 7: they change nothing in what is run, the first time and after a change."""
    (tmp_path / "elsewhere/a project").mkdir(parents=True)
    (tmp_path / "profile").write_text("set -o noclobber -o noglob; shopt -s failglob; echo hello from a profile >&2\n")
    (project.folder / "eval.py").write_text(NOTICES + STUB)
    command = [project.folder.name + "/run_all.sh"]
    for expected in (STAGES, ["eval.py --report"]):
        project.calls.write_text("")
        done = subprocess.run(command, cwd=tmp_path, env=project.environment | {name: value}, capture_output=True,
                              text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert project.called() == expected
        (project.folder / "trained/with_ltm/config.json").write_text("changed")


def test_exit_code_counts_where_python_is_told_to_stay(project):
    """Kind 7: with PYTHONINSPECT a Python ends as its prompt does, not as its script did."""
    assert project.run(PYTHONINSPECT="1", FAILING="add_memory.py").returncode == 7


def test_path_of_packages_is_believed_only_where_it_is_needed(bare, tmp_path, offline):
    """Kind 7: PYTHONPATH may be where the packages are; it does not hide those of .venv."""
    put_package(tmp_path / "packages")
    done = bare.run(PYTHONPATH=str(tmp_path / "packages"))
    assert done.returncode == 0 and not (bare.folder / ".venv").exists(), done.stderr

    put_package(make_environment(bare.folder / ".venv"), "3.0")
    (bare.folder / "requirements.txt").write_text("revena-probe==3.0\n")
    done = bare.run("--fresh", PYTHONPATH=str(tmp_path / "packages"))
    assert f"from {bare.folder}/.venv 3.0" in done.stdout, done.stderr


# ---------------------------------------------------------------------- kinds of faults: no pip, no lock, no bash

@pytest.mark.parametrize("where", ["on the PATH", "in .venv", "in a .venv of ours"])
def test_complete_environment_needs_no_pip(bare, tmp_path, where):
    """Kind 11: what has the packages is used, on every run."""
    environment = tmp_path / "env" if where == "on the PATH" else bare.folder / ".venv"
    put_package(make_environment(environment))
    if where == "on the PATH":
        bare.use_python(environment / "bin/python")
    if where == "in a .venv of ours":
        shutil.copy(bare.folder / "requirements.txt", environment / ".made_by_run_all")
    for flags in ([], ["--fresh"], ["--python", str(bare.folder / "requirements.txt")]):
        done = bare.run(*flags)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == f"{environment}/bin/python\n"


@pytest.fixture
def patched(tmp_path):
    """patched(statement): variables by which fcntl.flock does that, in every Python."""
    def make(statement):
        (tmp_path / "patched").mkdir()
        (tmp_path / "patched/sitecustomize.py").write_text(
            f"import errno, fcntl, os\ndef flock(*_):\n    {statement}\nfcntl.flock = flock\n")
        return {"PYTHONPATH": str(tmp_path / "patched")}
    return make


@pytest.mark.parametrize("error, flags", [
    ("ENOSYS", ["--memories"]), ("ENOLCK", []), ("EOPNOTSUPP", []), ("EINVAL", [])])
def test_file_system_without_locks_goes_on(project, patched, error, flags):
    """Kind 16: only a lock that is held refuses."""
    done = project.run(*flags, **patched(f"raise OSError(errno.{error}, 'no locks')"))
    assert done.returncode == 0, done.stderr


def test_lock_that_cannot_be_asked_for_is_not_a_held_one(project, patched):
    """Kind 16: a Python that dies over the lock says nothing about other runs."""
    assert project.run(**patched("os._exit(1)")).returncode == 0


def test_installing_needs_no_lock(bare, patched, tmp_path):
    """Kind 16: it is tried, and fails for another reason."""
    path = patched("raise OSError(errno.ENOSYS, 'no locks')")["PYTHONPATH"]
    (tmp_path / "bin/python3").write_text(
        '#!/bin/sh\ncase "$*" in *_base_executable*) echo "$0"; exit ;; esac\n'
        f'PYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    make_environment(bare.folder / ".venv")
    assert "lacks revena-probe, and pip" in bare.run().stderr


@pytest.fixture
def waiting(bare):
    """A project, and a run that waits for another one's installation: (project, the lock, the running process)."""
    (bare.folder / ".run_all").mkdir()
    with open(bare.folder / ".run_all/environment", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        running = bare.start()
        assert "Waiting for another installation" in running.stderr.readline()
        yield bare, held, running
        running.kill()
        running.communicate()


def test_second_installation_waits_for_the_first(waiting):
    """Kind 16: and finds what it has made."""
    project, held, running = waiting
    put_package(make_environment(project.folder / ".venv"))
    fcntl.flock(held, fcntl.LOCK_UN)
    output, error = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0 and INSTALLING not in error and "from" in output


SIGNALS = pytest.mark.parametrize("number, whole_group", [
    (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True),
], ids=["SIGTERM to the shell", "SIGTERM to all", "Ctrl-C"])


@SIGNALS
def test_waiting_for_an_installation_heeds_signals(waiting, number, whole_group):
    """Kind 16: it stops at once, whatever its Python was about."""
    project, _, running = waiting
    (os.killpg if whole_group else os.kill)(running.pid, number)
    _, error = running.communicate(timeout=PATIENCE)
    # a shell says so, or dies of the signal itself where it was at its own work
    assert running.returncode in (128 + number, -number) and error == ""
    assert not (project.folder / ".venv").exists()


@SIGNALS
def test_installing_heeds_signals(bare, number, whole_group):
    """Kind 16: nothing goes on installing behind the back of whoever stopped it."""
    put_pip(make_environment(bare.folder / ".venv"), "import signal\nprint('hanging', flush=True)\nsignal.pause()\n")
    running = bare.start()
    lines = iter(running.stderr.readline, "")
    assert any(line == "hanging\n" for line in lines)
    (os.killpg if whole_group else os.kill)(running.pid, number)
    _, error = running.communicate(timeout=PATIENCE)               # ends when nobody can write there any more
    assert running.returncode == 128 + number and bare.called() == []


@pytest.mark.parametrize("at", range(1, 9))
def test_stopped_between_any_two_commands_nothing_goes_on(project, at):
    """Kind 16: also while the command has only just begun, as on a busy machine it may have for long."""
    text = (project.folder / "run_all.sh").read_text()
    function = re.search(r"(?ms)^run\(\) \{.*?^\}", text)[0]
    at_once = f"n=0; set -T; trap 'n=$((n + 1)); [ $n != {at} ] || kill -TERM $$' DEBUG"
    running = subprocess.Popen(["bash", "-c", f"set -euo pipefail\n{function}\n{at_once}\nrun sleep 600"],
                               stdout=subprocess.PIPE, start_new_session=True)
    try:
        running.communicate(timeout=60)                     # ends when nobody can write there any more
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


@pytest.mark.parametrize("by", [["sh"], ["dash"], ["bash"], ["bash", "--posix"], ["sh", "-e"]], ids=" ".join)
def test_any_shell_may_be_told_to_run_it(project, tmp_path, by):
    """A plain sh hands over to bash."""
    if not shutil.which(by[0]):
        pytest.skip(f"there is no {by[0]}")
    done = project.run("--root", "some where", cwd=tmp_path, by=by)
    assert done.returncode == 0, done.stderr
    assert project.called(tmp_path / "some where") == STAGES


@pytest.mark.parametrize("by", [[], ["sh"], ["bash", "--posix"]], ids=" ".join)
def test_root_that_cannot_be_written(project, tmp_path, by):
    """One line, also where a shell would leave at once."""
    (tmp_path / "root/.run_all/lock").mkdir(parents=True)
    refused = project.run("--root", tmp_path / "root", by=by)
    assert refused.returncode == 1 and project.called() == []
    assert refused.stderr == (f"run_all.sh: nothing can be written in '{tmp_path}/root'; mend that, or choose another "
                              "--root\n")


@pytest.mark.parametrize("links", [
    {"run": "a project/run_all.sh"},
    {"bin/run_all.sh": "../a project/run_all.sh"},
    {"third": "second", "second": "bin/first", "bin/first": "../a project/run_all.sh"},
    {"other": "a project", "other/link.sh": "run_all.sh"},
    {"-n": "a project/run_all.sh"},
], ids=["link", "relative", "chain", "folder", "name like a flag"])
def test_through_symbolic_links(project, tmp_path, links):
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    called = f"./{next(reversed(links)) if 'other' in links else next(iter(links))}"
    for flags in (["--help"], ["--root", "mine"]):
        project.calls.write_text("")
        done = subprocess.run([called, *flags], cwd=tmp_path, env=project.environment, capture_output=True, text=True,
                              timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    assert project.called(tmp_path / "mine") == STAGES


def test_alone_it_says_what_is_missing(project, tmp_path):
    """A copy without the project makes no environment and no folders."""
    shutil.copy(project.folder / "run_all.sh", tmp_path / "bin/run_all.sh")
    before = files(tmp_path)
    alone = subprocess.run([tmp_path / "bin/run_all.sh"], env=project.environment, capture_output=True, text=True)
    assert alone.returncode == 1 and alone.stderr.startswith("run_all.sh: ") and alone.stderr.count("\n") == 1
    assert "has no stages.py" in alone.stderr and files(tmp_path) == before
