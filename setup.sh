# Makes sure that there is a Python with the packages of requirements.txt, and sets PYTHON to it.
#
#   bash setup.sh                                                # does just that
#   source setup.sh requirements.txt [more.txt ...]              # in a launcher: then "$PYTHON" script.py
#
# The Python in use (python3, or $PYTHON) is taken as it is if it has every package in the tested version. Otherwise
# .venv is made beside this file, once; later runs find it whole and do nothing. A set-up that was cut off starts anew.

setup_main() {
    local here requirements file install="apt-get install"
    here=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    requirements=()
    for file in "${@:-requirements.txt}"; do requirements+=("$here/$file"); done
    [ "$EUID" = 0 ] || install="sudo $install"

    PYTHON=${PYTHON:-python3}
    if ! command -v "$PYTHON" >/dev/null; then
        setup_fail "there is no $PYTHON here; install Python 3.10 or later: $install python3 python3-venv"
    elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        setup_fail "$PYTHON is $("$PYTHON" --version 2>&1 | head -n 1), Python 3.10 or later is needed;" \
            "name one: PYTHON=python3.11 bash ..."
    elif setup_has_all "$PYTHON" || setup_use_venv; then
        return 0
    fi || return

    # One set-up at a time; a second launcher waits and then finds it done.
    { exec 9>"$here/.setup.lock"; } 2>/dev/null \
        || setup_fail "$here cannot be written to; set-up makes .venv there" || return
    if command -v flock >/dev/null; then flock 9; fi
    setup_use_venv || setup_make_venv
    local status=$?
    exec 9>&-
    return $status
}

# Sets PYTHON to .venv's if that is whole. .unfinished stands in it from before the first file to after the last.
setup_use_venv() {
    [ ! -e "$here/.venv/.unfinished" ] && setup_has_all "$here/.venv/bin/python" && PYTHON=$here/.venv/bin/python
}

setup_make_venv() {
    local venv=$here/.venv log=$here/.venv/setup.log why
    # A run was cut off, or the Python that .venv was made with is gone. bin first: if rm is cut off, it is seen.
    if [ -e "$venv/.unfinished" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then rm -rf "$venv/bin" "$venv"; fi
    if ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
        setup_fail "$PYTHON has no venv; mend it and run this again:" \
            "$install $("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
        return
    fi
    # TMPDIR: so that a small /tmp does, and what a killed pip leaves goes with .venv.
    echo "Set-up    installing the packages of requirements.txt into .venv (once, about a minute; with CUDA 3 GB) ..."
    {
        mkdir -p "$venv" && touch "$venv/.unfinished" && : >"$log" \
            && { "$venv/bin/python" -c 'import pip' || TMPDIR=$venv "$PYTHON" -m venv "$venv" >>"$log" 2>&1; } \
            && TMPDIR=$venv "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
                "${requirements[@]/#/-r}" >>"$log" 2>&1 \
            && rm "$venv/.unfinished" && PYTHON=$venv/bin/python && echo "Set-up    done" && return
        why=$(grep '^ERROR' "$log" | tail -n 1 || true)
        # What was whole before is whole now if pip failed before it changed anything, as without a network.
        if grep -q '^ERROR' "$log" && ! grep -q '^Installing' "$log"; then rm "$venv/.unfinished"; fi
    } 2>/dev/null
    setup_fail "set-up did not finish${why:+: ${why#ERROR: }}; the whole story is in $log." \
        "With a network and room on the disk, run this again"
}

# Whether Python $1 has every pinned package; "2.13.0+cpu" counts as "2.13.0".
setup_has_all() {
    "$1" - "${requirements[@]}" <<'PY' 2>/dev/null
import importlib.metadata as metadata, sys
for file in sys.argv[1:]:
    for line in open(file):
        name, _, version = line.split("#")[0].strip().partition("==")
        if name and metadata.version(name).split("+")[0] != version:
            sys.exit(1)
PY
}

setup_fail() {
    echo "error: $*" >&2
    return 2
}

setup_main "$@"
