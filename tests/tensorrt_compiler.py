"""Lay out a real TensorRT compiler on a machine without a GPU, for the tests.

    python tests/tensorrt_compiler.py FOLDER        # then: PYTHONPATH=FOLDER pytest

Two wheels are unpacked into one folder: ``tensorrt-cu13-bindings``, TensorRT's Python API, and
``onnxruntime-ep-nv-tensorrt-rtx-cu13``, which carries the compiler and the ONNX parser of TensorRT for RTX. These
compile ahead without a GPU. Both products have the same API, so the libraries that the bindings look for beside them
are links to those, and the whole is importable as ``tensorrt_rtx``, which is what it is. What it compiles cannot be run
without a GPU.
"""

from __future__ import annotations

import platform
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {"tensorrt-cu13-bindings": "11.4.0.106", "onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0"}
LIBRARIES = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.*.*.*",
    "libtensorrt_rtx.so.1": "libtensorrt_rtx.so.*.*.*",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.*.*.*",
    "libtensorrt_onnxparser_rtx.so.1": "libtensorrt_onnxparser_rtx.so.*.*.*",
    "libcudart.so.13": "libcudart.so.*.*.*",
}
"""The name that is looked for -> the file of the compiler's wheel that serves."""
PLUGINS = "libnvinfer_plugin.so.11"
"""TensorRT's own plugins, of which no graph here has any; a stub stands in."""
MODULE = '''"""The TensorRT API on the compiler of TensorRT for RTX."""
from tensorrt_bindings import *  # noqa: F403
from tensorrt_bindings import __version__  # noqa: F401
'''


def unpack(folder: Path) -> None:
    """Fetch the wheels of this Python version, and unpack them."""
    with tempfile.TemporaryDirectory() as fetched:
        pins = [f"{name}=={version}" for name, version in WHEELS.items()]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--only-binary=:all:", "--dest", fetched, *pins], check=True)
        for wheel in sorted(Path(fetched).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)


def link(folder: Path) -> None:
    """Give the compiler's libraries the names that the API looks for, and make it importable."""
    bindings = folder / "tensorrt_bindings"
    for name, pattern in LIBRARIES.items():
        (found,) = (folder / "onnxruntime_ep_nv_tensorrt_rtx").glob(pattern)
        (bindings / name).symlink_to(found)
    (bindings / PLUGINS).write_bytes(stub("initLibNvInferPlugins"))
    package = folder / "tensorrt_rtx"
    package.mkdir()
    (package / "__init__.py").write_text(MODULE)


def stub(function: str) -> bytes:
    """A shared library for x86-64 Linux with one function, which returns 1; so that no C compiler is needed."""
    code = b"\xb8\x01\x00\x00\x00\xc3"  # mov eax, 1; ret
    names = b"\0" + function.encode() + b"\0"
    buckets = struct.pack("<6I", 1, 2, 1, 0, 0, 0)  # One bucket, which holds symbol 1.
    buckets_at = 64 + 2 * 56
    symbols_at = buckets_at + len(buckets)
    names_at = symbols_at + 2 * 24
    code_at = names_at + len(names)
    dynamic_at = -(-(code_at + len(code)) // 8) * 8
    # DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL
    entries = ((4, buckets_at), (5, names_at), (6, symbols_at), (10, len(names)), (11, 24), (0, 0))
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    end = dynamic_at + len(dynamic)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 7, 0, 0, 0, end, end, 4096)  # PT_LOAD: all of it
    header += struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8)
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 1, code_at, len(code))
    before = header + buckets + symbols + names + code
    return before + bytes(dynamic_at - len(before)) + dynamic


def main() -> None:
    """The script."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    if folder.exists():
        sys.exit(f"{folder} exists already")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        print("There is no TensorRT compiler for this machine without a GPU; its tests will say that they skip.")
        return
    folder.mkdir(parents=True)
    unpack(folder)
    link(folder)


if __name__ == "__main__":
    main()
