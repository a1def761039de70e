"""What a LoRA is, from its file alone."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.layouts import squash
from zimgkit.export.checkpoints.named_files import SUFFIX
from zimgkit.export.checkpoints.single_files import components_in, is_file
from zimgkit.export.checkpoints.urls import PICKLES, parse_url
from zimgkit.export.lora.formats import check_values, read_lora
from zimgkit.export.lora.names import families
from zimgkit.export.lora.source import find_lora
from zimgkit.runtime import demo_models


def is_lora(argument: str) -> bool:
    """Whether an argument names a LoRA rather than a checkpoint: a weight file of none, or a folder of such."""
    path = demo_models.locate_lora(argument).expanduser()
    if path.is_dir():
        has_weights = any(file.suffix in (SUFFIX, *PICKLES) for file in path.iterdir())
        return has_weights and not (path / "model_index.json").exists() and not (path / "transformer").exists()
    with suppress(CheckpointError):
        if is_file(str(path)) and components_in(path):
            return False
    name = address.path if not path.exists() and (address := parse_url(argument)) else path.name
    return name.endswith((SUFFIX, *PICKLES))


def lora_summary(argument: str, hub: str = "huggingface") -> dict[str, Any]:
    """Describe a LoRA.

    Args:
        argument: see :func:`zimgkit.export.lora.source.find_lora`.
        hub: ``"huggingface"`` or ``"modelscope"``.

    Raises:
        LoraError: it is missing, no LoRA, or broken.
    """
    lora = read_lora(find_lora(argument, hub))
    for module in lora.modules:
        check_values(lora, module)
    modules = [module for module in lora.modules if not module.is_alpha]
    shapes = [lora.change(module).shape for module in modules]
    targets = Counter(re.sub(r"\d+", "N", squash(module.name), count=1) for module in modules)
    alphas = {lora.alpha(module) for module in lora.modules}
    return {
        "path": str(lora.file.path),
        "sha256": lora.sha256,
        "format": lora.format,
        "kinds": sorted({module.kind for module in modules}),
        "dora": any(module.magnitude for module in modules),
        "families": families(module.name for module in modules),
        "ranks": sorted({module.rank for module in modules if module.rank}),
        "alphas": sorted(alpha for alpha in alphas if alpha is not None),
        "has_alpha": None not in alphas,
        "modules": len(modules),
        "widest": max(shapes),
        "targets": dict(sorted(targets.items())),
        "unknown_keys": list(lora.unknown),
    }


def lora_text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    kinds = ", ".join(summary["kinds"]) + (" with DoRA" if summary["dora"] else "")
    alphas = ", ".join(f"{alpha:g}" for alpha in summary["alphas"])
    if not summary["has_alpha"]:
        alphas = f"{alphas}, and none" if alphas else "none: the rank counts"
    family = " or ".join(summary["families"]) or "a model that zimgkit does not know"
    lines = [
        f"{Path(summary['path']).name}  ({kinds}, for {family})",
        f"  path      {summary['path']}",
        f"  sha256    {summary['sha256']}",
        f"  format    {summary['format']}",
        f"  rank      {', '.join(map(str, summary['ranks'])) or 'none'}",
        f"  alpha     {alphas}",
        f"  targets   {summary['modules']} modules, the largest {'x'.join(map(str, summary['widest']))}",
    ]
    lines.extend(f"    {count:>5}  {name}" for name, count in summary["targets"].items())
    lines.extend(f"  unknown   {key}" for key in summary["unknown_keys"][:5])
    return "\n".join(lines)
