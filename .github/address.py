"""Writes the repository's address into what is published: the sources do not know where they will lie.

    python .github/address.py https://HOST/OWNER/NAME TAG

Links and pictures of README.md that are paths become addresses, for the page of a package index has no files beside it;
pyproject.toml gets the project's URLs.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(
    r"(?P<before>!?\[[^\]]*\]\(|(?P<tag><(?:img|a|source)\s[^>]*?(?:src|href|srcset)=\"))(?P<path>(?!#|\w+:)[^)\s\"]+)"
)
PICTURES = (".png", ".svg", ".jpg", ".gif", ".webp")


def absolute(text: str, address: str, tag: str) -> str:
    def with_address(link: re.Match) -> str:
        kind = "raw" if link["path"].endswith(PICTURES) else "blob"
        return f"{link['before']}{address}/{kind}/{tag}/{link['path'].removeprefix('./')}"

    return LINK.sub(with_address, text)


def with_urls(project: str, address: str, tag: str) -> str:
    urls = {
        "Repository": address,
        "Documentation": f"{address}/tree/{tag}/docs",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    head = "[project.urls]\n"
    assert project.count(head) == 1
    return project.replace(head, head + "".join(f'{name} = "{url}"\n' for name, url in urls.items()))


def main(address: str, tag: str) -> None:
    for name, rewritten in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = Path(name)
        path.write_text(rewritten(path.read_text(encoding="utf-8"), address.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
