# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Knowledge distillation as a criterion around the task's own criterion; the student stays a plain model."""

from yolo_ext.distillation.criterion import DistillationLoss, Distiller
from yolo_ext.distillation.features import feature_losses
from yolo_ext.distillation.logits import HeadOutput, logit_losses
