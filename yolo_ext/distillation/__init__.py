# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Knowledge distillation as a criterion around the task's own criterion; the student stays a plain model."""
