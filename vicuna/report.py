"""What a training run shows: a line per logging step, the loss curve, and what was learned."""
import math
import sys
import time

from transformers import TrainerCallback


class Progress(TrainerCallback):
    """A line every `logging_steps` and at every evaluation: loss, rate, speed, time left. Keeps the curve in `history`."""

    def __init__(self, records_per_step, show):
        self.records_per_step, self.show = records_per_step, show
        self.history = []  # {"step", "loss", "learning_rate"} or {"step", "eval_loss"}

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "eval_loss")
                if key in logs and math.isfinite(logs[key])}  # a step that fp16's loss scale skips has none
        if not kept:
            return
        self.history.append({"step": state.global_step, **kept})
        if not self.show:
            return
        where = f"  step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            print(f"{where}  held-out loss {logs['eval_loss']:.4f}", flush=True)
        else:
            done = state.global_step - self.first_step
            spent = time.monotonic() - self.start
            left = spent / max(done, 1) * (state.max_steps - state.global_step)
            print(f"{where}  epoch {state.epoch:.2f}  loss {logs['loss']:.4f}  rate {logs['learning_rate']:.1e}  "
                  f"{done * self.records_per_step / spent:.1f} records/s  {clock(left)} left", flush=True)


def plot_loss(history, name, loss_before, loss_after, file):
    """The curves of the training loss and of the loss called `name` ("held-out") over steps, as a PNG picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    trained = [(h["step"], h["loss"]) for h in history if "loss" in h]
    axes.plot([step for step, _ in trained], [loss for _, loss in trained], label="while training", color="tab:blue")
    evaluated = [(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    points = [(0, loss_before)] + (evaluated or [(history[-1]["step"] if history else 0, loss_after)])
    axes.plot(*zip(*points), "o-", label=name, color="tab:orange")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)


def learned(name, loss_before, loss_after, questions):
    """The closing table as text. `questions`: dicts with instruction, input, expected, before, after."""
    lines = ["", f"{name + ' loss':<16} before {loss_before:.4f}   after {loss_after:.4f}"]
    for number, question in enumerate(questions, 1):
        asked = question["instruction"] + (f" | {question['input']}" if question["input"].strip() else "")
        lines += ["", f"{number}. {_one_line(asked)}"]
        lines += [f"   {key:<9} {_one_line(question[key]) or '(nothing)'}" for key in ("expected", "before", "after")]
    return "\n".join(lines)


def clock(seconds):
    """93 -> 1:33, 5000 -> 1:23:20"""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory():
    """(bytes, what they are): the card's peak where there is one, else this process's peak resident size."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "card"
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), "process"


def _one_line(text, width=100):
    text = " ⏎ ".join(line.strip() for line in text.strip().splitlines())
    return text if len(text) <= width else text[:width - 1] + "…"
