#!/usr/bin/env bash
# The whole experiment, in seven stages: does a surprisal-routed memory help?
#
#   ./run_all.sh                  on 10,000 documents of OpenWebText, streamed from the hub
#   ./run_all.sh --text FILE      on your documents: .jsonl, .json, .parquet or .txt, plain or .gz, .xz, .zst
#   ./run_all.sh --quick          all of it made small: minutes on two cores, nothing to download but the packages
#
#   --seeds N     train both arms with each of N seeds (default 1)
#   --controls    measure, too, what the gain depends on: other thresholds, sizes, models
#   --fresh       redo every stage, trainings too; without it, a run goes on from where the last one stopped
#   --root DIR    where data, checkpoints and results go (default: this folder; with --quick: quick/ in it)
#   --help        print this
#
# A stage is skipped when what it reads (its script, models.py, its flags, its files) and what it made are, byte for
# byte, as they were when it last finished. Without --fresh, no training is ever started over.
set -euo pipefail

home=$(dirname "${BASH_SOURCE[0]}")
. "$home/tests/setup.bash"              # die, lock, find_python

quick="" text="" seeds=1 controls="" fresh="" root=""
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick ;;
        --controls) controls=--controls ;;
        --fresh) fresh=--fresh ;;
        --text | --seeds | --root)
            [ -n "${2:-}" ] || die "$1 needs a value; see ./run_all.sh --help" 2
            case $1 in --text) text=$2 ;; --seeds) seeds=$2 ;; --root) root=$2 ;; esac
            shift ;;
        --help | -h) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
        *) die "there is no flag '$1'; see ./run_all.sh --help" 2 ;;
    esac
    shift
done
[[ $seeds =~ ^[1-9][0-9]{0,2}$ ]] || die "--seeds takes a whole number from 1 to 999, not '$seeds'" 2
[ -z "$text" ] || { [ -f "$text" ] && [ -r "$text" ]; } || die "--text: there is no readable file '$text'" 2

# what the caller named is relative to where the caller stands, the rest to this folder
case $text in "" | /*) ;; *) text=$PWD/$text ;; esac
case $root in "") root=${quick:+quick} ;; /*) ;; *) root=$PWD/$root ;; esac
root=${root:-.}
cd "$home"
mkdir -p "$root/.run_all" 2>/dev/null || die "--root: no folder can be made at '$root'" 2
find_python pytest pytest-xdist         # sets PYTHON; the spare ones are for the tests only
export PYTHONUNBUFFERED=1               # lines come in order, in a log file too
export PYTORCH_ENABLE_MPS_FALLBACK=1    # what an Apple GPU has no kernel for runs on the CPU

exec 8>"$root/.run_all/lock"
lock "$PYTHON" 8 || die "another run_all.sh is at work in '$root'; wait for it, or choose another --root"
[ -z "$fresh" ] || rm -f "$root"/.run_all/[1-7]*

digest() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

# contents FILES: the hashes of files under the root, named in one string; fails where one is missing
# shellcheck disable=SC2086  # the string is split, and its * expanded, on purpose
contents() { (cd "$root" && digest $1 </dev/null 2>&1); }

# cause FILES COMMAND...: one hash of all that a stage's result follows from
cause() {
    local word
    {
        echo "$quick ${*:2}"
        for word in models.py "${@:2}"; do [ ! -f "$word" ] || digest <"$word"; done    # the script; the --text file
        contents "$1" || true           # the stage itself says best what it lacks
    } | digest
}

# run COMMAND...: run a command, pass on SIGINT and SIGTERM to it, return its exit code
run() {
    local child code signal=0
    (trap - INT; exec "$@") </dev/null 8>&- &
    child=$!
    trap 'signal=130' INT
    trap 'signal=143; kill -TERM "$child" 2>/dev/null || true' TERM
    while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do
        # Ctrl-C in a terminal has reached the command by itself; `kill -INT` of this shell alone has not
        for _ in {1..30}; do if kill -0 "$child" 2>/dev/null; then sleep 0.1; fi; done
        [ "$signal" = 143 ] || kill -TERM "$child" 2>/dev/null || true
    done
    trap - INT TERM
    [ "$signal" = 0 ] || code=$signal
    return "$code"
}

# stage NUMBER[.SEED] READS MAKES COMMAND...: run a stage, unless all it would read and make is as it left it
stage() {
    local stamp=$root/.run_all/$1 title="[${1%.*}/7] ${*:4}" reads=$2 makes=$3 from made code=0 began=$SECONDS
    shift 3
    from=$(cause "$reads" "$@")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$from $(contents "$makes")" ]; then
        echo "$title: skipped, nothing has changed since it finished"
        return
    fi
    echo "$title"
    [ "$1" != train.py ] || set -- "$@" "${fresh:---resume}"    # --resume starts, continues or says that it is done
    run "$PYTHON" "$@" --root "$root" ${quick:+--quick} || code=$?
    [ "$code" = 0 ] || die "stage $title failed with exit code $code; nothing after it was run" "$code"
    made=$(contents "$makes") || die "stage $title ended without making all of: $makes"
    echo "$from $made" >"$stamp"
    echo "$title: done in $((SECONDS - began)) s"
}

tokenizer="data/tokenizer/vocab.json data/tokenizer/merges.txt"
data="data/train.bin data/val.bin data/meta.json"
# quoted, a * is left for contents() to expand under the root
models=$(echo trained/{,"seed*"/}{init,baseline,with_ltm}/{model.safetensors,config.json})
history=$(echo trained/{,"seed*"/}{baseline,with_ltm}/history.jsonl)

#       reads                        makes                              command
stage 1 ""                           "$tokenizer"                       download_models.py
stage 2 "$tokenizer"                 "$data"                            prepare_data.py ${text:+--text "$text"}
for ((seed = 0; seed < seeds; seed++)); do
    arms=trained; [ "$seed" = 0 ] || arms=trained/seed$seed
    init="$arms/init/model.safetensors $arms/init/config.json"
    stage 3."$seed" "$data"          "$init"                            add_memory.py --seed "$seed"
    stage 4."$seed" "$data $init"    "$arms/baseline/model.safetensors" train.py --baseline --seed "$seed"
    stage 5."$seed" "$data $init"    "$arms/with_ltm/model.safetensors" train.py --with-ltm --seed "$seed"
done
pictures="results.png results_memory.png${controls:+ results_controls.png}"
stage 6 "$tokenizer $data $models"   "results.json"                     eval.py $controls
stage 7 "results.json $history"      "$pictures"                        plot_eval.py
echo "All seven stages are done: see $root/results.json, ${pictures// /, }"
