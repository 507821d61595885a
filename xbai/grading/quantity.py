"""Numbers with an optional unit, read exactly: most answers are one, and need no computer algebra."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

PERCENT = "%"

_SYNONYMS = (
    "mm millimeter millimetre, cm centimeter centimetre, m meter metre, km kilometer kilometre",
    "in inch inche, ft foot feet, yd yard, mi mile, mg milligram, g gram, kg kilogram, lb pound, oz ounce",
    "s sec second, min minute, h hr hour, day, week, month, year yr, am a.m, pm p.m",
    "ml milliliter millilitre, l liter litre, dollar usd buck, cent, degree deg, radian rad, mph mi/h, unit",
)
_UNITS = {name: names.split()[0] for line in _SYNONYMS for names in line.split(", ") for name in names.split()}
_UNITS["percent"] = PERCENT
_KNOWN = set(_UNITS.values())
_VAGUE = {"unit"}
_PER = re.compile(r" ?/ ?| per ")

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_DECIMAL = re.compile(rf"(?P<whole>{_INTEGER})?(?:\.(?P<digits>\d*)(?:\\overline\s*\{{(?P<repeating>\d+)\}})?)?")
_FRACTION = re.compile(
    r"(?P<whole>\d+)?\s*\\frac\s*\{\s*(?P<top>[+-]?[\d.]+)\s*\}\s*\{\s*(?P<bottom>[+-]?[\d.]+)\s*\}"
    r"|(?:(?P<whole2>\d+) )?(?P<top2>[\d.]+) ?/ ?(?P<bottom2>[\d.]+)"
)
_UNIT = r"(?P<unit>[A-Za-z](?:[A-Za-z. /]|\\cdot )*?)\.?\s*(?P<power>\^\s*\{?\s*\d\s*\}?)?"
_TEXT_UNIT = re.compile(rf"(?P<value>.*\S)\s*\\text\s*\{{\s*{_UNIT}\s*\}}\s*(?P<power2>\^\s*\{{?\s*\d\s*\}}?)?")
_PLAIN_UNIT = re.compile(rf"(?P<value>.*[\d}})])\s*(?<!\\){_UNIT}")
_BASE = re.compile(r"(?P<value>[\dA-Fa-f]+)_\s*\{?\s*(?P<base>\d+)\s*\}?")


@dataclass(frozen=True)
class Quantity:
    """An exact number, and its unit where one was given."""

    value: Fraction
    unit: str | None = None

    def equals(self, truth: Quantity) -> bool:
        """Whether this answers what `truth` says. A missing unit is forgiven, another unit is not.

        20 % is 20 (what percent?) and 0.2; but 0.5 % is not 0.5, since nobody asks for a share in this way.
        """
        if self.unit == truth.unit:
            return self.value == truth.value
        if self.unit == PERCENT:
            return self.value == truth.value * 100 or (self.value == truth.value and abs(truth.value) >= 1)
        if truth.unit == PERCENT:
            return self.value in (truth.value, truth.value / 100)
        return same_unit(self.unit, truth.unit) and self.value == truth.value


def same_unit(first: str | None, second: str | None) -> bool:
    """Whether two units can be the same: equal, missing, or not both known."""
    if first == second or first is None or second is None:
        return True
    return not (_is_known(first) and _is_known(second))


def split_unit(text: str) -> tuple[str, str | None]:
    """A cleaned answer without its unit, and the unit (by its canonical name where known).

    What stands in `\\text{}` after a value is a unit; bare letters are one only if they are a known word, since
    they could be variables. The base of a numeral (`12_8`) counts as its unit.
    """
    if text.endswith("%"):
        return text[:-1].strip(), PERCENT
    found = _BASE.fullmatch(text)
    # C_1 is a name.
    if found and (found["value"].isdigit() or max(int(digit, 16) for digit in found["value"]) < int(found["base"])):
        return found["value"], f"base {found['base']}"
    if found := _TEXT_UNIT.fullmatch(text):
        return found["value"], _canonical(found["unit"]) + _power(found["power"] or found["power2"])
    found = _PLAIN_UNIT.fullmatch(text)
    if found and len(found["unit"]) > 1 and _canonical(found["unit"]) in _KNOWN:
        return found["value"], _canonical(found["unit"]) + _power(found["power"])
    return text, None


def parse_quantity(text: str) -> Quantity | None:
    """A cleaned answer as a quantity; None when it is anything but one number."""
    value, unit = split_unit(text)
    number = parse_number(value)
    return None if number is None else Quantity(number, unit)


def parse_number(text: str) -> Fraction | None:
    """Integer (thousands separators, leading zeros), decimal (repeating too), fraction or mixed number."""
    text = text.strip()
    negative = text.startswith("-")
    text = text[1:].strip() if text[:1] in ("+", "-") else text
    number = _parse_decimal(text)
    number = _parse_fraction(text) if number is None else number
    return -number if negative and number is not None else number


def _parse_decimal(text: str) -> Fraction | None:
    found = _DECIMAL.fullmatch(text)
    if not found or not (found["whole"] or found["digits"] or found["repeating"]):
        return None
    digits = found["digits"] or ""
    number = Fraction(re.sub(r"[, ]", "", found["whole"] or "0")) + Fraction(int(digits or 0), 10 ** len(digits))
    if found["repeating"]:
        number += Fraction(int(found["repeating"]), (10 ** len(found["repeating"]) - 1) * 10 ** len(digits))
    return number


def _parse_fraction(text: str) -> Fraction | None:
    found = _FRACTION.fullmatch(text)
    if not found:
        return None
    try:
        top, bottom = Fraction(found["top"] or found["top2"]), Fraction(found["bottom"] or found["bottom2"])
        return int(found["whole"] or found["whole2"] or 0) + top / bottom
    except (ValueError, ZeroDivisionError):
        return None


def _canonical(unit: str) -> str:
    words = re.sub(r"\s+", " ", unit.strip(" .").lower())
    parts = _PER.split(words)
    if len(parts) > 1:
        words = "/".join(map(_canonical, parts))
    for name, power in (("square ", "^2"), ("sq ", "^2"), ("cubic ", "^3")):
        if words.startswith(name):
            return _canonical(words.removeprefix(name)) + power
    return _UNITS.get(words) or _UNITS.get(words.removesuffix("s")) or words


def _power(text: str | None) -> str:
    return "^" + re.sub(r"\D", "", text) if text else ""


def _is_known(unit: str) -> bool:
    names = [part.partition("^")[0] for part in unit.split("/")]
    return unit.startswith("base ") or all(name in _KNOWN and name not in _VAGUE for name in names)
