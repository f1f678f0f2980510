"""Content types from one table: the same on every machine, whatever its `/etc/mime.types` says."""

_SUBTYPES = {
    "application": "epub+zip=epub gzip=gz json msword=doc pdf rtf vnd.ms-excel=xls vnd.ms-powerpoint=ppt "
    "vnd.oasis.opendocument.text=odt vnd.openxmlformats-officedocument.presentationml.presentation=pptx "
    "vnd.openxmlformats-officedocument.spreadsheetml.sheet=xlsx x-7z-compressed=7z x-tar=tar "
    "vnd.openxmlformats-officedocument.wordprocessingml.document=docx xhtml+xml=xht xhtml+xml=xhtml xml xml=xsl zip",
    "audio": "aac flac mp4=m4a mpeg=mp3 ogg ogg=opus wav webm=weba",
    "font": "otf ttf woff woff2",
    "image": "apng avif bmp gif heic heif jpeg jpeg=jfif jpeg=jpe jpeg=jpg jxl png svg+xml=svg tiff tiff=tif webp "
    "x-icon=ico",
    "text": "css csv html html=htm javascript=js javascript=mjs markdown=md plain=txt",
    "video": "mp4 mp4=m4v quicktime=mov webm x-matroska=mkv",
}
"""The subtypes of each type, and their extension where it has another name."""
_TABLE = {
    words[-1]: f"{kind}/{words[0]}" + "; charset=utf-8" * (kind == "text")
    for kind, subtypes in _SUBTYPES.items()
    for words in (subtype.split("=") for subtype in subtypes.split())
}

UNKNOWN = "application/octet-stream"
IMAGE_EXTENSIONS = frozenset(end for end, kind in _TABLE.items() if kind.startswith("image/"))


def extension(name: str) -> str:
    """Return the extension of a name in lower case, without its dot; empty if there is none."""
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return end.lower() if dot and stem else ""


def content_type(name: str) -> str:
    """Return the Content-Type that `name` is served with."""
    return _TABLE.get(extension(name), UNKNOWN)


def can_run_script(kind: str) -> bool:
    """Whether a browser runs scripts inside such a document: SVG, HTML and every XML (CVE-2020-15275)."""
    bare = kind.partition(";")[0]
    return bare == "text/html" or bare.endswith(("/xml", "+xml"))
