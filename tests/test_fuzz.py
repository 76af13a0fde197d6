"""Damaged corpora, files and command lines, over 500 of them, each put to the stage that reads it.

Whatever it meets, a stage either does its work or ends in one line that says what to do; what was there before is
unchanged, byte for byte; and no code out of any file is run. What is damaged is what the stages themselves made, of a
model of two dimensions.

Besides, which test holds which fault:

 1 the network drops               test_data.py::test_a_broken_stream_goes_on_where_it_broke
 2 no network                      test_data.py::test_no_network_names_the_ways_without
                                   test_data.py::test_no_tokenizer_anywhere_names_the_ways_without
 3 killed while writing a .bin     test_data.py::test_a_kill_leaves_no_half_bin_and_the_rerun_is_whole
 4 .bin truncated                  test_data.py::test_a_damaged_bin_is_refused
                                   test_train.py::test_damaged_data_is_refused_before_training
                                   test_eval.py::test_changed_data_is_refused
 5 .bin of another type, flipped   the same three
 6 a token beyond the vocabulary   test_data.py::test_a_token_beyond_the_vocabulary_stops_it
                                   test_train.py::test_damaged_data_is_refused_before_training
 7 another window, seed, source    test_data.py::test_a_changed_meta_is_refused_whatever_the_field
                                   test_train.py::test_a_run_goes_on_only_as_it_began
 8 killed while saving             test_train.py::test_a_kill_at_any_point_of_saving_leaves_a_whole_checkpoint
                                   test_train.py::test_a_checkpoint_is_on_the_disk_before_it_has_its_name
                                   test_train.py::test_after_a_kill_in_a_save_the_run_ends_alike
                                   test_train.py::test_thirty_kills_and_thirty_resumes
 9 SIGTERM, Ctrl-C                 test_train.py::test_a_signal_saves_and_exits
                                   test_run_all.py::test_signals_reach_the_stage
10 stopped and resumed             test_train.py::test_stopped_anywhere_a_run_goes_on_to_the_same_bits
11 the disk is full                test_train.py::test_a_full_disk_keeps_the_checkpoint_before
                                   test_data.py::test_a_full_disk_leaves_what_was_there
12 a damaged checkpoint            test_train.py::test_a_damaged_checkpoint_is_named_and_the_one_before_it_used
                                   test_train.py::test_no_whole_checkpoint
                                   test_train.py::test_the_folders_own_weights_are_mended
                                   test_eval.py::test_damaged_weights_give_way_to_the_newest_whole_checkpoint
                                   test_eval.py::test_a_config_that_was_changed_is_refused
13 a malicious pickle              test_train.py::test_a_pickle_is_refused_and_not_run
                                   test_fuzz.py::test_it_works_or_says_why_in_one_line
14 a loss of NaN or infinity       test_train.py::test_no_weight_moves_after_a_nan
                                   test_train.py::test_a_loss_that_is_not_a_number_stops_the_run
15 other settings, a finished run  test_train.py::test_a_run_goes_on_only_as_it_began
                                   test_train.py::test_a_run_that_is_there_is_never_started_over_unasked
16 two runs into one folder        test_train.py::test_two_runs_into_one_folder
                                   test_data.py::test_two_runs_at_once_are_refused
                                   test_run_all.py::test_second_run_in_the_same_folder_is_refused
17 wandb                           test_train.py::test_wandb_costs_a_warning_at_most
18 out of GPU memory               test_train.py::test_out_of_memory_says_what_to_lower
                                   test_eval.py::test_out_of_memory_is_one_line
19 another checkpoint after eval   test_plot.py::test_row_19_checkpoint_changed_after_the_evaluation
20 a metric of NaN                 test_eval.py::test_a_metric_that_is_not_a_number_is_never_written
                                   test_eval.py::test_weights_that_are_not_numbers_are_refused
                                   test_plot.py::test_row_20_a_number_that_is_none
21 a stage of run_all.sh fails     test_run_all.py::test_failing_stage_stops_the_run
22 strange text                    test_data.py::test_texts_come_back_whole
                                   test_data.py::test_a_long_document_is_cut_off_at_2048_tokens
                                   test_data.py::test_bad_rows_are_skipped_and_counted
                                   test_data.py::test_a_bad_file_gets_one_line_and_changes_nothing
23 bad flags                       test_data.py::test_help_and_wrong_flags
                                   test_train.py::test_bad_flags
                                   test_eval.py::test_bad_flags
                                   test_plot.py::test_row_23_bad_flags
                                   test_run_all.py::test_bad_flags
"""

import dataclasses
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save

import add_memory
import download_models
import eval as evaluation
import models
import plot_eval
import prepare_data
import stages
import train

PROJECT = Path(models.__file__).parent
WIDTH = 32
MODULES = {"download_models": download_models, "prepare_data": prepare_data, "add_memory": add_memory, "train": train,
           "eval": evaluation, "plot_eval": plot_eval}
MAKES = {           # what a stage may change, and no other file
    "download_models": ("data/tokenizer/",), "prepare_data": ("data/train.bin", "data/val.bin", "data/meta.json"),
    "add_memory": ("trained/init/", "trained/seed"), "train": ("trained/baseline/", "trained/with_ltm/"),
    "eval": ("results.json", "trained/baseline/evaluation.", "trained/with_ltm/evaluation."),
    "plot_eval": ("results.html", "results.png", "results_memory.png", "results_controls.png")}
# one of these a line must have: a command to run, or what is to be done by hand
ADVICE = r"python \w+\.py|run_all\.sh|run \S+ again|--resume|--fresh|--text|mend it|rename one|another name|read from \.jsonl"


class Case(NamedTuple):
    stage: str
    flags: tuple                # {root} in them becomes the root
    damage: object              # damage(root, draw) is done before


CASES = {}


def add(kind, name, stage, damage, *flags):
    """One more case; all but command lines are given the root."""
    assert f"{kind}: {name}" not in CASES, name
    CASES[f"{kind}: {name}"] = Case(stage, flags if kind == "command" else ("--root", "{root}", *flags), damage)


# ------------------------------------------------------------------ kinds of damage: functions of (root, draw)

class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, root):
        self.path = root / "canary"

    def __reduce__(self):
        return Path.touch, (self.path,)


def writing(path, make):
    """make(root, draw) -> bytes go into a file, a new one: what is there is a second name of a file that all share."""
    def damage(root, draw):
        data = make(root, draw)
        (root / path).unlink(missing_ok=True)
        (root / path).write_bytes(data)
    return damage


def rewriting(path, change):
    """change(bytes, draw) -> bytes of a file that is there."""
    return writing(path, lambda root, draw: change((root / path).read_bytes(), draw))


def replacing(path, make):
    """make(path) in the place of a file or folder, or where there is none."""
    def damage(root, draw):
        if (root / path).is_dir():
            shutil.rmtree(root / path)
        (root / path).unlink(missing_ok=True)
        make(root / path)
    return damage


def pickling(path):
    """A pickle that would make a file."""
    return writing(path, lambda root, draw: pickle.dumps(Payload(root)))


def all_of(*damages):
    def damage(root, draw):
        for one in damages:
            one(root, draw)
    return damage


def nothing(*_):
    pass


def gone(_):
    pass


def flip(data, draw, end=None):
    at = draw.randrange(min(len(data), end or len(data)))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]


BYTES = {           # change(bytes, draw) -> bytes
    "cut": lambda data, draw: data[:draw.randrange(len(data))],
    "flipped early": lambda data, draw: flip(data, draw, 100),
    "flipped": flip,
    "longer": lambda data, draw: data + data[:64],
    "noise": lambda data, draw: draw.randbytes(500),
    "zeros": lambda data, draw: bytes(len(data)),
    "empty": lambda data, draw: b"",
    "nested": lambda data, draw: b"[" * 100_000,
}


def every_way(kind, path, stage, *flags):
    """Cases: whatever can become of one file."""
    for how, change in BYTES.items():
        add(kind, f"{path} {how}", stage, rewriting(path, change), *flags)
    add(kind, f"{path} gone", stage, replacing(path, gone), *flags)
    add(kind, f"{path} a folder", stage, replacing(path, Path.mkdir), *flags)
    add(kind, f"{path} a loop", stage, replacing(path, lambda path: path.symlink_to(path)), *flags)
    add(kind, f"{path} a pickle", stage, pickling(path), *flags)


JUNK = [None, True, -1, 0, 2.5, 1e308, 10 ** 400, float("nan"), float("inf"), "", "word", "\0", "\ud83d", "../../x", [],
        {}, [[]], "x" * 5_000]


def places(value, place=()):
    """The place of each value inside of nested dicts and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*place, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*place, key))


def retyping(path, place=None, sealed=False, junk=JUNK):
    """One value of a JSON file, at `place` or anywhere, becomes something else, or goes."""
    def change(data, draw):
        whole = inner = json.loads(data)
        *above, last = place or draw.choice(list(places(whole)))
        for key in above:
            inner = inner[key]
        if draw.random() < 0.2:
            del inner[last]
        else:
            inner[last] = draw.choice(junk)
        return json.dumps({**whole, "sha256": stages.seal(whole)} if sealed else whole).encode()
    return rewriting(path, change)


def refitting(folder):
    """The manifest of a folder is made to fit what its files have become."""
    def damage(root, draw):
        folder_, path = root / folder, root / folder / "manifest.json"
        manifest = json.loads(path.read_text())
        if "weights" in manifest:                                       # of an arm
            manifest["weights"] = {stages.sha256(folder_ / "model.safetensors"): manifest["step"]}
            manifest["config"] = stages.sha256(folder_ / "config.json")
            stages.write_json(path, manifest)
        else:
            stages.write_manifest(folder_, **{k: v for k, v in manifest.items() if k not in ("files", "sha256")})
    return damage


# ------------------------------------------------------------------ the cases: corpora

def texts(seed, count=12):
    words = ["the", "of", "and", "caf\u00e9", "in", "surprise", "memory", "\u4f60\u597d", "angle", "eleven"]
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=50)) for _ in range(count)]


def json_lines(rows):
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def zst(data):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return bytes(out.getvalue())


def parquet(**columns):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), out)
    return out.getvalue()


GOOD = [{"text": text} for text in texts("good", 20)]
LINES = {
    "broken": [b'{"text": "a\n', b'{"text"}\n', b"{'text': 'b'}\n", b'{"text": "c"} more\n', b"}\n", b'"\n'],
    "types": [*({"text": junk} for junk in JUNK), *JUNK],
    "nested": [b"[" * 100_000 + b"\n", b'{"text":' * 5_000 + b"\n", {"text": {"text": "inner"}}, {"a": {"text": "b"}}],
    "numbers": [b'{"text": ' + b"9" * 5_000 + b"}\n", b"NaN\n", b'{"text": NaN}\n', b"1e999\n", b"-\n"],
    "huge": [{"text": " ".join(texts("huge", 5_000))}, b"x" * 3_000_000 + b"\n"],
    "NULs": [b"\0\n" * 50, {"text": "\0" * 5_000}, b'{"text": "a\0b"}\n', b"\0" * 100_000 + b"\n"],
    "emoji": [{"text": "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f916" * n} for n in range(1, 9)],
    "surrogates": [b'{"text": "\\ud83d"}\n', b'{"text": "\\ude00\\ud83d"}\n', b'{"text": "\xed\xa0\xbd"}\n'],
    "encodings": [b"\xff\xfe{\0", '{"text": "utf-16"}\n'.encode("utf-16"), b'{"text": "\xe9"}\n', b"\xef\xbb\xbf{}\n"],
    "line ends": [b"\r\n\r\r\n \t\n\x0c\n\xc2\x85\n\xe2\x80\xa8\n", b'{"text": "a"}\r{"text": "b"}\r\n'],
    "keys": [b'{"text": "a", "text": "b"}\n', {"TEXT": "c"}, {"": "d"}, {" text": "e"}, {"text\0": "f"}, {}],
    "specials": [{"text": "<|endoftext|>" * n} for n in range(1, 9)],
    "repeats": [{"text": "the same"}] * 50,
    "controls": [{"text": "".join(map(chr, range(32))) * n} for n in (1, 2, 900)],
}
FORMATS = {".jsonl": json_lines(GOOD), ".json": json.dumps(GOOD).encode(),
           ".txt": "\n".join(texts("txt", 400)).encode(), ".parquet": parquet(text=texts("parquet")),
           ".jsonl.gz": gzip.compress(json_lines(GOOD), mtime=0), ".jsonl.xz": lzma.compress(json_lines(GOOD)),
           ".jsonl.zst": zst(json_lines(GOOD)), ".parquet.gz": gzip.compress(parquet(text=texts("parquet")), mtime=0)}


def add_corpora():
    """Odd lines; each format damaged; parquet of other things; odd names."""
    for name, lines in LINES.items():
        for how, rows in (("alone", lines), ("among others", [*GOOD[:6], *lines, *GOOD[6:]])):
            add("corpus", f"{name} {how}", "prepare_data", writing("in.jsonl", lambda *_, rows=rows: json_lines(rows)),
                "--text", "{root}/in.jsonl")

    for suffix, whole in FORMATS.items():
        for how in ("cut", "flipped early", "flipped", "longer", "noise", "empty"):
            add("corpus", f"{suffix} {how}", "prepare_data", writing(
                f"in{suffix}", lambda root, draw, whole=whole, how=how: BYTES[how](whole, draw)),
                "--text", f"{{root}}/in{suffix}")
        add("corpus", f"{suffix} a pickle", "prepare_data", pickling(f"in{suffix}"), "--text", f"{{root}}/in{suffix}")

    for name, columns in {
            "numbers": dict(text=[1, 2]), "bytes": dict(text=[b"\xff", b"a"]), "nulls": dict(text=pa.nulls(5)),
            "lists": dict(text=[["a"], ["b"]]), "structs": dict(text=[{"a": 1}]), "no text": dict(title=["a", "b"]),
            "no rows": dict(text=pa.array([], "string")),
            "codes": dict(text=pa.array(texts("codes")).dictionary_encode()),
            "other types": dict(text=texts("types", 2), at=pa.array([0, 1], pa.timestamp("ns", "UTC"))),
            "no UTF-8": dict(text=pa.array([b"caf\xe9", b"b"]).cast("string", safe=False)),
            "some nulls": dict(text=[*texts("nulls", 4), None, ""])}.items():
        add("corpus", f".parquet of {name}", "prepare_data", writing(
            "in.parquet", lambda *_, columns=columns: parquet(**columns)), "--text", "{root}/in.parquet")

    def holding(data):
        return functools.partial(Path.write_bytes, data=data)

    for name, make in {
            "folder.jsonl": Path.mkdir, "loop.jsonl": lambda path: path.symlink_to(path), "fifo.jsonl": os.mkfifo,
            "missing.jsonl": gone, ".jsonl": Path.touch, "in.gz.xz": Path.touch, "in.pkl": Path.touch,
            "two\nlines.json.gz": holding(b"noise"), "\udcff.jsonl": holding(json_lines(GOOD)),
            "x" * 250 + ".json": holding(b"[1, 2"), "*.json": holding(b"[]"), "{}%s.txt": holding(b"alone")}.items():
        add("corpus", f"by the name of {name[-20:]!r}", "prepare_data", replacing(name, make),
            "--text", f"{{root}}/{name}")


# ------------------------------------------------------------------ the cases: .bin, meta.json, the tokenizer

def add_data():
    """Each file under data/."""
    for split, stage, *flags in (("train", "train", "--with-ltm", "--resume"), ("val", "eval")):
        path = f"data/{split}.bin"
        every_way("data", path, stage, *flags)
        add("data", f"{path} without its last row", stage, rewriting(path, lambda data, _: data[:-2 * WIDTH]), *flags)
        add("data", f"{path} in reverse", stage, rewriting(path, lambda data, _: data[::-1]), *flags)
        add("data", f"{path} as uint32", stage, rewriting(
            path, lambda data, _: np.frombuffer(data, np.uint16).astype(np.uint32).tobytes()), *flags)
    every_way("data", "data/meta.json", "eval")
    for place in (("format",), ("source",), ("fingerprint",), ("quick",), ("versions",), ("tokenizer_sha256",),
                  ("vocab_size",), ("window",), ("stride",), ("documents",), ("splits",), ("splits", "train"),
                  ("splits", "val", "bytes"), ("splits", "val", "sha256"), ("splits", "val", "windows"), ("sha256",)):
        name = f"meta.json with another {'.'.join(place)}"
        add("data", name, "train", retyping("data/meta.json", place), "--resume")
        add("data", f"{name}, resealed", "eval", retyping("data/meta.json", place, sealed=True))
    for field in ("documents", "tokens", "bytes", "sha256"):
        add("data", f"meta.json with another splits.train.{field}, resealed", "train",
            retyping("data/meta.json", ("splits", "train", field), sealed=True), "--fresh")
    for value in (0, -1, 7, 1e308, float("inf"), "32", None):
        add("data", f"meta.json with a window of {value}, resealed", "train",
            retyping("data/meta.json", ("window",), sealed=True, junk=[value]), "--with-ltm", "--fresh")
    for name in ("vocab.json", "merges.txt"):
        for stage, how in zip(("prepare_data", "add_memory", "train", "eval"), ("cut", "flipped", "empty", "longer")):
            add("data", f"{name} {how}", stage, rewriting(f"data/tokenizer/{name}", BYTES[how]))


# ------------------------------------------------------------------ the cases: weights, settings, manifests


def header(value, body=b"", length=None):
    """A safetensors file by hand."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensors(change):
    """A change of a safetensors file's bytes: change({name: tensor})."""
    def changed(data, draw):
        named = load(data)
        change(named, sorted(name for name, x in named.items() if x.is_floating_point()))
        return save(named)
    return changed


def filled(value):
    return tensors(lambda named, names: named[names[0]].fill_(value))


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FORGED = {          # change(bytes, draw) -> bytes: hashes that fit are no proof of sense
    "a header of 2^40 bytes": lambda *_: header({}, length=2 ** 40),
    "a header of 2^63 bytes": lambda *_: header({}, length=2 ** 63),
    "a header that is no JSON": lambda *_: header(b"{" * 64),
    "a header of nested lists": lambda *_: header(b"[" * 50_000),
    "offsets beyond the end": lambda *_: header({"a": ONE}),
    "offsets backwards": lambda *_: header({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8)),
    "tensors that overlap": lambda *_: header({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
    "a huge shape": lambda *_: header({"a": {**ONE, "shape": [2 ** 62, 2 ** 62]}}, bytes(8)),
    "an unknown dtype": lambda *_: header({"a": {**ONE, "dtype": "O8"}}, bytes(8)),
    "no tensors": lambda *_: save({}),
    "other tensors": lambda *_: save({"a": torch.zeros(2)}),
    "one tensor missing": tensors(lambda named, names: named.pop(names[0])),
    "one tensor more": tensors(lambda named, names: named.update(extra=torch.zeros(2))),
    "one tensor flat": tensors(lambda named, names: named.update({names[0]: named[names[0]].flatten()})),
    "one tensor longer": tensors(lambda named, names: named.update({names[0]: named[names[0]].repeat(2, 1)})),
    "integers": tensors(lambda named, names: named.update({names[0]: named[names[0]].int()})),
    "NaN": filled(float("nan")), "infinity": filled(float("inf")), "1e38": filled(1e38),
}
ARM = "trained/with_ltm"
NEWEST, BEFORE = (f"{ARM}/checkpoints/step-00000{step}" for step in (4, 2))
def add_trained():
    """The initial weights, an arm and its newest checkpoint."""
    for path in ("config.json", "manifest.json", "model.safetensors"):
        every_way("trained", f"trained/init/{path}", "train", "--with-ltm", "--resume")
        every_way("trained", f"{ARM}/{path}", "eval")
    for path in ("manifest.json", "model.safetensors", "optimizer.safetensors"):
        every_way("trained", f"{NEWEST}/{path}", "train", "--with-ltm", "--resume")
    for how, change in FORGED.items():
        for folder, name, stage, *flags in (("trained/init", "model", "train", "--with-ltm"), (ARM, "model", "eval"),
                                            (NEWEST, "model", "train", "--with-ltm", "--resume"),
                                            (NEWEST, "optimizer", "train", "--with-ltm", "--resume")):
            damages = rewriting(f"{folder}/{name}.safetensors", change), refitting(folder)
            if folder == "trained/init":
                damages = replacing(ARM, gone), *damages
            add("trained", f"{folder[8:]}: {name} with {how}, resealed", stage, all_of(*damages), *flags)
    for number in range(10):
        add("trained", f"with_ltm/config.json, another value {number}", "eval", retyping(f"{ARM}/config.json"))
        add("trained", f"with_ltm/manifest.json, another value {number}", "eval", retyping(f"{ARM}/manifest.json"))
        add("trained", f"with_ltm/manifest.json, another value {number}, to go on", "train",
            retyping(f"{ARM}/manifest.json"), "--with-ltm", *["--resume"] * (number % 2))
        add("trained", f"step 4's manifest.json, another value {number}", "train",
            retyping(f"{NEWEST}/manifest.json"), "--with-ltm", "--resume")
    for name in ("../../../results.json", "/etc/passwd", "..", ".", "", "a\0b", "x" * 300):
        add("trained", f"a manifest that names {name[:30]!r}", "train", rewriting(
            "trained/init/manifest.json", lambda data, _, name=name: json.dumps(
                {**(value := {**json.loads(data), "files": {name: "0" * 64}}), "sha256": stages.seal(value)}).encode()),
            "--with-ltm", "--resume")
    for folder in ("trained/init", NEWEST, ARM):
        add("trained", f"pickles and code all over {folder}, resealed",
            "eval" if folder == ARM else "train", all_of(
                *(pickling(f"{folder}/{name}") for name in ("model.safetensors", "optimizer.safetensors", "config.json",
                                                            "pytorch_model.bin", "training_args.bin")),
                writing(f"{folder}/models.py", lambda root, _: f"open({str(root / 'canary')!r}, 'w')".encode()),
                refitting(folder)), *() if folder == ARM else ("--with-ltm", "--resume"))
    add("trained", "both checkpoints cut", "train", all_of(*(rewriting(
        f"{folder}/optimizer.safetensors", BYTES["cut"]) for folder in (NEWEST, BEFORE))), "--with-ltm", "--resume")
    add("trained", "all weights of an arm cut", "eval", all_of(*(
        rewriting(f"{folder}/model.safetensors", BYTES["cut"]) for folder in (ARM, NEWEST, BEFORE))))


# ------------------------------------------------------------------ the cases: results.json, history.jsonl

def add_results():
    """What plot_eval.py reads."""
    every_way("results", "results.json", "plot_eval")
    history = f"{ARM}/history.jsonl"
    for how in ("cut", "flipped", "zeros", "nested"):
        add("results", f"history.jsonl {how}", "plot_eval", rewriting(history, BYTES[how]))
    add("results", "history.jsonl gone", "plot_eval", replacing(history, gone))
    add("results", "history.jsonl a pickle", "plot_eval", pickling(history))
    every_way("results", f"{ARM}/model.safetensors", "plot_eval")
    for number in range(12):
        add("results", f"results.json, another value {number}", "plot_eval", retyping("results.json"))
    for name in ("..", "/etc", "trained/../trained/with_ltm", "a\0b", "", "x" * 300, "\ud83d", 7):
        add("results", f"a checkpoint in {str(name)[:20]!r}", "plot_eval", retyping(
            "results.json", ("detail", "arms", "with_ltm", "checkpoints", 0, "folder"), junk=[name]))
    for number in range(4):
        add("results", f"history.jsonl, another value {number}", "plot_eval", rewriting(
            history, lambda data, draw: b"\n".join(json.dumps(
                {**json.loads(line), draw.choice(["step", "ltm_hit_rate"]): draw.choice(JUNK)}).encode()
                for line in data.splitlines())))


# ------------------------------------------------------------------ the cases: command lines

FLAGS = ["--root", "--seed", "--steps", "--text", "--name", "--quick", "--baseline", "--with-ltm", "--with-gru", "--resume",
         "--chained", "--planted", "--fresh", "--controls", "--lr", "-x", "--", "--help"]
ROOTS = ["{root}", "{root}/none", "{root}/two\nlines", "{root}/\udcff", "{root}/results.json", "/dev/null",
         "/proc/none", "x" * 300, " "]
VALUES = [*ROOTS, "-1", "0", "1", "x", "", "9" * 30, "1e3", "NaN", "\u0663", "0x10", "1_0", "-", "%s", "{{}}",
          "$(touch {root}/canary)"]


def add_commands():
    """Flags of all stages and values of all kinds, for each."""
    for stage in MODULES:
        for number, root in enumerate(ROOTS):
            add("command", f"{stage} in root {number}", stage, nothing, "--root", root)
        draw = random.Random(stage)
        for number in range(10):
            words = [draw.choice(FLAGS[:draw.choice([4, len(FLAGS)])]) if draw.random() < 0.6 else draw.choice(VALUES)
                     for _ in range(draw.randint(1, 4))]
            add("command", f"{stage} {number}", stage, nothing, *words)


for add_cases in (add_corpora, add_data, add_trained, add_results, add_commands):
    add_cases()


# ------------------------------------------------------------------ the stages made small, and what they make

def shrink(patch, home):
    """Constants for a model of two dimensions and seconds of work; `home` in place of the project's own folder."""
    def smaller(settings, **values):
        return dict.fromkeys(("FULL", "QUICK"), dataclasses.replace(settings, **values))

    tiny = dict(n_layer=1, n_embd=2, n_head=1)
    asked = dict(pack=4, lane=2, trials=1, forms=("pair",), distances=(40,), long_range=(40,), lead=8, distractors=(0,),
                 distracted=40, dialogues=1, turn=30, together=1, repeats=1, timed=1, shown=50, bootstrap=100,
                 control_trials=1, fitted=2)
    for module, constants in {
            stages: dict(PROJECT=home),
            prepare_data: dict(smaller(prepare_data.FULL, window=WIDTH, stride=WIDTH // 2),
                               read_python_documentation=lambda settings: iter(GOOD)),
            download_models: dict(SOURCES=dict.fromkeys(download_models.SOURCES, unreachable)),
            add_memory: dict(smaller(add_memory.QUICK, window=WIDTH, slots=24), TOTAL=(0, 1e9),
                             milliseconds=lambda _: (1, 1)),
            train: dict(smaller(train.FULL, steps=4, batch=1, lane=1, warmup=1, log_every=1, checkpoint_steps=2),
                        Wandb=lambda *_: SimpleNamespace(log=gone, finish=lambda: None)),
            evaluation: smaller(evaluation.FULL, **asked),
            plot_eval: dict(DPI=10)}.items():
        for name, value in constants.items():
            patch.setattr(module, name, value)
    for module in (add_memory, train, evaluation):
        patch.setattr(module, "default_root", lambda root, quick: stages.default_root(root or home, quick))
    patch.setitem(models.SIZES, "quick", tiny)
    patch.setattr(os, "fsync", lambda _: None)


def unreachable(_):
    raise OSError("no network here")


@pytest.fixture(scope="module", autouse=True)
def slow_constants():
    """A tokenizer takes a tenth of a second to make; its files' hashes are still looked at each time."""
    tokenizers, make = [], transformers.GPT2TokenizerFast
    count = functools.cache(stages.characters_per_token)

    def once(*arguments, **named):
        tokenizers[:] = tokenizers or [make(*arguments, **named)]
        return tokenizers[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "GPT2TokenizerFast", once)
        patch.setattr(make, "save_pretrained", lambda *_: None)         # 3.5 MB into each folder, not read here
        for module in (prepare_data, evaluation):
            patch.setattr(module, "characters_per_token", count)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_dir):
    """A root in which all stages have run."""
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(tokenizer_dir, root / "data" / "tokenizer")
    (root / "corpus.jsonl").write_bytes(json_lines(GOOD))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.signal, "signal", lambda *_: None)
        shrink(patch, root)
        for stage, *flags in (("prepare_data", "--text", str(root / "corpus.jsonl")), ("add_memory",),
                              ("train", "--baseline"), ("train", "--with-ltm"), ("eval",), ("plot_eval",)):
            assert not MODULES[stage].main(["--root", str(root), *flags])
    return root


HASHES = {}


def files(root):
    """{path: hash} of all but the locks. A file is read again where it is another one, or was written to."""
    found = {}
    for folder, _, names in os.walk(root):
        for path in (os.path.join(folder, name) for name in names if name != ".lock"):
            about = os.lstat(path)
            key = about.st_ino, about.st_size, about.st_mtime_ns
            if key not in HASHES:
                HASHES[key] = stages.sha256(path) if os.path.isfile(path) else about.st_mode
            found[os.path.relpath(path, root)] = HASHES[key]
    return found


@pytest.fixture(scope="module")
def shared(whole):
    """A second root of the same files, linked."""
    return shutil.copytree(whole, whole.parent / "shared", copy_function=os.link)


@pytest.fixture
def root(whole, shared):
    """The second root; mended afterwards, which is ten times quicker than a new one."""
    yield shared
    now, then = files(shared), files(whole)
    for path in now.keys() | then.keys():
        if now.get(path) != then.get(path):
            shutil.rmtree(shared / path) if (shared / path).is_dir() else (shared / path).unlink(missing_ok=True)
            if path in then:
                (shared / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(whole / path, shared / path)
    for path in sorted(shared.rglob("*")):
        if path.name == ".lock":
            path.unlink()                               # what ended in an exception may hold it for a while yet
        elif not (whole / path.relative_to(shared)).exists():
            shutil.rmtree(path, ignore_errors=True)     # a folder that is new, and empty by now


def befall(root, name):
    """Let a case's damage happen to a root; the flags of the stage that is to meet it."""
    CASES[name].damage(root, random.Random(name))
    return [flag.replace("{root}", str(root)) for flag in CASES[name].flags]


@pytest.fixture
def here(whole, tmp_path, stage, monkeypatch):
    """here(name of a stage, flags, root): the stage in this process; (exit code, stdout, stderr)."""
    def run(name, flags, root):
        shrink(monkeypatch, root)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        sys.stderr.reconfigure(errors="backslashreplace")               # as the real one is
        monkeypatch.chdir(tmp_path)
        return stage(MODULES[name].main, *flags)
    return run


def sane(path):
    """A file that a stage has just written is what its name says, and holds numbers."""
    if path.suffix == ".json":
        json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{path} holds {word}"))
    elif path.suffix == ".safetensors":
        assert all(x.isfinite().all() for x in load_file(path).values()), path
    elif path.suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
    elif path.suffix == ".bin":
        stages.load_split(path.parent.parent, path.stem)


# every second case is left to -m slow: the others are enough to find what a change breaks
@pytest.mark.parametrize("name", [*list(CASES)[::2], *(pytest.param(name, marks=pytest.mark.slow)
                                                       for name in list(CASES)[1::2])])
def test_it_works_or_says_why_in_one_line(root, here, name):
    flags = befall(root, name)
    before, stage = files(root), CASES[name].stage
    code, out, err = here(stage, flags, root)
    after = files(root)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert "canary" not in after and "Traceback" not in out + err
    assert not [path for path in after if path.endswith(".tmp")]
    mine = {path for path in changed if path.startswith(MAKES[stage])}
    if code == 0:
        assert changed == mine
        for path in changed & after.keys():
            sane(root / path)
        return
    # a training that stops has begun: its folder is new, and no earlier artefact
    assert not changed - (mine - before.keys() if stage == "train" else set())
    if code == 2:
        assert err.startswith("usage: ") and f"\n{stage}.py: error: " in err
    else:
        lines = [line for line in err.splitlines() if " is passed over: " not in line]
        assert code == 1 and len(lines) == 1 and lines[0].startswith(f"{stage}.py: "), err
        assert re.search(ADVICE, lines[0]), err


# run by a Python of its own, which imports the libraries once; then each command line is a process of its own
PROCESSES = """
import gc, json, os, runpy, sys
sys.path.insert(0, project := sys.argv[1])
import eval, plot_eval, prepare_data, train
gc.freeze()                                             # or each would look through all that was imported
for number, command in enumerate(json.load(sys.stdin)):
    if not os.fork():
        os.dup2(os.open(f"{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        sys.argv = command
        runpy.run_path(os.path.join(project, command[0]), run_name="__main__")
        sys.exit("it did not leave")
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
REAL = ["corpus: .jsonl.xz cut", "data: data/train.bin flipped", "trained: trained/init/config.json a pickle",
        "results: results.json zeros", "command: add_memory 0"]


def test_a_process_of_its_own_says_the_same(whole, here, tmp_path):
    """Exit code and last line, of one case of each kind."""
    roots = [shutil.copytree(whole, tmp_path / str(number), copy_function=os.link) for number in range(len(REAL))]
    commands = [[f"{CASES[name].stage}.py", *befall(root, name)] for name, root in zip(REAL, roots)]
    before = [files(root) for root in roots]
    done = subprocess.run([sys.executable, "-c", PROCESSES, PROJECT], input=json.dumps(commands), cwd=tmp_path,
                          text=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert [files(root) for root in roots] == before, done.stderr
    for number, (root, (script, *flags)) in enumerate(zip(roots, commands)):
        code, _, said = here(script.removesuffix(".py"), flags, root)
        real = (tmp_path / f"{number}.err").read_text()
        assert int(done.stdout.split()[number]) == code != 0 and "Traceback" not in real
        assert real.splitlines()[-1] == said.splitlines()[-1]


def test_there_are_enough_of_each_kind():
    kinds = Counter(name.partition(":")[0] for name in list(CASES)[::2])
    assert len(kinds) == 5 and min(kinds.values()) >= 25 and kinds.total() >= 200, kinds


def test_every_fault_has_its_tests():
    """The names in this file's docstring are those of tests that are there."""
    rows = re.findall(r"(?m)^ ?(\d+) .{32}(\S.*)$", __doc__)
    assert [int(number) for number, _ in rows] == list(range(1, 24))
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", __doc__)
    missing = [(file, name) for file, name in named
               if f"\ndef {name}(" not in Path(__file__).with_name(file).read_text()]
    assert len(named) > 40 and not missing
