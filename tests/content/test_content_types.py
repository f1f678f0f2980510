"""One table of content types: what is in it, what is not, and what a browser would run."""

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
    """Every kind of image that browsers show has its registered type, in lower and in upper case."""
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
    """The extension is what follows the last dot of the last part, lower case; a dotfile and a folder give none."""
    assert extension(name) == end


@pytest.mark.parametrize("name", ["tom", "tom.unknown", ".png", "cats.png/tom", "x.php", "x.exe", "x.swf", ""])
def test_what_is_not_in_the_table(name: str) -> None:
    """What the table does not know is bytes that a browser downloads, never something that it guesses."""
    assert content_type(name) == UNKNOWN == "application/octet-stream"
    assert not can_run_script(content_type(name))


@pytest.mark.parametrize("name", SCRIPTED)
def test_documents_that_run_scripts(name: str) -> None:
    """CVE-2020-15275: SVG, HTML and every XML are known as documents in which a browser runs scripts."""
    assert can_run_script(content_type(name))


@pytest.mark.parametrize("name", [name for name in EVERY_NAME if name not in SCRIPTED])
def test_nothing_else_runs_scripts(name: str) -> None:
    """No other type of the table is a document in which a browser runs scripts."""
    kind = content_type(name)
    assert not can_run_script(kind)
    assert "xml;" not in f"{kind};".replace("officedocument.", "")
    assert "html" not in kind


def test_parameters_do_not_hide_a_script() -> None:
    """A charset behind the type changes nothing in what a browser runs."""
    assert can_run_script("text/html; charset=utf-8")
    assert can_run_script("image/svg+xml;charset=utf-8")
    assert can_run_script("application/rss+xml")
    assert not can_run_script("text/plain; charset=utf-8")


@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_type_is_fit_for_a_header(name: str) -> None:
    """Every type is ASCII of the form type/subtype, every text says its charset, and every extension is lower case."""
    bare, _, parameter = content_type(name).partition("; ")
    assert content_type(name).isascii()
    assert bare.count("/") == 1
    assert bare == bare.lower()
    assert parameter == ("charset=utf-8" if bare.startswith("text/") else "")
    assert name == name.lower()


def test_the_machine_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's table of types says, the answer is the same."""
    monkeypatch.setattr(mimetypes, "_db", mimetypes.MimeTypes())
    mimetypes.add_type("text/html", ".png")
    mimetypes.add_type("text/html", ".unknown")
    assert mimetypes.guess_type("tom.png")[0] == "text/html"
    assert content_type("tom.png") == "image/png"
    assert content_type("tom.unknown") == UNKNOWN
