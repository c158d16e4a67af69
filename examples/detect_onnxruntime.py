# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A detector with ONNX Runtime, NumPy and OpenCV: python detect_onnxruntime.py int8.onnx shot.jpg [0.25].

It stands by itself: neither torch nor Ultralytics nor this package is imported. For detect models with fixed size and
without embedded NMS. `yolo_ext.deployment.Detector` does the same for all tasks, sizes and heads.
"""

import ast
import sys

import cv2
import numpy as np
import onnxruntime as ort

file, picture, conf = sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.25
session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
entry = session.get_inputs()[0]
height, width = entry.shape[2:]

# The picture, scaled into a grey frame of the size of the network, RGB, 0 to 1
image = cv2.imread(picture)
gain = min(height / image.shape[0], width / image.shape[1])
w, h = round(image.shape[1] * gain), round(image.shape[0] * gain)
left, top = round((width - w) / 2 - 0.1), round((height - h) / 2 - 0.1)
frame = np.full((height, width, 3), 114, np.uint8)
frame[top : top + h, left : left + w] = cv2.resize(image, (w, h))
batch = frame[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255

# (1, 4 + classes, anchors): centre and size in pixels of the frame, a score for each class
rows = session.run(None, {entry.name: batch})[0][0].T
classes, scores = rows[:, 4:].argmax(1), rows[:, 4:].max(1)
sure = scores > conf
centres, sizes = rows[sure, :2], rows[sure, 2:4]
boxes = np.concatenate([centres - sizes / 2, sizes], 1)
kept = cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores[sure].tolist(), classes[sure].tolist(), conf, 0.7)

for i in kept:
    x, y, w, h = (boxes[i] - [left, top, 0, 0]) / gain
    print(f"{names[classes[sure][i]]} {scores[sure][i]:.3f} {x:.1f} {y:.1f} {x + w:.1f} {y + h:.1f}")
