"""How the tensors of a component are called in files: one table for checkpoints and LoRAs.

A layout is one entry of :data:`LAYOUTS`: the sign that tells it, names and what they become, tensors that lie in one
(their rows, one after the other), matrices that are stored as kernels of one pixel, and what nothing reads. Canonical
names are those of diffusers for transformers and VAEs, and those of the bare text model for text encoders
(``layers.0.self_attn.q_proj.weight``), beside ``visual.…`` and ``lm_head.weight``.

Sources: ``single_file_utils.py`` of diffusers 0.42, ComfyUI's files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.stored import Decoded, Stored, part_of, row_count, row_width


@dataclass(frozen=True)
class Rename:
    """What names begin with, up to a dot or the end, and what that becomes."""

    old: str
    """A pattern in which all dots are escaped."""
    new: str | tuple[str, ...]
    """Templates for it; several where so many tensors of as many rows lie in one, in this order."""

    @property
    def names(self) -> tuple[str, ...]:
        """The templates."""
        return (self.new,) if isinstance(self.new, str) else self.new


@dataclass(frozen=True)
class Layout:
    """How one kind of file calls the tensors of a component."""

    component: str
    name: str
    """For people."""
    sign: str
    """A pattern that some of its names begin with, after prefixes are taken off, and no canonical name does."""
    renames: tuple[Rename, ...]
    """Each is tried in turn, on what those before it made."""
    matrices: str = ""
    """A pattern of canonical names of matrices, (out, in), that may be stored as kernels, (out, in, 1, 1)."""
    unused: str = ""
    """A pattern of names that nothing reads, before they are renamed."""


ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"), ("norm", "group_norm"))
OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
LLAMA_CPP = (
    *(("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj")),
    *(("attn_output", "self_attn.o_proj"), ("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")),
    *(("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")),
    *((f"ffn_{name}", f"mlp.{name}_proj") for name in ("gate", "up", "down")),
)
LLAMA_CPP_VISION = (
    *(("attn_qkv", "attn.qkv"), ("attn_out", "attn.proj"), ("ln1", "norm1"), ("ln2", "norm2")),
    *((f"ffn_{name}", f"mlp.{name}_proj") for name in ("gate", "up", "down")),
)
RESIDUAL = ((0, "norm1"), (2, "conv1"), (3, "norm2"), (6, "conv2"))

LAYOUTS = (
    Layout(
        "transformer",
        "original names",
        r"(\w+\.\d+\.attention\.(qkv|out|q_norm|k_norm)|x_embedder|final_layer)\.",
        (
            Rename(
                r"(\w+\.\d+\.attention)\.qkv",
                (r"\1.to_q", r"\1.to_k", r"\1.to_v"),
            ),
            Rename(r"(\w+\.\d+\.attention)\.out", r"\1.to_out.0"),
            Rename(r"(\w+\.\d+\.attention)\.q_norm", r"\1.norm_q"),
            Rename(r"(\w+\.\d+\.attention)\.k_norm", r"\1.norm_k"),
            Rename(r"x_embedder", "all_x_embedder.2-1"),
            Rename(r"final_layer", "all_final_layer.2-1"),
        ),
        unused=r"norm_final\.",  # Of trainings it may be NaN.
    ),
    Layout(
        "transformer",
        "output projections without a number",
        r".+\.to_out\.(weight|bias)",
        (Rename(r"(.+)\.to_out(?!\.\d)", r"\1.to_out.0"),),
    ),
    Layout(
        "text_encoder",
        "llama.cpp names",
        r"(token_embd|blk\.\d+|v\.blk\.\d+)\.",
        (
            Rename(r"token_embd", "embed_tokens"),
            Rename(r"output_norm", "norm"),
            Rename(r"output", "lm_head"),
            *(Rename(rf"blk\.(\d+)\.{old}", rf"layers.\1.{new}") for old, new in LLAMA_CPP),
            *(Rename(rf"v\.blk\.(\d+)\.{old}", rf"visual.blocks.\1.{new}") for old, new in LLAMA_CPP_VISION),
            Rename(r"v\.patch_embd", "visual.patch_embed.proj"),
            Rename(r"v\.post_ln", "visual.merger.ln_q"),
            Rename(r"mm", "visual.merger.mlp"),
        ),
    ),
    Layout(
        "vae",
        "LDM names",
        r"(encoder|decoder)\.mid\.",
        (
            Rename(r"(encoder|decoder)\.mid\.block_1", r"\1.mid_block.resnets.0"),
            Rename(r"(encoder|decoder)\.mid\.block_2", r"\1.mid_block.resnets.1"),
            *(Rename(rf"(encoder|decoder)\.mid\.attn_1\.{a}", rf"\1.mid_block.attentions.0.{b}") for a, b in ATTENTION),
            Rename(r"encoder\.down\.(\d+)\.block", r"encoder.down_blocks.\1.resnets"),
            Rename(r"encoder\.down\.(\d+)\.downsample", r"encoder.down_blocks.\1.downsamplers.0"),
            # Here the last level comes first.
            *(Rename(rf"decoder\.up\.{3 - i}\.block", f"decoder.up_blocks.{i}.resnets") for i in range(4)),
            *(Rename(rf"decoder\.up\.{3 - i}\.upsample", f"decoder.up_blocks.{i}.upsamplers.0") for i in range(4)),
            Rename(r"(.+)\.nin_shortcut", r"\1.conv_shortcut"),
            Rename(r"(encoder|decoder)\.norm_out", r"\1.conv_norm_out"),
        ),
        matrices=r".+\.attentions\.0\.to_(q|k|v|out\.0)\.weight",
    ),
    Layout(
        "vae",
        "old attention names",
        r".+\.attentions\.0\.(query|key|value|proj_attn)\.",
        tuple(Rename(rf"(.+\.attentions\.0)\.{a}", rf"\1.{b}") for a, b in OLD_ATTENTION),
        matrices=r".+\.attentions\.0\.to_(q|k|v|out\.0)\.weight",
    ),
    Layout(
        "vae",
        "Wan names",
        r"(encoder|decoder)\.middle\.",
        (
            Rename(r"(encoder|decoder)\.middle\.0", r"\1.mid_block.resnets.0"),
            Rename(r"(encoder|decoder)\.middle\.1", r"\1.mid_block.attentions.0"),
            Rename(r"(encoder|decoder)\.middle\.2", r"\1.mid_block.resnets.1"),
            Rename(r"(encoder|decoder)\.head\.0", r"\1.norm_out"),
            Rename(r"(encoder|decoder)\.head\.2", r"\1.conv_out"),
            Rename(r"(encoder|decoder)\.conv1", r"\1.conv_in"),
            Rename(r"conv1", "quant_conv"),
            Rename(r"conv2", "post_quant_conv"),
            Rename(r"encoder\.downsamples", "encoder.down_blocks"),
            # Four levels of three blocks, and an upsampler between them.
            *(Rename(rf"decoder\.upsamples\.{4 * i + 3}", f"decoder.up_blocks.{i}.upsamplers.0") for i in range(3)),
            *(
                Rename(rf"decoder\.upsamples\.{4 * i + j}", f"decoder.up_blocks.{i}.resnets.{j}")
                for i in range(4)
                for j in range(3)
            ),
            *(Rename(rf"(.+)\.residual\.{number}", rf"\1.{name}") for number, name in RESIDUAL),
            Rename(r"(.+)\.shortcut", r"\1.conv_shortcut"),
        ),
    ),
)
"""The first whose sign is there is the one."""

MARKS = {
    "transformer": r"(model\.)?diffusion_model\.",
    "text_encoder": r"text_encoders\.\w+\.transformer\.",
    "vae": r"(vae|first_stage_model)\.",
}
"""Component -> what its names begin with in a file that holds several components."""
OTHER_MARKS = r"(text_encoders|cond_stage_model|conditioner|model_ema|ema|optimizer)\."
"""What others begin with in files that hold all sorts of things."""

WRAPPERS = (r"_orig_mod\.", r"module\.", r"base_model\.model\.", r"pipe\.")
"""What torch.compile, DistributedDataParallel, peft and trainers put before the names of all that they wrap."""
PREFIXES = {
    "transformer": (MARKS["transformer"], r"(transformer|model|dit|net|unet)\.", *WRAPPERS),
    "text_encoder": (MARKS["text_encoder"], r"(text_encoder|model|language_model)\.", *WRAPPERS),
    "vae": (MARKS["vae"], r"model\.", *WRAPPERS),
    "siglip": (r"vision_model\.", *WRAPPERS),
}
"""Component -> patterns of what is taken off its names, as long as one of them is there.

Text encoders are stored as the whole language model (``model.layers…``), as the whole vision-language model of
older (``model.layers…``, ``visual…``) and newer transformers (``model.language_model.layers…``, ``model.visual…``),
or bare (``layers…``).
"""
LEFTOVERS = r"(model_ema|ema|optimizer|lr_scheduler)\..*|.*[._]ema|.*\.inv_freq|.*\.position_ids|.*\.logit_scale"
"""A pattern of names that trainings leave in files, and nothing reads."""


def canonical(component: str, stored: str) -> str:
    """The canonical name of a component's tensor, where that is the one it is stored under without its prefixes."""
    pattern = _prefixes(component)
    while match := pattern.match(stored):
        stored = stored[match.end() :]
    return stored


@cache
def _prefixes(component: str) -> re.Pattern[str]:
    return re.compile("|".join(PREFIXES.get(component, WRAPPERS)))


def layout_of(component: str, names: Iterable[str]) -> Layout | None:
    """The layout of a component's tensors, by their names without prefixes; None where those are canonical."""
    known = [*names]
    return next(
        (own for own in LAYOUTS if own.component == component and any(re.match(own.sign, name) for name in known)), None
    )


def arrange(component: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """A component's tensors by their canonical names, from those of its files by their stored ones.

    What only lacks a prefix stays what it is; of tensors that lie in one, each becomes its rows of that.

    Raises:
        CheckpointError: two stored tensors are one, or one does not divide into those that lie in it.
    """
    own = {name: canonical(component, name) for name in own_names(component, tensors)}
    layout = layout_of(component, own.values())
    found: dict[str, Stored] = {}
    origins: dict[str, str] = {}
    for stored, name in own.items():
        if re.fullmatch(LEFTOVERS, name) or (layout and layout.unused and re.match(layout.unused, name)):
            continue
        for key, tensor in _placed(layout, name, tensors[stored]).items():
            if key in found:
                both = f"{stored!r} and {origins[key]!r}"
                raise CheckpointError(f"{tensor.file}: {both} are both the {component}'s {key!r}", "keep one of them")
            found[key], origins[key] = tensor, stored
    return found


def own_names(component: str, names: Iterable[str]) -> list[str]:
    """The names of one component's tensors, of files that may hold those of others."""
    mark, known = MARKS.get(component), [*names]
    if mark and (marked := [name for name in known if re.match(mark, name)]):
        return marked
    others = "|".join([*(other for key, other in MARKS.items() if key != component), OTHER_MARKS])
    return [name for name in known if not re.match(others, name)]


def _placed(layout: Layout | None, name: str, tensor: Stored) -> dict[str, Stored]:
    """What one stored tensor is, by canonical names."""
    names = (name,) if layout is None else renamed(layout, name)
    rows = row_count(tensor.shape)
    if rows % len(names):
        raise CheckpointError(f"{tensor.file}: {tensor.name!r} has {rows} rows, and holds {len(names)} tensors")
    is_kernel = layout and layout.matrices and re.fullmatch(layout.matrices, names[0]) and len(tensor.shape) > 2
    rest = (row_width(tensor.shape),) if is_kernel else tensor.shape[1:]
    if names == (name,) and not is_kernel:
        return {name: replace(tensor, name=name) if isinstance(tensor, Decoded) else tensor}
    share = rows // len(names)
    shape = (share, *rest) if tensor.shape else ()
    return {key: part_of(tensor, key, shape, index * share) for index, key in enumerate(names)}


def renamed(layout: Layout, name: str) -> tuple[str, ...]:
    """The canonical names of what a tensor of this name, without prefixes, holds."""
    names: tuple[str, ...] = (name,)
    for rename in layout.renames:
        names = tuple(made for one in names for made in _renamed(rename, one))
    return names


def _renamed(rename: Rename, name: str) -> tuple[str, ...]:
    match = re.match(rf"(?:{rename.old})(?=\.|$)", name)
    if match is None:
        return (name,)
    return tuple(match.expand(new) + name[match.end() :] for new in rename.names)


def squash(name: str) -> str:
    """A name with dots and dashes as underscores, as some trainers write it."""
    return re.sub(r"[.\-]", "_", name)


@cache
def squashed_renames() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """All other names of modules, for names with underscores for dots.

    Returns:
        Pattern of what a name begins with -> templates of what that stands for, in the order of their rows.
    """
    return tuple(
        (rf"(?:{rename.old})(?=_|$)".replace(r"\.", "_"), tuple(map(squash, rename.names)))
        for layout in LAYOUTS
        for rename in layout.renames
    )
