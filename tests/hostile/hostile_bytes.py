# ruff: noqa: E501
"""Ways to damage bytes and texts; everything is decided by the generator that is passed in."""

from __future__ import annotations

import random
import struct

WORDS = [b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x80\x00\x00\x00",
         b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\n", b"\r\n", b'"', b",", b"\xef\xbb\xbf", b"\xff\xfe", b"NaN", b"1e999", b"-1", b"{", b"[",
         b"../../", b"\xed\xa0\x80", b"=cmd|' /C calc'!A0", b"PK\x03\x04"]  # fmt: skip
NAMES = ["</script><script>canary()</script>", "<img src=x onerror=canary()>", '"><svg/onload=canary()>', "' onmouseover='canary()", "<!--",
         "]]>", "{{ 7*7 }}", "{% include '/etc/passwd' %}", "%{y}", "javascript:canary()", "\u202eabc", "\x00", "\x1b]0;x\x07", "../../escape",
         "/escape", "..", "=1+1", "@SUM(A1)", "+1+1", "a\nb", "a\rb", "\ud83d\ude00", "A" * 5000, "", " ", "NaN", "-0", "1e999", "True", "nul",
         "\u2028", "&lt;", "`", "${7*7}", "[/red]", "[bold]x", "__class__", "%s%n", "data:text/html,x", "C:\\escape", "\\\\host\\x"]  # fmt: skip


def damaged(rng: random.Random, data: bytes, rounds: int | None = None) -> bytes:
    """Flip, cut, repeat, insert and overwrite: usually a little, at times a lot."""
    raw = bytearray(data)
    for _ in range(rounds if rounds is not None else rng.choice([1, 1, 1, 2, 3, 5, 20])):
        kind = rng.randrange(9)
        at = rng.randrange(len(raw) + 1)
        if rng.random() < 0.4:
            # Headers decide most.
            at = min(at, rng.randrange(64))
        if kind == 0 and raw:
            at = min(at, len(raw) - 1)
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and raw:
            raw[min(at, len(raw) - 1)] = rng.randrange(256)
        elif kind == 2:
            del raw[at:]
        elif kind == 3:
            del raw[at : at + rng.choice([1, 2, 4, 8, 100])]
        elif kind == 4:
            raw[at:at] = rng.choice(WORDS)
        elif kind == 5:
            word = rng.choice(WORDS)
            raw[at : at + len(word)] = word
        elif kind == 6:
            piece = raw[at : at + rng.choice([1, 4, 16, 200])]
            raw[at:at] = piece * rng.choice([1, 2, 50])
        elif kind == 7:
            raw[at : at + 8] = struct.pack("<q", rng.choice([-1, 0, 1, 2**31, 2**32, 2**40, 2**62, -(2**63)]))
        else:
            raw[at:at] = rng.randbytes(rng.choice([1, 3, 16]))
        if len(raw) > 1 << 22:
            del raw[1 << 22 :]
    return bytes(raw)


def damaged_text(rng: random.Random, text: str, pieces: list[str]) -> str:
    """The same for a text, with pieces of its own language put in."""
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        at, kind = rng.randrange(len(text) + 1), rng.randrange(6)
        if kind == 0:
            text = text[:at] + text[at + rng.choice([1, 2, 5]) :]
        elif kind == 1:
            text = text[:at] + rng.choice(pieces) + text[at:]
        elif kind == 2:
            text = (
                text[:at]
                + chr(
                    rng.choice([0, 9, 10, 34, 39, 92, 96, 160, 0x202E, 0x2028, 0xD800, 0x1D400, rng.randrange(32, 127)])
                )
                + text[at:]
            )
        elif kind == 3:
            text = text[:at]
        elif kind == 4:
            text = text[:at] + text[at : at + 20] * rng.choice([1, 2, 10]) + text[at:]
        else:
            text = (
                text[:at]
                + rng.choice(["(", ")", "[", "{", "-", "*", "**", "+", ",", "=", ".", "'", ":", "~", "not "])
                * rng.choice([1, 1, 3, 70])
                + text[at:]
            )
    return text


def value(rng: random.Random, depth: int = 0) -> object:
    """A JSON or TOML value that nobody asked for."""
    kind = rng.randrange(11 if depth < 3 else 8)
    if kind == 0:
        return rng.choice([0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400])
    if kind == 1:
        return rng.choice([0.0, -1.5, 1e308, -0.0, 1e-320, float("inf"), float("nan")])
    if kind == 2:
        return rng.choice([True, False])
    if kind in (3, 4):
        return rng.choice(NAMES)
    if kind == 5:
        return rng.choice(
            [
                "cross_entropy",
                "l2",
                "digits",
                "mlp",
                "linear",
                "subprocess:call",
                "canary_model:make",
                "os:abort",
                "auto",
                "cpu",
                "adam",
            ]
        )
    if kind == 6:
        return ""
    if kind == 7:
        return None
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {
            rng.choice(["a", "source", "split", *NAMES[:6]]): value(rng, depth + 1) for _ in range(rng.randrange(3))
        }
    return [[]] * rng.choice([1, 100])


def mutated(rng: random.Random, tree: object, chance: float = 0.15) -> object:
    """A document with some of its values replaced, dropped or added."""
    if rng.random() < chance * 0.3:
        return value(rng)
    if isinstance(tree, dict):
        out = {}
        for key, item in tree.items():
            roll = rng.random()
            if roll < chance * 0.2:
                continue
            out[rng.choice(NAMES) if roll < chance * 0.3 else key] = (
                value(rng) if rng.random() < chance else mutated(rng, item, chance)
            )
        if rng.random() < chance * 0.3:
            out[rng.choice(NAMES)] = value(rng)
        return out
    if isinstance(tree, list):
        items = [value(rng) if rng.random() < chance else mutated(rng, item, chance) for item in tree]
        return items * rng.choice([1, 1, 1, 1, 2]) if rng.random() < chance else items
    return tree
