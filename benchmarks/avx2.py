# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Measure as on an AVX2 CPU without VNNI, on one that has it: copies of runtimes that see no AVX-512, VNNI or AMX.

    python benchmarks/avx2.py FOLDER onnxruntime [openvino]
    PYTHONPATH=FOLDER python benchmarks/quantization.py ...

A runtime chooses its kernels by the CPUID instruction, which no setting of ONNX Runtime covers. In the copies every
CPUID of the shared libraries is an undefined instruction of the same length; a handler, loaded by the folder's
`sitecustomize`, answers in its place and clears the bits of what an AVX2 CPU lacks. All other code runs natively, so
that times and the saturation of `vpmaddubsw` are real ones of the AVX2 kernels. The same instruction as a trap of
their own, where a compiler marks what cannot be reached, would go unnoticed. Linux on x86-64 with gcc and objdump.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

HANDLER = r"""
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stddef.h>
#include <ucontext.h>

/* Bits of CPUID leaf 7 (Intel SDM, volume 2A) that AVX2 CPUs without VNNI do not have. */
static const unsigned SUB0_EBX = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
static const unsigned SUB0_ECX = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
static const unsigned SUB0_EDX = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;
static const unsigned SUB1_EAX = 1u << 4 | 1u << 5 | 1u << 21 | 1u << 23;
static const unsigned SUB1_EDX = 1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19;

static void answer(int signal_number, siginfo_t *info, void *context) {
    greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)reg[REG_RIP];
    unsigned leaf = (unsigned)reg[REG_RAX], sub = (unsigned)reg[REG_RCX], a, b, c, d;
    if (at[0] != 0x0f || at[1] != 0x0b) { signal(signal_number, SIG_DFL); return; }
    __cpuid_count(leaf, sub, a, b, c, d);
    if (leaf == 7 && sub == 0) { b &= ~SUB0_EBX; c &= ~SUB0_ECX; d &= ~SUB0_EDX; }
    if (leaf == 7 && sub == 1) { a &= ~SUB1_EAX; d &= ~SUB1_EDX; }
    reg[REG_RAX] = a; reg[REG_RBX] = b; reg[REG_RCX] = c; reg[REG_RDX] = d;
    reg[REG_RIP] += 2;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {0};
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, NULL);
}
"""
CPUID, UNDEFINED = b"\x0f\xa2", b"\x0f\x0b"


def text_offset(library: Path) -> int:
    """Return address minus file offset of the section `.text`."""
    headers = subprocess.run(["objdump", "-h", library], capture_output=True, text=True, check=True).stdout
    fields = re.search(r"\.text\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)", headers)
    return int(fields[2], 16) - int(fields[4], 16)


def mask(library: Path) -> int:
    """Replace every CPUID instruction of `.text` and return how many there were; found by disassembly, not by bytes."""
    listing = subprocess.Popen(
        ["objdump", "-d", "-j", ".text", "--no-show-raw-insn", library], stdout=subprocess.PIPE, text=True
    )
    shift = text_offset(library)
    places = [int(line.split(":")[0], 16) - shift for line in listing.stdout if line.rstrip().endswith("\tcpuid")]
    code = bytearray(library.read_bytes())
    for place in places:
        if code[place : place + 2] != CPUID:
            raise RuntimeError(f"{library}: no CPUID at file offset {place:#x}.")
        code[place : place + 2] = UNDEFINED
    library.write_bytes(code)
    return len(places)


def main(folder: str, *packages: str) -> None:
    out = Path(folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "cpuid.c").write_text(HANDLER)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", out / "cpuid.so", out / "cpuid.c"], check=True)
    (out / "sitecustomize.py").write_text(f"import ctypes\n\nctypes.CDLL({str(out / 'cpuid.so')!r})\n")
    for package in packages:
        source = Path(importlib.util.find_spec(package).origin).parent
        shutil.copytree(source, out / package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        for library in sorted((out / package).rglob("*.so*")):
            if found := mask(library):
                print(f"{package}: {library.name}: {found} CPUID instructions replaced")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
