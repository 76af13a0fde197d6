"""What the tests share: no network, the project on the path, and fresh roots that hold the tokenizer.

The tokenizer's files come from the project's data/tokenizer or, once, by way of download_models.py into tests/.cache.
"""

import fcntl
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"          # before anything imports the hub's client: no test waits for a network
os.environ["WANDB_MODE"] = "disabled"       # but in the tests that are about it

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:       # a shell's job in the background is started so, ..
    signal.signal(signal.SIGINT, signal.default_int_handler)        # .. and what tests start would be deaf to it too

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import download_models                                      # noqa: E402
import stages                                               # noqa: E402


def pytest_collection_finish():
    """What the libraries have imported stays: Python's collector need not look through a million of their objects
    again and again, which took a third of all the time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """One thread for torch, where a test has imported it: not every script needs it.

    Models this small are several times slower on two threads, and a fork would lose the second one; besides, one
    thread takes the same sums in the same order in every process.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_dir():
    """A folder with GPT-2's verified tokenizer files."""
    cache = PROJECT / "tests" / ".cache"
    cache.mkdir(exist_ok=True)
    with open(cache / ".lock", "w") as lock:                # of two processes that find nothing, the second waits
        fcntl.flock(lock, fcntl.LOCK_EX)
        for root in (PROJECT, cache):
            if not download_models.wrong_files(root / "data" / "tokenizer"):
                return root / "data" / "tokenizer"
        download_models.main(["--root", str(root)])
    return root / "data" / "tokenizer"


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder that make(folder) has filled, once for all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name, make):
        folder = base / "once" / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:           # of two processes that need it, the second waits
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / ".made").exists():
                make(folder)
                (folder / ".made").touch()
        return folder
    return get


@pytest.fixture
def make_root(tmp_path, tokenizer_dir):
    """make_root(name): a fresh root folder with data/tokenizer in it and nothing else."""
    def make(name="root"):
        shutil.copytree(tokenizer_dir, tmp_path / name / "data" / "tokenizer")
        return tmp_path / name
    return make


@pytest.fixture
def stage(capsys, monkeypatch):
    """stage(main, *flags): run a script's main() as the command line would; (exit code, stdout, what stderr says)."""
    monkeypatch.setattr(stages.signal, "signal", lambda *_: None)

    def run(main, *flags):
        with pytest.raises(SystemExit) as exit_:
            stages.run_stage(lambda: main([str(flag) for flag in flags]))
        printed = capsys.readouterr()
        code = exit_.value.code
        # sys.exit("a line") prints the line and leaves with 1, as the interpreter does
        return (1, printed.out, printed.err + code) if isinstance(code, str) else (code, printed.out, printed.err)
    return run


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(texts, name): a file of such rows; a text that is bytes goes in as a line of its own, as it is."""
    def write(texts, name="corpus.jsonl"):
        lines = [text if isinstance(text, bytes) else json.dumps({"text": text}).encode() for text in texts]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path
    return write
