"""The oldest versions that pyproject.toml allows, as requirements for pip: ``python tests/oldest.py pyproject.toml``.

Of the package itself, of what builds it, and of the extras that the tests of ``make oldest`` need.
"""

import re
import sys
from pathlib import Path

EXTRAS = ("train", "serve", "plots", "test")


def oldest(pyproject: str) -> list[str]:
    """The requirements of a pyproject.toml with each lower bound as the version; those without a bound as they are."""
    lists = [_list(pyproject, name) for name in ("requires", "dependencies", *EXTRAS)]
    return list(dict.fromkeys(requirement.replace(">=", "==") for part in lists for requirement in part))


def _list(pyproject: str, name: str) -> list[str]:
    # Python 3.10 has no tomllib, and these lists hold nothing but strings.
    contents = re.search(rf"^{name} = \[(.*?)\]$", pyproject, re.MULTILINE | re.DOTALL)
    if contents is None:
        raise ValueError(f"pyproject.toml has no list named {name}")
    return re.findall(r'"([^"]+)"', contents[1])


if __name__ == "__main__":
    print("\n".join(oldest(Path(sys.argv[1]).read_text(encoding="utf-8"))))
