"""torchrun for a script of ours: several processes, whose mistake is told once and whose exit status is kept.

    python -m vicuna.launch --nproc_per_node=4 --master_port=12345 finetune.py --data_path merge.json

Takes torchrun's arguments. torchrun itself ends with a report of some thirty lines and status 1 when a process ends with
a status other than 0, whatever that process has said.
"""
import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # the agent's own lines about a process that ended
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        sys.exit(max(1, error.get_first_failure()[1].exitcode))
    except KeyboardInterrupt:
        sys.exit(130)
