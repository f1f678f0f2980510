"""The table of content types: what is in it, what is not, and which types run scripts."""

from __future__ import annotations

import mimetypes

import pytest

from selfheal.content import content_types
from selfheal.content.content_types import IMAGE_EXTENSIONS, UNKNOWN, can_run_script, content_type, extension

IMAGES = {
    "tom.jpg": "image/jpeg",
    "tom.jpeg": "image/jpeg",
    "tom.jpe": "image/jpeg",
    "tom.jfif": "image/jpeg",
    "tom.png": "image/png",
    "tom.apng": "image/apng",
    "tom.gif": "image/gif",
    "tom.webp": "image/webp",
    "tom.avif": "image/avif",
    "tom.bmp": "image/bmp",
    "tom.tif": "image/tiff",
    "tom.tiff": "image/tiff",
    "tom.ico": "image/x-icon",
    "tom.svg": "image/svg+xml",
    "tom.heic": "image/heic",
    "tom.heif": "image/heif",
    "tom.jxl": "image/jxl",
}
SCRIPTED = ["x.svg", "x.SVG", "x.html", "x.htm", "x.xhtml", "x.xht", "x.xml", "x.xsl"]
EVERY_NAME = [f"x.{end}" for end in sorted({*content_types._IMAGES, *content_types._OTHERS})]


@pytest.mark.parametrize(("name", "kind"), IMAGES.items())
def test_images(name: str, kind: str) -> None:
    """Every image type that browsers show has its registered content type, in lower and upper case."""
    assert content_type(name) == kind
    assert content_type(name.upper()) == kind
    assert extension(name) in IMAGE_EXTENSIONS


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("tom.jpg", "jpg"),
        ("cats/tom.JPG", "jpg"),
        ("a.tar.gz", "gz"),
        ("shell.php.png", "png"),
        ("tom.png.exe", "exe"),
        ("cats.d/tom", ""),
        ("tom", ""),
        ("tom.", ""),
        (".png", ""),
        ("cats/.png", ""),
        ("a..png", "png"),
        ("", ""),
        ("cats.png/", ""),
    ],
)
def test_extensions(name: str, end: str) -> None:
    """The extension follows the last dot of the last part, in lower case; a dotfile and a folder have none."""
    assert extension(name) == end


@pytest.mark.parametrize("name", ["tom", "tom.unknown", ".png", "cats.png/tom", "x.php", "x.exe", "x.swf", ""])
def test_unknown_names(name: str) -> None:
    """A name that is not in the table is `application/octet-stream`, which a browser downloads."""
    assert content_type(name) == UNKNOWN == "application/octet-stream"
    assert not can_run_script(content_type(name))


@pytest.mark.parametrize("name", SCRIPTED)
def test_documents_that_run_scripts(name: str) -> None:
    """SVG, HTML and every XML type are known to run scripts (CVE-2020-15275)."""
    assert can_run_script(content_type(name))


@pytest.mark.parametrize("name", [name for name in EVERY_NAME if name not in SCRIPTED])
def test_nothing_else_runs_scripts(name: str) -> None:
    """No other type of the table runs scripts in a browser."""
    kind = content_type(name)
    assert not can_run_script(kind)
    assert "xml;" not in f"{kind};".replace("officedocument.", "")
    assert "html" not in kind


def test_parameters_do_not_hide_a_script() -> None:
    """A charset after the type does not change whether it runs scripts."""
    assert can_run_script("text/html; charset=utf-8")
    assert can_run_script("image/svg+xml;charset=utf-8")
    assert can_run_script("application/rss+xml")
    assert not can_run_script("text/plain; charset=utf-8")


@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_type_is_valid_in_a_header(name: str) -> None:
    """Every type is ASCII of the form type/subtype, every text has a charset, every extension is lower case."""
    bare, _, parameter = content_type(name).partition("; ")
    assert content_type(name).isascii()
    assert bare.count("/") == 1
    assert bare == bare.lower()
    assert parameter == ("charset=utf-8" if bare.startswith("text/") else "")
    assert name == name.lower()


def test_the_types_of_the_machine_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The content types of the machine (`mimetypes`) change nothing."""
    monkeypatch.setattr(mimetypes, "_db", mimetypes.MimeTypes())
    mimetypes.add_type("text/html", ".png")
    mimetypes.add_type("text/html", ".unknown")
    assert mimetypes.guess_type("tom.png")[0] == "text/html"
    assert content_type("tom.png") == "image/png"
    assert content_type("tom.unknown") == UNKNOWN
