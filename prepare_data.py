"""Turn 10,000 documents into windows of 128 tokens: train.bin and val.bin.

  reads   ROOT/data/tokenizer (download_models.py), and the documents:
            by default   OpenWebText, streamed from the hub: exactly 10,000
                         documents, never the whole set on disk
            --text       local files, at most 10,000 documents: .jsonl, .json
                         and .parquet with a column "text"; .txt, cut at line
                         ends into documents of about 6,000 characters; plain
                         or .gz, .xz, .zst; UTF-8, or UTF-16 and UTF-32 that
                         begin with their mark
            --quick      prose that every Python carries: its own
                         documentation and docstrings
  writes  ROOT/data/{train.bin, val.bin, meta.json}; where a run fails, what
          was there stays as it was
  next    add_memory.py

A document is <|endoftext|> and its tokens, cut off at 2,048. It becomes
windows of 128 tokens that start 64 apart, the last one padded with
<|endoftext|>. With 4 and 2 for 128 and 64, and E for <|endoftext|>, the text
"a b c d" becomes
  E a b c
  b c d E
A .bin is such rows, uint16, one after the other; a row that starts with E
opens a document. Of each ten documents one, drawn by a seed, goes into
val.bin. One that repeats an earlier one is skipped, so that none is on both
sides; so is one that is full of NULs or has no letter in it. meta.json says
what went in, what was skipped and why, and holds the hash of each .bin.

  python prepare_data.py
  python prepare_data.py --text corpus.jsonl.xz
  python prepare_data.py --quick
  python prepare_data.py --tokenizer MODEL    with the tokenizer of another
                                      model (add_memory.py --to MODEL), a
                                      folder or a name on the hub, which goes
                                      into data/tokenizer; its BOS stands for
                                      <|endoftext|>; uint32 where it has more
                                      than 65,536 tokens
  python prepare_data.py --planted    data/planted.bin beside the others: text
                                      that asks for facts planted in it
  python prepare_data.py --text FILE --into NAME      data/NAME.bin and
                                      NAME.json beside the others, not split:
                                      for eval.py --on NAME
"""

import ast
import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import platform
import re
import shlex
import sysconfig
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from stages import (
    TOKENIZER_SHA256, StageError, characters_per_token, command,
    default_root, documents, encoded, load_split, load_tokenizer, lock,
    one_line, own_name, parser_of, read_json, read_meta, run_stage, seal,
    settled, sha256, spaced_words, write_atomic, write_json, write_manifest,
)


@dataclass(frozen=True)
class Settings:
    """What is kept of the documents, and how it is cut."""

    documents: int = 10_000         # kept; for a skipped one the next is taken
    window: int = 128               # tokens in a row
    stride: int = 64                # tokens from one row's start to the next's
    max_doc_tokens: int = 2_048     # with <|endoftext|>; what is over is left out
    val_fraction: float = 0.1       # of the documents
    split_seed: int = 1337          # draws them
    txt_characters: int = 6_000     # a .txt is cut into documents of about so many

    # What eval.py's farthest questions need: their distance of 1,024 tokens,
    # 64 before it and <|endoftext|>; and enough of such documents in val, else
    # the same few texts are asked about again and again.
    asked_tokens: int = 1_089
    asked_documents: int = 5

    # --planted: as many as fill a quarter of 10,000 steps, each a lane of rows
    planted_documents: int = 2_500
    planted_tokens: int = 1_024


FULL = Settings()
QUICK = Settings(documents=300, asked_tokens=321,   # a distance of 256 tokens
                 planted_documents=50, planted_tokens=256)

DATASET = "Skylion007/openwebtext"
REVISIONS = (
    "79d93d786212f7344586290adb811d4ae6a1762c",     # parquet, 8,013,769 documents
    "refs/convert/parquet",         # the hub's own copy, should that one go away
)
RETRIES = 6             # when the stream breaks: after 1, 2, 4, ... 32 s
TOKEN_BYTES = 128       # GPT-2's longest token: more of a document is never kept
BATCH_BYTES = 2**18     # of text for one thread at a time: bounds memory
HEAD_BYTES = 2**12      # of a file, by which its encoding is known
FOREIGN = 0.1           # a text with a larger share of NULs is none, nor is a
                        # file with a larger share of lines that are not UTF-8

# How a file may begin, and its encoding. UTF-32's mark begins with UTF-16's.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


# ------------------------------------------------------------ local files, as bytes and lines

def unpacked(path):
    """A local file opened for reading bytes, decompressed on the way if its name says so."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        file = gzip.open(path)
    elif suffix == ".xz":
        file = lzma.open(path)
    elif suffix == ".zst":
        from pyarrow import CompressedInputStream       # Python has none before 3.14

        file = CompressedInputStream(open(path, "rb"), "zstd")
    else:
        file = open(path, "rb", buffering=0)
    return io.BufferedReader(file, 1 << 20)


def encoding_of(path):
    """The encoding that a text file's first bytes tell.

    Raises StageError where they are full of NULs.
    """
    with unpacked(path) as file:
        head = file.read(HEAD_BYTES)
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    if head.count(0) > FOREIGN * len(head):
        raise StageError(
            f"{path} is full of NULs, so it is no UTF-8 text; if it is UTF-16 without its mark, convert it: "
            f"iconv -f UTF-16LE -t UTF-8 OLD >NEW, and give NEW with --text")
    return "utf-8"


def text_lines(path):
    """The lines of a text file; None for one that is not UTF-8.

    So a bad line costs that line and no more. UTF-16 and UTF-32 are decoded
    by their mark; half a surrogate pair in them is for `document` to find.
    """
    encoding = encoding_of(path)
    with unpacked(path) as file:
        if encoding != "utf-8":
            yield from io.TextIOWrapper(file, encoding, "surrogatepass", "\n")
            return
        for number, line in enumerate(file):
            try:
                yield line.decode("utf-8" if number else "utf-8-sig")
            except UnicodeDecodeError:
                yield None


# ------------------------------------------------------------ rows: {"text": ...} or a reason

def rows_of_json(path, settings):
    """Rows: one object a line, or one list of them in a .json, read whole."""
    lines = text_lines(path)
    first = next(lines, "")
    if ".json" in path.name.lower() and (first or "").lstrip().startswith("["):
        try:
            rows = json.loads(first + "".join(lines))
        except (ValueError, TypeError, RecursionError):
            raise StageError(f"{path} starts like a list but is not valid JSON; mend it") from None
        for row in rows:
            yield row if isinstance(row, dict) else "not an object"
        return
    for line in itertools.chain([first], lines):
        if line is None:
            yield "not UTF-8"
        elif line.strip():
            yield row_of_line(line)


def row_of_line(line):
    """The object that a line of JSON holds, or why there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "not valid JSON"
    return row if isinstance(row, dict) else "not an object"


def copy(source, target):
    """Copy an open file into a temporary one; an error in writing names that."""
    while block := source.read(1 << 20):
        try:
            target.write(block)
            target.flush()
        except OSError as error:
            error.filename = tempfile.gettempdir()
            raise
    target.seek(0)


def rows_of_parquet(path, settings):
    """Rows of a parquet file; a compressed one is unpacked aside first.

    Only the column "text" is read: others may be of types not known here.
    """
    from pyarrow.parquet import ParquetFile

    with contextlib.ExitStack() as stack:
        if path.suffix.lower() == ".parquet":
            file = stack.enter_context(open(path, "rb"))
        else:
            file = stack.enter_context(tempfile.TemporaryFile())
            with unpacked(path) as packed:
                copy(packed, file)
        table = ParquetFile(file)
        names = table.schema_arrow.names
        if "text" not in names:
            raise without_text(path, names)
        for batch in table.iter_batches(columns=["text"], batch_size=1_000):
            for value in batch.column("text"):
                try:
                    yield {"text": value.as_py()}
                except UnicodeDecodeError:
                    yield "not UTF-8"


def rows_of_txt(path, settings):
    """Rows of whole lines."""
    lines = mostly_utf8(text_lines(path), path)
    yield from pack(lines, settings.txt_characters)


def mostly_utf8(lines, path):
    """The same lines; raises StageError where more than FOREIGN are None.

    The lines that are left of such a file would be a text with holes. It is
    looked at every thousand lines, since not every file is read to its end.
    """
    number = 0
    foreign = 0

    def check():
        if foreign > FOREIGN * number:
            raise StageError(
                f"{path} is not UTF-8: {foreign:,} of its first {number:,} lines are something else; convert it: "
                f"iconv -f LATIN1 -t UTF-8 OLD >NEW, and give NEW with --text")

    for number, line in enumerate(lines, 1):
        foreign += line is None
        if number % 1_000 == 0:
            check()
        yield line
    check()


def pack(lines, characters):
    """Rows of whole lines, each of as many as it takes to reach `characters`."""
    held = []
    size = 0
    for line in lines:
        if line is None:
            yield "not UTF-8"
            continue
        start = 0
        while start < len(line):
            end = end_of_part(line, start, characters, characters - size)
            held.append(line[start:end])
            size += end - start
            start = end
            if size >= characters:
                yield {"text": "".join(held)}
                held = []
                size = 0
    if held:
        yield {"text": "".join(held)}


def end_of_part(line, start, characters, room):
    """Where to cut a line: at its end; where more than a document is left, at a space.

    A text without line ends is one line, and is not to be one document.
    """
    if len(line) - start <= characters:
        return len(line)
    full = start + room
    space = line.find(" ", full - 1, full + 100)
    return full if space < 0 else space + 1


READERS = {
    ".jsonl": rows_of_json,
    ".json": rows_of_json,
    ".parquet": rows_of_parquet,
    ".txt": rows_of_txt,
}


def reader_of(path):
    """The reader for a file's name.

    Raises StageError for a name that has none, and where there is no file.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".xz", ".zst"):
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        kinds = ", ".join(READERS)
        raise StageError(f"{path}: documents are read from {kinds}, plain or .gz, .xz, .zst")
    if not path.is_file():
        raise StageError(f"{path} is not a file; give --text the path of one that is there")
    return READERS[kind]


def without_text(path, columns):
    """The StageError for a file that has other columns."""
    listing = ", ".join(sorted(columns)[:20])
    return StageError(
        f'{path} has no column "text"; its columns are: {listing}; rename one of them')


@contextlib.contextmanager
def blaming(path):
    """Whatever reading a damaged file raises becomes a StageError naming it.

    Decompressors, decoders and pyarrow have no class of errors in common.
    What the system says (errno: a full disk, a missing right), too little
    memory or a missing package are not the file's fault, and are not put so.
    """
    try:
        yield
    except (StageError, MemoryError):
        raise
    except ImportError as error:
        reason = f"{one_line(error)}; install requirements.txt, then run prepare_data.py again"
        raise StageError(reason) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)
            raise
        reason = f"{path} cannot be read ({one_line(error)}); mend it or get it again"
        raise StageError(reason) from None


def read_files(paths, settings):
    """The rows of local files, one file after the other.

    Raises StageError for a damaged one, and for one that has no "text".
    """
    for path in paths:
        columns = []
        with_text = False
        with blaming(path):
            for row in reader_of(path)(path, settings):
                if isinstance(row, dict):
                    with_text = with_text or "text" in row
                    columns = columns or list(row)
                yield row
        if columns and not with_text:
            raise without_text(path, columns)


# ------------------------------------------------------------ rows: Python's documentation

def read_python_documentation(settings):
    """Rows: the topics of Python's help() and its modules' docstrings.

    The topics quote one another: a paragraph that came before is left out, so
    that val does not repeat train.
    """
    seen = set()

    def new(text):
        paragraphs = [part for part in text.split("\n\n") if part.strip() not in seen]
        seen.update(part.strip() for part in paragraphs)
        return "\n\n".join(paragraphs)

    try:
        from pydoc_data.topics import topics
    except ImportError:                                 # some minimal Pythons lack it
        topics = {}
    for name in sorted(topics):                         # many are too long for one document
        lines = new(topics[name]).splitlines(keepends=True)
        yield from pack(lines, settings.txt_characters)
    for docstring in module_docstrings(Path(sysconfig.get_path("stdlib"))):
        text = new(docstring)
        if text:
            yield {"text": text}


def module_docstrings(library):
    """The docstrings of the modules in a folder, read and never imported.

    They come in the order of their paths; tests and what was installed are
    left out.
    """
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    for parts in sorted(path.relative_to(library).parts for path in library.rglob("*.py")):
        if not left_out.isdisjoint(parts):
            continue
        code = library.joinpath(*parts).read_bytes()
        try:
            docstring = ast.get_docstring(ast.parse(code))
        except (SyntaxError, ValueError):               # a few files are wrong on purpose
            continue
        yield docstring or ""


# ------------------------------------------------------------ rows: the hub

def check_caches():
    """Raise StageError where the hub's client cannot write its own folders.

    By itself it would say that the hub is out of reach.
    """
    from datasets import config
    from huggingface_hub import constants

    for folder in (constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE):
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise StageError(
                f"the hub's client keeps files in {folder}, which cannot be written ({error.strerror}); set HF_HOME to "
                f"a folder of yours, or do without the hub: python prepare_data.py --text FILE") from None


def open_hub():
    """OpenWebText as a stream, and its revision.

    Raises StageError naming the ways to do without the hub.
    """
    print(f"waiting for the hub: {DATASET} (half a minute if there is no network) ...", flush=True)
    for revision in REVISIONS:
        try:
            from datasets import load_dataset           # even this may raise, for a proxy

            # what they have to say of a network, a StageError says in one line;
            # set before they are imported, they would set it back
            for library in ("datasets", "huggingface_hub"):
                logging.getLogger(library).setLevel(logging.CRITICAL)
            check_caches()
            rows = load_dataset(DATASET, split="train", streaming=True, revision=revision)
            return rows, revision
        except StageError:
            raise
        except Exception as error:                      # a dozen unrelated classes
            failure = one_line(error)
            if isinstance(error, ConnectionError):      # whatever the revision
                break
    raise StageError(
        f"{DATASET} is out of reach ({failure}); try again later, or without a network: "
        "python prepare_data.py --text FILE, or python prepare_data.py --quick")


def resuming(rows):
    """The rows of a streamed data set; where it breaks, on from exactly there.

    That is tried after 1, 2, 4, ... s. Raises StageError after more than
    RETRIES breaks without a row in between.
    """
    breaks = 0
    while True:
        try:
            for row in rows:
                breaks = 0
                yield row
            return
        except Exception as error:                      # httpx, aiohttp, ssl, pyarrow
            if getattr(error, "filename", None):        # of this machine: waiting is no help
                raise
            reason = one_line(error)
            if breaks == RETRIES:
                raise StageError(
                    f"the stream broke {breaks + 1} times in a row ({reason}); "
                    "run prepare_data.py again later, or with --text FILE") from None
            seconds = 2 ** breaks
            tqdm.write(f"the stream broke ({reason}); going on from there in {seconds} s")
            rows.load_state_dict(rows.state_dict())
            time.sleep(seconds)
            breaks += 1


# ------------------------------------------------------------ where rows come from

def printable(name):
    """A name with an escape for what cannot be printed, or is not UTF-8.

    It goes into model cards, pictures and tables, which take less than a disk.
    """
    letters = []
    for letter in name:
        if not letter.isprintable():
            letter = letter.encode("unicode_escape").decode()
        letters.append(letter)
    return "".join(letters)


def facts_of(path):
    """What tells a local file from any other."""
    return {
        "name": printable(path.name),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }


def open_source(text, quick, settings):
    """(rows, what people call the source, what tells it from any other).

    Raises StageError where it is not there.
    """
    if text:
        for path in text:
            reader_of(path)
        files = [facts_of(path) for path in text]
        source = "local files: " + ", ".join(file["name"] for file in files)
        return read_files(text, settings), source, files
    if quick:
        source = (f"the documentation inside Python {platform.python_version()}: "
                  "pydoc_data.topics and the standard library's module docstrings")
        return read_python_documentation(settings), source, []
    rows, revision = open_hub()
    source = f"OpenWebText, streamed from {DATASET}"
    return resuming(rows), source, [{"name": DATASET, "revision": revision}]


# ------------------------------------------------------------ tokenising and cutting

def document(row, most):
    """One row as (at most `most` bytes of its text's UTF-8, None).

    Or as (None, the reason why it has no text to use).
    """
    if not isinstance(row, dict):
        return None, row
    text = row.get("text")
    if text is None:
        return None, "text is missing"
    if not isinstance(text, str):
        return None, "text is not a string"
    text = text[:most]
    try:
        data = text.encode()[:most]
    except UnicodeEncodeError:                          # half a surrogate pair
        return None, "not UTF-8"
    if not data:
        return None, "text is empty"
    if text.count("\0") > FOREIGN * len(text):          # UTF-16, or a hole in a file
        return None, "full of NULs"
    if not any(map(str.isalpha, text)):
        return None, "without letters"
    return data, None


def batches(rows, most):
    """Lists of documents, each of about BATCH_BYTES.

    Few enough for memory, enough to keep a core busy.
    """
    batch = []
    size = 0
    for row in rows:
        data, reason = document(row, most)
        batch.append((data, reason))
        size += len(data) if data else 1
        if size >= BATCH_BYTES:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def encode(batch, backend, most, eot):
    """What `tokenized` gives for each document, as a list for a batch of them."""
    # the cut at so many bytes may be inside a character
    texts = [data.decode(errors="ignore") for data, _ in batch if data]
    encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
    found = []
    for data, reason in batch:
        ids = np.array([eot, *next(encodings).ids[:most]], np.int32) if data else None
        found.append((ids, reason))
    return found


def tokenized(rows, tokenizer, settings):
    """For each row in order (its ids with the leading <|endoftext|>, None).

    Or (None, the reason why there are none). ids: (n,) int32, n at most
    max_doc_tokens + 1: the one more than is kept says that there is more.

    The library lets go of Python's lock while it works. So one thread a core
    does what its own pool would, and the rest (reading ahead, cutting,
    writing) goes on beside it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    most = settings.max_doc_tokens
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True    # a literal <|endoftext|> is text: "<", "|", ...
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):    # not on macOS
        cores = len(os.sched_getaffinity(0))
    pending = deque()
    with ThreadPoolExecutor(cores) as pool:
        for batch in batches(rows, TOKEN_BYTES * most):
            pending.append(pool.submit(encode, batch, backend, most, tokenizer.pad_token_id))
            if len(pending) > 2 * cores:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def type_of_rows(tokenizer):
    """The type of a .bin: uint16, where it holds every token."""
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)


def windows_of(ids, window, stride, dtype=np.uint16):
    """Cut one document, (n,) ids, into rows: (windows, window) of dtype.

    The first id is <|endoftext|>, or what stands for it. Each row after the first brings at least
    one new token; the last one is padded.
    """
    count = 1 + max(0, -(-(len(ids) - window) // stride))   # rounded up
    padded = np.full((count - 1) * stride + window, ids[0], dtype)
    padded[:len(ids)] = ids
    return np.lib.stride_tricks.sliding_window_view(padded, window)[::stride]


def split_names(settings):
    """An endless "train" or "val" for document after document.

    Of each ten one is val, at a place the seed draws. In the first ten it is
    one of the first two: two documents are enough for two splits.
    """
    rng = np.random.default_rng(settings.split_seed)
    block = round(1 / settings.val_fraction)
    for places in itertools.chain([2], itertools.repeat(block)):
        chosen = rng.integers(places)
        for place in range(block):
            yield "val" if place == chosen else "train"


# ------------------------------------------------------------ writing

class SplitWriter:
    """One .bin on its way: written aside, hashed and counted as it grows.

    It is gone with the stack unless it is renamed.
    """

    def __init__(self, path, settings, stack, dtype):
        self.path = path
        self.dtype = dtype
        self.aside = path.with_name(f".{path.name}.tmp")
        self.settings = settings
        self.file = stack.enter_context(open(self.aside, "wb"))
        stack.callback(self.aside.unlink, missing_ok=True)
        self.hash = hashlib.sha256()
        self.counts = Counter()

    def write(self, ids, characters):
        """Append one document, (n,) ids; `characters` has each token's count."""
        rows = windows_of(ids, self.settings.window, self.settings.stride, self.dtype)
        data = rows.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.counts.update(
            documents=1,
            windows=len(rows),
            tokens=len(ids) - 1,            # <|endoftext|> is no token of the text
            characters=int(characters[ids].sum()),
            bytes=len(data),
        )

    def finish(self):
        """Bring it all to the disk; returns what meta.json says of this split."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {**self.counts, "sha256": self.hash.hexdigest()}


class Kept:
    """What became of the rows: kept, told apart by hash; cut off; skipped, by reason.

    known: hashes of documents that are not to be kept either.
    """

    def __init__(self, known=()):
        self.known = known
        self.seen = set()
        self.truncated = 0
        self.skipped = Counter()

    def take(self, ids, reason, most):
        """The first `most` ids of a document that is kept; None for one that is not."""
        if reason:
            self.skipped[reason] += 1
            return None
        short = ids[:most]
        digest = hashlib.sha256(short).digest()
        if digest in self.known:
            self.skipped["stands in train.bin"] += 1
            return None
        if digest in self.seen:
            self.skipped["repeats an earlier document"] += 1
            return None
        self.seen.add(digest)
        self.truncated += len(ids) > most
        return short


def listed(skipped):
    """Reasons and their counts, in words."""
    words = [f"{count:,} {reason}" for reason, count in skipped.items()]
    return "; ".join(words) or "none"


def write_splits(rows, writers, tokenizer, settings, least=2, known=()):
    """Write each document into its split until there are enough.

    writers: {split: SplitWriter}; where there is one, all goes into it.
    Returns what became of the rows; raises StageError where fewer than
    `least` documents are kept.
    """
    characters = characters_per_token(tokenizer)
    names = split_names(settings) if len(writers) > 1 else itertools.repeat(*writers)
    kept = Kept(known)
    bar = tqdm(total=settings.documents, unit=" documents", disable=None, mininterval=0.5)
    with bar, contextlib.closing(tokenized(rows, tokenizer, settings)) as found:
        for ids, reason in found:
            ids = kept.take(ids, reason, settings.max_doc_tokens)
            if ids is None:
                continue
            if ids.max() >= len(tokenizer):
                raise StageError(
                    f"the tokenizer gave token {ids.max()}, its vocabulary ends at {len(tokenizer) - 1}; get GPT-2's "
                    "with python download_models.py, then run prepare_data.py again")
            writers[next(names)].write(ids, characters)
            bar.update()
            if len(kept.seen) == settings.documents:
                break
    if len(kept.seen) < least:
        raise StageError(
            f"documents with text: {len(kept.seen)}, and {least} are the least; skipped: {listed(kept.skipped)}; "
            "give other ones with --text FILE")
    return kept


def meta_of(source, fingerprint, quick, settings, kept, splits, tokenizer, hashes):
    """What meta.json says; `hashes` of the tokenizer's files."""
    count = len(kept.seen)
    read = count + sum(kept.skipped.values())
    libraries = ("datasets", "numpy", "tokenizers", "transformers")
    meta = {
        "format": 1,
        "source": source,
        "fingerprint": fingerprint,
        "quick": quick,
        "versions": {name: version(name) for name in libraries},
        "tokenizer_sha256": hashes,
        "vocab_size": len(tokenizer),
        "window": settings.window,
        "stride": settings.stride,
        "max_doc_tokens": settings.max_doc_tokens,
        "split_seed": settings.split_seed,
        "val_fraction": settings.val_fraction,
        "documents": {"read": read, "kept": count, "skipped": dict(kept.skipped)},
        "truncated": kept.truncated,
        "splits": splits,
    }
    if hashes != TOKENIZER_SHA256:
        meta |= {"eot": tokenizer.pad_token_id, "dtype": type_of_rows(tokenizer).name}
    return {**meta, "sha256": seal(meta)}


def fetch_tokenizer(model, root, quick):
    """Put the tokenizer of a model, a folder or a name on the hub, into ROOT/data/tokenizer.

    Raises StageError where it cannot be had or used, or another one is there.
    """
    from transformers import AutoTokenizer

    again = command("prepare_data.py --tokenizer MODEL", root, quick)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:                          # a dozen unrelated classes
        raise StageError(f"{model} has no tokenizer that transformers could load ({one_line(error)}); give a folder "
                         f"or a name on the hub: {again}") from None
    folder = root / "data" / "tokenizer"
    there = folder.exists() and any(folder.iterdir())
    if there and not (folder / "manifest.json").exists():
        raise StageError(f"{folder} holds the tokenizer of this project's own models; keep another one's data apart: "
                         + command(f"prepare_data.py --tokenizer {shlex.quote(model)}", "DIR", quick))
    tokenizer = settled(tokenizer, model, again)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    tokenizer.save_pretrained(folder)
    write_manifest(folder, model=str(model))


@contextlib.contextmanager
def tokenizer_of(model, root, quick):
    """ROOT/data/tokenizer is that of `model`; what was there comes back where the preparation with
    it fails. None: it stays.
    """
    folder = root / "data" / "tokenizer"
    before = {path: path.read_bytes() for path in folder.glob("*")} if model else {}
    try:
        if model:
            fetch_tokenizer(model, root, quick)
        yield
    except BaseException:
        if before:
            for path in folder.glob("*"):
                path.unlink()
        for path, content in before.items():
            path.write_bytes(content)
        raise


def prepare(root, text, quick, name=None):
    """Write ROOT/data/{train.bin, val.bin, meta.json} and return meta.

    Where it raises, they are what they were.
    """
    settings = QUICK if quick else FULL
    folder = root / "data"
    tokenizer = load_tokenizer(root, quick)
    with contextlib.ExitStack() as stack:
        lock_file = stack.enter_context(open(folder / ".lock", "w"))
        lock(lock_file, f"another prepare_data.py is writing into {folder}; let it end first")
        writers = {}
        for split in ("train", "val"):
            writers[split] = SplitWriter(folder / f"{split}.bin", settings, stack, type_of_rows(tokenizer))
        rows, source, fingerprint = open_source(text, quick, settings)
        source = printable(name or source)
        print(f"source: {source}", flush=True)
        kept = write_splits(rows, writers, tokenizer, settings)
        splits = {split: writer.finish() for split, writer in writers.items()}
        own, hashes = folder / "tokenizer" / "manifest.json", TOKENIZER_SHA256
        if own.exists():
            hashes = read_json(own, "prepare_data.py --tokenizer MODEL")["files"]
        meta = meta_of(source, fingerprint, quick, settings, kept, splits, tokenizer, hashes)
        # without meta.json no stage takes a .bin: it goes first and comes last,
        # and never stands beside other ones
        (folder / "meta.json").unlink(missing_ok=True)
        for writer in writers.values():
            os.replace(writer.aside, writer.path)
        write_json(folder / "meta.json", meta)
    return meta


def hashes_of_training(root, quick):
    """How `Kept` tells the documents of train.bin apart: a set of hashes."""
    rows, meta = load_split(root, "train", quick)
    return {hashlib.sha256(text.astype(np.int32)).digest() for text in documents(rows, meta["eot"])}


def prepare_own(root, text, quick, name, source=None):
    """Write ROOT/data/NAME.bin and NAME.json: local documents for eval.py --on NAME, none of
    which stands in train.bin; return what NAME.json says.

    Where it raises, they are what they were.
    """
    settings = QUICK if quick else FULL
    folder = root / "data"
    tokenizer = load_tokenizer(root, quick)
    known, meta = hashes_of_training(root, quick), read_meta(root, command("prepare_data.py", root, quick))
    with contextlib.ExitStack() as stack:
        lock_file = stack.enter_context(open(folder / ".lock", "w"))
        lock(lock_file, f"another prepare_data.py is writing into {folder}; let it end first")
        writer = SplitWriter(folder / f"{name}.bin", settings, stack, type_of_rows(tokenizer))
        rows, files, fingerprint = open_source(text, quick, settings)
        kept = write_splits(rows, {name: writer}, tokenizer, settings, 1, known)
        about = {
            "source": printable(source or files),
            "fingerprint": fingerprint,
            "tokenizer_sha256": meta["tokenizer_sha256"],
            "window": settings.window,
            "documents": {"kept": len(kept.seen), "skipped": dict(kept.skipped)},
            "truncated": kept.truncated,
            "split": writer.finish(),
        }
        (folder / f"{name}.json").unlink(missing_ok=True)   # as meta.json in `prepare`
        os.replace(writer.aside, writer.path)
        about = {**about, "sha256": seal(about)}
        write_json(folder / f"{name}.json", about)
    return about


# ------------------------------------------------------------ text that asks to be remembered

# How a planted fact is written, {0} and {1} two words: in none of the ways in
# which eval.py asks. And how the end of a chain of facts is asked for.
FACT_FORMATS = (" [{0}|{1}]", " {0} = {1};", " Note that {0} goes with {1},")
CHAIN_FORMATS = (" {0} => {1};", " Follow {0} and find {1},")
MOST_HOPS = 4                   # facts of a chain; the last documents have the longest


def planted_words(tokenizer):
    """Tokens of one capitalised word of four letters or more and the space before it: (n,) int64.

    eval.py asks about words in lower case, so none of these.
    """
    chosen = [index for word, index in spaced_words(tokenizer) if len(word) > 3 and word.istitle()]
    return np.array(sorted(chosen))


def written(tokenizer, form, first, second):
    """The tokens of a fact, or of a question with its answer."""
    ids = []
    for part in re.split(r"(\{[01]\})", form):
        if part == "{0}":
            ids.append(first)
        elif part == "{1}":
            ids.append(second)
        else:
            ids += encoded(tokenizer, part.rstrip(" "))     # the space before a word is in its token
    return ids


def scattered(real, pieces, draw):
    """Tokens of text with pieces between them, in their order, at places that are drawn."""
    cuts = np.sort(draw.integers(0, len(real) + 1, len(pieces)))
    parts = np.split(real, cuts)
    line = [parts[0]]
    for piece, part in zip(pieces, parts[1:]):
        line += [piece, part]
    return np.concatenate(line)


def planted_document(texts, words, tokenizer, hops, length, draw):
    """A document of `length` tokens: facts in its first half, what they say asked for in its second.

    With one hop the question repeats a fact up to its second word; with more, a chain of facts (a = b; b = c;) is
    asked for its end (a => c;), as in hash-hop (Magic 2024).
    """
    count = max(2, length // 128 // hops)
    chains = draw.choice(words, (count, hops + 1), replace=False)
    form = FACT_FORMATS[draw.integers(len(FACT_FORMATS))]
    question = form if hops == 1 else CHAIN_FORMATS[draw.integers(len(CHAIN_FORMATS))]
    facts = [written(tokenizer, form, *pair) for chain in chains for pair in zip(chain, chain[1:])]
    asked = [written(tokenizer, question, chain[0], chain[-1]) for chain in chains]
    facts = [facts[place] for place in draw.permutation(len(facts))]
    asked = [asked[place] for place in draw.permutation(len(asked))]
    room = length - 1 - sum(map(len, facts)) - sum(map(len, asked))
    real = np.concatenate([texts[place][1:] for place in draw.integers(len(texts), size=8)])
    while len(real) < room:
        real = np.concatenate((real, real))
    early = scattered(real[:room // 2], facts, draw)
    late = scattered(real[room // 2:room], asked, draw)
    return np.concatenate(([tokenizer.pad_token_id], early, late))


def plant(root, quick, settings):
    """Write ROOT/data/planted.bin and planted.json: documents in which facts are asked for, for train.py --planted.

    The text around the facts is that of train.bin. The documents come in the order in which they are to be learnt:
    one hop first, chains of up to MOST_HOPS last (the curriculum of MAG's relative).
    """
    rows, meta = load_split(root, "train", quick)
    texts = [text for text in documents(rows, meta["eot"]) if len(text) > 1]
    tokenizer = load_tokenizer(root, quick)
    words = planted_words(tokenizer)
    draw = np.random.default_rng((settings.split_seed, 1))
    made = []
    for number in tqdm(range(settings.planted_documents), unit=" documents", disable=None):
        most = 1 + MOST_HOPS * number // settings.planted_documents
        hops = int(draw.integers(1, most + 1))
        made.append(planted_document(texts, words, tokenizer, hops, settings.planted_tokens, draw))
    bins = np.concatenate([windows_of(ids, settings.window, settings.stride, rows.dtype) for ids in made])
    path = root / "data" / "planted.bin"
    write_atomic(path, bins.tobytes())
    facts = {"documents": len(made), "sha256": sha256(path), "train_sha256": meta["splits"]["train"]["sha256"]}
    write_json(root / "data" / "planted.json", facts)
    return facts


# ------------------------------------------------------------ what is said of it

def warn_of_short_documents(root, quick, settings):
    """Say where eval.py will find too few texts for its farthest questions."""
    rows, meta = load_split(root, "val", quick)
    lengths = [len(tokens) for tokens in documents(rows, meta["eot"])]
    enough = sum(length >= settings.asked_tokens for length in lengths)
    if enough < settings.asked_documents:
        print(f"warning: {enough:,} of {len(lengths):,} validation documents have the {settings.asked_tokens:,} tokens "
              f"that eval.py's farthest questions need, {settings.asked_documents} should; the longest has "
              f"{max(lengths):,}; what it cannot ask it leaves out; give longer documents, or more")


def report(meta, settings):
    """Print what went in and what was left out."""
    for split, counts in meta["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['windows']:,} windows, "
              f"{counts['tokens']:,} tokens, {counts['characters']:,} characters")
    read, kept, skipped = meta["documents"].values()
    if kept < settings.documents and not meta["quick"]:
        wanted = f"{settings.documents:,}"
        print(f"warning: {kept:,} documents where {wanted} are asked for; going on with them")
    print(f"{read:,} documents read, {kept:,} kept ({meta['truncated']:,} of them cut off at "
          f"{settings.max_doc_tokens:,} tokens); skipped: {listed(skipped)}")


def main(argv=None):
    parser = parser_of(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE",
                        help="local documents instead of OpenWebText")
    source.add_argument("--planted", action="store_true",
                        help="from train.bin, documents with facts that are asked for: for train.py --planted")
    parser.add_argument("--tokenizer", metavar="MODEL",
                        help="a folder or a name on the hub: prepare for add_memory.py --to MODEL, with its tokenizer")
    parser.add_argument("--name", metavar="TEXT",
                        help="what to call these documents in results (default: their files)")
    parser.add_argument("--into", type=own_name, metavar="NAME",
                        help="with --text: data/NAME.bin beside the others, for eval.py --on NAME")
    flags = parser.parse_args(argv)
    if flags.into and not flags.text:
        parser.error("--into goes with --text FILE: it is for documents of your own")
    if flags.tokenizer and (flags.into or flags.planted):
        parser.error("--tokenizer is for all data of a root: give it alone, or with --text")
    settings = QUICK if flags.quick else FULL
    root = default_root(flags.root, flags.quick)

    start = time.monotonic()
    if flags.planted:
        made = plant(root, flags.quick, settings)
        print(f"wrote {root}/data/planted.bin: {made['documents']:,} documents of {settings.planted_tokens:,} tokens; "
              f"next: " + command("train.py --baseline --chained --planted", root, flags.quick))
        return
    if flags.into:
        about = prepare_own(root, flags.text, flags.quick, flags.into, flags.name)
        counts = about["split"]
        print(f"wrote {root}/data/{flags.into}.bin: {counts['documents']:,} documents, {counts['tokens']:,} tokens; "
              f"skipped: {listed(about['documents']['skipped'])}; "
              f"next: " + command(f"eval.py --on {flags.into}", root, flags.quick))
        return
    following = "add_memory.py"
    if flags.tokenizer:
        following += f" --to {shlex.quote(flags.tokenizer)}"
    with tokenizer_of(flags.tokenizer, root, flags.quick):
        meta = prepare(root, flags.text, flags.quick, flags.name)
    report(meta, settings)
    warn_of_short_documents(root, flags.quick, settings)
    print(f"{time.monotonic() - start:.1f} s; next: " + command(following, root, flags.quick))


if __name__ == "__main__":
    run_stage(main)
