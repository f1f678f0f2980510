"""Content types from one table: the same on every machine, whatever its `/etc/mime.types` says.

The table has every extension that Python's `mimetypes` has, except a few that `tests/content` lists with reasons. Types
are named as IANA registers them.
"""

_SUBTYPES = {
    "application": "atom+xml=atom dash+xml=mpd epub+zip=epub geo+json=geojson gpx+xml=gpx gzip=gz,taz,tgz,svgz "
    "json=json,map ld+json=jsonld manifest+json=webmanifest msword=doc,dot,wiz n-quads=nq n-triples=nt node=cjs oda "
    "ogg=ogx pdf pkcs7-mime=p7c postscript=ps,ai,eps rdf+xml=rdf rss+xml=rss rtf texinfo=texinfo,texi toml trig "
    "vnd.android.package-archive=apk vnd.apple.mpegurl=m3u8,m3u vnd.google-earth.kml+xml=kml "
    "vnd.google-earth.kmz=kmz vnd.mozilla.xul+xml=xul vnd.ms-excel=xls,xlb vnd.ms-fontobject=eot "
    "vnd.ms-powerpoint=ppt,pot,ppa,pps,pwz vnd.oasis.opendocument.graphics=odg "
    "vnd.oasis.opendocument.presentation=odp vnd.oasis.opendocument.spreadsheet=ods vnd.oasis.opendocument.text=odt "
    "vnd.openxmlformats-officedocument.presentationml.presentation=pptx "
    "vnd.openxmlformats-officedocument.spreadsheetml.sheet=xlsx "
    "vnd.openxmlformats-officedocument.wordprocessingml.document=docx vnd.rar=rar wasm wsdl+xml=wsdl "
    "x-7z-compressed=7z x-bcpio=bcpio x-bzip2=bz2,tbz2 x-compress=z x-cpio=cpio x-csh=csh x-debian-package=deb "
    "x-dvi=dvi x-gtar=gtar x-hdf=hdf x-hdf5=h5 x-latex=latex x-mif=mif x-netcdf=nc,cdf x-pkcs12=p12,pfx "
    "x-pn-realaudio=ram x-python-code=pyc,pyo x-rpm=rpm x-sh=sh x-shar=shar x-sv4cpio=sv4cpio x-sv4crc=sv4crc "
    "x-tar=tar x-tcl=tcl x-tex=tex x-troff=roff,t,tr x-troff-man=man x-troff-me=me x-troff-ms=ms x-ustar=ustar "
    "x-wais-source=src x-xz=xz,txz xhtml+xml=xhtml,xht xml=xml,xpdl,xsl yaml=yaml,yml zip zstd=zst",
    "audio": "aac=aac,adts,ass,loas basic=au,snd flac matroska=mka midi=mid,midi mp4=m4a,m4b mpeg=mp3,mp2 "
    "ogg=ogg,oga,opus wav webm=weba x-aiff=aiff,aif,aifc x-pn-realaudio=ra",
    "font": "collection=ttc otf ttf woff woff2",
    "image": "apng avif bmp emf fits g3fax=g3 gif heic heif ief jp2 jpeg=jpg,jpeg,jpe,jfif jpm jpx jxl "
    "pict=pict,pct,pic png svg+xml=svg t38 tiff=tif,tiff tiff-fx=tfx vnd.adobe.photoshop=psd webp wmf "
    "x-cmu-raster=ras x-icon=ico x-portable-anymap=pnm x-portable-bitmap=pbm x-portable-graymap=pgm "
    "x-portable-pixmap=ppm x-rgb=rgb x-xbitmap=xbm x-xpixmap=xpm x-xwindowdump=xwd",
    "message": "rfc822=eml,mht,mhtml,nws",
    "model": "gltf+json=gltf gltf-binary=glb stl",
    "text": "calendar=ics css csv html=html,htm javascript=js,mjs markdown=md,markdown n3 plain=txt,bat,c,h,ksh,pl,srt "
    "richtext=rtx sgml=sgml,sgm tab-separated-values=tsv vcard=vcf vtt x-python=py x-rst=rst x-setext=etx",
    "video": "3gpp=3gp,3gpp 3gpp2=3g2,3gpp2 matroska-3d=mk3d mp4=mp4,m4v mpeg=mpeg,m1v,mpa,mpe,mpg ogg=ogv "
    "quicktime=mov,qt vnd.avi=avi webm x-matroska=mkv x-ms-wmv=wmv x-sgi-movie=movie",
}
"""The subtypes of each type, and their extensions where they have other names."""
_TABLE = {
    end: f"{kind}/{subtype}" + "; charset=utf-8" * (kind == "text")
    for kind, subtypes in _SUBTYPES.items()
    for subtype, _, ends in (words.partition("=") for words in subtypes.split())
    for end in (ends or subtype).split(",")
}

UNKNOWN = "application/octet-stream"
_PICTURES = "apng avif bmp gif heic heif ico jfif jpe jpeg jpg jxl png tif tiff webp"
IMAGE_EXTENSIONS = frozenset(_PICTURES.split())
"""What uploads may be by default. SVG is not in it: it can run script on servers that send no policy with it."""


def extension(name: str) -> str:
    """Return the extension of a name in lower case, without its dot; empty if there is none."""
    stem, dot, end = name.rpartition("/")[2].rpartition(".")
    return end.lower() if dot and stem else ""


def content_type(name: str) -> str:
    """Return the Content-Type that `name` is served with."""
    return _TABLE.get(extension(name), UNKNOWN)


def can_run_script(kind: str) -> bool:
    """Whether a browser may run scripts in such a document: HTML, every XML (SVG: CVE-2020-15275), archived pages."""
    bare = kind.partition(";")[0]
    return bare in {"text/html", "message/rfc822"} or bare.endswith(("/xml", "+xml"))
