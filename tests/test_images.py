"""The pictures of the documentation: as benchmarks.images draws them now, and legible on light and dark pages."""

from __future__ import annotations

import re
import statistics
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import images
from commons.plans.registry import MODEL_STATES, PLANS


@pytest.mark.parametrize("name", images.PICTURES)
def test_committed_pictures_are_current(name: str) -> None:
    drawn = images.PICTURES[name]()
    assert drawn == images.PICTURES[name](), "the same input gives the same bytes"
    assert (images.IMAGES / name).read_text() == drawn, "draw them again: python -m benchmarks.images"


def test_no_picture_is_left_over() -> None:
    assert {path.name for path in images.IMAGES.iterdir()} == set(images.PICTURES)


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("name", images.PICTURES)
@pytest.mark.parametrize("page", images.PAGES.values(), ids=images.PAGES)
def test_colours_are_legible(name: str, page: str) -> None:
    picture = ElementTree.fromstring(images.PICTURES[name]())
    for element in picture.iter():
        is_text = element.tag.endswith("text")
        for colour in (element.get("fill"), element.get("stroke")):
            if colour and colour.startswith("#") and not element.get("fill-opacity"):
                assert contrast(colour, page) >= (4.0 if is_text else 3.0), (colour, page)
        assert not is_text or element.get("fill") == images.INK


@pytest.mark.parametrize("name", images.PICTURES)
def test_everything_is_inside(name: str) -> None:
    """Nothing is cut off; a character counts as 0.62 of its size, which no usual sans-serif font exceeds on average."""
    picture = ElementTree.fromstring(images.PICTURES[name]())
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for element in picture.iter():
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        if element.tag.endswith("text"):
            length = 0.62 * float(element.get("font-size", 0)) * len(element.text or "")
            assert x + length * (element.get("text-anchor") is None) <= width, element.text
            assert 0 < y <= height, element.text
        elif element.tag.endswith("rect"):
            assert x + float(element.get("width", 0)) <= width and y + float(element.get("height", 0)) <= height


def test_bars_of_two_ranks_make_the_whole() -> None:
    """Sharded: half a bar on each rank; otherwise a whole one on both."""
    picture = images.plans_picture()
    for state, colour in images.STATE_COLOURS.items():
        solid = re.findall(
            rf'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="8" rx="2" fill="{colour}"/>', picture
        )
        rows: dict[float, list[float]] = {}
        for _, y, width in solid:
            rows.setdefault(float(y), []).append(float(width))
        widths = [rows[y] for y in sorted(rows)]
        full = max(max(pair) for pair in widths)
        expected = []
        for plan in PLANS.values():
            share = 0.5 if state in plan.sharded else 1.0
            expected.append([full * share] * 2)
            expected += [[full / 2] * 2] if plan.pipeline else []
        assert widths == expected, state
    assert set(images.STATE_COLOURS) == set(MODEL_STATES)


def test_speed_bars_are_medians() -> None:
    picture = images.speed_picture()
    for panel in images.PANELS:
        for case in panel.cases:
            values = images.medians(panel.results, case.case, "model_tflops_per_device")
            assert values and f">{statistics.median(values):.0f}</text>" in picture


def test_what_is_gone_is_not_drawn() -> None:
    assert images.is_defined("training", "train_steps") and not images.is_defined("training", "train_stepz")
