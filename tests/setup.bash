# shellcheck shell=bash
# What run_all.sh and tests/run.sh share, both standing in the project folder: finding a Python that has the packages
# of requirements.txt, or making one.

die() { echo "$(basename "$0"): $1" >&2; exit "${2:-1}"; }

# python_with_packages PYTHON [SPARE ...]: its real path, if it has all packages but the spare ones, each of the pinned
# major version or later. Looked up, not imported, which would take ten seconds each time
python_with_packages() {
    "$1" - "${@:2}" 2>/dev/null <<'PY'
import os, re, sys
from importlib.metadata import version
for name, major in re.findall(r"(?m)^([\w.-]+)==(\d+)", open("requirements.txt").read()):
    if name not in sys.argv[1:] and int(version(name).split(".")[0]) < int(major):
        sys.exit(1)
if sys.version_info < (3, 10) or os.path.exists(sys.prefix + "/installing"):    # the mark of make_environment below
    sys.exit(1)
print(sys.executable)
PY
}

# find_python [SPARE ...]: sets PYTHON to the current python where it has the packages, else to .venv's
find_python() {
    local name version base="" found=""
    for name in python3 python; do
        # a name on the PATH may be a shim with nothing behind it, so the answer counts, not the exit code alone
        PYTHON=$(python_with_packages "$name" "$@") && [ -n "$PYTHON" ] && return
    done
    PYTHON=.venv/bin/python
    environment_complete && return

    # the interpreter below an activated environment makes the new one; it may be this .venv that is to be replaced
    for name in python3 python; do
        version=$("$name" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        found="$found${version:+, $name is $version}"
        base=$("$name" -c 'import sys; print(sys.version_info >= (3, 10) and sys._base_executable or "")')
        [ -z "$base" ] || break
    done
    [ -n "$base" ] || die "Python 3.10 or later is needed${found:-, there is no python3}; install one or activate one"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$base cannot make environments; on Debian and Ubuntu: sudo apt install python3-venv, then run this again"
    (
        lock "$base" 9 || { echo "Waiting for another installation into .venv ..."; lock "$base" 9 wait; }
        environment_complete || make_environment "$base"
    ) 9<requirements.txt || exit            # the lock of two runs at once is on requirements.txt; any file would do
}

environment_complete() {                    # the copy of requirements.txt is put there last
    cmp -s requirements.txt .venv/requirements.txt && .venv/bin/python -c "" 2>/dev/null
}

# make_environment PYTHON: .venv with the packages; a .venv of the user's own is completed, not replaced
make_environment() {
    local quiet=--quiet
    [ ! -t 1 ] || quiet=""                  # progress bars are for people
    echo "Installing the packages of requirements.txt into .venv: once, over the network, some minutes ..."
    # with our mark still there, an installation was cut short and nothing in it can be trusted
    if [ -e .venv/installing ] || ! .venv/bin/python -c "" 2>/dev/null; then rm -rf .venv; fi
    mkdir -p .venv
    touch .venv/installing
    [ -x .venv/bin/python ] || "$1" -m venv .venv || die "the environment .venv could not be made (see above)"
    .venv/bin/python -m pip install ${quiet:+"$quiet"} --disable-pip-version-check --no-input -r requirements.txt ||
        die "the packages could not be installed (see above); check the network and the disk, then run this again"
    cp requirements.txt .venv/requirements.txt && rm .venv/installing
}

# lock PYTHON FD [wait]: lock an open file of this shell until it closes it or ends, however it ends
lock() {
    "$1" - "$2" "${3:-}" <<'PY'
import fcntl, sys
try:
    fcntl.flock(int(sys.argv[1]), fcntl.LOCK_EX | (0 if sys.argv[2] == "wait" else fcntl.LOCK_NB))
except BlockingIOError:
    sys.exit(1)
except OSError:
    pass    # a file system without locks: better to go on than never to start
PY
}
