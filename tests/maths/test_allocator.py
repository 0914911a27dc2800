"""The allocator: freed memory is kept within a block, given back after it, and the user's own."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dreamkit import allocator, runner
from dreamkit.allocator import freed_memory_kept, give_back
from dreamkit.api.networks import View
from dreamkit.api.session import Conditions, session
from dreamkit.latency.torch_eager import TorchCPU
from dreamkit.out_of_memory import give_back_memory
from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.recipe.bundled import find_recipe
from dreamkit.registry import Term
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan, Regularizer

glibc_only = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="this system's C library is not glibc"
)
PRELUDE = """
import ctypes, json, resource, threading
from dreamkit.allocator import freed_memory_kept, give_back

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def touched(mib):
    block = bytearray(mib * 2**20)  # calloc leaves new pages alone; writing touches them
    block[::4096] = bytes([1]) * len(block[::4096])
    return block

def faults(mib=64, times=4):
    touched(mib)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        touched(mib)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
FRESH = 4 * 64 * 2**20 // mmap.PAGESIZE
"""Faults of four blocks of 64 MiB that the system gives page by page."""


def measured(text, **environment):
    """Run a script in a fresh process and return what it prints, as JSON."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    script = PRELUDE + textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**given, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@glibc_only
def test_large_blocks_are_not_asked_of_the_system_again():
    before, within, after, small = measured("""
        found = [faults()]
        with freed_memory_kept():
            found.append(faults())
        found.append(faults())
        found.append(faults(mib=16))
        print(json.dumps(found))
    """)
    assert before > 0.9 * FRESH
    assert within < 0.01 * FRESH
    assert after > 0.9 * FRESH, "it ends with the block"
    assert small < 0.01 * FRESH, "as in a process that has run for a while"


@glibc_only
def test_what_was_kept_is_given_back():
    start, kept, given, after = measured("""
        found = [resident()]
        with freed_memory_kept():
            blocks = [touched(8) for _ in range(32)]
            last = touched(8)  # the heap's end
            del blocks
            found.append(resident())
            give_back()
            found.append(resident())
            blocks = [touched(8) for _ in range(32)]
            del blocks
        found.append(resident())
        print(json.dumps(found))
    """)
    assert kept - start > 250
    assert given - start < 40
    assert after - start < 40


@glibc_only
def test_blocks_within_blocks():
    inner, outer, after = measured("""
        with freed_memory_kept():
            with freed_memory_kept():
                found = [faults()]
            found.append(faults())
        found.append(faults())
        print(json.dumps(found))
    """)
    assert max(inner, outer) < 0.01 * FRESH
    assert after > 0.9 * FRESH


@glibc_only
def test_blocks_of_several_threads():
    beside, after = measured("""
        opened, leave = threading.Event(), threading.Event()

        def other():
            with freed_memory_kept():
                opened.set()
                leave.wait()

        thread = threading.Thread(target=other)
        with freed_memory_kept():
            thread.start()
            opened.wait()
        found = [faults()]
        leave.set()
        thread.join()
        found.append(faults())
        print(json.dumps(found))
    """)
    assert beside < 0.01 * FRESH, "another thread's block is still open"
    assert after > 0.9 * FRESH


@glibc_only
def test_an_error_ends_a_block_too():
    (after,) = measured("""
        try:
            with freed_memory_kept():
                raise ValueError
        except ValueError:
            print(json.dumps([faults()]))
    """)
    assert after > 0.9 * FRESH


@glibc_only
@pytest.mark.parametrize(
    "environment",
    [
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576:glibc.malloc.check=0"},
        {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    ],
)
def test_the_users_own_settings_stay(environment):
    (within,) = measured(
        """
        with freed_memory_kept():
            print(json.dumps([faults()]))
        """,
        **environment,
    )
    assert within > 0.9 * FRESH


@glibc_only
def test_memory_stays_flat_while_sizes_alternate():
    first, last = measured("""
        found = []
        with freed_memory_kept():
            for turn in range(40):
                sizes = (3, 17, 40, 9) if turn % 2 else (5, 11, 70, 33, 2)
                blocks = [touched(mib) for mib in sizes]
                kept = blocks[0]
                del blocks
                found.append(resident())
        print(json.dumps([max(found[:4]), max(found[4:])]))
    """)
    assert last < first + 20


@pytest.mark.parametrize(
    "answer", [object(), SimpleNamespace(gnu_get_libc_version=None), OSError(), TypeError()]
)
def test_other_c_libraries_are_left_alone(monkeypatch, answer):
    def load(name):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ctypes, "CDLL", load)
    with freed_memory_kept():
        assert allocator._blocks.open == 0
    give_back()
    give_back_memory()


@glibc_only
def test_it_is_kept_while_it_dreams_and_while_it_times(toys):
    seen = []

    class Watching(Regularizer):
        def __call__(self, step):
            seen.append(allocator._blocks.open)
            return 0 * step.images.sum()

    given = DeepInversion(
        regularizers=(Term("watching", 1.0, Watching()),),
        images=4,
        batch_size=4,
        stages=(Stage(1),),
        engine=Engine(compile=False),
    )
    with given.session(toys.teacher(toys.two_bn()), torch.device("cpu")) as session:
        session.dream(BatchPlan(0, 0, 4, 1), lambda *_: None)

    class Layer(torch.nn.Module):
        def forward(self, x):
            seen.append(allocator._blocks.open)
            return x

    TorchCPU(warmup=0, repeats=3).time([(Layer(), torch.zeros(1))])
    assert len(seen) > 2
    assert min(seen) > 0
    assert allocator._blocks.open == 0


@glibc_only
def test_it_is_kept_for_a_whole_run_and_a_whole_call(toys, tmp_path, monkeypatch):
    seen = []

    def look(*_):
        seen.append(allocator._blocks.open)

    monkeypatch.setattr(runner, "_run", look)
    loaded = read_recipe(find_recipe("quickstart"), build_registries)
    runner.run(loaded, tmp_path / "run", Console(quiet=True))
    with session(toys.teacher(toys.two_bn()), Conditions(View())):
        look()
    assert seen == [1, 1]
    assert allocator._blocks.open == 0
