"""Freed memory stays with the process where the C library can be told."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from fed.allocator import keep_freed_memory

FAULTS = """
import resource
import sys

from fed.allocator import keep_freed_memory

import torch

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def touch():
    return [torch.ones(2**20) for _ in range(4)]

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told")
def test_pages_are_not_mapped_anew() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("leave") / 2


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
