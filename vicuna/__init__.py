"""What the task scripts share: prompt, data, loss, model, report, errors, launch."""
import logging
import os
import warnings

# Said once an import, a retry or a matrix product; what a reader of a run's output can do something with, we say.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
