"""finetune.py through its command line: what it trains and writes, what it proves, what it refuses."""
import gc
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from conftest import LLAMA_TOKENIZER, RECORDS, ROOT, clean_env, make_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file
from servers import model_hub
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

import finetune as script
from vicuna import model as models, prompt

QUICK = ["--test_size", 3, "--micro_batch_size", 2, "--batch_size", 4, "--num_epochs", 2, "--learning_rate", 0.02,
         "--warmup_steps", 0, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1]


def tree(directory):
    """What a directory holds: {name: contents}."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def check_adapter(output, base, records):
    """A peer's reading: PEFT's own from_pretrained on `output`, its logits those of our loader's model."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = torch.tensor([tokenizer.encode(records[0]["instruction"] + records[0]["output"])])
    config, _ = models.load_config(base)
    with torch.no_grad():
        peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), output).eval()
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)(input_ids=ids).logits
        ours = models.load_adapter(models.load_base(base, config, 16, "cpu"), output)
        logits = peer(input_ids=ids).logits
        assert torch.equal(logits, ours(input_ids=ids).logits)
        assert not torch.equal(logits, plain)


# --- what it does ---------------------------------------------------------------------------------------------------

def test_from_records_to_a_proven_adapter(finetune, llama, data_file, tmp_path):
    output = tmp_path / "out" / "lora"
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", output, "--bits", 16, *QUICK)
    assert result.status == 0, result.err
    assert "12 records" in result.out and "9 records, 3 held out; 6 steps of 4 records (2 at once)" in result.out
    assert "step 6/6  epoch 2.00" in result.out and "left" in result.out
    assert "its weights are not zero, its held-out loss is the trained one" in result.out
    assert result.err == ""

    run = json.loads((output / "run.json").read_text("utf-8"))
    figures = run["figures"]
    assert run["finished"] and run["settings"]["bits"] == 16 and run["settings"]["learning_rate"] == 0.02
    assert run["versions"]["torch"] == torch.__version__ and list(run["data"]) == [str(data_file)]
    assert figures["loss_after"] < figures["loss_before"] - 0.1
    assert [h["step"] for h in run["history"] if "eval_loss" in h] == [2, 4, 6]
    assert figures["loss_after"] == pytest.approx(min(h["eval_loss"] for h in run["history"] if "eval_loss" in h), abs=1e-6)
    assert len(run["answers"]) == 3 and {"expected", "before", "after"} <= set(run["answers"][0])
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")

    adapter = json.loads((output / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(llama)
    assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (8, 16, ["q_proj", "v_proj"])
    weights = load_file(output / "adapter_model.safetensors")
    assert len(weights) == 8 and all(name.startswith("base_model.model.model.layers.") for name in weights)
    # B starts at zero: what is not zero was learned.
    assert all(tensor.abs().max() > 1e-4 for name, tensor in weights.items() if "lora_B" in name)
    checkpoints = sorted(p.name for p in output.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for checkpoint in checkpoints:
        assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= set(os.listdir(output / checkpoint))
    best = load_file(output / f"checkpoint-{figures['best_step']}" / "adapter_model.safetensors")
    assert all(torch.equal(best[name], weights[name]) for name in weights)
    check_adapter(output, llama, RECORDS)


def test_with_llamas_real_tokenizer(finetune, data_file, tmp_path):
    if not LLAMA_TOKENIZER.is_file():
        pytest.skip("set LLAMA_TOKENIZER to a LLaMA's tokenizer.model to test with the real one")
    base = make_llama(tmp_path / "llama-real-tokenizer", LLAMA_TOKENIZER)
    output = tmp_path / "out"
    result = finetune("--data_path", data_file, "--model_path", base, "--output_path", output, *QUICK)
    assert result.status == 0, result.err
    assert "in 8 bits" in result.out
    figures = json.loads((output / "run.json").read_text("utf-8"))["figures"]
    assert figures["loss_before"] > 10 and figures["loss_after"] < figures["loss_before"] - 0.05  # ln 32000 = 10.4
    check_adapter(output, base, RECORDS)
    saved = AutoTokenizer.from_pretrained(output)
    assert saved.encode("def f():\n    return 1") == [1, 822, 285, 7295, 13, 1678, 736, 29871, 29896]  # Meta's own ids


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_embedded_base(finetune, base, data_file, tmp_path, bits):
    output = tmp_path / "out"
    result = finetune("--data_path", data_file, "--model_path", base, "--output_path", output, "--bits", bits, *QUICK[:-4],
                      "--learning_rate", 2e-3, "--eval_steps", 3, "--save_steps", 3, "--max_steps", 3)
    assert result.status == 0, result.err
    assert f"134,515,008 parameters in {bits} bits" in result.out
    run = json.loads((output / "run.json").read_text("utf-8"))
    figures = run["figures"]
    # the reference: transformers' own loss of the base, on the held-out records
    tokenizer, plain = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    total, count = 0, 0
    for row in run["answers"]:
        asked = tokenizer(prompt.alpaca(row["instruction"], row["input"])).input_ids
        answer = tokenizer(row["expected"]).input_ids + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(asked) + answer])
        with torch.no_grad():
            total += plain(input_ids=torch.tensor([asked + answer]), labels=labels).loss.item() * len(answer)
        count += len(answer)
    assert count > 6 and figures["loss_before"] == pytest.approx(total / count, abs={16: 0.03, 8: 0.4, 4: 0.8}[bits])
    assert figures["loss_after"] < figures["loss_before"] - 0.3
    if bits == 16:
        check_adapter(output, base, RECORDS)


@pytest.mark.parametrize("bits", [8, 4, 16])
def test_on_a_processor_without_bf16(finetune, llama, data_file, tmp_path, monkeypatch, bits):
    monkeypatch.setattr(models, "compute_dtype", lambda: torch.float32)
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / "out", "--bits", bits, *QUICK)
    assert result.status == 0 and f"in {bits} bits, float32, CPU" in result.out, result.err
    assert result.err == ""
    figures = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["figures"]
    assert figures["loss_after"] < figures["loss_before"] - 0.1


def test_the_trained_model_is_gone_before_the_fresh_base_is_loaded(finetune, llama, data_file, tmp_path, monkeypatch):
    """Or a card that just held the training would not hold the proof."""
    alive, load = [], models.load_base

    def counting_load(*args):
        alive.append(sum(type(thing).__name__ == "LlamaForCausalLM" and next(thing.parameters()).device.type != "meta"
                         for thing in gc.get_objects()))
        return load(*args)
    monkeypatch.setattr(models, "load_base", counting_load)
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / "out", "--bits", 8, *QUICK)
    assert result.status == 0, result.err
    assert len(alive) == 2 and alive[1] <= alive[0]


@pytest.mark.parametrize("bits", [16, 8])
def test_gradient_checkpointing_changes_memory_not_results(finetune, llama, data_file, tmp_path, monkeypatch, bits):
    """With it, each layer runs twice a step, and no layer's inputs are held in between: not by bitsandbytes either, whose
    int8 product keeps its input beside autograd's own saved tensors."""
    weights, calls, held = [], [], []
    plain = LlamaMLP.forward

    def counting(self, x):
        calls[-1] += torch.is_grad_enabled() or self.training
        return plain(self, x)
    monkeypatch.setattr(LlamaMLP, "forward", counting)
    step = script.LabelTrainer.compute_loss

    def looking(self, model, inputs, **kwargs):
        loss = step(self, model, inputs, **kwargs)
        held[-1] = max(held[-1], kept_beside_autograd(loss))
        return loss
    monkeypatch.setattr(script.LabelTrainer, "compute_loss", looking)
    for flag in ("--gradient_checkpointing", "--no-gradient_checkpointing"):
        output = tmp_path / flag
        calls.append(0), held.append(0)
        result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", output, "--bits", bits, *QUICK, flag)
        assert result.status == 0 and result.err == ""
        weights.append(load_file(output / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=0.05, atol=5e-3)
    assert calls[0] > 1.5 * calls[1] > 0
    assert held[0] == 0 and (held[1] > 0) == (bits == 8)


def kept_beside_autograd(loss):
    """Bytes of activations that the graph's nodes hold as plain attributes, where no checkpointing can free them."""
    seen, stack, total = set(), [loss.grad_fn], {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in [*(getattr(node, "tensors", None) or ()), getattr(node, "A", None)]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        stack += [following for following, _ in node.next_functions]
    return sum(total.values())


def test_the_best_is_chosen_among_the_saved(finetune, llama, data_file, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 5.0, 4.0, 2.5])  # at steps 1 to 6
    monkeypatch.setattr(script.LabelTrainer, "evaluate", evaluate_as(losses))
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / "out", "--bits", 16, *QUICK,
                      "--eval_steps", 1, "--save_steps", 3)
    assert result.status == 0, result.err
    # 3 and 6 are saved: 2.0 and 2.5; 1.0 at step 2 was never on the disk
    assert json.loads((tmp_path / "out" / "run.json").read_text())["figures"]["best_step"] == 3
    best, final = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out/checkpoint-3", tmp_path / "out"))
    assert all(torch.equal(best[name], final[name]) for name in best)


def evaluate_as(losses):
    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": next(losses)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
    return evaluate


def test_one_process_uses_one_card(finetune, llama, data_file, tmp_path, monkeypatch):
    """transformers would take all cards it sees into one process, and multiply batch and loss by their number."""
    real, results = script.TrainingArguments, []

    def with_cards(count):
        def make(**kwargs):
            made = real(**kwargs)
            made._n_gpu = count
            return made
        return make
    for count in (0, 4):
        monkeypatch.setattr(script, "TrainingArguments", with_cards(count))
        output = tmp_path / f"cards-{count}"
        result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", output, "--bits", 8, *QUICK)
        assert result.status == 0, result.err
        results.append([h for h in json.loads((output / "run.json").read_text())["history"] if "loss" in h])
    assert [h["step"] for h in results[1]] == [1, 2, 3, 4, 5, 6]
    assert [h["loss"] for h in results[0]] == [h["loss"] for h in results[1]]


def test_padding_is_to_the_longest_of_batches_grouped_by_length(finetune, llama, tmp_path, monkeypatch):
    rows = [{"instruction": f"{k}", "output": "x" * (1 + 40 * (k % 4))} for k in range(48)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    shapes, collate = [], script.data.collate
    monkeypatch.setattr(script.data, "collate",
                        lambda examples, multiple: shapes.append(examples) or collate(examples, multiple))
    result = finetune("--data_path", file, "--model_path", llama, "--output_path", tmp_path / "out", "--bits", 16,
                      "--test_size", 0, "--micro_batch_size", 4, "--batch_size", 8, "--num_epochs", 2)
    assert result.status == 0, result.err
    epochs = [[[e["record"] for e in examples] for examples in shapes[k:k + 12]] for k in (0, 12)]
    assert len(shapes) == 24 and all(sorted(sum(epoch, [])) == list(range(48)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    spread = [max(e["length"] for e in examples) - min(e["length"] for e in examples) for examples in shapes]
    assert sum(spread) / len(spread) < 12  # of lengths that spread over 120
    assert "training loss" in result.out and json.loads((tmp_path / "out/run.json").read_text())["figures"]["loss_on"] == "training"


def test_the_same_seed_gives_the_same_adapter(finetune, llama, data_file, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / name, "--seed", seed, *QUICK)
        assert result.status == 0, result.err
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_what_does_not_fit_the_data_is_said(finetune, llama, data_file, tmp_path):
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / "out", "--test_size", 3,
                      "--num_epochs", 1, "--bits", 16)
    assert result.status == 0, result.err
    assert "--batch_size 128 is more than the 9 training records: 8 is used" in result.out
    assert "--warmup_steps 100 is not less than the 2 steps of this run: 0 is used" in result.out
    assert "--eval_steps 200 is more than the 2 steps of this run: 2 is used" in result.out
    run = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
    assert run["settings"]["batch_size"] == 8 and run["figures"]["steps"] == 2


def leveldb_records(raw, offset):
    """The records of a file in LevelDB's log format: 32 KB blocks of (checksum 4, length 2, type 1, bytes)."""
    parts, position = [], 0
    while position + 7 <= len(raw):
        left = 32768 - (position + offset) % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(raw[position + 4:position + 6], "little"), raw[position + 6]
        parts.append(raw[position + 7:position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_wandb_logs_for_real_offline(finetune, llama, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / "out", "--wandb", *QUICK)
    assert result.status == 0, result.err
    import wandb
    wandb.teardown()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    from wandb.proto import wandb_internal_pb2
    seen = []
    for raw in leveldb_records(log.read_bytes()[7:], offset=7):  # wandb's own header has 7 bytes
        record = wandb_internal_pb2.Record.FromString(raw)
        seen += ["/".join(item.nested_key) or item.key for item in record.history.item]
    assert seen.count("train/loss") == 6 and seen.count("eval/loss") == 3 and "train/learning_rate" in seen


# --- what it does not overwrite -------------------------------------------------------------------------------------

def test_another_runs_result_is_kept_unless_told(finetune, llama, data_file, tmp_path):
    output = tmp_path / "out"
    args = ["--data_path", data_file, "--model_path", llama, "--output_path", output, "--bits", 16, *QUICK]
    assert finetune(*args).status == 0
    before = tree(output)
    refused = finetune(*args, "--seed", 7)
    assert refused.status == 2 and "holds another run's result" in refused.err and tree(output) == before
    assert finetune(*args, "--seed", 7, "--overwrite_output_dir").status == 0
    assert json.loads((output / "run.json").read_text())["settings"]["seed"] == 7
    assert tree(output)["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    # the same run may be done again, and gives the same
    again = tree(output)
    assert finetune(*args, "--seed", 7).status == 0
    assert tree(output)["adapter_model.safetensors"] == again["adapter_model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "records.json"]


def test_a_run_that_fails_loses_nothing_of_the_one_before(finetune, llama, data_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    args = ["--data_path", data_file, "--model_path", llama, "--output_path", output, "--bits", 16, *QUICK]
    assert finetune(*args).status == 0
    before = tree(output)
    monkeypatch.setattr(script.LabelTrainer, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert finetune(*args).status == 130
    assert tree(tmp_path / ".out.set-aside") == before
    # once more cut off, now with a checkpoint: the finished one is still there, and goes when a run is done
    (output / "checkpoint-2").mkdir()
    assert finetune(*args).status == 130
    assert tree(tmp_path / ".out.set-aside") == before
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", [])
    # whoever removes the cut-off one and trains anew, replaces nothing: what is set aside stays
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    elsewhere = tmp_path.with_name("copy")
    shutil.rmtree(elsewhere / "out")
    assert finetune(*args, "--output_path", elsewhere / "out").status == 0
    assert tree(elsewhere / ".out.set-aside") == before
    assert finetune(*args).status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "records.json"]


def test_of_two_runs_cut_off_the_one_that_came_further_is_kept(finetune, llama, data_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    args = ["--data_path", data_file, "--model_path", llama, "--output_path", output, "--bits", 16, *QUICK]
    monkeypatch.setattr(script.LabelTrainer, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    for step in (4, 2):
        assert finetune(*args).status == 130
        (output / f"checkpoint-{step}").mkdir()
    assert finetune(*args).status == 130
    assert (tmp_path / ".out.set-aside" / "checkpoint-4").is_dir()


def test_somebodys_own_copy_beside_is_not_touched(finetune, llama, data_file, tmp_path):
    for name in ("out.previous", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    args = ["--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / "out", "--bits", 16, *QUICK]
    assert finetune(*args).status == 0 and finetune(*args).status == 0
    assert sorted(tree(tmp_path / "out.previous")) == sorted(tree(tmp_path / "out.old")) == ["mine.txt"]


def test_files_that_are_no_run_are_never_replaced(finetune, llama, data_file, tmp_path):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.txt").write_text("years of work")
    for more in ([], ["--overwrite_output_dir"]):
        result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", output, *QUICK, *more)
        assert result.status == 2 and "no run of finetune.py" in result.err
    assert tree(output) == {"chapter.txt": b"years of work"}


# --- what it proves -------------------------------------------------------------------------------------------------

def damage_empty(file, weights):
    save_file({}, file)


def damage_zero(file, weights):
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, file)


def damage_other(file, weights):
    save_file({k: v * -3 for k, v in weights.items()}, file)


def damage_names(file, weights):
    save_file({k.replace("self_attn", "attention"): v for k, v in weights.items()}, file)


def damage_nan(file, weights):
    save_file({k: v * float("nan") for k, v in weights.items()}, file)


def damage_cut(file, weights):
    file.write_bytes(file.read_bytes()[:443])


@pytest.mark.parametrize("damage, why", [
    (damage_empty, "holds no tensors"), (damage_zero, "every lora_B is zero"), (damage_other, "is another one"),
    (damage_names, "do not match this base"), (damage_nan, "not finite"), (damage_cut, "missing or damaged")])
def test_a_bad_save_fails_loudly(finetune, llama, data_file, tmp_path, monkeypatch, damage, why):
    save = models.save_adapter

    def bad_save(model, tokenizer, directory):
        save(model, tokenizer, directory)
        if directory == output:  # not the checkpoints
            file = output / "adapter_model.safetensors"
            damage(file, load_file(file))
    output = tmp_path / "out"
    monkeypatch.setattr(models, "save_adapter", bad_save)
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", output, "--bits", 16, *QUICK)
    assert result.status == 1 and result.err.startswith("FAILED: ") and why in result.err
    assert "is the trained one" not in result.out and not json.loads((output / "run.json").read_text())["finished"]


# --- bad input: one line, exit status 2, nothing written ------------------------------------------------------------

def refused(finetune, tmp_path, *argv):
    """Calls finetune with one bad thing; checks that it is refused as it should be. Gives the line."""
    output = tmp_path / "not-written"
    argv = [str(a) for a in argv]
    result = finetune("--output_path", output, *argv)
    assert result.status == 2, result.out + result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1 and "Traceback" not in result.err + result.out
    assert not output.exists()
    return result.err


@pytest.mark.parametrize("flag, value, message", [
    ("--lora_r", 0, "--lora_r 0: must be 1 or more"), ("--learning_rate", -1e-4, "--learning_rate -0.0001: must be a number above 0"),
    ("--learning_rate", "nan", "--learning_rate nan: must be"), ("--learning_rate", "fast", "invalid float value: 'fast'"),
    ("--cutoff_len", 10, "the template alone has"), ("--micro_batch_size", 0, "must be 1 or more"),
    ("--batch_size", 6, "must be a multiple of --micro_batch_size 4"), ("--lora_dropout", 1, "from 0 to below 1"),
    ("--num_epochs", 0, "must be a number above 0"), ("--max_steps", 0, "1 or more, or -1"), ("--seed", -1, "from 0 to"),
    ("--bits", 3, "invalid choice"), ("--save_steps", 300, "must be a multiple of --eval_steps 200"),
    ("--test_size", 12, "--test_size 12 is not less than the 12 records"), ("--test_size", -1, "0 or more"),
    ("--test_size", "many", "invalid int value"), ("--lora_target_modules", "q_proj,query", "no layer is called query; this model "
     "has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"), ("--lora_target_modules", ",", "no layer"),
    ("--no_such_flag", 1, "unrecognized arguments"),
])
def test_bad_numbers(finetune, llama, data_file, tmp_path, flag, value, message):
    argv = ["--data_path", data_file, "--model_path", llama] + ["--test_size", 2] * (flag != "--test_size") + [flag, value]
    assert message in refused(finetune, tmp_path, *argv)


@pytest.mark.parametrize("text, message", [
    (None, "no such data file"), ("", "holds no records"), ("{]", "line 1, column 2"), ('[{"instruction": "x"}]', 'record 1 (line 1): has no "output"'),
    ('[{"instruction": "x", "output": ["y"]}]', '"output" is a list'), ('["x"]', "record 1 (line 1): is no object"),
    ('[{"instruction": "x", "output": ""}]', "every record was dropped"),
])
def test_bad_data(finetune, llama, tmp_path, text, message):
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    line = refused(finetune, tmp_path, "--data_path", file, "--model_path", llama)
    assert message in line and "bad.json" in line


def test_bad_bases(finetune, llama, data_file, tmp_path):
    def line(path):
        return refused(finetune, tmp_path, "--data_path", data_file, "--test_size", 2, "--bits", 16, "--model_path", path)

    def copy(name, **config):
        shutil.copytree(llama, tmp_path / name)
        values = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**values, **config}))
        return tmp_path / name

    assert "no such directory" in line(tmp_path / "nowhere")
    assert "is a file" in line(data_file)
    (tmp_path / "hollow").mkdir()
    assert "holds no config.json" in line(tmp_path / "hollow")
    assert 'is a "gpt2" model, not a LLaMA' in line(copy("gpt2", model_type="gpt2"))
    assert "quantized already" in line(copy("gptq", quantization_config={"quant_method": "gptq"}))
    assert "they do not belong together" in line(copy("small-vocabulary", vocab_size=100))
    for k, bad in enumerate(({"hidden_act": "nope"}, {"vocab_size": "x", "pad_token_id": 0}, {"hidden_size": 63},
                             {"rope_scaling": {"rope_type": "new"}})):
        assert "config.json: damaged" in line(copy(f"bad-config-{k}", **bad))
    broken = copy("broken-config")
    (broken / "config.json").write_text('{"model_type": "llama"')
    assert "damaged" in line(broken)
    for name, size in (("cut", 5000), ("empty", 0)):
        cut = copy(name)
        (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:size])
        assert "weights cannot be read, missing or damaged" in line(cut)
    gone = copy("gone")
    (gone / "model.safetensors").unlink()
    assert "weights cannot be read, missing or damaged" in line(gone)
    lacks = copy("lacks")
    weights = load_file(lacks / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacks / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in line(lacks)
    other = copy("other-shape", intermediate_size=256)
    assert "damaged" in line(other)
    no_tokens = copy("no-tokenizer")
    (no_tokens / "tokenizer.model").write_bytes(b"nothing of the kind")
    assert "its tokenizer cannot be read" in line(no_tokens)
    nan = copy("nan")
    save_file({k: v * float("nan") for k, v in load_file(nan / "model.safetensors").items()}, nan / "model.safetensors",
              metadata={"format": "pt"})
    assert "its weights are damaged" in line(nan)


def test_weights_that_are_code_are_refused(finetune, llama, data_file, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(llama, evil)
    (evil / "model.safetensors").unlink()

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)
    torch.save({"model.embed_tokens.weight": Code()}, evil / "pytorch_model.bin")
    line = refused(finetune, tmp_path, "--data_path", data_file, "--test_size", 2, "--bits", 16, "--model_path", evil)
    assert "evil" in line and not (tmp_path / "pwned").exists()


def test_bad_output_paths(finetune, llama, data_file, tmp_path, monkeypatch):
    args = ["--data_path", data_file, "--model_path", llama, "--bits", 16, *QUICK]
    for path, message in ((data_file, "is a file"), (data_file / "below", "cannot be written"), ("/proc/lora", "cannot be written")):
        result = finetune(*args, "--output_path", path)
        assert result.status == 2 and message in result.err and result.err.count("\n") == 1
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert finetune(*args, "--output_path", ".").status == 0  # an empty directory may be named so
    assert finetune(*args, "--output_path", ".").status in (0, 2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    assert "1 MB free on the disk" in refused(finetune, tmp_path, *args)


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory"), "the card's memory is full; a smaller --micro_batch_size"),
    (OSError(28, "No space left on device"), "the disk is full"),
    (RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file"), "the disk is full")])
def test_no_room_while_it_runs(finetune, llama, data_file, tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(script.LabelTrainer, "train", lambda self: (_ for _ in ()).throw(error))
    result = finetune("--data_path", data_file, "--model_path", llama, "--output_path", tmp_path / "out", "--bits", 16, *QUICK)
    assert result.status == 2 and message in result.err and result.err.count("\n") == 1


def test_an_unused_special_token_is_no_reason_to_refuse_a_base(finetune, llama, data_file, tmp_path):
    """Early LLaMA 2 copies have <pad> = 32000 and 32,000 rows."""
    padded = tmp_path / "padded"
    shutil.copytree(llama, padded)
    tokenizer = models.load_tokenizer(llama, models.load_config(llama)[0])[0]
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(padded)
    result = finetune("--data_path", data_file, "--model_path", padded, "--output_path", tmp_path / "out", "--bits", 16, *QUICK)
    assert result.status == 0, result.err
    tokenizer.add_tokens(["新词"])
    tokenizer.save_pretrained(padded)
    assert "they do not belong together" in refused(finetune, tmp_path, "--data_path", data_file, "--test_size", 2, "--model_path", padded)


# --- LLaMA-1's bad conversions --------------------------------------------------------------------------------------

def test_bad_conversions_of_llama_1_are_mended_in_memory(finetune, llama, data_file, tmp_path):
    bad = tmp_path / "llama-7b-hf"
    shutil.copytree(llama, bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0,
                                                 "eos_token_id": 1, "pad_token_id": -1}))
    (bad / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer",
        "model_max_length": 1000000000000000019884624838656}))
    before = tree(bad)
    output = tmp_path / "out"
    result = finetune("--data_path", data_file, "--model_path", bad, "--output_path", output, "--bits", 16, *QUICK)
    assert result.status == 0, result.err
    for said in ("class LLaMATokenizer, bos ''", "bos_token_id 0 of config.json is 1", "eos_token_id 1 of config.json is 2",
                 "pad_token_id -1 of config.json is no token"):
        assert said in result.out
    assert tree(bad) == before
    good = AutoTokenizer.from_pretrained(output)
    assert (good.bos_token_id, good.eos_token_id) == (1, 2) and good.encode("中文")[0] == 1


# --- bases from elsewhere -------------------------------------------------------------------------------------------

def test_base_from_the_hub(llama, data_file, tmp_path):
    """By a hub id, and again without the hub, from its cache; a name that the hub does not know is one line."""
    repository = tmp_path / "repository"
    shutil.copytree(llama, repository)
    for foreign in ("README.md", ".gitattributes", "original/consolidated.safetensors"):  # as real ones have
        (repository / foreign).parent.mkdir(exist_ok=True)
        (repository / foreign).write_text("not needed")
    with model_hub({"someone/tiny-llama": repository}) as hub:
        env = clean_env(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_XET="1")
        argv = [sys.executable, str(ROOT / "finetune.py"), "--data_path", str(data_file), "--bits", "16", *map(str, QUICK)]

        def call(model_path, output):
            return subprocess.run([*argv, "--model_path", model_path, "--output_path", str(tmp_path / output)], env=env,
                                  capture_output=True, text=True, timeout=300)
        fetched = call("someone/tiny-llama", "a")
        assert fetched.returncode == 0, fetched.stderr
        adapter = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "someone/tiny-llama"  # not a path of the cache
        unknown = call("someone/else", "b")
        assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1 and "Traceback" not in unknown.stderr
        assert "someone/else: no such directory, and the hub gave no such model" in unknown.stderr
    cached = call("someone/tiny-llama", "c")
    assert cached.returncode == 0 and cached.stderr == "", cached.stderr
    assert not any("README" in request or "consolidated" in request for request in hub.requests)
    assert (tmp_path / "c/adapter_model.safetensors").read_bytes() == (tmp_path / "a/adapter_model.safetensors").read_bytes()


def test_llama_3s_settings_are_kept(llama, data_file, finetune, tmp_path):
    """Rope scaling and tied embeddings, in the spelling of the hub's files, reach the model as transformers reads them."""
    directory = make_llama(tmp_path / "llama-3", llama / "tokenizer.model", tie_word_embeddings=True)
    values = json.loads((directory / "config.json").read_text())
    values.pop("rope_parameters", None)
    values.update(rope_theta=500000.0, rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                                     "original_max_position_embeddings": 64, "rope_type": "llama3"})
    (directory / "config.json").write_text(json.dumps(values))
    config, mended = models.load_config(directory)
    assert mended == [] and config.rope_parameters == AutoConfig.from_pretrained(directory).rope_parameters
    assert config.rope_parameters["rope_type"] == "llama3" and config.rope_parameters["rope_theta"] == 500000.0
    result = finetune("--data_path", data_file, "--model_path", directory, "--output_path", tmp_path / "out", "--bits", 16, *QUICK)
    assert result.status == 0, result.err
    check_adapter(tmp_path / "out", directory, RECORDS)


def test_weights_in_bin_shards(llama, data_file, finetune, tmp_path):
    """LLaMA-1's conversions are pytorch_model-0000N-of-0000M.bin; they are read as tensors alone."""
    directory = tmp_path / "bin"
    shutil.copytree(llama, directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, files = sorted(weights), {}
    for k in range(2):
        file = f"pytorch_model-0000{k + 1}-of-00002.bin"
        torch.save({name: weights[name] for name in names[k::2]}, directory / file)
        files.update({name: file for name in names[k::2]})
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    results = []
    for base in (llama, directory):
        result = finetune("--data_path", data_file, "--model_path", base, "--output_path", tmp_path / f"out-{base.name}", "--bits", 16, *QUICK)
        assert result.status == 0, result.err
        results.append(load_file(tmp_path / f"out-{base.name}" / "adapter_model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# --- the scripts as people type them --------------------------------------------------------------------------------

def test_launcher_passes_variables_and_arguments_on(llama, data_file, tmp_path):
    output = tmp_path / "out"
    env = clean_env(PYTHON=sys.executable, DATA_PATH=str(data_file), OUTPUT_PATH=str(output), MODEL_PATH=str(llama),
                    TEST_SIZE="4", TOT_CUDA="0")
    result = subprocess.run(["bash", str(ROOT / "finetune.sh"), "--bits", "16", "--num_epochs", "1", "--lora_r", "2"], env=env,
                            capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Set-up" not in result.stdout  # this Python has all, so nothing is set up
    settings = json.loads((output / "run.json").read_text("utf-8"))["settings"]
    assert (settings["test_size"], settings["lora_r"], settings["batch_size"]) == (4, 2, 8)
    several = subprocess.run(["bash", str(ROOT / "finetune.sh")], env={**env, "TOT_CUDA": "0,1,2,3"}, capture_output=True, text=True)
    assert several.returncode == 2 and "names GPU 0, this machine has 0" in several.stderr


def test_help_is_the_reference():
    result = subprocess.run([sys.executable, str(ROOT / "finetune.py"), "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == ""
    for flag, default in (("--micro_batch_size", 4), ("--batch_size", 128), ("--num_epochs", 3), ("--learning_rate", 0.0003),
                          ("--cutoff_len", 256), ("--lora_r", 8), ("--lora_alpha", 16), ("--lora_dropout", 0.05),
                          ("--lora_target_modules", "q_proj,v_proj"), ("--eval_steps", 200), ("--save_steps", 200), ("--bits", 8)):
        text = " ".join(result.stdout[result.stdout.rindex(flag + " "):].split())
        assert f"(default: {default})" in text[:250], flag


def test_launcher_with_two_cards(llama, data_file, tmp_path):
    """nvidia-smi is a stand-in that lists two cards; torch sees none, so two CPU processes train."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: RTX 2080 Ti'\necho 'GPU 1: RTX 2080 Ti'\n")
    (fake / "nvidia-smi").chmod(0o755)
    env = clean_env(PATH=f"{fake}:{os.environ['PATH']}", PYTHON=sys.executable, DATA_PATH=str(data_file), MODEL_PATH=str(llama),
                    OUTPUT_PATH=str(tmp_path / "out"), TEST_SIZE="4", TOT_CUDA="0,1", PORT="29518")
    launch = ["bash", str(ROOT / "finetune.sh"), "--num_epochs", "1"]
    two = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stdout + two.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["processes"] == 2
    for cards in ("0,2", "2", "1,5"):
        missing = subprocess.run(launch, env={**env, "TOT_CUDA": cards}, capture_output=True, text=True, timeout=60)
        assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "this machine has 2" in missing.stderr
    # a mistake under torchrun is told once, and keeps its status
    mistake = subprocess.run([*launch, "--lora_r", "0"], env={**env, "OUTPUT_PATH": str(tmp_path / "b")}, capture_output=True, text=True, timeout=120)
    assert mistake.returncode == 2 and mistake.stderr == "error: --lora_r 0: must be 1 or more\n", mistake.stderr
    assert not (tmp_path / "b").exists()


def test_a_python_without_the_packages_is_told_what_to_do():
    result = subprocess.run([sys.executable, "-S", str(ROOT / "finetune.py")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "bash setup.sh makes one that has" in result.stderr


def test_two_processes_train_as_one(finetune, llama, data_file, tmp_path):
    """torchrun with two CPU processes: the same batches in sum, so the same losses within rounding; one result."""
    args = [str(ROOT / "finetune.py"), "--data_path", str(data_file), "--model_path", str(llama), "--lora_dropout", "0",
            *map(str, QUICK), "--test_size", "4"]
    env = clean_env(OMP_NUM_THREADS="1")
    result = subprocess.run([sys.executable, "-m", "vicuna.launch", "--nproc_per_node=2", "--master_port=29517", *args,
                             "--output_path", str(tmp_path / "two")], capture_output=True, text=True, env=env, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("held-out loss of the base") == 1 and "CPU x 2" in result.stdout
    run = json.loads((tmp_path / "two" / "run.json").read_text("utf-8"))
    assert run["processes"] == 2 and run["figures"]["loss_after"] < run["figures"]["loss_before"] - 0.1
    alone = finetune(*args[1:], "--output_path", tmp_path / "one")
    assert alone.status == 0, alone.err
    one = json.loads((tmp_path / "one" / "run.json").read_text("utf-8"))
    for key in ("loss", "eval_loss"):
        losses = [[h[key] for h in r["history"] if key in h] for r in (one, run)]
        assert losses[0] == pytest.approx(losses[1], abs=0.01) and len(losses[0]) >= 2
