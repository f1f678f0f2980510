"""The table of content types: what is in it, what is not, and which types run scripts."""

from __future__ import annotations

import mimetypes

import pytest

from selfheal.content.content_types import (
    _TABLE,
    IMAGE_EXTENSIONS,
    UNKNOWN,
    can_run_script,
    content_type,
    extension,
)

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
OTHERS |= {
    "x.vtt": "text/vtt; charset=utf-8",
    "x.ics": "text/calendar; charset=utf-8",
    "x.vcf": "text/vcard; charset=utf-8",
    "x.srt": "text/plain; charset=utf-8",
    "x.avi": "video/vnd.avi",
    "x.mpeg": "video/mpeg",
    "x.mpg": "video/mpeg",
    "x.3gp": "video/3gpp",
    "x.ogv": "video/ogg",
    "x.oga": "audio/ogg",
    "x.mid": "audio/midi",
    "x.mka": "audio/matroska",
    "x.wasm": "application/wasm",
    "x.m3u8": "application/vnd.apple.mpegurl",
    "x.webmanifest": "application/manifest+json",
    "x.geojson": "application/geo+json",
    "x.yaml": "application/yaml",
    "x.toml": "application/toml",
    "x.rar": "application/vnd.rar",
    "x.tgz": "application/gzip",
    "x.svgz": "application/gzip",
    "x.glb": "model/gltf-binary",
    "x.eml": "message/rfc822",
    "x.mhtml": "message/rfc822",
    "x.rss": "application/rss+xml",
    "x.kml": "application/vnd.google-earth.kml+xml",
    "x.xul": "application/vnd.mozilla.xul+xml",
}
"""Those that browsers show are in the default policy, these are not."""
OTHER_IMAGES = {
    "x.jp2": "image/jp2",
    "x.psd": "image/vnd.adobe.photoshop",
    "x.emf": "image/emf",
    "x.pbm": "image/x-portable-bitmap",
}
"""Images that no browser shows."""
SCRIPTED = ["svg", "html", "htm", "xhtml", "xht", "xml", "xsl", "xpdl", "atom", "rss", "rdf", "wsdl", "gpx", "kml"]
SCRIPTED += ["mpd", "xul", "eml", "mht", "mhtml", "nws"]
EVERY_NAME = sorted({f"x.{end}" for end in _TABLE} | IMAGES.keys() | OTHERS.keys() | OTHER_IMAGES.keys())
DIFFERENT = {
    "3gp": "the usual file is a film; audio/3gpp is for files without one",
    "3gpp": "as 3gp",
    "3g2": "as 3gp",
    "3gpp2": "as 3gp",
    "avi": "IANA: video/vnd.avi (Python 3.11 to 3.13: video/x-msvideo)",
    "ico": "the MIME Sniffing Standard and browsers: image/x-icon",
    "jpg": "image/jpg, of the non-standard types, is an error",
    "js": "RFC 9239: text/javascript (Python 3.11: application/javascript)",
    "m4v": "an MP4 film; browsers do not know video/x-m4v",
    "mjs": "as js",
    "mkv": "browsers: video/x-matroska",
    "opus": "RFC 7845: audio/ogg; audio/opus is for RTP",
    "php": "no browser uses a type of its source code, and a server in front could run it",
    "rdf": "IANA: application/rdf+xml",
    "rtf": "IANA has both; text/rtf would get a charset, which the format does not use",
    "sgm": "IANA: text/sgml",
    "sgml": "as sgm",
    "swf": "plug-ins run script; no browser has this one any more",
    "texi": "as texinfo",
    "texinfo": "application/texinfo (Python 3.11 to 3.13: with x-)",
    "vcf": "RFC 6350: text/vcard",
    "wav": "the MIME Sniffing Standard: audio/wav",
    "wsdl": "IANA: application/wsdl+xml",
    "xml": "RFC 7303: application/xml, whose charset is in the file",
    "xul": "application/vnd.mozilla.xul+xml: known to run script",
}
"""The extensions whose types differ from Python's `mimetypes` on purpose, on some version or on all."""
NEWER = (
    "epub gz ogx toml eot odg odp ods odt pptx xlsx docx rar 7z deb rpm yaml yml flac mka m4a ogg weba otf ttf woff "
    "woff2 emf fits g3 jp2 jpm jpx t38 tfx wmf gltf glb stl md markdown rst mkv mk3d ogv m4v wmv cjs apk"
)
"""What `mimetypes` got after Python 3.11."""


@pytest.mark.parametrize(("name", "kind"), IMAGES.items())
def test_images(name: str, kind: str) -> None:
    """Every image type that browsers show has its registered content type, in lower and upper case."""
    assert content_type(name) == kind
    assert content_type(name.upper()) == kind
    assert (extension(name) in IMAGE_EXTENSIONS) == (name != "tom.svg")


def test_uploads_that_are_accepted_by_default_run_no_script() -> None:
    """By default no upload is accepted that can run script in a browser, whatever server sends it; SVG can."""
    assert not any(can_run_script(content_type(f"x.{end}")) for end in IMAGE_EXTENSIONS)
    assert all(content_type(f"x.{end}").startswith("image/") for end in IMAGE_EXTENSIONS)
    assert IMAGE_EXTENSIONS == {extension(name) for name in IMAGES} - {"svg"}


@pytest.mark.parametrize(("name", "kind"), (OTHERS | OTHER_IMAGES).items())
def test_other_types(name: str, kind: str) -> None:
    """Documents, sound, fonts and film have their registered content type, and are not accepted by default."""
    assert content_type(name) == kind
    assert extension(name) not in IMAGE_EXTENSIONS


@pytest.mark.parametrize("is_strict", [True, False])
def test_every_type_of_python(is_strict: bool) -> None:
    """Every extension that Python's own table knows has the same type here, except where this is better on purpose."""
    theirs = mimetypes.MimeTypes(()).types_map[is_strict]
    assert len(theirs) >= (8 if not is_strict else 130)
    different = {
        dotted[1:]: (kind, content_type(f"x{dotted}"))
        for dotted, kind in theirs.items()
        if content_type(f"x{dotted}").partition(";")[0] != kind
    }
    assert different.keys() <= DIFFERENT.keys()


def test_the_types_of_newer_pythons() -> None:
    """What newer versions of Python know is known on every version."""
    assert [end for end in NEWER.split() if content_type(f"x.{end}") == UNKNOWN] == []


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


@pytest.mark.parametrize("end", SCRIPTED)
def test_documents_that_run_scripts(end: str) -> None:
    """SVG, HTML, every XML type and archived pages are known to run scripts (CVE-2020-15275)."""
    assert can_run_script(content_type(f"x.{end}"))
    assert can_run_script(content_type(f"x.{end.upper()}"))


@pytest.mark.parametrize("name", [name for name in EVERY_NAME if extension(name) not in SCRIPTED])
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
