#!/usr/bin/env bash
# The whole experiment, in seven stages: does a memory help a small GPT?
#
#   ./run_all.sh                on 10,000 documents of OpenWebText, streamed from the hub
#   ./run_all.sh --text FILE    on your documents: .jsonl, .json, .parquet, .txt, or a .gz, .xz, .zst
#   ./run_all.sh --quick        all of it made small: minutes on two cores, downloads only packages
#   ./run_all.sh --memories     all memories, trained chained on the same data, in memories/
#   ./run_all.sh --study        what else would have bought the gain: 27 trainings, in study/
#
#   --seeds N     train each arm with each of N seeds (default 1)
#   --steps N     train each arm for N steps (default: train.py's own)
#   --controls    measure, too, what the gain depends on: other thresholds, sizes, models
#   --fresh       redo every stage, trainings too; without it, a run goes on where one stopped
#   --root DIR    where data, checkpoints and results go (default: here; with --quick in quick/)
#   --python [LIST]   run no stage: set up the packages, those of a LIST like requirements.txt too,
#                     and print the Python that has them
#   --help        print this
#
# A stage is skipped when what it reads (its script, the modules that shape its result, its flags,
# its files) and what it made are, byte for byte, as they were when it last finished. Without
# --fresh, no training is ever started over. What run_all.sh did not make it never deletes.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # sh run_all.sh: a plain sh knows little of this
set -euo pipefail
set +fC +o posix                        # which BASH_ENV or SHELLOPTS may have set
shopt -u failglob

# Variables that the caller has set for other programs. These would, in turn: send bash elsewhere
# for files; give a Python the libraries of another one; hide a script's own folder from it; end
# it with a prompt; drop its asserts; make its warnings errors; send packages elsewhere than
# .venv; let a training wait for other processes
unset BASH_ENV CDPATH GLOBIGNORE
unset PYTHONHOME __PYVENV_LAUNCHER__
unset PYTHONSAFEPATH PYTHONINSPECT PYTHONOPTIMIZE PYTHONWARNINGS
unset PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_PYTHON
unset WORLD_SIZE
export MPLBACKEND=Agg                   # pictures without a screen
export PYTHONUNBUFFERED=1               # lines come in order, in a log file too
export PYTORCH_ENABLE_MPS_FALLBACK=1    # what an Apple GPU has no kernel for runs on the CPU

die() { echo "run_all.sh: $1" >&2; exit "${2:-1}"; }

script=${BASH_SOURCE[0]}
while [ -L "$script" ]; do              # the project lies where the file does, not where a link does
    target=$(readlink "$script")
    case $target in /*) script=$target ;; *) script=$(dirname -- "$script")/$target ;; esac
done
home=$(cd -P -- "$(dirname -- "$script")" && pwd)
[ -f "$home/stages.py" ] ||
    die "'$home' has no stages.py: leave run_all.sh in the project, or make a link to it"

quick="" text="" seeds=1 steps="" controls="" fresh="" root="" memories="" study="" python="" list=""
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick ;;
        --controls) controls=--controls ;;
        --fresh) fresh=--fresh ;;
        --memories) memories=--memories ;;
        --study) study=--study ;;
        --python)
            python=--python
            case ${2:-} in "" | -*) ;; *) list=$2; shift ;; esac ;;
        --text | --seeds | --steps | --root)
            [ -n "${2:-}" ] || die "$1 needs a value; see ./run_all.sh --help" 2
            case $1 in
                --text) text=$2 ;;
                --seeds) seeds=$2 ;;
                --steps) steps=$2 ;;
                --root) root=$2 ;;
            esac
            shift ;;
        --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' "$script"; exit ;;
        *) die "there is no flag '$1'; see ./run_all.sh --help" 2 ;;
    esac
    shift
done
[[ $seeds =~ ^[1-9][0-9]{0,2}$ ]] ||
    die "--seeds takes a whole number from 1 to 999, not '$seeds'" 2
[[ ${steps:-1} =~ ^[1-9][0-9]{0,6}$ ]] ||
    die "--steps takes a whole number from 1 to 9999999, not '$steps'" 2
[ -z "$study" ] || [ -z "$memories$controls$steps${seeds#1}" ] ||
    die "--study has arms, steps and seeds of its own: it goes without --memories, --controls, --steps, --seeds" 2
for file in "$text" "$list"; do
    [ -z "$file" ] || { [ -f "$file" ] && [ -r "$file" ]; } || die "there is no readable file '$file'" 2
done

# what the caller named is relative to where the caller stands, the rest to the project
case $text in "" | /*) ;; *) text=$PWD/$text ;; esac
case $list in "" | /*) ;; *) list=$PWD/$list ;; esac
case $root in "") root=${quick:+quick} ;; /*) ;; *) root=$PWD/$root ;; esac
root=${root:-.}
cd "$home"
mkdir -p "$root" 2>/dev/null || die "--root: no folder can be made at '$root'" 2

# run COMMAND...: run a command, pass on SIGINT and SIGTERM to it, return its exit code
run() {
    local child="" code signal=0
    # before the command, which may be told to stop as soon as it has begun
    trap 'signal=130' INT
    trap 'signal=143; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
    (trap - INT TERM; exec "$@") </dev/null &
    child=$!
    [ "$signal" = 0 ] || kill -TERM "$child" 2>/dev/null || true     # it came while there was no number to send it to
    while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do
        # Ctrl-C in a terminal has reached the command by itself, `kill -INT` of this shell has
        # not
        for _ in {1..30}; do if kill -0 "$child" 2>/dev/null; then sleep 0.1; fi; done
        [ "$signal" = 143 ] || kill -TERM "$child" 2>/dev/null || true
    done
    trap - INT TERM
    [ "$signal" = 0 ] || code=$signal
    return "$code"
}

# lock PYTHON FD [wait]: lock an open file of this shell until it closes it or ends, however it ends.
# Fails where another process holds it, and nowhere else: on a file system without locks it is
# better to go on than never to start
lock() {
    local code=0
    run "$1" -c '
import errno, fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | (0 if sys.argv[2] == "wait" else fcntl.LOCK_NB))
except OSError as error:
    sys.exit(75 if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else 0)
' "$2" "${3:-}" 2>/dev/null || code=$?
    case $code in 130 | 143) exit "$code" ;; esac
    [ "$code" != 75 ]
}

# ---------------------------------------------------------------- a Python that has the packages

# fit PYTHON LIST: its full path where it has all packages of a list; else what it lacks, and
# failure. A package needs the version after >= or, without one, its major version. They are
# looked up, not imported, which would take ten seconds each time
fit() {
    "$1" - "$2" 2>/dev/null <<'PY'
import re, sys

def numbers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]

def lack(packages):
    if sys.version_info < (3, 10):
        return "Python 3.10"
    from importlib.metadata import PackageNotFoundError, version
    for name, major, least in re.findall(r"(?m)^([\w.-]+)==(\d+)[\d.]*(?:,>=([\d.]+))?", packages):
        try:
            if numbers(version(name)) < numbers(least or major):
                return name + " " + (least or major)
        except PackageNotFoundError:
            return name

missing = lack(open(sys.argv[1]).read())
print(missing or sys.executable)
sys.exit(bool(missing))
PY
}

# legible LIST: whether it can be a list of packages; of bytes that are no text pip makes a traceback
legible() {
    "$PYTHON" -c '
import sys
sys.exit("\0" in open(sys.argv[1], encoding="utf-8").read())
' "$1" 2>/dev/null
}

# Our mark in a .venv that we made: empty while it is worked on, a copy of requirements.txt once
# it is complete. It comes before anything else, so that a .venv without it is the user's own
mark=.made_by_run_all
cut_short() { [ -e "$1/$mark" ] && [ ! -s "$1/$mark" ]; }
starts() { "$PYTHON" -c "" 2>/dev/null; }

# find_python: sets PYTHON to the current python where it has the packages, else to .venv's
find_python() {
    local name version base="" found=""
    for name in python3 python; do
        # a name on the PATH may be a shim with nothing behind it: the answer counts, not the exit
        # code
        if PYTHON=$(fit "$name" requirements.txt) && [ -n "$PYTHON" ]; then
            cut_short "${PYTHON%/bin/*}" || return 0
        fi
    done
    unset PYTHONPATH                        # its packages would hide those of .venv
    PYTHON=$home/.venv/bin/python
    environment_complete && return

    # the one below an activated environment makes the new one, which may be to replace the
    # activated one
    for name in python3 python; do
        version=$("$name" -c 'import platform as p; print(p.python_version())' 2>/dev/null) || continue
        found="$found${version:+, $name is $version}"
        base=$("$name" -c 'import sys; print(sys.version_info >= (3, 10) and sys._base_executable or "")')
        [ -z "$base" ] || break
    done
    [ -n "$base" ] ||
        die "Python 3.10 or later is needed${found:-, there is no python3}; install one or activate one"
    { mkdir -p .run_all && exec 9>.run_all/environment; } 2>/dev/null ||
        die "no .venv can be made in '$home'; activate an environment that has requirements.txt's packages"
    if ! lock "$base" 9; then
        echo "Waiting for another installation into .venv ..."
        lock "$base" 9 wait
    fi
    environment_complete || make_environment "$base"
    exec 9>&-
}

environment_complete() {
    if [ -e ".venv/$mark" ]; then
        cmp -s requirements.txt ".venv/$mark" && starts
    else
        fit "$PYTHON" requirements.txt >/dev/null
    fi
}

# make_environment BASE: .venv with the packages, by another Python; one of the user's own is
# completed, never replaced
make_environment() {
    if [ ! -e ".venv/$mark" ] && [ -n "$(ls -A .venv 2>/dev/null)" ]; then
        starts ||
            die "'$home/.venv' has no Python that starts, and run_all.sh did not make it; move it away or mend it"
        install requirements.txt
        return
    fi
    if [ ! -s ".venv/$mark" ] || ! starts; then             # nothing in it can be trusted
        "$1" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$1 cannot make environments; on Debian and Ubuntu: sudo apt install python3-venv"
        { mkdir -p .venv && : >".venv/$mark"; } 2>/dev/null ||
            die "'$home/.venv' cannot be made or written to; mend that, then run this again"
        find .venv/ -mindepth 1 ! -path ".venv/$mark" -delete
        run "$1" -m venv .venv || die "the environment .venv could not be made (see above)" $?
    fi
    : >".venv/$mark"
    install requirements.txt
    cp requirements.txt ".venv/$mark"
}

# install LIST: the packages of a list, for PYTHON
install() {
    local lack quiet=--quiet
    [ ! -t 2 ] || quiet=""                  # progress bars are for people
    lack=$(fit "$PYTHON" "$1") || true
    "$PYTHON" -c "import pip" 2>/dev/null ||
        die "$PYTHON lacks $lack, and pip to get it with; try: uv pip install --python '$PYTHON' -r '$1'"
    echo "Installing the packages of $1 for $PYTHON: once, over the network, some minutes ..."
    run "$PYTHON" -m pip install $quiet --disable-pip-version-check --no-input -r "$1" ||
        die "the packages could not be installed (see above); mend the network or the disk, then run this again" $?
    lack=$(fit "$PYTHON" "$1") ||
        die "pip is done, yet $PYTHON lacks $lack; mend what pip.conf says of targets, then run this again"
}

# ---------------------------------------------------------------- the stages

digest() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

# contents FILES: the hashes of files under the root, named in one string; fails where one is
# missing
# shellcheck disable=SC2086  # the string is split, and its * expanded, on purpose
contents() { (cd "$root" && digest $1 </dev/null 2>&1); }

# cause MODULES FILES COMMAND...: one hash of all that a stage's result follows from
cause() {
    local word
    {
        echo "$quick ${*:3}"
        for word in $1 "${@:3}"; do     # modules, and of the command its script and its --text file
            [ ! -f "$word" ] || digest <"$word"
        done
        contents "$2" || true           # the stage itself says best what it lacks
    } | digest
}

# stage NUMBER[.SEED[.ARM]] MODULES READS MAKES COMMAND...: run a stage, unless nothing of it
# changed
stage() {
    local stamp=$root/.run_all/$1 title="[${1%%.*}/7] ${*:5}"
    local modules=$2 reads=$3 makes=$4
    local from made code=0 began=$SECONDS
    shift 4
    from=$(cause "$modules" "$reads" "$@")
    if [ -z "$fresh" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$from $(contents "$makes")" ]; then
        echo "$title: skipped, nothing has changed since it finished"
        return
    fi
    echo "$title"
    rm -f "$stamp"
    # --resume starts, continues or says that it is done
    [ "$1" != train.py ] || set -- "$@" "${fresh:---resume}"
    run "$PYTHON" "$@" --root "$root" ${quick:+--quick} 8>&- || code=$?     # the lock is this shell's alone
    case $code in
        0) ;;
        130 | 143) die "stopped in stage $title; the same command again goes on from there" "$code" ;;
        *) die "stage $title failed with exit code $code; nothing after it was run" "$code" ;;
    esac
    made=$(contents "$makes") || die "stage $title ended without making all of: $makes"
    echo "$from $made" >"$stamp"
    echo "$title: done in $((SECONDS - began)) s"
}

# enter ROOT: work there from now on, and alone
enter() {
    root=$1
    { mkdir -p "$root/.run_all" && exec 8>"$root/.run_all/lock"; } 2>/dev/null ||
        die "nothing can be written in '$root'; mend that, or choose another --root"
    lock "$PYTHON" 8 ||
        die "another run_all.sh is at work in '$root'; wait for it, or choose another --root"
}

# bring FILES ROOT: copy files from another root, where they are not here already
bring() {
    local file
    for file in $1; do
        ! cmp -s "$2/$file" "$root/$file" || continue
        mkdir -p "$root/$(dirname "$file")"
        cp "$2/$file" "$root/$file.tmp"
        mv "$root/$file.tmp" "$root/$file"
    done
}

# enter_memories: the same data, more arms, the other regime of training: a root of their own
enter_memories() {
    local base=$root there=$root/memories
    enter "${there#./}"
    bring "$tokenizer $data" "$base"
    # the table of arms says which there are: NAME/FLAG/START, where START is the folder of its
    # first weights
    further=$("$PYTHON" -c '
from stages import ARMS, SPECIFIED, arm_flag, init_name
for name, arm in ARMS.items():
    if not arm.control and name not in SPECIFIED:
        print(name, arm_flag(name), init_name(name), sep="/")
') || die "the table of arms in stages.py cannot be read (see above)"
}

# start_further, train_further: stages 3 and 5 for a seed's further arms, of which only --memories
# knows
start_further() {
    local arm name flag start
    for arm in $further; do
        IFS=/ read -r name flag start <<<"$arm"
        start=$(weights "$at/$start")
        stage "3.$seed.$name" "$core memories.py" "$tokenizer" "$start" add_memory.py "$flag" --seed "$seed"
    done
}
train_further() {
    local arm name flag start made
    for arm in $further; do
        IFS=/ read -r name flag start <<<"$arm"
        start=$(weights "$at/$start") made=$at/$name/model.safetensors
        stage "5.$seed.$name" "$core memories.py" "$data $start" "$made" train.py "$flag" "${how[@]}"
    done
}

# study: stages 3 to 7 of the study, in a root of its own: every training a stage, so that it goes on
# where it stopped
study() {
    local base=$root there=$root/study names name start
    enter "${there#./}"
    bring "$tokenizer $data" "$base"
    # NAME/START: START is the folder of its first weights
    names=$("$PYTHON" -c '
from stages import STUDY, init_name
for name in STUDY:
    print(name, init_name(name), sep="/")
') || die "the table of the study in stages.py cannot be read (see above)"
    stage 3.0 "$core" "$tokenizer" "$(weights trained/init)" add_memory.py --seed 0
    for name in $names; do
        IFS=/ read -r name start <<<"$name"
        start=$(weights "trained/$start")
        [ "${start#*init_}" = "$start" ] ||
            stage "3.0.$name" "$core" "$tokenizer" "$start" add_memory.py --study "$name" --seed 0
        stage "4.0.$name" "$core prepare_data.py" "$data $start" "trained/$name/model.safetensors" \
            train.py --study "$name" --seed 0
    done
    stage 6 "$core" "$tokenizer $data $models" "results_study.json" eval.py --study --report
    stage 7 stages.py "results_study.json" "results_study.png" plot_eval.py --study
    echo "The study is done: see $root/results_study.json, results_study.png"
}

find_python >&2
[ -z "$list" ] || legible "$list" ||
    die "'$list' is no text: --python takes a list of packages like requirements.txt" 2
[ -z "$list" ] || fit "$PYTHON" "$list" >/dev/null || install "$list" >&2
[ -z "$python" ] || { echo "$PYTHON"; exit; }

tokenizer="data/tokenizer/vocab.json data/tokenizer/merges.txt"
data="data/train.bin data/val.bin data/meta.json"
weights() { echo "$1/model.safetensors $1/config.json"; }
# quoted, a * is left for contents() to expand under the root
models="$(weights "trained/*") $(weights "trained/seed*/*")"
history="trained/*/history.jsonl trained/seed*/*/history.jsonl"
pictures="results.html results.png results_memory.png${controls:+ results_controls.png}"

# The modules that shape a result; memories.py shapes only those of further memories. What stages
# 1 and 2 take from stages.py is checked, by hash or format, by whoever reads what they made: for
# a new arm in its table no document has to be streamed again
core="stages.py models.py"
further=""

enter "$root"
#       modules    reads                      makes                             command
stage 1 ""         ""                         "$tokenizer"                      download_models.py
stage 2 ""         "$tokenizer"               "$data"                           prepare_data.py ${text:+--text "$text"}
if [ -n "$study" ]; then study; exit; fi
if [ -n "$memories" ]; then enter_memories; fi
for ((seed = 0; seed < seeds; seed++)); do
    at=trained; [ "$seed" = 0 ] || at=trained/seed$seed
    init=$(weights "$at/init")
    how=(${memories:+--chained} --seed "$seed" ${steps:+--steps "$steps"})
    stage 3.$seed "$core" "$tokenizer"        "$init"                           add_memory.py --seed "$seed"
    start_further
    stage 4.$seed "$core" "$data $init"       "$at/baseline/model.safetensors"  train.py --baseline "${how[@]}"
    stage 5.$seed "$core" "$data $init"       "$at/with_ltm/model.safetensors"  train.py --with-ltm "${how[@]}"
    train_further
done
# a checkpoint of a further memory carries its code
[ -z "$(find "$root/trained" -name memories.py)" ] || core="$core memories.py"
stage 6 "$core"    "$tokenizer $data $models" "results.json"                    eval.py --report $controls
stage 7 stages.py  "results.json $history"    "$pictures"                       plot_eval.py
echo "All seven stages are done: see $root/results.json, ${pictures// /, }"
