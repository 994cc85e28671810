"""A progress's measurements in words, the same on a terminal, in plain lines and in Prefect's log.

loss 1.932  lr 2.0e-04  12,340 tokens/s  MFU 41 %        held-out 1.901 (code 1.412, maths 2.014)        experts 4 % – 31 %, entropy 0.97
"""

from __future__ import annotations

from collections.abc import Mapping

_SPECIAL = ("tokens_per_second", "mfu", "lr", "held_out", "expert_max", "expert_min", "expert_entropy")


def fields_text(fields: Mapping[str, float]) -> str:
    """One line; fields without a form of their own are `name value`."""
    return "  ".join(part for part in (numbers_text(fields), held_out_text(fields), experts_text(fields)) if part)


def numbers_text(fields: Mapping[str, float]) -> str:
    """Loss, rates, speed and all other plain numbers."""
    plain = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in fields.items() if name not in _SPECIAL and "/" not in name]
    rate, use, lr = fields.get("tokens_per_second"), fields.get("mfu"), fields.get("lr")
    plain += [f"lr {lr:.1e}"] if lr is not None else []
    plain += [f"{rate:,.0f} tokens/s"] if rate else []
    return "  ".join([*plain, *([f"MFU {100 * use:.0f} %"] if use is not None else [])])


def held_out_text(fields: Mapping[str, float]) -> str:
    """The last held-out loss, and each domain's."""
    if "held_out" not in fields:
        return ""
    domains = ", ".join(f"{name.partition('/')[2]} {value:.3f}" for name, value in fields.items() if name.startswith("held_out/"))
    return f"held-out {fields['held_out']:.3f}" + (f" ({domains})" if domains else "")


def experts_text(fields: Mapping[str, float], width: int = 0) -> str:
    """The idlest and the busiest expert's share of a layer's choices, on a bar of `width` places when there is room; the mean entropy."""
    if "expert_max" not in fields:
        return ""
    low, high = fields.get("expert_min", 0.0), fields["expert_max"]
    bar = ""
    if width:
        first, last = int(low * width), max(int(low * width) + 1, round(high * width))
        bar = f" [{'·' * first}{'█' * (last - first)}{'·' * (width - last)}]"
    return f"experts{bar} {100 * low:.0f} % – {100 * high:.0f} %, entropy {fields.get('expert_entropy', 0.0):.2f}"
