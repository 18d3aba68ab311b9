# Makes sure that there is a Python with the packages of requirements.txt, and sets PYTHON to it.
#
#   bash setup.sh                                                # does just that
#   source setup.sh requirements.txt [more.txt ...]              # in a launcher: then "$PYTHON" script.py
#
# The Python in use (python3, or $PYTHON) is taken as it is if it has every package in the tested version. Otherwise
# .venv is made beside this file, once; later runs find it whole and do nothing. A set-up that was cut off starts anew.

setup_main() {
    local here requirements file
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    requirements=()
    for file in "${@:-requirements.txt}"; do requirements+=("$here/$file"); done

    PYTHON=${PYTHON:-python3}
    if ! command -v "$PYTHON" >/dev/null; then
        setup_fail "there is no $PYTHON here; install Python 3.10 or later: sudo apt-get install python3 python3-venv"
    elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        setup_fail "$PYTHON is $("$PYTHON" --version 2>&1), Python 3.10 or later is needed; name one: PYTHON=python3.11 bash ..."
    elif setup_has_all "$PYTHON"; then
        return 0
    fi || return

    # One set-up at a time; a second launcher waits and then finds it done.
    exec 9>"$here/.setup.lock" || setup_fail "$here cannot be written to; set-up makes .venv there" || return
    if command -v flock >/dev/null; then flock 9; fi
    setup_venv
    local status=$?
    exec 9>&-
    return $status
}

setup_venv() {
    local venv=$here/.venv
    # .unfinished stands from before the first file to after the last; where it still stands, a run was cut off.
    if [ -e "$venv/.unfinished" ] || { [ -d "$venv" ] && ! "$venv/bin/python" -c '' 2>/dev/null; }; then rm -rf "$venv"; fi
    if [ -d "$venv" ] && setup_has_all "$venv/bin/python"; then
        PYTHON=$venv/bin/python
        return 0
    fi
    if ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
        setup_fail "$PYTHON has no venv; run  sudo apt-get install $("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')  and then this again"
        return
    fi
    echo "Set-up    installing the packages of requirements.txt into .venv (once, about a minute; with CUDA 3 GB) ..."
    mkdir -p "$venv" && touch "$venv/.unfinished" \
        && { [ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv" >"$venv/setup.log" 2>&1; } \
        && "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "${requirements[@]/#/-r}" \
            >>"$venv/setup.log" 2>&1 \
        && rm "$venv/.unfinished"
    if [ -e "$venv/.unfinished" ] || [ ! -d "$venv" ]; then
        grep -h '^ERROR' "$venv/setup.log" 2>/dev/null | tail -n 3 >&2 || true
        setup_fail "set-up did not finish; the whole story is in $venv/setup.log. With a network and room on the disk, run this again"
        return
    fi
    PYTHON=$venv/bin/python
    echo "Set-up    done"
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
