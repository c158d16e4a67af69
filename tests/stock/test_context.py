# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import logging
import logging.handlers
import random
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER, TQDM
from ultralytics.utils.checks import print_args

from yolo_ext.checkpoint import fingerprint
from yolo_ext.runs import saved
from yolo_ext.stock.context import brief, cpu_info, evaluating, quiet, recalibrate, undisturbed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense() -> DetectionModel:
    torch.manual_seed(0)
    return DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()


def test_each_module_goes_back_to_its_own_mode(dense):
    model = deepcopy(dense)
    model.model[3].train()
    before = [m.training for m in model.modules()]
    with pytest.raises(ValueError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise ValueError
    assert [m.training for m in model.modules()] == before and any(before)


def test_random_generators_go_on_as_if_nothing_had_been():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = [draw(), draw()]
    random.setstate(state[0]), np.random.set_state(state[1]), torch.set_rng_state(state[2])
    first = draw()
    with pytest.raises(ZeroDivisionError), undisturbed(CPU):
        draw()
        1 / 0  # noqa: B018  also when it fails
    assert [first, draw()] == expected


def test_quiet_restores_the_logger_after_an_error():
    level = LOGGER.level
    with pytest.raises(ValueError), quiet():
        assert LOGGER.level >= 30
        raise ValueError
    assert LOGGER.level == level


def test_cpu_info():
    found = cpu_info()
    assert found["cpu"] and found["threads"] >= 1 and found["vnni"] in {True, False, None}
    assert {"avx2", "python", "torch", "onnx", "onnxruntime", "ultralytics"} < set(found)


# Recalibration -------------------------------------------------------------------------------------------------------
def batches(n: int) -> list[torch.Tensor]:
    return [torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(n)]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_are_those_of_the_data(dense, n, training):
    model = deepcopy(dense).train(training)
    assert recalibrate(model, iter(batches(n))) == 4 * n
    first = model.model[0]
    maps = [first.conv(x).detach() for x in batches(n)]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(first.bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.bn.running_var, var, rtol=1e-4, atol=1e-5)
    assert model.training is training
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}


def test_without_images_nothing_changes(dense):
    model = deepcopy(dense)
    assert recalibrate(model, []) == 0
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in model.state_dict().items())


def test_weights_and_gradients_are_not_touched(dense):
    model = deepcopy(dense)
    recalibrate(model, batches(1))
    assert fingerprint(model) == fingerprint(dense)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("verbose", [True, None, False])
def test_brief_keeps_warnings_ours_and_the_log(verbose, capsys, monkeypatch):
    log, console = logging.handlers.BufferingHandler(99), logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(LOGGER, "handlers", [console, log])
    monkeypatch.setattr(LOGGER, "level", logging.INFO)
    with brief(verbose):
        print_args({"a": 1}, show_file=False)  # a line of Ultralytics
        saved("ours")
        list(TQDM(range(2), desc="Bar"))
    print_args({"b": 2}, show_file=False)
    said = capsys.readouterr().out
    assert "ours" in said and "b=2" in said
    assert ("a=1" in said) == ("Bar" in said) == (verbose is not False)
    assert len(log.buffer) == 3


def test_no_flops_are_counted_on_uninitialised_memory_for_lines_that_nobody_sees(monkeypatch):
    counted = []
    net = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    monkeypatch.setattr(net, "forward", lambda *_: counted.append(1))
    with quiet():
        net.info()
    assert not counted
    net.info()
    assert counted
