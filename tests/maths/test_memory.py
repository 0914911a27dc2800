"""Memory: how much there is, that it ran out, and what is said then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.errors import DreamkitError, OutOfMemory
from dreamkit.evaluation.accuracy import predict
from dreamkit.memory import available_memory, largest_batch
from dreamkit.out_of_memory import InParts, enough_memory, is_out_of_memory
from dreamkit.stages.dreaming import dream_into_store
from dreamkit.stages.teaching import train_student
from dreamkit.training.distillation import Distillation

CPU = torch.device("cpu")
GIB = 2**30
REFUSED = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(REFUSED),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_ran_out_is_known_by_its_words(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("could not create a primitive descriptor for a convolution"),
        ValueError("out of memory, says somebody"),
        OSError(28, "No space left on device"),
    ],
)
def test_other_errors_are_not_of_memory(error):
    assert not is_out_of_memory(error)


def scarce(limit):
    """Return a function of images that refuses more than so many, and the sizes it was given."""
    sizes = []

    def function(images):
        sizes.append(len(images))
        if len(images) > limit:
            raise RuntimeError(REFUSED)
        return 2 * images

    return function, sizes


def test_what_does_not_fit_is_computed_in_parts():
    function, sizes = scarce(3)
    in_parts, images = InParts(function), torch.arange(10.0)
    assert torch.equal(in_parts(images), 2 * images)
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    in_parts(images)
    assert sizes[7:] == [2] * 5, "it remembers"


def test_one_image_that_does_not_fit_is_an_error():
    with pytest.raises(RuntimeError, match="alloc_cpu"):
        InParts(scarce(0)[0])(torch.zeros(2))


def test_the_largest_batch_where_the_allocator_refuses():
    tried = []

    def trial(size):
        tried.append(size)
        if size > 4:
            raise RuntimeError(REFUSED)

    assert 1 <= largest_batch(trial, 64, CPU) <= 4
    assert tried[0] == 8


def test_errors_of_a_trial_that_are_not_of_memory_stay_as_they_are():
    def trial(size):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        largest_batch(trial, 64, CPU)


def test_the_message_names_the_option():
    with pytest.raises(OutOfMemory) as caught, enough_memory("training", "lower it", ("batch",)):
        raise RuntimeError(REFUSED)
    assert caught.value.path == ("batch",)
    assert "memory ran out while training: lower it" in caught.value.message


# --- how much there is ------------------------------------------------------------------------


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A machine with 64 GiB to spare, of which the process has 1."""
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    status = f"VmSize:\t{2 * GIB // 1024} kB\nVmRSS:\t{GIB // 1024} kB\nVmData:\t{GIB // 1024} kB\n"
    files = {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {64 * GIB // 1024} kB\n",
        "proc/self/status": status,
    }
    write(tmp_path, files)
    return tmp_path


def test_what_the_machine_has(root):
    assert available_memory(CPU, root) == 64 * GIB


@pytest.mark.parametrize("where", ["slice/job", "slice", ""])
def test_a_limit_of_any_group_above_counts(root, where):
    write(root, {"proc/self/cgroup": "0::/slice/job\n"})
    for name in ("slice/job", "slice", ""):
        group = root / "sys/fs/cgroup" / name
        limit = str(8 * GIB) if name == where else "max"
        write(group, {"memory.max": limit, "memory.current": str(3 * GIB)})
    assert available_memory(CPU, root) == 5 * GIB


def test_a_high_mark_counts_and_the_cache_of_files_does_not(root):
    write(root, {"proc/self/cgroup": "0::/job:1\n"})
    files = {"memory.max": "max", "memory.high": str(8 * GIB), "memory.current": str(5 * GIB)}
    write(
        root / "sys/fs/cgroup/job:1", files | {"memory.stat": f"anon 1\ninactive_file {2 * GIB}\n"}
    )
    assert available_memory(CPU, root) == 5 * GIB


def test_groups_of_the_first_version(root):
    write(root, {"proc/self/cgroup": "5:cpu:/x\n4:memory:/slurm/job\n0::/\n"})
    mount = root / "sys/fs/cgroup/memory"
    none = {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "0"}
    write(mount, none)
    write(mount / "slurm/job", none)
    used = {"memory.limit_in_bytes": str(6 * GIB), "memory.usage_in_bytes": str(GIB)}
    write(mount / "slurm", used)
    assert available_memory(CPU, root) == 5 * GIB


def test_in_a_container_the_group_is_the_root_of_what_is_mounted(root):
    write(root, {"proc/self/cgroup": "0::/docker/0123\n"})
    write(root / "sys/fs/cgroup", {"memory.max": str(4 * GIB), "memory.current": str(GIB)})
    assert available_memory(CPU, root) == 3 * GIB


@pytest.mark.parametrize(("name", "left"), [("Max address space", 6), ("Max data size", 7)])
def test_ulimit_leaves_what_is_not_used(root, name, left):
    head = "Limit                     Soft Limit           Hard Limit           Units\n"
    write(root, {"proc/self/limits": f"{head}{name:<26}{8 * GIB}           unlimited   bytes\n"})
    assert available_memory(CPU, root) == left * GIB
    write(root, {"proc/self/limits": f"{head}{name:<26}unlimited      unlimited   bytes\n"})
    assert available_memory(CPU, root) == 64 * GIB


def test_slurm_says_what_it_granted(root, monkeypatch):
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "2048")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert available_memory(CPU, root) == 7 * GIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    assert available_memory(CPU, root) == 3 * GIB
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # all of the machine
    monkeypatch.delenv("SLURM_MEM_PER_CPU")
    assert available_memory(CPU, root) == 64 * GIB


def test_a_system_without_proc(tmp_path):
    assert 2**28 < available_memory(CPU, tmp_path / "none") < 2**50


# --- within a run -----------------------------------------------------------------------------


class Scarce(nn.Module):
    """A network that memory is short for from some number of images, or some pass on."""

    def __init__(self, network, images=10**9, passes=10**9):
        super().__init__()
        self.network, self.images, self.passes = network, images, passes
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.images or len(self.sizes) > self.passes:
            raise RuntimeError(REFUSED)
        return self.network(x)


def test_an_evaluation_is_done_in_parts(toys):
    model, images = toys.two_bn(), toys.images(12)
    short = Scarce(model, images=5)
    told = []
    found, _ = predict(short, images, toys.card(), CPU, told.append)
    assert torch.equal(found, predict(model, images, toys.card(), CPU)[0])
    assert short.sizes == [12, 6, 3, 3, 3, 3]
    assert told == [12]


def test_a_training_that_does_not_fit_says_what_to_lower(toys, tmp_path):
    teacher = toys.teacher(toys.two_bn())
    options = Distillation(steps=3, batch_size=4, precision="float32")
    student = Scarce(toys.two_bn(), passes=2)  # which tell where its features are
    with pytest.raises(OutOfMemory, match=r"training.*lower batch_size \(4 now\).*accumulate") as e:
        train_student(teacher, student, toys.images(8), options, toys.context(tmp_path), "training")
    assert e.value.path == ("batch_size",)


def test_a_step_of_one_row_is_refused_with_the_reason(toys, tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.bn = toys.two_bn(), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(self.body(x))

    teacher = toys.teacher(toys.two_bn())
    options = Distillation(steps=1, batch_size=4, precision="float32")
    with pytest.raises(DreamkitError, match="two images or more"):
        train_student(teacher, Head(), toys.images(1), options, toys.context(tmp_path), "training")


def test_more_classes_than_images_are_told(toys, tmp_path):
    from dreamkit.registry import Term
    from dreamkit.regularizers.tv import TotalVariation
    from dreamkit.synthesizers.deepinversion import DeepInversion
    from dreamkit.synthesizers.engine import Engine
    from dreamkit.synthesizers.stage import Stage
    from dreamkit.types import Synthesis

    def notes(images, **options):
        synthesizer = DeepInversion(
            images=images,
            batch_size=2,
            regularizers=(Term("tv", 1e-3, TotalVariation()),),
            stages=(Stage(1),),
            engine=Engine(precision="float32", compile=False),
            **options,
        )
        context = toys.context(tmp_path / f"{images}{options}")
        dream_into_store(toys.teacher(toys.two_bn()), Synthesis(synthesizer, {}), context)
        return [note for note in context.log.notes if note.startswith("images:")]

    assert notes(2) == ["images: 2 for 3 classes: 2 are shown, 1 gets no image"]
    assert notes(1, labels="random") == [
        "images: 1 for 3 classes: at most 1 is shown, at least 2 get no image"
    ]
    assert notes(4, unconditional=0.5) == [
        "images: 2 with a class for 3 classes: 2 are shown, 1 gets no image"
    ]
    assert notes(3) == notes(2, labels=(0, 2)) == notes(2, unconditional=1.0) == []
