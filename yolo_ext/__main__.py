# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext` and `python -m yolo_ext`: a process that shows no traceback, from its first import to its last line."""

import os
import sys


def start() -> int:
    """Run the command line of this process, and return its exit status."""
    try:
        import logging

        from yolo_ext.cli import main

        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime would tell its makers what it runs
        logging.raiseExceptions = False  # about a line that a full disk does not take
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # what a terminal does not know is no error
        status = main()
    except KeyboardInterrupt:
        status = 130
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads any more, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


if __name__ == "__main__":
    sys.exit(start())
