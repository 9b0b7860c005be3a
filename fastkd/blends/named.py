"""The blends that users of the Megatron QAD scripts know by name, with the number of samples they train on.

A name may end in ``_cot``, ``_chat`` or ``_cot_chat``: the same texts with the reasoning kept, put through the chat
template, or both. The file of a blend is ``datablend_<name>.json``. In the scripts a name that they do not know
silently becomes openscience; here it is an error unless the file is given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from fastkd.config.blend import Variant
from fastkd.errors import DataError


@dataclass(frozen=True, slots=True)
class NamedBlend:
    """What is known of a blend."""

    samples: int
    """Samples of a run, as a rule one epoch of the largest source."""
    what: str
    file: str = ""
    """Its part of the file name where that is not the name itself."""


_V1, _V2 = "Nemotron post-training v1", "Nemotron post-training v2, English"

NAMED: dict[str, NamedBlend] = {
    "openscience": NamedBlend(299_800, "OpenScience"),
    "nemotron_10pct": NamedBlend(2_500_000, f"{_V1}, 10 %", "nemotron_all_10pct"),
    "nemotron_30pct": NamedBlend(7_500_000, f"{_V1}, 30 %", "nemotron_all_30pct"),
    "nemotron_50pct": NamedBlend(12_500_000, f"{_V1}, 50 %", "nemotron_all_50pct"),
    "nemotron_100pct": NamedBlend(25_000_000, f"{_V1}, all of it", "nemotron_all_100pct"),
    "nemotron_stem": NamedBlend(5_000_000, f"{_V1}, STEM"),
    "nemotron_math": NamedBlend(2_000_000, f"{_V1}, mathematics"),
    "nemotron_v1_stem_30pct": NamedBlend(5_886_717, f"{_V1}, STEM, 30 %"),
    "nemotron_v1_math_30pct": NamedBlend(582_654, f"{_V1}, mathematics, 30 %"),
    "nemotron_v1_code_30pct": NamedBlend(540_472, f"{_V1}, code, 30 %"),
    "nemotron_v1_chat_30pct": NamedBlend(212_786, f"{_V1}, chat, 30 %"),
    "nemotron_v1_all_en_30pct": NamedBlend(7_222_629, f"{_V1}, every split, 30 %"),
    "nemotron_v2_30pct": NamedBlend(398_198, f"{_V2}, 30 %", "nemotron_v2_all_en_30pct"),
    "nemotron_v2_50pct": NamedBlend(663_663, f"{_V2}, 50 %", "nemotron_v2_all_en_50pct"),
    "nemotron_v2_stem_30pct": NamedBlend(101_175, f"{_V2}, STEM, 30 %"),
    "nemotron_v2_math_30pct": NamedBlend(68_248, f"{_V2}, mathematics, 30 %"),
    # 49,875 documents. The scripts go twice over the plain and chat forms (99,750); here epochs are the user's choice.
    "nemotron_v2_code_30pct": NamedBlend(49_875, f"{_V2}, code, 30 %"),
    "nemotron_v2_chat_30pct": NamedBlend(178_900, f"{_V2}, chat, 30 %"),
    "combined_v1_v2_openscience": NamedBlend(10_000_000, "50 % Nemotron v1, 30 % Nemotron v2, 20 % OpenScience"),
    "combined": NamedBlend(8_200_000, "20 % OpenScience, 50 % Nemotron v1, 30 % Nemotron v2"),
    "combined_v2": NamedBlend(1_024_000, "20 % OpenScience, 40 % Nemotron v1, 40 % Nemotron v2; code and mathematics"),
    "slimorca": NamedBlend(500_000, "SlimOrca"),
}

_ALIASES = {
    "nemotron": "nemotron_30pct",
    "nemotron_all_10pct": "nemotron_10pct",
    "nemotron_all_30pct": "nemotron_30pct",
    "nemotron_all_50pct": "nemotron_50pct",
    "nemotron_all_100pct": "nemotron_100pct",
    "nemotron_full": "nemotron_100pct",
    "nemotron_v2": "nemotron_v2_30pct",
    "nemotron_v2_all_en_30pct": "nemotron_v2_30pct",
    "nemotron_v2_all_en_50pct": "nemotron_v2_50pct",
    "nemotron_v2_stem": "nemotron_v2_stem_30pct",
    "nemotron_v2_math": "nemotron_v2_math_30pct",
    "nemotron_v2_code": "nemotron_v2_code_30pct",
    "nemotron_v2_chat": "nemotron_v2_chat_30pct",
}
"""Other names of the same blends; a suffix may follow."""
_WHOLE = {
    "nemotron_v1_stem": "nemotron_v1_stem_30pct_cot_chat",
    "nemotron_v1_math": "nemotron_v1_math_30pct_cot_chat",
    "nemotron_v1_code": "nemotron_v1_code_30pct_cot_chat",
    "nemotron_v1_chat": "nemotron_v1_chat_30pct_cot_chat",
    "nemotron_v1_all": "nemotron_v1_all_en_30pct_cot_chat",
    "nemotron_v2_chat": "nemotron_v2_chat_30pct",
    "nemotron_v2_chat_tmpl": "nemotron_v2_30pct_chat",
    "combined": "combined_v1_v2_openscience",
    "combined_chat": "combined_v1_v2_openscience_chat",
    "combined_all_cot_chat": "combined_cot_chat",
    "combined_v2": "combined_v2_cot_chat",
}
"""Names that do not follow the rule: nemotron_v2_chat is the chat split, not the chat template."""
_SUFFIX = re.compile(r"_(cot_chat|cot|chat)$")


def variant_of(name: str) -> Variant:
    """The variant of a blend: that of a known name, else what the name (or a file name without its ending) ends in."""
    named = find_named(name.removeprefix("datablend_"))
    return named[1] if named else _variant(name)


def _variant(name: str) -> Variant:
    match = _SUFFIX.search(name)
    return match[1] if match else "plain"  # pyright: ignore[reportReturnType]


def find_named(name: str) -> tuple[NamedBlend, Variant, str] | None:
    """(blend, variant, name of its file) of a name; None when it is not known."""
    name = _WHOLE.get(name, name)
    variant = _variant(name)
    base = _SUFFIX.sub("", name) if variant != "plain" else name
    base = _ALIASES.get(base, base)
    if base not in NAMED:
        return None
    blend = NAMED[base]
    suffix = "" if variant == "plain" else f"_{variant}"
    return blend, variant, f"datablend_{blend.file or base}{suffix}.json"


def unknown_name(name: str) -> DataError:
    """The error for a name that is neither known nor accompanied by a file."""
    near = get_close_matches(name, [*NAMED, *_ALIASES, *(f"{one}_cot_chat" for one in NAMED)], n=1)
    return DataError(
        "data.blend.name",
        "no blend of this name is known (docs/blends.md lists them)",
        f"Did you mean {near[0]}?" if near else "Give data.blend.path and data.blend.train_samples.",
        value=name,
    )
