"""Errors that a user reads: one line, exit status 2, no traceback."""
import argparse
import os
import sys
import time


class UserError(Exception):
    """Something the user can mend. The text says what is wrong, where, and what to do, in one line."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaint is one line, like every other error here, and whose help shows the defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        first_speaks()
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def run(main):
    """Calls `main()` as a script's body and exits: a UserError gives its line on stderr and status 2, Ctrl-C gives 130."""
    try:
        main()
    except UserError as error:
        first_speaks()
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def first_speaks():
    """Under torchrun all processes meet the same mistake: the first tells it, and its end ends the others meanwhile."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(20)
