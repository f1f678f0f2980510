"""Names that look alike, or that a database could compare as equal."""

from __future__ import annotations

import unicodedata

NFC, NFD = unicodedata.normalize("NFC", "café.png"), unicodedata.normalize("NFD", "café.png")
SIMILAR_NAMES = [
    "a.png", "A.png", "a.PNG", "Ä.png", "ä.png", "æ.png", "ae.png", NFC, NFD, "cafe.png", "Café.png", "CAFÉ.PNG",
    "straße.png", "strasse.png", "ı.png", "i.png", "I.png", "İ.png", "ﬁ.png", "fi.png", "a b.png", "a_b.png",
    "a-b.png", "ab.png", "a%b.png", "10.png", "9.png", "2.png", "a/b.png", "a/B.png", "A/b.png", "日本.png", "😀.png",
    "\uffed.png", "\u2126.png", "\u03a9.png", "a'b.png", 'a"b.png', "a[b]@2x.png", "a;b.png", "null", "a\u200bb.png",
]  # fmt: skip
