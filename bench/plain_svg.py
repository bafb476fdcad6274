"""A picture as SVG, without a library: what all of ours have alike."""

from collections.abc import Sequence


def picture(width: float, height: float, parts: Sequence[str]) -> str:
    """On white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="none">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="#333" text-anchor="{anchor}">{words}</text>'
