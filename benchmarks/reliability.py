# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What yolo_ext promises of its reliability, each item with its figure.

    python benchmarks/reliability.py [only=kills,load] [images=20000] [folder=scratch]

Runs the tests that prove an item and reads the figure that they record, `record_property("reliability", "20 of 20")`;
where they record none, it counts them. Measures the load itself. Prints one line per item, and writes the table of
docs/reliability.md, where a run of some groups or items leaves the other rows. Exit status 1 where an item fails.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import psutil

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
PACKAGES = ("yolo-ext", "ultralytics", "torch", "torch-pruning", "onnxruntime")
TOP = """# Reliability

What is promised, what is done to prove it, and what came out. `python benchmarks/reliability.py` writes this page;
`only=` makes rows anew of some groups. A test is run by `python -m pytest -m "" TEST`.

{machine}

| group | item | what is done | figure | shown by |
|---|---|---|---|---|
"""


class Item(NamedTuple):
    """One row: its group, what is promised, what is done, and the tests that do it; without tests `load` does."""

    group: str
    name: str
    done: str
    tests: str = ""


FAULTS, GUEST = "tests/reliability/test_faults.py::test_", "tests/reliability/test_guest.py::test_"
KILLS, RESUME = "tests/integration/test_kills.py::test_", "tests/integration/test_exact_resume.py::test_"
SAFETY, WRONG = "tests/stock/test_safety.py::test_", "tests/integration/test_wrong_input.py::test_"
CHAINS = "tests/integration/test_chains.py::test_"
ITEMS = (
    Item("kills", "A save that is killed", "SIGKILL at 20 random moments of a process that saves without a pause; the "
         "file must load and be of one save", f"{FAULTS}a_save_that_is_killed_leaves_a_whole_file"),
    Item("kills", "A run that is killed", "SIGKILL at 20 random moments of compress (prune, fine-tune, QAT) in real "
         "processes, resumed until it is finished", f"{FAULTS}a_run_that_is_killed_ends_the_same"),
    Item("kills", "A training that is killed at any write", "stopped at each change of a file in turn, then resumed: "
         "the same weights and the same table", f"{KILLS}a_training_that_is_killed_anywhere_ends_the_same"),
    Item("kills", "A compress run that is killed at any write", "stopped at each change of a file in turn, then "
         "resumed: the same weights, no stage done twice", f"{KILLS}a_compress_run_that_is_killed_anywhere_goes_on"),
    Item("resume", "A run that was killed and resumed", "N + M epochs against N, SIGKILL, M, without dataloader "
         "workers: weights, optimizer, table; difference 0.0", f"{RESUME}killed_run_resumes_exactly "
         f"{RESUME}killed_twice_resumes_exactly {RESUME}the_moment_of_the_kill_does_not_matter"),
    Item("resume", "Pruning while training", "the same, killed before, in and behind the epochs that prune",
         f"{RESUME}pruning_while_training_resumes_exactly"),
    Item("faults", "A disk that is full at any write", "each file of a compress run fails once with ENOSPC, in real "
         "processes", f"{FAULTS}a_disk_that_is_full_at_any_write"),
    Item("faults", "A disk that is really full", "compress on a file system that is too small and grows step by step",
         f"{FAULTS}a_disk_that_is_really_full"),
    Item("faults", "A folder that cannot be written", "six commands on a file system that is mounted read-only",
         f"{FAULTS}a_folder_that_cannot_be_written"),
    Item("faults", "A loss that is not a number", "NaN in the epoch of a cut and in the next one, and with all "
         "techniques", "tests/integration/test_prune_training.py::test_loss_that_is_not_a_number_goes_back_to_the_"
         "pruned_checkpoint tests/integration/test_resume.py::test_nan_recovery_with_all_techniques"),
    Item("faults", "Out of memory", "in the first epoch, with optimizers that are kept or made anew: batch halved, "
         "nothing made twice", "tests/integration/test_out_of_memory.py"),
    Item("faults", "Two processes on one run", "the second one new, with `exist_ok`, `overwrite` and `resume`, for "
         "compress, train and label", f"{FAULTS}two_processes_on_one_run tests/core/test_lock.py"),
    Item("faults", "Inputs that change under a run", "other weights, images, labels, class names, records",
         f"{FAULTS}inputs_that_change_under_a_run tests/pipeline/test_inputs_and_damage.py"),
    Item("faults", "SIGTERM", "three times in one run of compress; then the bits of an unbroken run",
         f"{FAULTS}sigterm_is_ctrl_c {WRONG}a_command_that_is_terminated_stops_as_by_ctrl_c"),
    Item("faults", "A clock that jumps", "by days at each look, in a run that is killed and resumed",
         f"{FAULTS}a_clock_that_jumps_changes_nothing"),
    Item("files", "A pickle in the place of a model", "a file that runs code, given to every key that takes a model",
         f"{SAFETY}every_key_that_takes_a_model_is_a_route {SAFETY}a_command_loads_no_code "
         f"{SAFETY}files_that_run_something_are_refused {SAFETY}a_run_folder_holds_no_code"),
    Item("files", "Caches, YAML, lists", "label caches that are pickles, download scripts, alias bombs, activations "
         "that are code, paths that lead out", f"{SAFETY}a_cache_of_labels_is_data "
         f"{SAFETY}the_download_of_a_data_yaml_is_not_run {SAFETY}aliases_are_bounded "
         f"{SAFETY}an_activation_is_a_call_of_torch_nn {SAFETY}a_list_of_images_leads_nowhere_else "
         f"{SAFETY}a_name_in_a_coco_file_leads_nowhere_else"),
    Item("files", "ONNX files", "broken, oversized, with external data or unknown operators",
         f"{SAFETY}a_hostile_onnx_file_is_an_error {SAFETY}the_detector_refuses_a_hostile_onnx_file"),
    Item("guest", "Stock training beside yolo_ext", "`YOLO().train()` in a process that never imported yolo_ext, and "
         "behind import, commands, a trainer, compress and a detector",
         f"{GUEST}ultralytics_trains_to_the_same_bits_behind_each_step"),
    Item("guest", "Nothing is changed", "Ultralytics' modules and classes, settings, environment, torch, OpenCV, "
         "Matplotlib, NumPy, loggers, signals, warnings, paths", f"{GUEST}nothing_is_changed_or_left_behind_from_the_"
         f"import_on[CHANGED] {GUEST}nothing_of_ultralytics_is_changed"),
    Item("guest", "Nothing is left behind", "open files, temporary files, threads and processes",
         f"{GUEST}nothing_is_changed_or_left_behind_from_the_import_on[LEFT]"),
    Item("guest", "Detectors in threads", "two detectors, eight threads, against one thread",
         f"{GUEST}two_detectors_in_eight_threads_find_what_each_finds_alone"),
    Item("guest", "Detectors in processes", "started by fork and by spawn",
         f"{GUEST}a_detector_works_in_other_processes"),
    Item("guest", "Two models in one process", "with other techniques, trained in turns",
         f"{GUEST}two_models_that_are_trained_in_turns_do_not_mix"),
    Item("load", "Calibration", "`quantize` with all train images for calibration"),
    Item("load", "Sensitivity", "`sensitivity` over the val split"),
    Item("load", "Data check", "`data check`"),
    Item("load", "Labelling", "`label` of the train images"),
    Item("chains", "Legal chains", "subsets and orders of all techniques on a real model, saved, read and run again",
         f"{CHAINS}legal_chains_restore_exactly"),
    Item("chains", "Illegal chains", "refused with the exact reason", f"{CHAINS}illegal_commands_say_why_not "
         f"{CHAINS}what_is_exported_or_quantized_says_why_not {CHAINS}illegal_trainings_say_why_not"),
    Item("chains", "Properties", "of plans, cuts, quantizers, schedules, losses, formats and options (hypothesis)",
         "tests/pruning/test_pruning_properties.py tests/core/test_schedule_properties.py "
         "tests/quantization/test_quantizer_properties.py tests/core/test_config_properties.py "
         "tests/data/test_round_trip_properties.py tests/distillation/test_properties.py"),
    Item("rest", "Command lines at random", "no traceback, exit status 0, 1, 2 or 130", "tests/commands/test_fuzz.py"),
    Item("rest", "yolo-ext checks", "each step tried", "tests/commands/test_checks.py::test_every_step_is_tried"),
)  # fmt: skip


# Load -----------------------------------------------------------------------------------------------------------------
LOADS = {  # by item
    "Calibration": "quantize model={model} data={data} imgsz=64 device=cpu quant.mode=ptq quant.calib={train} "
    "quant.max_drop=1 quant.profile=ort-x86 save_dir={out}",
    "Sensitivity": "sensitivity model={model} data={data} imgsz=64 ratios=0.5 prune.include=model.4 save_dir={out}",
    "Data check": "data check={data} save_dir={out}",
    "Labelling": "label model={model} source={source} imgsz=64 device=cpu out={out}",
}
SIDE, FEWER = 64, 10  # pixels of an image, and the share of the images that the peak is compared with


def peak(words: list[str]) -> float:
    """Run a command line in a process of its own; return the most memory that it or one of its workers held, in MB."""
    process, most = psutil.Popen([sys.executable, "-m", "yolo_ext", *words], stdout=subprocess.DEVNULL), 0.0
    while process.poll() is None:
        for p in (process, *process.children(recursive=True)):
            with suppress(OSError, IndexError):  # it has just ended
                status = Path(f"/proc/{p.pid}/status").read_text(encoding="utf-8")
                most = max(most, int(status.split("VmHWM:")[1].split()[0]) / 1e3)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"This failed: yolo-ext {' '.join(words)}")
    return most


def load(images: int, folder: Path, names: list[str]) -> Iterator[tuple[str, str, bool]]:
    """Yield the name, the figure and the outcome of each command on a generated set, against a tenth of the images."""
    from ultralytics import YOLO

    from yolo_ext.data.shapes import make_shapes

    counts, model = (images // FEWER, images), folder / "model" / "weights" / "best.pt"
    sets = {n: make_shapes(folder / str(n), train=n * 9 // 10, val=n // 10, imgsz=SIDE) for n in counts}
    if not model.exists():
        given = {"epochs": 4, "imgsz": SIDE, "batch": 32, "workers": 0, "device": "cpu", "plots": False}
        YOLO("yolov8n.yaml").train(data=str(sets[counts[0]]), save_dir=str(model.parents[1]), exist_ok=True, **given)
    for name in names:
        found = []
        for n, data in sets.items():
            source, out = data.parent / "images" / "train", folder / f"{name} {n}"
            shutil.rmtree(out, ignore_errors=True)
            place = {"model": model, "data": data, "train": n * 9 // 10, "source": source, "out": out}
            found.append(peak([word.format(**place) for word in LOADS[name].split()]))
        few, many = found
        more = many / few - 1
        yield name, f"{many:.0f} MB, {few:.0f} MB with {counts[0]:,} images: {more:+.1%}", more <= 0.1


# Tests ----------------------------------------------------------------------------------------------------------------
def tested(items: list[Item]) -> Iterator[tuple[str, str, bool]]:
    """Yield the name, the figure and the outcome of each item that tests prove."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.xml"
        ids = dict.fromkeys(word for item in items for word in item.tests.split())
        words = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--strict-markers", f"--junitxml={file}", *ids]
        subprocess.run(words, cwd=ROOT, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        cases = [*ElementTree.parse(file).iter("testcase")] if file.exists() else []
    for item in items:
        starts = tuple(
            f"{word.removesuffix('.py').replace('/', '.').replace('.py::', '::')}" for word in item.tests.split()
        )
        own = [case for case in cases if f"{case.get('classname')}::{case.get('name')}".startswith(starts)]
        if own:  # or it was stopped before: what was found last time stays
            yield item.name, *outcome(own)


def outcome(cases: list[ElementTree.Element]) -> tuple[str, bool]:
    """Return the figures that test cases recorded, or how many passed, and whether all did."""
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [found.get("message", "") for case in cases if (found := case.find("skipped")) is not None]
    ran = len(cases) - len(skipped)
    if wrong or not ran:
        return f"**failed**: {len(wrong)} of {ran} cases" if ran else f"not run: {skipped[0]}", not wrong
    said = [p.get("value", "") for case in cases for p in case.iter("property") if p.get("name") == "reliability"]
    others = [f"{ran - len(said)} {'more ' if said else ''}cases hold"] if ran > len(said) else []
    return "; ".join([*dict.fromkeys(said), *others]), True


# Page -----------------------------------------------------------------------------------------------------------------
def machine() -> str:
    """Return what the figures were taken on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.partition(": ")[2] for line in info.splitlines() if line.startswith("model name")), "")
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)])
    return f"{platform.system()}, {cpu or platform.machine()}, {len(os.sched_getaffinity(0))} cores. {versions}."


def row(item: Item, figure: str, images: int) -> str:
    """Return the row of an item."""
    shown = "<br>".join(f"`{word}`" for word in item.tests.split()) or "`python benchmarks/reliability.py only=load`"
    done = item.done if item.tests else f"{item.done}, {images:,} images of {SIDE} px: peak memory"
    return f"| {item.group} | {item.name} | {done} | {figure} | {shown} |"


def main() -> None:
    args = {"images": "20000", **dict(a.split("=", 1) for a in sys.argv[1:])}
    names = {name for item in ITEMS for name in (item.group, item.name)}
    wanted = {*args["only"].split(",")} if "only" in args else names
    if unknown := wanted - names:
        raise SystemExit(f"Unknown items {sorted(unknown)}. Legal: {', '.join(sorted(names))}.")
    chosen, images, failed = [i for i in ITEMS if {i.group, i.name} & wanted], int(args["images"]), False
    with tempfile.TemporaryDirectory() as tmp:
        found = [*(tested(tests) if (tests := [i for i in chosen if i.tests]) else ())]
        loads = [i.name for i in chosen if not i.tests]
        found += load(images, Path(args.get("folder", tmp)).resolve(), loads) if loads else []
    before = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    rows = {line.split(" | ")[1]: line for line in before if line.startswith("| ")}
    for name, figure, passed in found:
        item = next(i for i in ITEMS if i.name == name)
        rows[name] = row(item, figure, images)
        failed |= not passed
        print(f"{item.group}: {name}: {figure}", flush=True)
    page = [rows[i.name] for i in ITEMS if i.name in rows]
    PAGE.write_text(TOP.format(machine=machine()) + "\n".join(page) + "\n", encoding="utf-8")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
