"""Pictures for the demo and the tests: a few hundred KB of drawings, the same bytes at every run.

`python -m examples.pictures DIRECTORY` writes them to a directory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from PIL import ExifTags, Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageMath

Colour = tuple[int, int, int]
Point = tuple[float, float]

SIZE = WIDTH, HEIGHT = 720, 480
NIGHT = "#0b1026"
DUSK = (NIGHT, "#2b2a5e", "#7b3b7a", "#d8576b", "#f9a65a", "#ffe9b0")
SEA = ("#03121f", "#063b52", "#0d7c86", "#57c4ad", "#e9f5db")
EMBER = ("#07060f", "#3a0f3d", "#8f1d4f", "#e2533a", "#fbb13c", "#fff6d6")
MEADOW = ("#0c3b35", "#17725d", "#5fae57", "#d9d26b", "#f7e7b4", "#e07a3f")
LAND = ("#0b3954", "#0f5d7e", "#2a93a6", "#8fd0c4", "#efe3b8", "#9dbb6a", "#4f8a4b", "#7d6a4f", "#b9a793", "#ffffff")


def pictures() -> dict[str, bytes]:
    """Return every picture, encoded, by its file name."""
    return {name: draw() for name, draw in DRAWINGS.items()}


# -- images like photographs: JPEG with EXIF, WebP --------------------------------------------------------------------


def dusk() -> bytes:
    """Ridges in front of a low sun: JPEG."""
    picture, random = _coloured(Image.linear_gradient("L").resize(SIZE), DUSK), Random("dusk")
    for radius, strength, blur in ((150, 80, 60), (80, 90, 25), (40, 255, 1)):
        glow = Image.new("L", SIZE)
        ImageDraw.Draw(glow).circle((490, 205), radius, fill=strength)
        picture.paste("#fff3cc", mask=glow.filter(ImageFilter.GaussianBlur(blur)))
    draw = ImageDraw.Draw(picture)
    for layer in range(7):
        waves = [(random.uniform(2, 4) * 2**octave, random.uniform(0, 6.3), 30 / 2**octave) for octave in range(7)]
        ridge = [
            (x, 270 + 32 * layer + sum(size * math.sin(x / WIDTH * often + shift) for often, shift, size in waves))
            for x in range(0, WIDTH + 3, 3)
        ]
        draw.polygon([*ridge, (WIDTH, HEIGHT), (0, HEIGHT)], fill=_at(("#a94f6d", "#4a2a5c", NIGHT), layer / 6))
    return _encoded(picture, "JPEG", quality=88, exif=_exif("Dusk"))


def glass() -> bytes:
    """Leaded glass: JPEG. The nearest of many points gives the colour, the second nearest the lead lines."""
    random, (x, y) = Random("glass"), _coordinates()
    picture = Image.new("RGB", SIZE)
    nearest = second = Image.new("F", SIZE, 1e6)
    for cell in range(9 * 6):
        at = (cell % 9 + random.uniform(0.05, 0.95)) * 80, (cell // 9 + random.uniform(0.05, 0.95)) * 80
        far = _distance(x, y, at)
        nearer = _math(lambda o: (o["nearest"] - o["far"]) * 1e6, nearest=nearest, far=far).convert("L")
        picture.paste(_at(MEADOW, (at[0] / WIDTH + at[1] / HEIGHT) / 2 + random.uniform(-0.2, 0.2)), mask=nearer)
        second = _math(
            lambda o: o["min"](o["second"], o["max"](o["nearest"], o["far"])), nearest=nearest, second=second, far=far
        )
        nearest = _math(lambda o: o["min"](o["nearest"], o["far"]), nearest=nearest, far=far)
    glass = _math(lambda o: (o["second"] - o["nearest"] - 4) * 70, nearest=nearest, second=second).convert("L")
    light = _math(lambda o: 262 - o["nearest"] * 1.9, nearest=nearest).convert("L")
    picture = ImageChops.multiply(picture, light.convert("RGB"))
    picture.paste("#12161c", mask=ImageChops.invert(glass))
    return _encoded(picture, "JPEG", quality=82, progressive=True, exif=_exif("Leaded glass"))


def flow() -> bytes:
    """Lines that follow a field of directions: JPEG."""
    picture, random = Image.new("RGB", (WIDTH * 2, HEIGHT * 2), NIGHT), Random("flow")
    draw = ImageDraw.Draw(picture)
    for _ in range(1300):
        x, y = random.uniform(-60, WIDTH + 60), random.uniform(-60, HEIGHT + 60)
        tone = 0.55 + 0.4 * math.sin(x / 160 + y / 90) + random.uniform(-0.12, 0.12)
        thread = []
        for _ in range(34):
            angle = 1.6 * math.sin(x / 150) + 1.4 * math.cos(y / 110) + 0.9 * math.sin((x + y) / 210)
            thread.append((x * 2, y * 2))
            x, y = x + 4 * math.cos(angle), y + 4 * math.sin(angle)
        draw.line(thread, fill=_at(DUSK[1:], tone), width=random.choice((2, 3, 5, 7)))
    return _encoded(_smoothed(picture), "JPEG", quality=66, exif=_exif("Flow"))


def island() -> bytes:
    """A shaded map of an invented island: JPEG."""
    x, y = _coordinates()
    height = _math(
        lambda o: o["noise"] * 1.5 - o["far"] * 0.42 + 5,
        noise=_noise("isle", (3, 6, 12, 24, 48)),
        far=_distance(x, y, (WIDTH / 2, HEIGHT / 2)),
    )
    relief = ImageChops.subtract(height.convert("L"), ImageChops.offset(height.convert("L"), 2, 2), 0.3, 128)
    land = _coloured(height.convert("L"), LAND)
    return _encoded(ImageChops.overlay(land, relief.convert("RGB")), "JPEG", quality=80, exif=_exif("Island"))


def moon() -> bytes:
    """A moon in its third quarter: JPEG in grey."""
    x, y = _coordinates()
    sphere = _math(
        lambda o: o["max"](1 - ((o["x"] - 360) / 190) ** 2 - ((o["y"] - 240) / 190) ** 2, 0.0) ** 0.5, x=x, y=y
    )
    lit = _math(
        lambda o: (o["z"] * 0.55 + ((o["x"] - 360) * -0.75 + (o["y"] - 240) * -0.35) / 190) * (60 + o["noise"] * 1.1),
        x=x,
        y=y,
        z=sphere,
        noise=_noise("moon", (5, 10, 20, 40, 80)),
    )
    disc = _math(lambda o: o["z"] * 900, z=sphere).convert("L")
    picture, random = Image.new("L", SIZE, 8), Random("moon")
    for _ in range(260):
        picture.putpixel((random.randrange(WIDTH), random.randrange(HEIGHT)), random.randrange(60, 255))
    picture.paste(_math(lambda o: o["max"](o["lit"], 6.0), lit=lit).convert("L"), mask=disc)
    return _encoded(picture, "JPEG", quality=84, exif=_exif("Moon"))


def julia() -> bytes:
    """A Julia set: WebP. The colour says how near each point's orbit came to the axes."""
    x, y = _coordinates()
    re, im = _math(lambda o: (o["x"] - WIDTH / 2) / 215, x=x), _math(lambda o: (o["y"] - HEIGHT / 2) / 215, y=y)
    near = Image.new("F", SIZE, 4.0)
    for _ in range(40):
        re, im = (
            _math(lambda o: _bounded(o, o["re"] * o["re"] - o["im"] * o["im"] - 0.79), re=re, im=im),
            _math(lambda o: _bounded(o, 2 * o["re"] * o["im"] + 0.15), re=re, im=im),
        )
        near = _math(lambda o: o["min"](o["near"], o["min"](abs(o["re"]), abs(o["im"]))), re=re, im=im, near=near)
    shade = _math(lambda o: 262 - 255 * (o["near"] * 1.9) ** 0.3, near=near).convert("L")
    return _encoded(_coloured(shade, EMBER), "WEBP", quality=72, method=2)


def ripples() -> bytes:
    """Rings of three stones that fell into water: WebP."""
    x, y = _coordinates()
    wave = [round(127.5 + 127.5 * math.sin(step / 128 * math.pi)) for step in range(256)]
    rings = [
        _math(lambda o: o["far"] / o["length"] * 256 % 256.0, far=_distance(x, y, at), length=length)
        .convert("L")
        .point(wave)
        for at, length in (((190, 150), 23), ((560, 330), 31), ((420, -60), 47))
    ]
    water = ImageChops.blend(ImageChops.blend(rings[0], rings[1], 0.5), rings[2], 0.35)
    depth = ImageChops.blend(water, ImageChops.invert(Image.linear_gradient("L").resize(SIZE)), 0.45)
    return _encoded(_coloured(depth, SEA), "WEBP", quality=70, method=2)


# -- drawings: PNG (alpha, palette, grey), an animation, SVG ----------------------------------------------------------


def sunflower() -> bytes:
    """Seeds at the golden angle, without a background: PNG with alpha."""
    picture, seeds = Image.new("RGBA", (WIDTH * 2, HEIGHT * 2)), 560
    draw = ImageDraw.Draw(picture)
    for seed in range(seeds):
        angle, radius = seed * math.pi * (3 - math.sqrt(5)), 19 * math.sqrt(seed + 0.5)
        alpha = round(255 * min(1.0, 4 * (1 - seed / seeds)))
        centre = WIDTH + radius * math.cos(angle), HEIGHT + radius * math.sin(angle)
        draw.circle(centre, 5 + 12 * seed / seeds, fill=(*_at(EMBER[2:-1], seed / seeds), alpha))
    return _encoded(_smoothed(picture), "PNG", optimize=True)


def tiles() -> bytes:
    """Truchet tiles, each turned at random: PNG with a palette."""
    side, random = 120, Random("tiles")
    picture = Image.new("RGB", (WIDTH * 2, HEIGHT * 2), "#f4ecd8")
    draw = ImageDraw.Draw(picture)
    for left in range(0, WIDTH * 2, side):
        for top in range(0, HEIGHT * 2, side):
            for x, y in random.choice((((0, 0), (1, 1)), ((1, 0), (0, 1)))):
                centre, start = (
                    (left + x * side, top + y * side),
                    {(0, 0): 0, (1, 0): 90, (1, 1): 180, (0, 1): 270}[x, y],
                )
                for half, colour in ((23, "#1d3557"), (17, "#e63946"), (6, "#f6bd60")):
                    radius = side / 2 + half
                    draw.arc(_box(centre, radius), start, start + 90, colour, half * 2)
    return _encoded(_smoothed(picture).quantize(24, dither=Image.Dither.NONE), "PNG", optimize=True)


def pulsar() -> bytes:
    """The pulses of a star, one below the other: PNG in grey."""
    picture, random = Image.new("L", (WIDTH * 2, HEIGHT * 2), 14), Random("pulsar")
    draw = ImageDraw.Draw(picture)
    for row in range(46):
        bumps = [(random.gauss(0.5, 0.09), random.uniform(0.015, 0.04), random.uniform(8, 74)) for _ in range(8)]
        pulse = [
            (
                x,
                170
                + row * 15
                - sum(h * math.exp(-(((x / 1440 - at) / w) ** 2)) for at, w, h in bumps)
                - random.random() * 4,
            )
            for x in range(300, 1142, 6)
        ]
        draw.polygon([*pulse, (1140, 960), (300, 960)], fill=14)
        draw.line(pulse, fill=225, width=3)
        draw.rectangle((300, 185 + row * 15, 1142, 960), fill=14)
    return _encoded(_smoothed(picture).quantize(16), "PNG", optimize=True)


def orbit() -> bytes:
    """A turning ring of beads: an animated GIF, 24 frames of 50 ms."""
    frames = [_smoothed(_beads(frame / 24)).quantize(32, dither=Image.Dither.NONE) for frame in range(24)]
    return _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50, loop=0)


def _beads(turn: float) -> Image.Image:
    """Return one frame: three strings of beads that wind around a ring."""
    picture = Image.new("RGB", (720, 480), NIGHT)
    draw, beads = ImageDraw.Draw(picture), []
    for bead in range(3 * 72):
        around, spin = bead / 72 * math.tau, (bead / 72 * 8 / 3 + turn / 3) * math.tau
        radius, lift = 1 + 0.36 * math.cos(spin), 0.36 * math.sin(spin)
        x, y, z = radius * math.cos(around), lift, radius * math.sin(around)
        y, z = z * 0.8 - y * 0.6, z * 0.6 + y * 0.8
        beads.append((z, x, y))
    for z, x, y in sorted(beads):
        near = 580 / (3.6 - z)
        draw.circle((360 + x * near, 215 + y * near), near / 21, fill=_at(DUSK[1:], (z + 1.1) / 2.2))
    return picture


def rose() -> bytes:
    """A curve of a pendulum: SVG, written as text."""
    strokes = []
    for turn in range(8):
        angles = [step / 320 * 2 * math.tau for step in range(321)]
        radii = [(215 - 20 * turn) * math.cos(3.5 * angle) + 7 * turn for angle in angles]
        points = " ".join(
            f"{360 + radius * math.cos(angle):.1f},{240 + radius * math.sin(angle):.1f}"
            for radius, angle in zip(radii, angles, strict=True)
        )
        strokes.append(f'<polyline points="{points}"/>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
<title>Rose</title>
<defs><radialGradient id="ink" gradientUnits="userSpaceOnUse" cx="360" cy="240" r="215">
<stop stop-color="#f6bd60"/><stop offset=".6" stop-color="#e63946"/><stop offset="1" stop-color="#1d3557"/>
</radialGradient></defs>
<rect width="100%" height="100%" fill="#fbf5e9"/>
<g fill="none" stroke="url(#ink)" stroke-width="1.1">{"".join(strokes)}</g>
</svg>
""".encode()


DRAWINGS: dict[str, Callable[[], bytes]] = {
    "dusk.jpg": dusk,
    "sunflower.png": sunflower,
    "ripples.webp": ripples,
    "tiles.png": tiles,
    "island.jpg": island,
    "julia.webp": julia,
    "orbit.gif": orbit,
    "glass.jpg": glass,
    "moon.jpg": moon,
    "flow.jpg": flow,
    "rose.svg": rose,
    "pulsar.png": pulsar,
}


# -- drawing functions ------------------------------------------------------------------------------------------------


def _at(colours: tuple[str, ...], tone: float) -> Colour:
    """Return the colour at `tone` (from 0 to 1) on a scale of colours."""
    place = min(max(tone, 0.0), 1.0) * (len(colours) - 1)
    first = min(int(place), len(colours) - 2)
    ends = zip(*(ImageColor.getrgb(colour)[:3] for colour in colours[first : first + 2]), strict=True)
    red, green, blue = (round(a + (b - a) * (place - first)) for a, b in ends)
    return red, green, blue


def _coloured(grey: Image.Image, colours: tuple[str, ...]) -> Image.Image:
    """Return a grey picture with each shade replaced by a colour of a scale."""
    scale = [_at(colours, shade / 255) for shade in range(256)]
    return Image.merge("RGB", [grey.point([colour[band] for colour in scale]) for band in range(3)])


def _coordinates() -> tuple[Image.Image, Image.Image]:
    """Return two pictures: each pixel holds its x coordinate in one, its y coordinate in the other."""
    across, down = Image.new("F", (WIDTH, 1)), Image.new("F", (1, HEIGHT))
    across.putdata(range(WIDTH))
    down.putdata(range(HEIGHT))
    return across.resize(SIZE), down.resize(SIZE)


def _distance(x: Image.Image, y: Image.Image, at: Point) -> Image.Image:
    return _math(lambda o: ((o["x"] - at[0]) ** 2 + (o["y"] - at[1]) ** 2) ** 0.5, x=x, y=y)


def _noise(seed: str, sizes: tuple[int, ...]) -> Image.Image:
    """Return clouds with values from 0 to 255: random noise at several sizes, the finer the weaker."""
    random, noise, weight = Random(seed), Image.new("F", SIZE), 0.5
    for size in sizes:
        grain = Image.frombytes("L", (size * 3, size * 2), random.randbytes(size * size * 6))
        grain = grain.convert("F").resize(SIZE, Image.Resampling.BICUBIC)
        noise = _math(lambda o: o["noise"] + o["grain"] * o["weight"], noise=noise, grain=grain, weight=weight)
        weight /= 2
    return noise


def _math(formula: Callable[[dict[str, Any]], Any], **operands: Any) -> Image.Image:
    """Compute a picture from pictures, pixel by pixel, in C."""
    computed: Image.Image = ImageMath.lambda_eval(formula, **operands)
    return computed


def _bounded(o: dict[str, Any], value: Any) -> Any:
    return o["min"](o["max"](value, -1e3), 1e3)


def _box(centre: Point, radius: float) -> tuple[float, float, float, float]:
    x, y = centre
    return x - radius, y - radius, x + radius, y + radius


def _smoothed(picture: Image.Image) -> Image.Image:
    """Return the picture at half its size, which smooths hard edges."""
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)


def _exif(title: str) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = title
    exif[ExifTags.Base.Artist] = "selfheal"
    exif[ExifTags.Base.DateTime] = "2024:06:21 21:39:00"
    return exif


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def main(directory: str) -> None:
    """Write every picture to `directory`."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, data in pictures().items():
        Path(directory, name).write_bytes(data)


if __name__ == "__main__":
    main(sys.argv[1])
