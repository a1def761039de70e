"""Compile the kernels of all operators; needs triton (``pip install -e '.[kernels]'``), but no GPU.

``python -m zimgkit.plugins.compile`` writes ``kernels/`` in the operators' folders. The same source and the same
compiler give the same bytes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from zimgkit.plugins import manifest
from zimgkit.plugins.launch import SCRATCH
from zimgkit.plugins.manifest import FOLDER, MANIFEST, PTX, Compiled, Parameter, folder_of, source_hash

OPERATORS = ("gate_norm_modulate", "qk_norm_rope", "quantized_linear")
ARCHITECTURES = (89, 90, 120)
"""Ada, Hopper, Blackwell; of the first two later devices of the generation run it too."""
FLOATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
ALIGNED = 16
PTX_VERSION = 87
"""8.7, of CUDA 12.8: any later driver takes it, and compiles it for its device."""


class Kernel(NamedTuple):
    """How a kernel is compiled; parameters that no list names are int32."""

    function: Any
    grid: tuple[tuple[str, int], ...]
    constants: Mapping[str, int]
    floats: str = ""
    """Names of pointers to the element type that is computed with, aligned to 16 bytes."""
    singles: str = ""
    """Names of pointers to float32, which may lie anywhere."""
    bytes: str = ""
    """Names of pointers to 8 bits, aligned to 16 bytes."""
    multiples: str = ""
    """Names of integers that are multiples of 16."""
    reals: str = ""
    """Names of numbers of float32."""
    limits: Mapping[str, int] = {}
    warps: int = 4
    stages: int = 3
    types: Sequence[str] = tuple(FLOATS)
    name: str = ""
    is_portable: bool = False
    """Whether it is compiled to PTX, for a compiler of others: once, for all devices, and without scratch memory."""

    def signature(self, dtype: str) -> dict[str, str]:
        """Parameter -> type, as triton writes them."""
        kinds = dict.fromkeys(self.floats.split(), f"*{FLOATS[dtype]}") | dict.fromkeys(self.singles.split(), "*fp32")
        kinds |= dict.fromkeys(self.bytes.split(), "*i8") | dict.fromkeys(self.reals.split(), "fp32")
        return {name: kinds.get(name, "i32") for name in self.function.arg_names if name not in self.constants}

    @property
    def aligned(self) -> set[str]:
        """The parameters that are multiples of 16."""
        return {*self.floats.split(), *self.bytes.split(), *self.multiples.split()}


def compile_operator(operator: str, folder: Path) -> None:
    """Compile the kernels of an operator into a folder, which is new or empty, with their manifest."""
    import triton

    kernels = importlib.import_module(f"zimgkit.plugins.{operator}.triton").KERNELS
    found = {}
    folder.mkdir(exist_ok=True)
    for kernel in kernels:
        for dtype in kernel.types:
            name = f"{kernel.name or kernel.function.__name__}.{dtype}"
            if kernel.is_portable:
                compiled = {PTX: _compile(kernel, dtype, ARCHITECTURES[0], folder / f"{name}.{PTX}")}
            else:
                files = {arch: folder / f"{name}.sm{arch}.cubin" for arch in ARCHITECTURES}
                compiled = {f"sm{arch}": _compile(kernel, dtype, arch, file) for arch, file in files.items()}
            parameters = tuple(
                Parameter(each, _kind(kind), ALIGNED if each in kernel.aligned else 1)
                for each, kind in kernel.signature(dtype).items()
            )
            symbol = kernel.function.__name__
            found[name] = manifest.Kernel(symbol, parameters, kernel.grid, dict(kernel.limits), compiled)
    content = manifest.Manifest(source_hash(operator), f"triton {triton.__version__}", found)
    text = msgspec.json.format(msgspec.json.encode(content), indent=1)
    (folder / MANIFEST).write_bytes(text + b"\n")


def _kind(kind: str) -> str:
    return "pointer" if kind.startswith("*") else {"i32": "int32", "fp32": "float32"}[kind]


def _compile(kernel: Kernel, dtype: str, architecture: int, path: Path) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    names = kernel.function.arg_names
    source = triton.compiler.ASTSource(
        kernel.function,
        {**kernel.signature(dtype), **dict.fromkeys(kernel.constants, "constexpr")},
        dict(kernel.constants),
        {(names.index(name),): [["tt.divisibility", ALIGNED]] for name in sorted(kernel.aligned)},
    )
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": True}
    if kernel.is_portable:
        options["ptx_version"] = PTX_VERSION
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    path.write_bytes(_without_scratch(built.asm["ptx"]).encode() if kernel.is_portable else built.asm["cubin"])
    return Compiled(path.name, 32 * built.metadata.num_warps, built.metadata.shared)


def _without_scratch(ptx: str) -> str:
    """A kernel without its last parameters, pointers to scratch memory: who passes arguments by count has none."""
    head, body = ptx.split(")\n", 1)
    start, *parameters = head.split(",\n")
    scratch = [re.findall(r"\w+_param_\d+", parameter)[0] for parameter in parameters[-SCRATCH:]]
    if any(re.search(rf"\b{name}\b", body) for name in scratch):
        raise RuntimeError(f"the kernel uses its scratch memory: {', '.join(scratch)}")
    return ",\n".join([start, *parameters[:-SCRATCH]]) + "\n)\n" + body


def main(operators: Sequence[str], into: Path | None) -> None:
    """Compile them in the place of what is there, or into folders of another one."""
    for operator in operators or OPERATORS:
        target = into / operator if into else folder_of(operator) / FOLDER
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        compile_operator(operator, part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        files = list(target.iterdir())
        print(f"{operator}: {len(files) - 1} files, {sum(path.stat().st_size for path in files) / 1000:.0f} kB")


if __name__ == "__main__":
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # Else the kernels hold the paths of this machine.
    parser = argparse.ArgumentParser("zimgkit.plugins.compile", description=__doc__.partition(chr(10))[0])
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="all, where none is named")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="beside what is there")
    given = parser.parse_args()
    main(given.operators, given.into)
