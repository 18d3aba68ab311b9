"""What the task scripts share: prompt, data, loss, model, report, errors."""
import logging
import warnings

# bitsandbytes says these once an import or once a matrix product; a reader of a run's output can do nothing with them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
