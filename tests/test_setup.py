"""setup.sh, as launchers source it, with a requirements.txt that names one tiny package. No network is used."""
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from servers import package_index

LAUNCHER = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup.sh requirements.txt
echo "python $PYTHON"
"$PYTHON" -c 'import vicuna_probe; print("probe", vicuna_probe.VERSION)'
echo "arguments" "$@"
"""


def make_wheel(directory, version):
    directory.mkdir(exist_ok=True)
    info = f"vicuna_probe-{version}.dist-info"
    with zipfile.ZipFile(directory / f"vicuna_probe-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vicuna_probe/__init__.py", f'VERSION = "{version}"\n')
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vicuna-probe\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*wheel.namelist(), f"{info}/RECORD"]))


def require(checkout, version):
    (checkout / "requirements.txt").write_text(f"# what the launcher needs\nvicuna-probe=={version}  # tested\n")


def environment(**changes):
    """Without this machine's pip settings: no index, and Python as it runs these tests (which lacks the package)."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_RETRIES": "0", "PYTHON": sys.executable,
            **changes}


def launch(checkout, *argv, **changes):
    return subprocess.run(["bash", checkout / "launcher.sh", *argv], capture_output=True, text=True,
                          env=environment(**changes))


def started(checkout, version, *argv):
    """What a launcher prints that was set up: the Python of .venv, the package, its own arguments."""
    return f"python {checkout}/.venv/bin/python\nprobe {version}\n" + " ".join(["arguments", *argv]) + "\n"


def one_line(result):
    """The line of an error: exit status 2, one line on stderr, and the launcher went no further."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "probe" not in result.stdout and "arguments" not in result.stdout, result.stdout
    return result.stderr


def script(file, text):
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def checkout(tmp_path):
    """A directory with setup.sh, a launcher, and version 1.0 required; nothing set up. Its name holds a blank."""
    directory = tmp_path / "a checkout"
    directory.mkdir()
    shutil.copy(ROOT / "setup.sh", directory)
    (directory / "launcher.sh").write_text(LAUNCHER)
    require(directory, "1.0")
    return directory


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A directory with versions 1.0 and 2.0 of the package."""
    directory = tmp_path_factory.mktemp("wheels")
    make_wheel(directory, "1.0")
    make_wheel(directory, "2.0")
    return directory


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, wheels):
    """(the directory, what `bash setup.sh` gave) of one set-up, made once."""
    directory = tmp_path_factory.mktemp("first") / "a checkout"
    directory.mkdir()
    shutil.copy(ROOT / "setup.sh", directory)
    require(directory, "1.0")
    result = subprocess.run(["bash", directory / "setup.sh"], capture_output=True, text=True,
                            env=environment(PIP_FIND_LINKS=str(wheels)))
    return directory, result


@pytest.fixture
def ready(checkout, first_run):
    """A checkout of one's own where 1.0 is set up already."""
    shutil.copytree(first_run[0] / ".venv", checkout / ".venv", symlinks=True)
    return checkout


def files_of(directory):
    return {file: (file.lstat().st_mtime_ns, file.lstat().st_size) for file in directory.rglob("*")}


def test_the_first_run_makes_a_venv_that_has_the_package(first_run):
    directory, result = first_run
    assert (result.returncode, result.stderr) == (0, "")
    assert "into .venv" in result.stdout and result.stdout.endswith("Set-up    done\n")
    assert not (directory / ".venv/.unfinished").exists()
    probe = subprocess.run([directory / ".venv/bin/python", "-c", "import vicuna_probe; print(vicuna_probe.VERSION)"],
                           capture_output=True, text=True)
    assert probe.stdout == "1.0\n"


def test_a_second_run_changes_nothing_and_needs_neither_network_nor_a_writable_place(ready):
    (ready / ".setup.lock").mkdir()  # nobody can write there, not even root
    before = files_of(ready)
    result = launch(ready, "--wandb", "--bits", "4")
    assert result.stderr == "" and result.stdout == started(ready, "1.0", "--wandb", "--bits", "4")
    assert result.returncode == 0 and files_of(ready) == before


def test_a_python_that_has_the_packages_is_taken_as_it_is(checkout, first_run):
    python = str(first_run[0] / ".venv/bin/python")
    result = launch(checkout, PYTHON=python)
    assert (result.returncode, result.stdout) == (0, f"python {python}\nprobe 1.0\narguments\n")
    assert not (checkout / ".venv").exists()


def test_another_version_required_is_installed_into_the_same_venv(ready, wheels):
    require(ready, "2.0")
    (ready / ".venv/mark").touch()
    result = launch(ready, PIP_FIND_LINKS=str(wheels))
    assert result.returncode == 0 and result.stdout.endswith(started(ready, "2.0"))
    assert (ready / ".venv/mark").exists()


def test_a_failed_first_install_is_told_and_the_next_run_succeeds(checkout, wheels, tmp_path):
    error = one_line(launch(checkout, PIP_FIND_LINKS=str(tmp_path)))
    assert "No matching distribution found for vicuna-probe==1.0" in error and "setup.log" in error
    result = launch(checkout, PIP_FIND_LINKS=str(wheels))
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.endswith(started(checkout, "1.0"))


def test_a_failed_upgrade_costs_nothing_of_what_was_there(ready, tmp_path):
    require(ready, "3.0")
    with package_index(tmp_path) as index:  # it knows no such package
        error = one_line(launch(ready, PIP_NO_INDEX="0", PIP_INDEX_URL=index.url))
    assert "No matching distribution found for vicuna-probe==3.0" in error
    require(ready, "1.0")
    result = launch(ready)  # without an index
    assert (result.returncode, result.stdout) == (0, started(ready, "1.0"))


def test_killed_while_pip_runs_it_starts_anew(ready, wheels, tmp_path):
    require(ready, "2.0")
    (tmp_path / "tmp").mkdir()
    with package_index(wheels, hold={"vicuna_probe-2.0-py3-none-any.whl": 200}) as index:
        running = subprocess.Popen(
            ["bash", ready / "launcher.sh"], start_new_session=True, stdout=subprocess.DEVNULL,
            env=environment(PIP_NO_INDEX="0", PIP_INDEX_URL=index.url, TMPDIR=str(tmp_path / "tmp")))
        assert index.held.wait(60)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert not list((tmp_path / "tmp").iterdir())
    # The worst that a cut-off pip leaves: it says 2.0 is installed, and the package is not there.
    packages = next((ready / ".venv/lib").glob("python*/site-packages"))
    shutil.rmtree(packages / "vicuna_probe")
    info = packages / "vicuna_probe-1.0.dist-info"
    (info / "METADATA").write_text((info / "METADATA").read_text().replace("1.0", "2.0"))
    info.rename(packages / "vicuna_probe-2.0.dist-info")

    result = launch(ready, PIP_FIND_LINKS=str(wheels))
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.endswith(started(ready, "2.0"))


def test_a_venv_whose_python_is_gone_is_made_anew(ready, wheels):
    for link in (ready / ".venv/bin").glob("python*"):
        link.unlink()
    result = launch(ready, PIP_FIND_LINKS=str(wheels))
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.endswith(started(ready, "1.0"))


def test_two_launchers_at_once_both_succeed(checkout, wheels):
    both = [subprocess.Popen(["bash", checkout / "launcher.sh", name], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=environment(PIP_FIND_LINKS=str(wheels))) for name in "ab"]
    (out_a, err_a), (out_b, err_b) = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0] and err_a == err_b == ""
    assert out_a.endswith(started(checkout, "1.0", "a")) and out_b.endswith(started(checkout, "1.0", "b"))
    assert (out_a + out_b).count("Set-up    done\n") == 1


def test_without_venv_it_names_the_command_that_mends_it(checkout, wheels, tmp_path):
    (tmp_path / "none/ensurepip").mkdir(parents=True)
    (tmp_path / "none/ensurepip/__init__.py").write_text("raise ImportError('Debian keeps it in another package')\n")
    python = script(tmp_path / "python3", f'#!/bin/sh\nPYTHONPATH="{tmp_path}/none" exec "{sys.executable}" "$@"\n')
    error = one_line(launch(checkout, PYTHON=python, PIP_FIND_LINKS=str(wheels)))
    assert error.endswith(f"apt-get install python3.{sys.version_info.minor}-venv\n")
    result = launch(checkout, PIP_FIND_LINKS=str(wheels))  # once it is mended
    assert result.returncode == 0 and result.stdout.endswith(started(checkout, "1.0"))


def test_a_python_that_is_too_old_or_broken(checkout, tmp_path):
    old = script(tmp_path / "python3.8", '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.18"\nexit 1\n')
    assert "is Python 3.8.18, Python 3.10 or later is needed" in one_line(launch(checkout, PYTHON=old))
    broken = script(tmp_path / "python3", '#!/bin/sh\nprintf "shim: no such version\\nand more\\n" >&2\nexit 127\n')
    assert "Python 3.10 or later is needed" in one_line(launch(checkout, PYTHON=broken))
    assert not (checkout / ".venv").exists()


def test_no_python_at_all(checkout, tmp_path):
    assert "there is no /no/such/python here" in one_line(launch(checkout, PYTHON="/no/such/python"))
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    error = one_line(launch(checkout, PYTHON="", PATH=str(tools)))
    assert "there is no python3 here" in error and "apt-get install python3 python3-venv" in error


def test_a_place_that_cannot_be_written_to(checkout):
    (checkout / ".setup.lock").mkdir()
    assert f"{checkout} cannot be written to" in one_line(launch(checkout))


def test_the_real_requirements_are_pinned_and_met_here():
    """A Python that pip gave requirements.txt is found whole: a line that setup.sh cannot read would set up for ever."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [re.sub(r"==[0-9.]+$", "", line) for line in lines] == [
        "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "sentencepiece", "safetensors", "gguf",
        "gradio", "wandb", "matplotlib"]
    result = subprocess.run(["bash", "-c", 'source "$0" requirements.txt requirements-test.txt; echo "python $PYTHON"',
                             str(ROOT / "setup.sh")], capture_output=True, text=True, env=environment())
    assert (result.stdout, result.stderr) == (f"python {sys.executable}\n", "")
