"""What the scripts share: the table of arms, failures in one line, files that are whole or absent,
data, wandb.

Importing this file does not import torch: a script that needs none starts at once. What needs
torch (loading a model, picking a device) imports it where it is called.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib
import json
import netrc
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

PROJECT = Path(__file__).resolve().parent
EOT = 50256                     # <|endoftext|>: opens every document, pads the last window, is never a target

TOKENIZER_SHA256 = {            # GPT-2's tokenizer (Radford et al. 2019), wherever it came from
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


# ------------------------------------------------------------ the arms of the experiment

class Arm(NamedTuple):
    """One line of the comparison: the backbone that all arms share, and what is added to it."""

    memory: str | None          # a name of models.Memory.kinds; None: the backbone alone
    label: str                  # as it stands in tables and pictures
    settings: dict = {}         # of the memory, where they are not its own (config.memory_settings)
    backbone: dict = {}         # of the config, where the backbone itself is changed: a control
    lora: int | None = None     # rank of LoRA matrices beside the backbone's: of a model that was trained already
    replay: float = 0.0         # share of each step's rows that is drawn again from rows seen before: a control
    control: bool = False       # no design of its own: left out of the comparison unless it is asked for
    # of the study alone
    group: str = ""             # where it stands in the table
    config: dict = {}           # of the config while it is trained: window, slots, what is stored
    training: dict = {}         # of train.py's Settings
    share: float = 1.0          # of the usual steps

    def steps_of(self, usual):
        """How many steps it is trained for."""
        return max(1, round(self.share * usual))

    def batch_of(self, usual, width):
        """Rows of its own window that a step takes in place of `usual` ones of `width` tokens: as many
        tokens, as far as a row allows.
        """
        return max(1, usual * width // self.config.get("stm_window", width))


ARMS = {
    "baseline": Arm(None, "no memory"),
    "with_ltm": Arm("ltm", "LTM: surprising tokens"),
    "with_store": Arm("store", "store: keys and values"),
    "with_bank": Arm("bank", "bank: learned vectors"),
    "with_mag": Arm("mag", "MAG: fast weights"),
    "with_gru": Arm("gru", "GRU: fading state", dict(placement="upper")),

    # what else a number could come from, one seed each
    "wide": Arm(None, "wider feed-forward", backbone=dict(n_inner=2784), control=True),
    "with_bank_low_rank": Arm("bank", "bank of rank 64", dict(rank=64), control=True),
    "with_gru_cell": Arm("gru", "GRUCell a row", dict(placement="upper", cell=True, fade=0.97), control=True),
    "with_gru_reset": Arm("gru", "GRU, reset at every row", dict(placement="upper", carry=False), control=True),
    "with_mag_reset": Arm("mag", "MAG, reset at every row", dict(carry=False), control=True),
    "with_store_reset": Arm("store", "store, reset at every row", dict(carry=False), control=True),
    "with_store_few": Arm("store", "store of 256, merging", dict(slots=256, merge_above=0.9), control=True),
    "with_store_replay": Arm("store", "store, a fifth replayed", replay=0.2, control=True),

    # of a model that was trained already: what its own weights learn, beside what a memory does
    "with_lora": Arm(None, "LoRA", lora=8, control=True),
    "with_ltm_lora": Arm("ltm", "LTM and LoRA", lora=8, control=True),
}


def study():
    """{name: Arm} of ./run_all.sh --study: what else would have bought the gain, each trained by
    itself on as many tokens, unless it is said otherwise.
    """
    two = {"baseline": Arm(None, "no memory"), "with_ltm": Arm("ltm", "LTM")}
    found = {}
    for share in (0.25, 0.5, 1, 2, 4, 8):
        for arm, about in two.items():
            found[f"{arm}_x{share:g}"] = about._replace(group="steps", share=share)
    # rows of the window, as many tokens a step; more steps, since a document's last row is padded: 98%
    # of the targets of rows of 128 are text, 93% and 83% of these
    for name, window, label, share in (("window_512", 512, "window of 512", 1.05),
                                       ("attention_1024", 1_024, "window of 1,024", 1.18)):
        found[name] = Arm(None, label, group="baseline", config=dict(stm_window=window), share=share)
    found["study_wide"] = Arm(None, "the LTM's parameters in the feed-forward", group="baseline",
                              backbone=dict(n_inner=2_720))
    found["more_steps"] = Arm(None, "the LTM's time in steps", group="baseline", share=1.05)     # by README's speeds
    stored = {"surprisal": {}, "random": dict(ltm_random=0.576), "every": dict(ltm_surprisal_bits=-1.0)}
    # an isolated row never fills 256 slots: 1,024 of them change what is evaluated, not what is trained
    labels = {"surprisal": "surprising tokens", "random": "random ones, same rate", "every": "every token"}
    for what, config in stored.items():
        for slots in (256, 1_024):
            if (what, slots) != ("surprisal", 256):         # with_ltm_x1
                found[f"store_{what}_{slots}"] = Arm("ltm", f"{labels[what]}, {slots:,} slots", group="routing",
                                                     config=config | dict(ltm_slots=slots))
    for rate in (2.5e-4, 1e-3, 2e-3):                       # 5e-4 is the usual one
        for arm, about in two.items():
            found[f"{arm}_lr_{rate:g}"] = about._replace(
                label=f"{about.label}, learning rate {rate:g}", group="learning rate",
                training=dict(lr=rate, min_lr=rate / 10))
    return found


STUDY = study()
SPECIFIED = ("baseline", "with_ltm")            # the experiment of ./run_all.sh; --memories trains all


def about(arm):
    """The Arm of that name, of the comparison or of the study."""
    return ARMS[arm] if arm in ARMS else STUDY[arm]


def arm_flag(arm):
    """The flag of train.py and add_memory.py that chooses an arm: "--with-ltm"; of one of the
    study: "--study NAME".
    """
    if arm in STUDY:
        return f"--study {arm}"
    return "--" + arm.replace("_", "-")


REGIME = ("steps", "chained", "planted", "train_backbone")     # settings of a training that train.py has flags for


def regime_flags(settings):
    """Flags of train.py: " --steps 6 --chained 1", of {name: value} of a training's settings."""
    told = [(name.replace("_", "-"), settings.get(name)) for name in REGIME]
    return "".join(f" --{name}" if value is True else f" --{name} {value:g}" for name, value in told if value)


def init_name(arm):
    """The folder under trained/ that holds the weights which an arm starts from; the
    specification's two share one, and so do those of the study whose backbone is theirs.
    """
    shared = arm in SPECIFIED or arm in STUDY and not STUDY[arm].backbone
    return "init" if shared else f"init_{arm}"


def arm_folder(root, seed, name):
    """Where seed `seed` keeps an arm ("with_ltm") or its starting weights ("init")."""
    return Path(root) / "trained" / (f"seed{seed}" if seed else "") / name


def model_class(memory, hosted=False):
    """The class of a model with that memory: the one place where names become code.

    It lives in the file that a checkpoint has to carry: models.py alone for the specification's
    arms, memories.py with it for the further ones and for all that stand on another model
    (`hosted`).
    """
    if hosted:
        return importlib.import_module("memories").RevenaHosted
    home, name = ("models", "RevenaHybridTiny") if memory in (None, "ltm") else ("memories", "RevenaHybrid")
    return getattr(importlib.import_module(home), name)


def is_hosted(model):
    """Whether a model's backbone is another model that add_memory.py --to put the memory on."""
    return getattr(model.config, "host", None) is not None


# ------------------------------------------------------------ failures

class StageError(Exception):
    """A failure the user can act on: one line that says what is wrong and which command to run
    next.
    """


def one_line(error, most=200):
    """An error's message, short enough to be part of one line."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def leave_on_sigterm():
    """Turn SIGTERM into SystemExit(143), the first: a second, as of `timeout` and of run_all.sh, finds
    it leaving. Outside the main thread (a notebook's) Python allows no handlers: then not.
    """
    def on_sigterm(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(143)

    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, on_sigterm)


def run_stage(main):
    """Run a script's `main()` and leave the process; every failure a user can cause is one line on
    stderr.

    Exit codes: 0 done, 1 a StageError, a failing disk or no memory, 2 bad flags (argparse), 130
    Ctrl-C, 143 SIGTERM.
    """
    name = Path(sys.argv[0]).name
    leave_on_sigterm()
    sys.stdout = sys.stdout or open(os.devnull, "w")        # None: closed before we began, as a daemon's may be
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):                  # a notebook's has no such thing
        sys.stdout.reconfigure(errors="backslashreplace")   # as stderr: a file's name need not be UTF-8
    try:
        sys.exit(main() or 0)
    except StageError as error:
        reason = str(error)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        reason = f"{error.strerror or error}{place}; mend that, then run {name} again"
    except MemoryError:
        reason = f"this machine is out of memory; close what else uses it, then run {name} again"
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":      # torch's, which need not have been imported
            raise
        reason = (f"the GPU is out of memory; close what else uses it or lower the batch size at the top of {name}, "
                  f"then run it again")
    reason = " ".join(reason.splitlines())                  # a name may even have line ends in it
    sys.exit(f"{name}: {reason}")


def parser_of(doc, root_help="folder of data/ and trained/ (default: this one; with --quick its quick/)"):
    """An argument parser with the two flags that every stage has: --root and --quick."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", metavar="DIR", help=root_help)
    parser.add_argument("--quick", action="store_true", help="the small setting, under quick/: minutes on any CPU")
    return parser


def seed_number(text):
    """An argparse type: a whole number that seeds a generator."""
    number = int(text)
    if not 0 <= number < 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 4294967295")
    return number


def default_root(root, quick):
    """The folder that data/, trained/ and the results lie in: --root, or the project's own, or its
    quick/.
    """
    if root:
        try:
            str(root).encode()
        except UnicodeEncodeError:
            raise StageError(f"--root {root} is not UTF-8, and the tokenizer's library opens no such names; give the "
                             f"folder another name, then pass that to --root") from None
        return Path(root)
    return Path(os.path.relpath(PROJECT)) / ("quick" if quick else "")


def command(script, root, quick, seed=None):
    """The command line that runs a script ("train.py --baseline") on the same root, size and, where
    given, seed.
    """
    words = [] if script.startswith("./") else ["python"]
    words += [script, "--root", shlex.quote(str(root))]
    if seed is not None:
        words += ["--seed", str(seed)]
    if quick:
        words.append("--quick")
    return " ".join(words)


def init_command(arm, root, quick, seed=None, to=None):
    """The command line that makes what an arm starts from, on the model `to` where it stands on one."""
    flag = "" if init_name(arm) == "init" else f" {arm_flag(arm)}"
    host = f" --to {shlex.quote(to)}" if to else ""
    return command(f"add_memory.py{flag}{host}", root, quick, seed)


# ------------------------------------------------------------ files

def sha256(path):
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path):
    """Bring a file's bytes to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path, data):
    """Write `data` (bytes or str) so that `path` is either what it was or all of `data`, never a
    part of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if isinstance(data, str):
        data = data.encode("utf-8", "backslashreplace")     # a file's name in it need not be UTF-8
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path, value):
    """Write a JSON file atomically; raises StageError on NaN and Infinity, which JSON has no words
    for.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError:
        raise StageError(f"a number that belongs into {path} is NaN or infinite; the file was left as it was") from None
    write_atomic(path, text + "\n")


def read_json(path, made_by):
    """Read a JSON object; raises StageError naming `made_by`, the command that makes it, where that
    fails.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StageError(f"{path} is missing; make it with: {made_by}") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise StageError(f"{path} is damaged; make it again with: {made_by}")
    return value


def seal(value):
    """SHA-256 of a JSON object but for its own "sha256": kept there, it tells when a byte of the
    file has changed.
    """
    rest = {key: entry for key, entry in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, **facts):
    """Write `folder`/manifest.json: the hash of every file in it, and `facts`. Comes last: no
    manifest, no folder.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    manifest = {"files": {name: sha256(folder / name) for name in names}, **facts}
    write_json(folder / "manifest.json", {**manifest, "sha256": seal(manifest)})


def read_manifest(folder, made_by="the stage that writes this folder"):
    """The manifest of a folder whose files all match it; raises StageError naming the first that
    does not.
    """
    folder = Path(folder)
    manifest = read_json(folder / "manifest.json", made_by)
    files = manifest.get("files")
    # a name is a file of this folder, never a path out of it
    if manifest.get("sha256") != seal(manifest) or not isinstance(files, dict) or any("/" in name for name in files):
        raise StageError(f"{folder / 'manifest.json'} is damaged; make it again with: {made_by}")
    for name, expected in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise StageError(f"{folder / name} is missing, damaged or changed: manifest.json has another hash; "
                             f"make it again with: {made_by}")
    return manifest


def lock(file, refusal):
    """Hold an open file until it is closed or the process ends; raises StageError(refusal) where
    another one does.

    A file system without locks (ENOSYS, ENOLCK) gives none: better to go on than never to start.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise StageError(refusal) from None


def commit():
    """The commit of this code, "-dirty" where it was changed since; "unknown" outside a checkout of
    its own.
    """
    def git(*words):
        # the variables by which git is told of another repository are not for this question
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(["git", "-C", str(PROJECT), *words], capture_output=True, text=True, env=clean,
                              check=True, timeout=30)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != PROJECT:
            return "unknown"                                # unpacked inside another repository
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ------------------------------------------------------------ tokenizer and data

def load_tokenizer(root, quick=False):
    """The tokenizer in `root`/data/tokenizer, GPT-2's or that of another model; raises StageError
    where a file is missing or another one.
    """
    from transformers import GPT2TokenizerFast

    folder, again = Path(root) / "data" / "tokenizer", command("download_models.py", root, quick)
    if (folder / "manifest.json").exists():
        from transformers import AutoTokenizer      # brings torch, which GPT-2's does not

        again = command("prepare_data.py --tokenizer MODEL", root, quick)
        read_manifest(folder, again)
        return settled(AutoTokenizer.from_pretrained(folder), folder, again)
    for name, expected in TOKENIZER_SHA256.items():
        if not (folder / name).is_file():
            raise StageError(f"{folder / name} is missing; get it with: {again}")
        if sha256(folder / name) != expected:
            raise StageError(f"{folder / name} is not GPT-2's; get it with: {again}")
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                  pad_token="<|endoftext|>", padding_side="left")      # GPT-2 has none; for batches
    # by other keyword names the same call gives an empty vocabulary without a word
    assert len(tokenizer) == EOT + 1 and tokenizer.encode("Hello world") == [15496, 995], "the tokenizer came out empty"
    return tokenizer


def settled(tokenizer, name, again):
    """A model's own tokenizer, ready for this project: it pads, on the left, with what opens a
    document; raises StageError where it cannot be used here.

    What opens a document is what the model's texts begin with (BOS) or, where there is none, what
    stands between them (Qwen pads with that) or ends them (GPT-2).
    """
    opening = next((token for token in (tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token) if token), None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or opening is None:
        lack = "is not a fast one" if backend is None else "has no token that begins or ends a text"
        raise StageError(f"the tokenizer of {name} {lack}, and cannot be used here; name another model: {again}")
    tokenizer.pad_token, tokenizer.padding_side = opening, "left"
    return tokenizer


def byte_level(tokenizer):
    """Whether its tokens are bytes, written as letters (GPT-2's way), and not text with "\u2581" for
    a space (sentencepiece's).
    """
    return "\u0120" in "".join(tokenizer.convert_ids_to_tokens(tokenizer.encode("a b", add_special_tokens=False)))


def encoded(tokenizer, text):
    """Token ids of a text as it goes on from another one, without anything before or after."""
    if byte_level(tokenizer):
        return tokenizer.encode(text, add_special_tokens=False)
    # sentencepiece may put a space before whatever comes first: here that is a line end
    lead = tokenizer.encode("\n", add_special_tokens=False)
    both = tokenizer.encode("\n" + text, add_special_tokens=False)
    return both[len(lead):] if both[:len(lead)] == lead else tokenizer.encode(text, add_special_tokens=False)


def spaced_words(tokenizer):
    """[(word, its token)] of the tokens that are a space and ASCII letters, in the vocabulary's order."""
    space = "\u0120" if byte_level(tokenizer) else "\u2581"
    return [(token[1:], index) for token, index in tokenizer.get_vocab().items()
            if token[:1] == space and token[1:].isascii() and token[1:].isalpha()]


def characters_per_token(tokenizer):
    """Characters each token adds to a text: its bytes that are not UTF-8 continuation bytes.
    (vocab,) int64 array.

    Summed over a document's tokens this is len(text), also where one character is spread over two
    tokens. A sentencepiece tokenizer writes bytes as <0xE2>, and may put a space before a text
    that has none: then what opens the document counts -1.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letter_of_byte, opening = bytes_to_unicode(), tokenizer.pad_token_id
    letters = {letter_of_byte[byte] for byte in range(0x80, 0xC0)}
    written = {f"<0x{byte:02X}>": int(not 0x80 <= byte < 0xC0) for byte in range(256)}
    of_bytes = byte_level(tokenizer)
    counts = np.zeros(len(tokenizer), np.int64)
    for token, index in tokenizer.get_vocab().items():
        counts[index] = (sum(letter not in letters for letter in token) if of_bytes
                         else written.get(token, len(token)))
    counts[list({opening, *tokenizer.all_special_ids})] = 0
    counts[opening] = 1 - counts[tokenizer.encode("a", add_special_tokens=False)].sum()
    return counts


def read_meta(root, again):
    """data/meta.json, unchanged since prepare_data.py of this version wrote it; else StageError."""
    path = Path(root) / "data" / "meta.json"
    meta = read_json(path, again)
    if meta.get("sha256") != seal(meta):
        raise StageError(f"{path} was changed after it was made; make it again with: {again}")
    try:
        parts = {name: meta["splits"][name] for name in ("train", "val")}
        counts = [part[name] for part in parts.values() for name in ("documents", "tokens", "bytes")]
        whole = [meta.get("eot", EOT), meta.get("vocab_size", EOT + 1)]
        usable = (meta["format"] == 1 and {"source", "quick"} <= meta.keys()
                  and meta.get("dtype", "uint16") in ("uint16", "uint32")
                  and all(type(number) is int and number >= 0 for number in whole)
                  and all("sha256" in part for part in parts.values())
                  and all(type(count) is int and count > 0 for count in (meta["window"], *counts)))
    except (KeyError, TypeError):
        usable = False
    if not usable:
        raise StageError(f"{path} is of another version of prepare_data.py; make it again with: {again}")
    own = Path(root) / "data" / "tokenizer" / "manifest.json"
    wanted = read_json(own, again)["files"] if own.exists() else TOKENIZER_SHA256
    if meta.get("tokenizer_sha256") != wanted:
        raise StageError(f"{path} names another tokenizer; make it again with: {again}")
    return {"eot": EOT, "vocab_size": EOT + 1, "dtype": "uint16", **meta}


def load_split(root, split, quick=False):
    """The windows of one split, verified against meta.json: ((rows, 128) uint16 memmap, meta dict);
    uint32 where the tokenizer has more than 65,536 tokens.

    Raises StageError where a file is missing, cut short, changed, or holds a token beyond the vocabulary.
    """
    again = command("prepare_data.py", root, quick)
    meta = read_meta(root, again)
    path = Path(root) / "data" / f"{split}.bin"
    return verified_rows(path, meta["splits"][split], meta, "meta.json", again), meta


def verified_rows(path, expected, meta, described, again):
    """The rows of a .bin, (rows, window) memmap as `meta` has them, that is what the JSON file
    `described` says of it ({"bytes", "sha256"}); else StageError naming `again`, the command that
    makes it.
    """
    window, dtype, last = meta["window"], np.dtype(meta["dtype"]), meta["vocab_size"] - 1
    if not path.is_file():
        raise StageError(f"{path} is missing; make it with: {again}")
    if path.stat().st_size != expected["bytes"] or expected["bytes"] % (dtype.itemsize * window):
        raise StageError(f"{path} has {path.stat().st_size} bytes, {described} says {expected['bytes']}; "
                         f"make it again with: {again}")
    if sha256(path) != expected["sha256"]:
        raise StageError(f"{path} is not the file {described} describes (its hash differs); "
                         f"make it again with: {again}")
    rows = np.memmap(path, dtype, mode="r").reshape(-1, window)
    if rows.max() > last:
        raise StageError(f"{path} holds token {rows.max()}, the vocabulary ends at {last}; make it again with: {again}")
    return rows


def own_name(text):
    """An argparse type: what documents of one's own are called, data/NAME.bin."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", text) or text in ("train", "val", "planted", "meta"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: up to 40 letters, digits, - and _, "
                                         f"and not train, val, planted or meta")
    return text


def load_own(root, name, quick=False):
    """The windows of data/NAME.bin (prepare_data.py --into NAME) and what data/NAME.json says of
    them: (rows, dict). Raises StageError as load_split does.
    """
    again = command(f"prepare_data.py --text FILE --into {name}", root, quick)
    path = Path(root) / "data" / f"{name}.json"
    about = read_json(path, again)
    if about.get("sha256") != seal(about):
        raise StageError(f"{path} was changed after it was made; make it again with: {again}")
    meta = read_meta(root, command("prepare_data.py", root, quick))
    if any(about.get(name) != meta[name] for name in ("window", "tokenizer_sha256")):
        raise StageError(f"{path} is of another window or tokenizer than meta.json; make it again with: {again}")
    return verified_rows(path.with_suffix(".bin"), about["split"], meta, path.name, again), about


def documents(rows, eot=EOT):
    """The documents that the rows of a .bin were cut from: list of int64 arrays, each opened by
    `eot`.
    """
    starts = np.flatnonzero(rows[:, 0] == eot)
    stride = rows.shape[1] // 2
    found = []
    for first, last in zip(starts, [*starts[1:], len(rows)]):
        fresh = rows[first + 1:last, stride:]
        tokens = np.concatenate([rows[first], *fresh]).astype(np.int64)
        end = np.flatnonzero(tokens != eot).max(initial=0) + 1
        found.append(tokens[:end])
    return found


def recut(rows, window):
    """Rows of another width, cut from the documents of `rows` as prepare_data.py cuts them: (n, window) uint16."""
    from prepare_data import windows_of

    return np.concatenate([windows_of(text, window, window // 2) for text in documents(rows)])


# ------------------------------------------------------------ models on a device

def save_model(model, tokenizer, folder):
    """Write a Hugging Face folder: config, weights (safetensors, float32), tokenizer, and the
    model's file as code.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    type(model).register_for_auto_class("AutoModelForCausalLM")
    type(model.config).register_for_auto_class()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder, device="cpu", made_by="python add_memory.py", weights=None):
    """The model of `folder`; raises StageError where its config or weights are missing or damaged.

    `weights`: another safetensors file than the folder's own. Nothing but JSON and safetensors is
    read: no code of the folder's runs.
    """
    from safetensors.torch import load_file

    from models import RevenaConfig

    folder = Path(folder)
    settings = read_json(folder / "config.json", made_by)
    path = weights or folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise StageError(f"{path} is missing; make it with: {made_by}") from None
    except Exception as error:                      # safetensors raises its own type, and OSError for some damage
        raise StageError(f"{path} is not a whole safetensors file ({error}); make it again with: {made_by}") from None
    try:
        hosted = "host" in settings
        if hosted:
            kind = model_class(None, hosted)
            config = kind.config_class.from_dict(settings)
        else:
            config = RevenaConfig.from_dict(settings)
            kind = model_class(config.memory)
        model = kind(config)
        model.load_state_dict(tensors)
    except (ImportError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise StageError(f"{folder}: config.json and model.safetensors do not fit ({one_line(error)}); "
                         f"make it again with: {made_by}") from None
    return model.to(device).eval()


def pick_device():
    """The best device here: CUDA, then Apple's MPS, then the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name(device):
    """What people call the device."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def lower_precision(model):
    """Let the matrices compute in bfloat16 where the GPU does, those of a memory that is off
    excepted.

    The residual stream, norms, softmax, states and the weighing of what is retrieved stay
    float32.
    """
    import torch

    weights = dict(model.named_parameters())
    on_cuda = next(iter(weights.values())).is_cuda
    if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        for name, weight in weights.items():
            part = name.partition(".")[0]
            vector = weight.dim() < 2 and (part != "backbone" or not is_hosted(model))     # a host has one type
            if not vector and (part == "backbone" or model.config.memory_enabled):
                weight.data = weight.data.bfloat16()
    return model


def compiled(function, settings=None, **options):
    """torch.compile, but for two of its habits; `settings`: further ones of its compiler.

    Choosing how to sum by a stopwatch: two runs are to sum alike (before torch 2.10 it has no
    other way). And padding the rows of what goes from kernel to kernel, of which an operator of
    models.py would be handed a copy: 54 microseconds of a step of 2.8 milliseconds.
    """
    import torch
    from torch._inductor import config

    # each process that compiles imports torch first: with 16 of them a step was ready after 16 s, with
    # three after 11
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        config.compile_threads = min(config.compile_threads, 4)
    by_rule = {"comprehensive_padding": False}
    if hasattr(config, "deterministic"):
        by_rule["deterministic"] = True
    return torch.compile(function, options=by_rule | (settings or {}), **options)


@functools.cache
def has_compiler(device):
    """Whether torch.compile is of use on this device: a CUDA GPU, and all that makes its kernels,
    tried on a small one.

    That takes Triton, a C compiler and Python's headers: which of them is missing shows nowhere
    before.
    """
    import torch

    if torch.device(device).type != "cuda":
        return False

    def twice(x):
        return 2 * x

    try:
        compiled(twice)(torch.ones(64, device=device))
    except Exception:
        return False
    return True


# ------------------------------------------------------------ wandb

WANDB_PROJECT = "revena"
WANDB_SECONDS = 15              # that its start and its end may take


def wandb_mode():
    """None (the environment decides) where there are credentials; else "offline": wandb would ask
    for them.
    """
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        entry = netrc.netrc(os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        entry = None
    named = any(map(os.environ.get, ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")))
    return None if entry or named or os.environ.get("WANDB_MODE") == "disabled" else "offline"


class Wandb:
    """Weights & Biases in a thread of its own: missing, raising or hanging, it costs a warning and
    nothing else.

    Online where the user has logged in (`wandb login`, WANDB_API_KEY) and WANDB_MODE does not say
    otherwise. A seed is a group and each arm a job type of its own, so that charts overlay the
    arms, also where they are drawn by group.

    Args:
        folder: where it writes. seed, job (an arm, or "eval"): what the run is called and grouped by.
        config: {name: value}, to which the hashes of the project's code are added.
        warn: is called, in the thread, with the line that says what went wrong.
    """

    def __init__(self, folder, seed, job, config, warn):
        self.warn = warn
        self.tasks = queue.Queue()
        self.failed = False
        self.thread = threading.Thread(target=self._work, daemon=True, args=(str(folder), f"seed{seed}", job, config))
        self.thread.start()

    def _work(self, folder, group, job, config):
        if os.environ.get("WANDB_MODE") == "disabled":
            return                                  # without waiting for the import
        try:
            code = {path.name: sha256(path) for path in sorted(PROJECT.glob("*.py"))}
            import wandb

            settings = wandb.Settings(console="off", silent=True, init_timeout=WANDB_SECONDS,
                                      finish_timeout=WANDB_SECONDS)
            run = wandb.init(project=WANDB_PROJECT, group=group, job_type=job, name=f"{job}-{group}", dir=folder,
                             config={**config, "code": code}, mode=wandb_mode(), settings=settings)
            while (task := self.tasks.get()) is not None:
                task(wandb, run)
            run.finish()
        except Exception as error:
            self.failed = True
            self.warn(f"wandb is left out ({one_line(error)})")

    def log(self, entry):
        """Log the numbers of a dict with a "step"."""
        def task(wandb, run):
            run.log(entry, step=entry["step"])

        if not self.failed:
            self.tasks.put(task)

    def log_pictures(self, paths):
        """Log picture files and pages (.html), to be looked at and, as one artefact, to be fetched."""
        def panel(wandb, path):
            if path.suffix == ".html":
                return wandb.Html(path.read_text(encoding="utf-8"), inject=False)
            return wandb.Image(str(path))

        def task(wandb, run):
            # a page is of the name of its picture
            run.log({path.stem + "_page" * (path.suffix == ".html"): panel(wandb, path) for path in paths})
            artifact = wandb.Artifact(f"pictures-{run.group}", type="pictures")
            for path in paths:
                artifact.add_file(str(path))
            run.log_artifact(artifact)

        self.tasks.put(task)

    def finish(self):
        """Wait for what was logged, at most WANDB_SECONDS."""
        self.tasks.put(None)
        self.thread.join(WANDB_SECONDS)
        if self.thread.is_alive():
            self.warn(f"wandb did not end within {WANDB_SECONDS} s and is left behind")
