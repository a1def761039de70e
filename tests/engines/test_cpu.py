"""What the processor can do."""

from __future__ import annotations

import platform

import pytest

from zimgkit.engines import cpu


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", {"avx2", "avx512f"}, False),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, True),
        ("AMD64", {"avx2", "avx_vnni"}, True),
        ("x86_64", set(), False),
        ("aarch64", set(), True),
    ],
)
def test_whether_integers_are_added_exactly(machine, flags, exact, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags))
    assert cpu.adds_integers_exactly() is exact


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\nbugs\t: x\n\nflags\t: other\n",
            {"fpu", "avx2", "avx512_bf16"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("nothing\n", set()),
        (None, set()),
    ],
)
def test_the_flags_of_a_processor(text, flags, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", file)
    cpu.cpu_flags.cache_clear()
    try:
        assert cpu.cpu_flags() == flags
    finally:
        cpu.cpu_flags.cache_clear()
