"""Turn 10,000 documents into windows of 128 tokens: train.bin and val.bin.

  reads   ROOT/data/tokenizer (download_models.py), and the documents:
            by default   OpenWebText, streamed from the hub: exactly 10,000 documents, never the whole set on disk
            --text       local files, at most 10,000 documents: .jsonl, .json and .parquet with a column "text"; .txt,
                         cut at line ends into documents of about 6,000 characters; plain or .gz, .xz, .zst
            --quick      prose that every Python carries: its own documentation and docstrings
  writes  ROOT/data/{train.bin, val.bin, meta.json}; where a run fails, what was there stays as it was
  next    add_memory.py

A document is <|endoftext|> and its tokens, cut off at 2,048. It becomes windows of 128 tokens that start 64 apart, the
last one padded with <|endoftext|>. With 4 and 2 for 128 and 64, and E for <|endoftext|>, the text "a b c d" becomes
  E a b c
  b c d E
A .bin is such rows, uint16, one after the other; a row that starts with E opens a document. Of each ten documents one,
drawn by a seed, goes into val.bin. One that repeats an earlier one is skipped, so that none is on both sides.
meta.json says what went in, what was skipped and why, and holds the hash of each .bin.

  python prepare_data.py
  python prepare_data.py --text corpus.jsonl.xz
  python prepare_data.py --quick
"""

import argparse
import ast
import fcntl
import glob
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import platform
import shlex
import shutil
import sysconfig
import tempfile
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from importlib.metadata import version
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow
from fsspec.compression import register_compression
from tqdm import tqdm

from models import (EOT, TOKENIZER_SHA256, StageError, characters_per_token, command, load_tokenizer, run_stage,
                    sha256, write_json)

PROJECT = Path(__file__).resolve().parent
DATASET = "Skylion007/openwebtext"
REVISIONS = ("79d93d786212f7344586290adb811d4ae6a1762c",    # parquet, 8,013,769 documents
             "refs/convert/parquet")                        # the hub's own copy, should that one go away
RETRIES = 6                 # when the stream breaks: after 1, 2, 4, ... 32 s
DOCUMENTS = 10_000          # documents kept; for one that is skipped the next one is taken
QUICK_DOCUMENTS = 300
WINDOW = 128                # tokens in a row
STRIDE = 64                 # tokens from one row's start to the next's
MAX_DOC_TOKENS = 2048       # tokens of a document with its <|endoftext|>; the rest of it is left out
VAL_FRACTION = 0.1          # of the documents
SPLIT_SEED = 1337
TXT_CHARACTERS = 6_000      # a .txt has no mark between documents; MAX_DOC_TOKENS hold about this much
MAX_DOC_BYTES = 128 * MAX_DOC_TOKENS    # no more can be kept of a document: GPT-2's longest token has 128 bytes
BATCH_BYTES = 2**18         # of text, tokenised by one thread at a time: bounds memory, whatever the documents

# what reading a damaged file raises, compressed or not
DAMAGED = (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error, pyarrow.ArrowException,
           datasets.exceptions.DatasetsError)
# .zst by way of pyarrow, which datasets brings: no package of its own
register_compression("zstd", lambda file, **_: pyarrow.CompressedInputStream(file, "zstd"), "zst", force=True)

# ------------------------------------------------------------------ reading: rows, {"text": ...} or why there is none


def one_line(error):
    """An error's message, short enough to be part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def unpacked(path):
    """A local file opened for reading bytes, decompressed on the way if its name says so."""
    return fsspec.open(str(path), "rb", compression="infer")


def text_lines(path):
    """The lines of a text file; None for a line that is not UTF-8: a bad line costs that line and no more.

    (The `datasets` readers for text and JSON give up on the whole file there.)
    """
    with unpacked(path) as file:
        for number, line in enumerate(io.BufferedReader(file, 1 << 20)):
            try:
                yield line.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError:
                yield None


def read_json(path):
    """Rows: one object a line; or, where a .json starts with "[", one list of them, which is read whole."""
    lines = text_lines(path)
    first = next(lines, "")
    if ".json" in path.name.lower() and (first or "").lstrip().startswith("["):
        try:
            rows = json.loads(first + "".join(lines))
        except (ValueError, TypeError, RecursionError):
            raise StageError(f"{path} starts like a list but is not valid JSON; mend it") from None
        yield from (row if isinstance(row, dict) else "not an object" for row in rows)
        return
    for line in itertools.chain([first], lines):
        if line is None:
            yield "not UTF-8"
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = "not valid JSON"
            yield row if isinstance(row, dict) or row == "not valid JSON" else "not an object"


def read_parquet(path):
    """Rows of a parquet file; a compressed one is unpacked aside first, since it is read from its end."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as aside:
        if path.suffix.lower() != ".parquet":
            with unpacked(path) as file:
                shutil.copyfileobj(file, aside)
            aside.flush()
            path = aside.name
        rows = datasets.load_dataset("parquet", data_files=[glob.escape(str(path))], split="train", streaming=True)
        yield from rows.select_columns("text") if "text" in rows.column_names else rows


def pack(lines):
    """Rows of whole lines, each of as many as it takes to reach TXT_CHARACTERS."""
    held, size = [], 0
    for line in lines:
        if line is None:
            yield "not UTF-8"
            continue
        held.append(line)
        size += len(line)
        if size >= TXT_CHARACTERS:
            yield {"text": "".join(held)}
            held, size = [], 0
    if held:
        yield {"text": "".join(held)}


READERS = {".jsonl": read_json, ".json": read_json, ".parquet": read_parquet,
           ".txt": lambda path: pack(text_lines(path))}


def reader_of(path):
    """The reader for a file's name; raises StageError for a name that has none and for a file that is not there."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = "".join(suffixes[-2:-1] if suffixes[-1:] in ([".gz"], [".xz"], [".zst"]) else suffixes[-1:])
    if kind not in READERS:
        raise StageError(f"{path}: documents are read from {', '.join(READERS)}, plain or .gz, .xz, .zst")
    if not path.is_file():
        raise StageError(f"{path} is not a file; give --text the path of one that is there")
    return READERS[kind]


def read_files(paths):
    """The rows of local files, one file after the other; raises StageError for a damaged one or one without "text"."""
    for path in paths:
        with_text, columns = False, None
        try:
            for row in reader_of(path)(path):
                if isinstance(row, dict):
                    with_text |= "text" in row
                    columns = columns or sorted(row)[:20]
                yield row
        except DAMAGED as error:
            raise StageError(f"{path} cannot be read ({one_line(error)}); mend it or get it again") from None
        if columns and not with_text:
            raise StageError(f'{path} has no column "text"; its columns are: {", ".join(columns)}; rename one of them')


def read_python_documentation():
    """Rows: the topics of Python's help() and the standard library's module docstrings, its files read, not imported.

    The topics quote one another: a paragraph that came before is left out, so that val does not repeat train.
    """
    seen = set()

    def new(text):
        paragraphs = [part for part in text.split("\n\n") if part.strip() not in seen]
        seen.update(part.strip() for part in paragraphs)
        return "\n\n".join(paragraphs)

    try:
        from pydoc_data.topics import topics
    except ImportError:                                     # some minimal Pythons lack it
        topics = {}
    for name in sorted(topics):
        yield from pack(new(topics[name]).splitlines(keepends=True))    # many are longer than a document can be
    library = Path(sysconfig.get_path("stdlib"))
    for parts in sorted(path.relative_to(library).parts for path in library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"}.isdisjoint(parts):
            try:
                docstring = ast.get_docstring(ast.parse(library.joinpath(*parts).read_bytes()))
            except (SyntaxError, ValueError):               # a few files are wrong on purpose
                continue
            if text := new(docstring or ""):
                yield {"text": text}


def open_hub():
    """OpenWebText as a stream, and its revision; raises StageError naming the ways to do without the hub."""
    print(f"waiting for the hub: {DATASET} (half a minute if there is no network) ...", flush=True)
    for revision in REVISIONS:
        try:
            return datasets.load_dataset(DATASET, split="train", streaming=True, revision=revision), revision
        except Exception as error:                          # datasets and the hub raise a dozen unrelated classes
            failure = error
            if isinstance(error, ConnectionError):          # no network is no network, whatever the revision
                break
    raise StageError(f"{DATASET} is out of reach ({one_line(failure)}); try again later, or without a network: "
                     "python prepare_data.py --text FILE, or python prepare_data.py --quick")


def resuming(rows):
    """The rows of a streamed data set; where the stream breaks, on from exactly there after 1, 2, 4, ... s.

    Raises StageError after more than RETRIES breaks without a row in between.
    """
    breaks = 0
    while True:
        try:
            for row in rows:
                breaks = 0
                yield row
            return
        except Exception as error:                          # httpx, aiohttp, ssl, pyarrow: no class in common
            if breaks == RETRIES:
                raise StageError(f"the stream broke {breaks + 1} times in a row ({one_line(error)}); run "
                                 "prepare_data.py again later, or with --text FILE") from None
            tqdm.write(f"the stream broke ({one_line(error)}); going on from there in {2 ** breaks} s")
            rows.load_state_dict(rows.state_dict())
            time.sleep(2 ** breaks)
            breaks += 1


def open_source(text, quick):
    """(rows, what people call the source, what tells it from any other); raises StageError where it is not there."""
    if text:
        for path in text:
            reader_of(path)
        files = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in text]
        return read_files(text), "local files: " + ", ".join(path.name for path in text), files
    if quick:
        return read_python_documentation(), (f"the documentation inside Python {platform.python_version()}: "
                                             "pydoc_data.topics and the standard library's module docstrings"), []
    rows, revision = open_hub()
    return resuming(rows), f"OpenWebText, streamed from {DATASET}", [{"name": DATASET, "revision": revision}]

# ------------------------------------------------------------------ tokenising, cutting, writing


def document(row):
    """One row as (its text's UTF-8, None), or as (None, the reason why it has no text to use)."""
    if not isinstance(row, dict):
        return None, row
    text = row.get("text")
    if not isinstance(text, str):
        return None, "text is missing" if text is None else "text is not a string"
    try:
        data = text[:MAX_DOC_BYTES].encode()[:MAX_DOC_BYTES]
    except UnicodeEncodeError:                              # half a surrogate pair, by way of a JSON escape
        return None, "not UTF-8"
    return (data, None) if data else (None, "text is empty")


def batches(rows):
    """Lists of documents, each of about BATCH_BYTES: few enough for memory, enough to keep a core busy."""
    batch, size = [], 0
    for data, reason in map(document, rows):
        batch.append((data, reason))
        size += len(data or ".")
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(rows, tokenizer):
    """For each row in order: (its ids with the leading <|endoftext|>, (n,) int32; None), or (None, a reason).

    n is at most MAX_DOC_TOKENS + 1: that one token more than is kept says that the document goes on.
    The library lets go of Python's lock while it works. So one thread a core does what its own pool would, and the rest
    (reading ahead, cutting, writing) goes on beside it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True                    # a literal <|endoftext|> is text: "<", "|", "end", ...

    def encode(batch):
        texts = [data.decode(errors="ignore") for data, _ in batch if data]     # the cut may be inside a character
        encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        return [(np.array([EOT, *next(encodings).ids[:MAX_DOC_TOKENS]], np.int32) if data else None, reason)
                for data, reason in batch]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pending = deque()
    with ThreadPoolExecutor(cores) as pool:
        for batch in batches(rows):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * cores:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def windows_of(ids):
    """Cut one document, (n,) ids of which the first is <|endoftext|>, into rows: (windows, WINDOW) uint16.

    Each row after the first brings at least one new token; the last one is padded.
    """
    count = 1 + max(0, -(-(len(ids) - WINDOW) // STRIDE))   # rounded up
    padded = np.full((count - 1) * STRIDE + WINDOW, EOT, np.uint16)
    padded[:len(ids)] = ids
    return np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STRIDE]


def split_names():
    """An endless "train" or "val" for document after document: of each ten one is val, at a place the seed draws.

    In the first ten it is one of the first two: two documents are enough for two splits.
    """
    rng, block = np.random.default_rng(SPLIT_SEED), round(1 / VAL_FRACTION)
    for places in itertools.chain([2], itertools.repeat(block)):
        chosen = rng.integers(places)
        yield from ("val" if place == chosen else "train" for place in range(block))


class SplitWriter:
    """One .bin on its way: written aside, hashed and counted as it grows; gone with the stack unless it is renamed."""

    def __init__(self, path, stack):
        self.path, self.aside = path, path.with_name(f".{path.name}.tmp")
        self.file = stack.enter_context(open(self.aside, "ab"))
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"another prepare_data.py is writing {path}; let it end first") from None
        stack.callback(self.aside.unlink, missing_ok=True)
        self.file.truncate(0)                               # what a killed run left
        self.hash, self.counts = hashlib.sha256(), Counter()

    def write(self, ids, characters):
        """Append one document: (n,) ids, and what each of the vocabulary's tokens counts for in characters."""
        rows = windows_of(ids)
        self.file.write(rows.tobytes())
        self.hash.update(rows.tobytes())
        # the leading <|endoftext|> is no token of the text, nor does it count for characters
        self.counts.update(documents=1, windows=len(rows), tokens=len(ids) - 1,
                           characters=int(characters[ids].sum()), bytes=rows.nbytes)

    def finish(self):
        """Bring it all to the disk; returns what meta.json says of this split."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {**self.counts, "sha256": self.hash.hexdigest()}


def prepare(root, text, quick, name=None):
    """Write ROOT/data/{train.bin, val.bin, meta.json} and return meta; where it raises, they are what they were."""
    folder, limit = root / "data", QUICK_DOCUMENTS if quick else DOCUMENTS
    tokenizer = load_tokenizer(root, quick)
    characters = characters_per_token(tokenizer)
    skipped, seen, truncated, names = Counter(), set(), 0, split_names()
    with ExitStack() as stack:
        writers = {split: SplitWriter(folder / f"{split}.bin", stack) for split in ("train", "val")}
        rows, source, fingerprint = open_source(text, quick)
        source = name or source
        print(f"source: {source}", flush=True)
        bar = stack.enter_context(tqdm(total=limit, unit=" documents", disable=None, mininterval=0.5))
        for ids, reason in stack.enter_context(closing(tokenized(rows, tokenizer))):
            if reason:
                skipped[reason] += 1
                continue
            if ids.max() > EOT:
                raise StageError(f"the tokenizer gave token {ids.max()}, GPT-2's vocabulary ends at {EOT}; get GPT-2's "
                                 f"with: {command('download_models.py', root, quick)}")
            goes_on, ids = len(ids) > MAX_DOC_TOKENS, ids[:MAX_DOC_TOKENS]
            digest = hashlib.sha256(ids).digest()
            if digest in seen:
                skipped["repeats an earlier document"] += 1
                continue
            seen.add(digest)
            writers[next(names)].write(ids, characters)
            truncated += goes_on
            bar.update()
            if len(seen) == limit:
                break
        if len(seen) < 2:
            raise StageError(f"documents with text: {len(seen)}, and 2 are the least; skipped: {listed(skipped)}; give "
                             "other ones with --text FILE")
        meta = {
            "format": 1, "source": source, "fingerprint": fingerprint, "quick": quick,
            "versions": {name: version(name) for name in ("datasets", "numpy", "tokenizers", "transformers")},
            "tokenizer_sha256": TOKENIZER_SHA256, "vocab_size": EOT + 1,
            "window": WINDOW, "stride": STRIDE, "max_doc_tokens": MAX_DOC_TOKENS,
            "split_seed": SPLIT_SEED, "val_fraction": VAL_FRACTION,
            "documents": {"read": len(seen) + sum(skipped.values()), "kept": len(seen), "skipped": dict(skipped)},
            "truncated": truncated,
            "splits": {split: writer.finish() for split, writer in writers.items()},
        }
        meta["sha256"] = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        # without meta.json no stage takes a .bin: it goes first and comes last, and never stands beside other ones
        (folder / "meta.json").unlink(missing_ok=True)
        for writer in writers.values():
            os.replace(writer.aside, writer.path)
        write_json(folder / "meta.json", meta)
    return meta


def listed(skipped):
    """Reasons and their counts, in words."""
    return "; ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "none"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, metavar="DIR",
                        help="the folder that holds data/ (default: the project folder; with --quick its quick/)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="local documents instead of OpenWebText")
    parser.add_argument("--name", metavar="TEXT", help="what to call these documents in results (default: their files)")
    parser.add_argument("--quick", action="store_true",
                        help=f"at most {QUICK_DOCUMENTS:,} documents; without --text, Python's own documentation")
    flags = parser.parse_args(argv)
    # what these libraries have to say of a network or a file, a StageError says in one line
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    root, start = flags.root or (PROJECT / "quick" if flags.quick else PROJECT), time.monotonic()

    meta = prepare(root, flags.text, flags.quick, flags.name)
    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['windows']:,} windows, "
              f"{counts['tokens']:,} tokens, {counts['characters']:,} characters")
    read, kept, skipped = meta["documents"].values()
    if kept < DOCUMENTS and not flags.quick:
        print(f"warning: {kept:,} documents where {DOCUMENTS:,} are asked for; going on with them")
    print(f"{read:,} documents read, {kept:,} kept ({meta['truncated']:,} of them cut off at "
          f"{MAX_DOC_TOKENS:,} tokens); skipped: {listed(skipped)}; {time.monotonic() - start:.1f} s")
    print("next: python add_memory.py" + (f" --root {shlex.quote(str(root))}" if root != PROJECT else "")
          + " --quick" * flags.quick)


if __name__ == "__main__":
    run_stage(main)
