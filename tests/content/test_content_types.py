"""The table of content types: what is in it, what is not, and which types run scripts."""

from __future__ import annotations

import mimetypes

import pytest

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
OTHERS = {
    "x.epub": "application/epub+zip",
    "x.gz": "application/gzip",
    "x.json": "application/json",
    "x.doc": "application/msword",
    "x.pdf": "application/pdf",
    "x.rtf": "application/rtf",
    "x.xls": "application/vnd.ms-excel",
    "x.ppt": "application/vnd.ms-powerpoint",
    "x.odt": "application/vnd.oasis.opendocument.text",
    "x.pptx": "application/vnd.openxmlformats-officedocument.presentationml.presentation",
    "x.xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "x.docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "x.7z": "application/x-7z-compressed",
    "x.tar": "application/x-tar",
    "x.xht": "application/xhtml+xml",
    "x.xhtml": "application/xhtml+xml",
    "x.xml": "application/xml",
    "x.xsl": "application/xml",
    "x.zip": "application/zip",
    "x.aac": "audio/aac",
    "x.flac": "audio/flac",
    "x.m4a": "audio/mp4",
    "x.mp3": "audio/mpeg",
    "x.ogg": "audio/ogg",
    "x.opus": "audio/ogg",
    "x.wav": "audio/wav",
    "x.weba": "audio/webm",
    "x.otf": "font/otf",
    "x.ttf": "font/ttf",
    "x.woff": "font/woff",
    "x.woff2": "font/woff2",
    "x.css": "text/css; charset=utf-8",
    "x.csv": "text/csv; charset=utf-8",
    "x.htm": "text/html; charset=utf-8",
    "x.html": "text/html; charset=utf-8",
    "x.js": "text/javascript; charset=utf-8",
    "x.mjs": "text/javascript; charset=utf-8",
    "x.md": "text/markdown; charset=utf-8",
    "x.txt": "text/plain; charset=utf-8",
    "x.m4v": "video/mp4",
    "x.mp4": "video/mp4",
    "x.mov": "video/quicktime",
    "x.webm": "video/webm",
    "x.mkv": "video/x-matroska",
}
SCRIPTED = ["x.svg", "x.SVG", "x.html", "x.htm", "x.xhtml", "x.xht", "x.xml", "x.xsl"]
SCRIPTED_ENDS = tuple(name.lower()[1:] for name in SCRIPTED)
EVERY_NAME = sorted(IMAGES | OTHERS)


@pytest.mark.parametrize(("name", "kind"), IMAGES.items())
def test_images(name: str, kind: str) -> None:
    """Every image type that browsers show has its registered content type, in lower and upper case."""
    assert content_type(name) == kind
    assert content_type(name.upper()) == kind
    assert extension(name) in IMAGE_EXTENSIONS


@pytest.mark.parametrize(("name", "kind"), OTHERS.items())
def test_other_types(name: str, kind: str) -> None:
    """Documents, sound, fonts and film have their registered content type, and are no images."""
    assert content_type(name) == kind
    assert extension(name) not in IMAGE_EXTENSIONS


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


@pytest.mark.parametrize("name", [name for name in EVERY_NAME if not name.endswith(SCRIPTED_ENDS)])
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
