"""Signatures: which extensions a file can have, judged by its first bytes. Nothing is decoded."""

import re
from dataclasses import dataclass
from functools import cache

from .content_types import content_type

HEAD = 8192
"""The number of first bytes that are looked at."""

_ISO = r".{4}ftyp"
_SIGNATURES = {
    # pictures
    r"\xff\xd8\xff": "jpg jpeg jpe jfif",
    r"\x89PNG\r\n\x1a\n": "png | apng",
    r"GIF8[79]a": "gif",
    r"RIFF.{4}WEBP": "webp",
    r"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0": "bmp",
    r"\0\0\x01\0[^\0]\0": "ico",
    _ISO + r"(?:avi[fs]|(?:mif1|msf1|miaf).{4}(?:.{4}){0,8}?avi[fs])": "avif",
    _ISO + r"(?:he[iv][cxms]|mif1|msf1)": "heic | heif",
    r"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n": "jxl",
    r"II[*+]\0|MM\0[*+]": "tif tiff",
    r"\0\0\0\x0cjP  \r\n\x87\n": "jp2 | jpx jpm",
    r"8BPS\0": "psd",
    # films and sound
    _ISO + r"qt  ": "mov qt",
    _ISO + r"M4[AB] ": "m4a m4b | mp4",
    _ISO: "mp4 m4v | m4a m4b mov 3gp 3g2 3gpp 3gpp2",
    r"\x1aE\xdf\xa3.{0,60}?webm": "webm | weba mkv mka",
    r"\x1aE\xdf\xa3": "mkv | mka mk3d",
    r"RIFF.{4}AVI ": "avi",
    r"RIFF.{4}WAVE": "wav",
    r"OggS\0.{20,60}?\x80theora": "ogv | ogg ogx",
    r"OggS\0": "ogg oga opus | ogv ogx",
    r"fLaC\0": "flac",
    r"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2-\xf5\xfa-\xfd]": "mp3 mp2",
    r"\xff[\xf0\xf1\xf8\xf9]": "aac adts",
    r"MThd\0\0\0\x06": "mid midi",
    r"FORM.{4}AIF[FC]": "aiff aif aifc",
    r"\.snd\0": "au snd",
    r"\0\0\x01[\xb3\xba]": "mpeg mpg mpe m1v",
    r"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "wmv",
    # documents, archives, fonts
    r"(?:\xef\xbb\xbf)?%PDF-": "pdf | ai",
    r"%!PS|\xc5\xd0\xd3\xc6": "ps eps ai",
    r"\{\\rtf": "rtf | doc",
    r"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "| doc dot wiz xls xlb ppt pot pps ppa pwz docx xlsx pptx",
    r"PK(?:\x03\x04|\x05\x06|\x07\x08)": "zip | docx xlsx pptx odt ods odp odg epub apk kmz",
    r"\x1f\x8b\x08": "gz tgz taz svgz",
    r"BZh[1-9]": "bz2 tbz2",
    r"\xfd7zXZ\0": "xz txz",
    r"\x28\xb5\x2f\xfd": "zst",
    r"7z\xbc\xaf\x27\x1c": "7z",
    r"Rar!\x1a\x07": "rar",
    r".{257}ustar": "tar | ustar gtar",
    r"OTTO\0": "otf",
    r"\0\x01\0\0\0[^\0]|true\0": "ttf | otf",
    r"ttcf\0": "ttc | otf ttf",
    r"wOFF(?:\0\x01\0\0|OTTO|true)": "woff",
    r"wOF2(?:\0\x01\0\0|OTTO|true|ttcf)": "woff2",
    r"\0asm": "wasm",
    r"glTF[\x01\x02]\0\0\0": "glb",
}
"""The first one that matches counts. The extensions of its type come first, the usual one at the beginning. Behind the
bar are those of types whose files can begin in the same way.
"""


@dataclass(frozen=True, slots=True)
class Signature:
    """First bytes of a type: the extensions of that type, and those of others whose files can begin in the same way."""

    mark: re.Pattern[bytes]
    own: list[str]
    others: list[str]

    @property
    def content_type(self) -> str:
        """The content type, for messages."""
        return content_type(f"x.{(self.own or self.others)[0]}")


@cache
def signatures() -> list[Signature]:
    """Compile them at the first upload: a command that saves none starts sooner."""
    lists = ((mark, *ends.partition("|")) for mark, ends in _SIGNATURES.items())
    return [
        Signature(re.compile(mark.encode("latin-1"), re.DOTALL), own.split(), others.split())
        for mark, own, _, others in lists
    ]


def recognise(head: bytes) -> Signature | None:
    """Return the signature that a file with these first bytes has; None if it is unknown."""
    return next((signature for signature in signatures() if signature.mark.match(head)), None)


def has_signature(end: str) -> bool:
    """Whether files with this extension begin with a signature."""
    return any(end in (*signature.own, *signature.others) for signature in signatures())
