"""vicuna/loss.py against transformers' own loss: the same value and gradients, whatever the batch's shape."""
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from vicuna import data, loss


def model(directory, dtype=torch.float32, targets=("q_proj", "v_proj")):
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
    return get_peft_model(base, LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))


def batch(rows=3, length=40, vocab=420):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, :5 + row] = data.IGNORE
        labels[row, length - 4 * row:] = data.IGNORE
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 4 * row:] = 0
    return ids, labels, mask


def gradients(peft_model):
    return {name: p.grad.clone() for name, p in peft_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "lm_head")])
@pytest.mark.parametrize("items", [None, 77])
def test_value_and_gradients_are_those_of_transformers(llama, monkeypatch, targets, items):
    monkeypatch.setattr(loss, "CHUNK", 16)  # several chunks and a rest
    ids, labels, mask = batch()
    theirs, ours = model(llama, targets=targets), model(llama, targets=targets)
    loss.use_label_loss(ours.base_model.model)
    expected = theirs(input_ids=ids, labels=labels, attention_mask=mask, num_items_in_batch=items).loss
    value = ours(input_ids=ids, labels=labels, num_items_in_batch=items).loss
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    (3 * expected).backward()
    (3 * value).backward()
    expected_gradients, got = gradients(theirs), gradients(ours)
    assert expected_gradients.keys() == got.keys() and len(got) >= 6
    for name in got:
        assert expected_gradients[name].abs().max() > 0
        torch.testing.assert_close(got[name], expected_gradients[name], rtol=2e-4, atol=1e-7)


def test_without_labels_the_models_own_forward_runs(llama):
    ids, _, mask = batch()
    theirs, ours = model(llama), loss.use_label_loss(model(llama).base_model.model)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids, attention_mask=mask).logits, ours(input_ids=ids, attention_mask=mask).logits)
        expected = theirs.generate(input_ids=ids[:1, :8], max_new_tokens=8, do_sample=False)
        assert torch.equal(expected, ours.generate(input_ids=ids[:1, :8], max_new_tokens=8, do_sample=False))


def test_a_batch_without_any_label_gives_zero(llama):
    ids, labels, _ = batch()
    ours = loss.use_label_loss(model(llama).base_model.model)
    value = ours(input_ids=ids, labels=torch.full_like(labels, data.IGNORE)).loss
    value.backward()
    assert value.item() == 0


def test_padding_changes_nothing(llama):
    ours = loss.use_label_loss(model(llama).base_model.model)
    examples = [{"input_ids": list(range(3, 3 + n)), "n_prompt": 2, "length": n} for n in (7, 12)]
    with torch.no_grad():
        alone = [ours(**data.collate([e]), num_items_in_batch=1).loss for e in examples]
        together = ours(**data.collate(examples, multiple=8), num_items_in_batch=1).loss
    torch.testing.assert_close(together, sum(alone))


def test_mean_loss_is_the_mean_over_all_labels(llama):
    from datasets import Dataset
    theirs, ours = model(llama), loss.use_label_loss(model(llama).base_model.model)
    ids = [torch.randint(3, 420, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 30, 5, 17, 12)]
    dataset = Dataset.from_list([{"input_ids": i, "n_prompt": 3, "length": len(i)} for i in ids])
    total, count = 0.0, 0
    theirs.eval()
    with torch.no_grad():
        for i in ids:
            logits = theirs(input_ids=torch.tensor([i])).logits[0, 2:-1].double()
            total -= logits.log_softmax(-1)[range(len(i) - 3), i[3:]].sum().item()
            count += len(i) - 3
    assert loss.mean_loss(ours, dataset, 2) == pytest.approx(total / count, rel=1e-5)


def test_mean_loss_is_the_same_for_any_number_of_processes(base, monkeypatch):
    """In 8 bits a record's loss depends on the batch it is in, so the batches must not depend on the processes."""
    from datasets import Dataset
    from vicuna import model as models
    config, _ = models.load_config(base)
    ours = loss.use_label_loss(models.load_base(base, config, 8, "cpu"))
    rows = [{"input_ids": list(range(50 + n, 50 + 3 * n)), "n_prompt": 2, "length": 2 * n} for n in range(3, 14)]
    dataset, totals = Dataset.from_list(rows), []
    alone = loss.mean_loss(ours, dataset, 4)
    monkeypatch.setattr(loss.dist, "all_reduce", lambda tensor: totals.append(tensor.clone()))
    for rank in range(3):
        loss.mean_loss(ours, dataset, 4, rank, 3)
    total, count = sum(totals).tolist()
    assert count == sum(row["length"] - 2 for row in rows) and total / count == pytest.approx(alone, rel=1e-6)
