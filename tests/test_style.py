"""A line of code knows its room: measures of every script, and what README and the files' heads promise cheaply.

A failure prints what breaks it: file, line, and the number that is too large.
"""

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
WIDE, WIDEST = 100, 120         # columns
WIDE_SHARE = 0.1                # of a file's lines may be wider than WIDE, none wider than WIDEST
NAMED_LAMBDAS = 8               # in the whole project, tests included
LONGEST = 70                    # lines of a function, but for tables of data
NOT_OF_MODELS = {"wandb", "argparse", "signal", "netrc", "subprocess", "queue", "threading"}
LIGHT = ("stages", "download_models", "prepare_data", "plot_eval")      # start without torch


def listed():
    """The Python files at the top level that belong to the project: those in git, or all where there is none."""
    known = subprocess.run(["git", "-C", PROJECT, "ls-files", "*.py"], capture_output=True, text=True)
    names = known.stdout.split() if known.returncode == 0 else []
    paths = [PROJECT / name for name in names] or [*PROJECT.glob("*.py"), *PROJECT.glob("tests/*.py")]
    return [path for path in sorted(paths) if path.exists()]


FILES = listed()
SCRIPTS = [path for path in FILES if path.parent == PROJECT]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def of_scripts(test):
    return pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)(test)


def is_table(node):
    """Whether a statement is data written out: a literal of many lines, without a call or a condition in it."""
    value = getattr(node, "value", None)
    if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return)) or value is None:
        return False
    data = (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Constant, ast.JoinedStr, ast.Name, ast.Attribute, ast.UnaryOp)
    parts = [part for part in ast.walk(value) if isinstance(part, ast.expr)]
    return isinstance(value, (ast.Dict, ast.List, ast.Tuple, ast.Set)) and all(isinstance(x, data) for x in parts)


def length_of(function):
    """Lines of a function, without its docstring and without tables of data."""
    lines = function.end_lineno - function.lineno + 1
    for node in ast.walk(function):
        if is_table(node) or (isinstance(node, ast.Expr) and node is function.body[0]
                              and isinstance(node.value, ast.Constant)):
            lines -= node.end_lineno - node.lineno + 1
    return lines


@of_scripts
def test_lines_know_their_room(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [(number, len(line)) for number, line in enumerate(lines, 1) if len(line) > WIDE]
    widest = [f"{path.name}:{number} has {columns} columns" for number, columns in wide if columns > WIDEST]
    assert not widest, "\n".join(widest)
    assert len(wide) <= WIDE_SHARE * len(lines), \
        f"{path.name}: {len(wide)} of {len(lines)} lines ({len(wide) / len(lines):.1%}) exceed {WIDE} columns"


@of_scripts
def test_functions_are_short(path):
    found = [(node.name, length_of(node), node.lineno) for node in ast.walk(TREES[path])
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [f"{path.name}:{line} {name} has {lines} lines" for name, lines, line in found if lines > LONGEST]
    assert not long, "\n".join(long)


def named_lambdas(tree):
    """Lines of assignments of a lambda to a name; one that is an argument or an entry of a table has none."""
    return [node.lineno for node in ast.walk(tree)
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr))
            and any(isinstance(value, ast.Lambda) for value in values_of(node.value))]


def values_of(value):
    return value.elts if isinstance(value, ast.Tuple) else [value]


def test_what_has_a_name_is_a_def():
    found = [f"{path.relative_to(PROJECT)}:{line}" for path, tree in TREES.items() for line in named_lambdas(tree)]
    assert len(found) <= NAMED_LAMBDAS, f"{len(found)} named lambdas: " + ", ".join(found)


@of_scripts
def test_python_3_10_can_read_it(path):
    """The oldest Python of requirements.txt: nothing of the grammar of later ones."""
    later = [node for node in ast.walk(TREES[path]) if type(node).__name__ in ("TryStar", "TypeAlias")]
    later += [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Subscript)
              and any(isinstance(part, ast.Starred) for part in ast.iter_child_nodes(node.slice))]
    assert not later, f"{path.name}:{later[0].lineno} is of a later Python"


def test_models_import_no_plumbing():
    """They travel in checkpoints: no flags, signals, processes or accounts in them."""
    for path in (PROJECT / "models.py", PROJECT / "memories.py"):
        if path not in TREES:
            continue
        imports = {alias.name.partition(".")[0] for node in ast.walk(TREES[path]) if isinstance(node, ast.Import)
                   for alias in node.names}
        imports |= {node.module.partition(".")[0] for node in ast.walk(TREES[path])
                    if isinstance(node, ast.ImportFrom) and node.module}
        assert not imports & NOT_OF_MODELS, f"{path.name} imports {imports & NOT_OF_MODELS}"
        assert "stages" not in imports, f"{path.name} imports stages, which does not travel with it"


def test_what_needs_no_torch_starts_without():
    code = f"import json, sys; sys.path.insert(0, {str(PROJECT)!r}); found = {{}}\n" + "".join(
        f"import {name}; found[{name!r}] = 'torch' in sys.modules\n" for name in LIGHT) + "print(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(LIGHT, False)


@of_scripts
def test_a_script_says_what_it_reads_and_writes(path):
    """And a bare except hides nothing; nothing is left to do."""
    tree, text = TREES[path], path.read_text(encoding="utf-8")
    document = ast.get_docstring(tree) or ""
    assert document
    if "\n    run_stage(main)" in text:
        assert "reads" in document and "writes" in document and f"python {path.name}" in document
    bare = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not bare and "TODO" not in text and "globals().update" not in text
    missing = [f"{path.name}:{node.lineno} {node.name} has no docstring" for node in tree.body
               if isinstance(node, ast.ClassDef) and not ast.get_docstring(node)]
    assert not missing, "\n".join(missing)


def test_readme_is_short_and_starts_with_the_commands():
    lines = (PROJECT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "./run_all.sh" in "\n".join(lines[:20]), "README.md: no command in its first 20 lines"
    words = sum(len(line.split()) for line in lines)
    assert words <= 1_700, f"README.md has {words} words"


def test_readme_names_what_is_there():
    """Each script, flag of a script and file that README names exists."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in SCRIPTS}
    named = {word.strip("`(),.;:") for word in text.split() if word.strip("`(),.;:").endswith(".py")}
    unknown = {name for name in named if Path(name).name not in scripts and not (PROJECT / name).exists()}
    assert not unknown, f"README.md names {unknown}"


ADVICE = re.compile(r"([a-z_]+\.py)((?: --[a-z][a-z-]*)*)")


def advised():
    """Commands that messages name, "train.py --baseline --chained": what command(..) is given, and what a text has
    after "python"."""
    found = set()
    for path in SCRIPTS:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "command":
                found |= {first.value for first in node.args[:1] if isinstance(first, ast.Constant)}
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {"".join(parts) for parts in re.findall("python " + ADVICE.pattern, node.value)}
    return sorted(text for text in found if not text.startswith("./"))


@pytest.mark.parametrize("text", advised())
def test_every_command_that_is_advised_is_taken(text, monkeypatch, tmp_path):
    """The script is there, and knows the flags: with a root of its own it comes to work."""
    class Taken(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def taken(parser, words=None, namespace=None):
        parse(parser, words, namespace)
        raise Taken

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", taken)
    script, *flags = text.split()
    values = {"--text": "a.jsonl", "--seed": "0", "--into": "mine", "--on": "mine", "--explore": "a.txt",
              "--tokenizer": "gpt2", "--to": "gpt2"}
    lone = [following.startswith("--") for following in [*flags[1:], "--"]]         # no value is named
    flags = [word for flag, alone in zip(flags, lone) for word in (flag, alone and values.get(flag)) if word]
    needs_arm = script == "train.py" and not any(flag.startswith(("--baseline", "--with")) for flag in flags)
    main = importlib.import_module(script.removesuffix(".py")).main
    with pytest.raises(Taken):
        main([*flags, *(["--baseline"] if needs_arm else []), "--root", str(tmp_path)])


# ------------------------------------------------------------------ the measures can fail


def test_the_measures_measure():
    tree = ast.parse("f = lambda: 1\ng, h = lambda: 1, 2\nx = max([], key=lambda: 1)\n"
                     "def long():\n    '''One.'''\n" + "    pass\n" * 71 +
                     "def table():\n    x = {\n" + "        1: 2,\n" * 99 + "    }\n    return x\n")
    assert named_lambdas(tree) == [1, 2]
    long, table = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert length_of(long) == 72 > LONGEST > length_of(table) == 2
