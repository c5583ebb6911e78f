"""Brings the line numbers of links like [`Symbol`](../path#L12) in docs/*.md up to date (`make docs`).

A link points to the first line of code in the file that names its symbol. With --check, only reports.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"\[`(?P<symbol>[^`]+)`\]\((?P<path>[^)#]+)#L(?P<line>\d+)\)")
DOCS = Path(__file__).parent


def line_of(symbol: str, path: Path) -> int:
    """The first line that names the symbol and is no comment; raises ValueError when there is none."""
    word = re.compile(rf"(?<!\w){re.escape(symbol)}(?!\w)")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if word.search(line) and not line.lstrip().startswith(("//", "#", '"""')):
            return number
    raise ValueError(f"{path} does not name {symbol}")


def relinked(document: Path) -> str:
    def replace(match: re.Match[str]) -> str:
        symbol, path = match["symbol"], match["path"]
        return f"[`{symbol}`]({path}#L{line_of(symbol, document.parent / path)})"

    return LINK.sub(replace, document.read_text())


def main() -> int:
    stale = [document for document in sorted(DOCS.glob("*.md")) if relinked(document) != document.read_text()]
    for document in stale:
        print(f"{document.name}: line numbers are out of date" + ("; run `make docs`" if "--check" in sys.argv else ""))
        if "--check" not in sys.argv:
            document.write_text(relinked(document))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
