# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`python -m yolo_ext` is `yolo-ext`."""

import sys

from yolo_ext.cli import main

sys.exit(main())
