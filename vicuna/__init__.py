"""What the task scripts share: prompt, data, loss, model, report, errors."""
import logging
import warnings

# Said once an import, a retry or a matrix product; what a reader of a run's output can do something with, we say.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
