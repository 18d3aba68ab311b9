"""The training loss, computed only where a label stands.

A LLaMA's head is its largest matrix (32,000 to 128,000 rows), and an instruction's prompt carries no label. So the head
is multiplied only with the positions that have one, a few hundred at a time, and the gradient with respect to the hidden
state is taken in the same pass: the logits, the largest tensor of a training step, are never kept. This is exact: the
loss and its gradients are those of transformers' `ForCausalLMLoss`, up to rounding.
(The idea of taking the gradient in the forward pass: Hsu et al., "Liger Kernel", arXiv:2410.10989, section 3.2.)
"""
import functools
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from vicuna.data import IGNORE, collate

CHUNK = 256  # positions whose logits exist at a time: 256 x 32,000 x 4 bytes = 33 MB


class _HeadLoss(torch.autograd.Function):
    """Sum over positions of -log softmax(hidden @ weight.T)[label].

    hidden (n, dim), weight (vocab, dim) frozen, labels (n,) int64, none of them IGNORE. Gives a float32 scalar.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        needs_grad = ctx.needs_input_grad[0]
        # float32, so that under fp16 the small gradients survive until the loss scale is multiplied in
        grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            label = labels[rows, None]
            log_p = F.log_softmax((hidden[rows] @ weight.T).float(), dim=-1)  # (chunk, vocab)
            total -= log_p.gather(1, label).sum()
            if needs_grad:
                p = log_p.exp_()
                p.scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))  # softmax - onehot
                grad[rows] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(ctx.dtype), None, None


def label_loss(hidden, head, labels, num_items_in_batch=None):
    """Cross entropy of the next token, over the positions that have a label.

    hidden: (batch, length, dim), the last hidden states. head: the model's `lm_head`. labels: (batch, length), IGNORE
    where nothing counts, position i predicting label i + 1 as everywhere in transformers. Divided by
    `num_items_in_batch` (the labels of the whole accumulated batch), or by the labels here. A float32 scalar.
    """
    labels = labels[:, 1:]
    counts = labels != IGNORE
    hidden, labels = hidden[:, :-1][counts], labels[counts]
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        total = _HeadLoss.apply(hidden.to(head.weight.dtype), head.weight, labels)
    else:  # a head with a LoRA of its own, or a quantized one: autograd's plain way
        total = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else max(len(labels), 1))


def use_label_loss(model):
    """Gives a LlamaForCausalLM the loss of this file: `model(input_ids, labels=...)` returns `.loss` and no logits.

    Without labels the model's own forward runs. No attention mask is taken with labels: batches are padded on the
    right, where a causal model's real tokens never look, which leaves attention its fastest path.
    """
    plain_forward = model.forward

    @functools.wraps(type(model).forward)  # the Trainer and generate() look at the signature
    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return plain_forward(input_ids=input_ids, **kwargs)
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return CausalLMOutputWithPast(loss=label_loss(hidden, self.lm_head, labels, num_items_in_batch))

    model.forward = types.MethodType(forward, model)
    return model


@torch.no_grad()
def mean_loss(model, dataset, batch_size, rank=0, world_size=1):
    """Mean loss a token over a whole data set (`vicuna.data` examples), by a model with `use_label_loss`. A float.

    With `world_size` processes, each calls it with its own rank and takes its share; all get the same figure.
    """
    was_training = model.training
    model.eval()
    lengths = dataset["length"][:]
    order = sorted(range(len(dataset)), key=lengths.__getitem__)
    # The batches are the same for any number of processes: in 8 bits a record's loss depends on its batch.
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)][rank::world_size]
    device = next(model.parameters()).device
    dtype = model.get_input_embeddings().weight.dtype
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of labels
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for rows in batches:
            batch = collate([dataset[k] for k in rows])
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}, num_items_in_batch=1).loss
            total += torch.tensor([loss.item(), (batch["labels"][:, 1:] != IGNORE).sum().item()])
    if world_size > 1:
        total = total.to(device)
        dist.all_reduce(total)
    model.train(was_training)
    return (total[0] / total[1]).item()
