"""download_models.py and prepare_data.py: what is in the data, and what becomes of it when something goes wrong."""

import base64
import dataclasses
import errno
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

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

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
    print(name, call, os.WTERMSIG(status), *sorted(path.name for path in (root / "data").iterdir() if path.is_file() and path.name != ".lock"))
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
    fake = type("Tokenizer", (), {"backend_tokenizer": Backend(), "get_vocab": real.get_vocab,
                                  "__len__": lambda self: len(real)})()
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
