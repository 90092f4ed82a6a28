"""Draw docs/architecture.svg: what the model is made of, what teaches it, and who attends to whom.

python docs/draw_architecture.py

Standard library only. A unit of the drawing is a pixel at the width that GitHub gives a README, 830. The two masks are
those of trunk.py: prefix_attention_mask and suffix_attention_mask.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 830, 800
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"

INK, MUTED, FAINT = "#22272e", "#57606a", "#a9b0b8"
CARD, CARD_EDGE, PAPER = "#fcfbf8", "#ddd8cd", "#ffffff"
IMAGE, TEXT, STATE, SUFFIX = "#6aa5dd", "#49ada2", "#3f5f96", "#efb03f"  # tokens, by what they come from


@dataclass(frozen=True)
class Paint:
    """A part's colours."""

    fill: str
    edge: str


TRUNK = Paint("#e3eefa", "#5b8fc7")
SELF = Paint("#fdeecd", "#d09a2e")
CROSS = Paint("#fbe3d8", "#cf7f5b")
LATENT = Paint("#ece6fa", "#7b5fc9")
ACTION = Paint("#e0f2e4", "#3f9656")
TEACHER = Paint("#edf0f4", "#8793a1")
PLAIN = Paint(PAPER, FAINT)

# The lanes: columns of layers, the same in the trunk and in the expert.
COLUMN, GAP = 58, 16
LAYERS = {"0": 292, "1": 366, "2": 440, "3": 514, "14": 630, "15": 704}  # name -> left edge
PREFIX_TOP, PREFIX_BOTTOM = 58, 172
EXPERT_TOP, EXPERT_BOTTOM = 236, 326
TOKENS = 258  # left edge of the token columns in front of the lanes
LEFT_RAIL, RIGHT_RAIL = 265, 797  # into the expert, and out of it


@dataclass
class Drawing:
    """SVG elements, in the order in which they are painted."""

    parts: list[str] = field(default_factory=list)

    def add(self, element: str, **attributes: object) -> None:
        given = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        self.parts.append(f"<{element} {given}/>")

    def box(self, x: float, y: float, width: float, height: float, paint: Paint, radius: float = 7, **extra) -> None:
        self.add("rect", x=x, y=y, width=width, height=height, rx=radius, fill=paint.fill, stroke=paint.edge, **extra)

    def cell(self, x: float, y: float, size: float, fill: str, **extra: object) -> None:
        self.add("rect", x=x, y=y, width=size, height=size, rx=2.5, fill=fill, **extra)

    def text(
        self, x: float, y: float, words: str, size: float = 12, color: str = INK, anchor: str = "start", **extra: object
    ) -> None:
        """One line with its baseline at y. `_t` in the words becomes a subscript t."""
        given = {"x": x, "y": y, "font-size": size, "fill": color, "text-anchor": anchor} | extra
        given = " ".join(f'{name.replace("_", "-")}="{value}"' for name, value in given.items())
        subscript = f'<tspan dy="3" font-size="{0.75 * size:.3g}">t</tspan><tspan dy="-3">&#8203;</tspan>'
        self.parts.append(f"<text {given}>{escape(words).replace('_t', subscript)}</text>")

    def lines(self, x: float, y: float, rows: list[str], size: float = 12, color: str = INK, anchor="start") -> None:
        for index, row in enumerate(rows):
            self.text(x, y + index * (size + 3.5), row, size, color, anchor)

    def path(self, commands: str, color: str = MUTED, width: float = 1.4, **extra: object) -> None:
        self.add("path", d=commands, fill="none", stroke=color, stroke_width=width, **extra)

    def arrow(self, *points: tuple[float, float], color: str = MUTED, width: float = 1.4, **extra: object) -> None:
        """A line through the points with a head at the last one; its parts are horizontal or vertical."""
        (x0, y0), (x1, y1) = points[-2:]
        length = 6
        dx, dy = ((x1 > x0) - (x1 < x0)) * length, ((y1 > y0) - (y1 < y0)) * length
        middle = (x1 - dx, y1 - dy)
        line = [*points[:-1], (x1 - 0.7 * dx, y1 - 0.7 * dy)]
        self.path("M" + " L".join(f"{x:g},{y:g}" for x, y in line), color, width, stroke_linejoin="round", **extra)
        one, other = (middle[0] - dy / 2, middle[1] + dx / 2), (middle[0] + dy / 2, middle[1] - dx / 2)
        self.add("polygon", points=" ".join(f"{x:g},{y:g}" for x, y in ((x1, y1), one, other)), fill=color)

    def snowflake(self, x: float, y: float, radius: float = 6, color: str = "#4a86c5") -> None:
        """The mark of a frozen part, around (x, y)."""
        arm = f"M0,0 V{-radius} M{-0.35 * radius:.3g},{-0.9 * radius:.3g} L0,{-0.55 * radius:.3g} "
        arm += f"L{0.35 * radius:.3g},{-0.9 * radius:.3g}"
        for turn in range(0, 360, 60):
            self.path(arm, color, 1.2, transform=f"translate({x},{y}) rotate({turn})", stroke_linecap="round")

    def scene(self, x: float, y: float, width: float, height: float, reach: float) -> None:
        """A camera's frame: a gripper pushes a plate over a table; reach 0 to 1 is how far it has come."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=3, fill="#f1ede4", stroke=MUTED, stroke_width=1)
        table = y + 0.78 * height
        self.path(f"M{x + 1},{table:g} H{x + width - 1}", "#b9a98c", 1.5)
        plate = x + (0.45 + 0.3 * reach) * width
        self.add(
            "ellipse",
            cx=f"{plate:g}",
            cy=f"{table - 2.5:g}",
            rx=f"{0.15 * width:g}",
            ry=2.4,
            fill="#d9694f",
            stroke="none",
        )
        hand = plate - 0.24 * width
        self.path(f"M{x + 0.1 * width:g},{y + 3} Q{hand:g},{y + 3} {hand:g},{table - 3:g}", "#4d5a6a", 2.2)

    def save(self, path: Path) -> None:
        title = "A SmolVLM prefix, a shared expert that reads its keys and values, and two flow-matching heads"
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="{FONT}" role="img">\n<title>{title}</title>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


# --- the model --------------------------------------------------------------------------------------------------------


def draw_inputs(d: Drawing) -> None:
    """Cameras, task text and state on the left, each through what makes tokens of it."""
    rows = [PREFIX_TOP + 40 * index for index in range(3)]
    height = PREFIX_BOTTOM - rows[2]
    d.scene(28, rows[0] - 1, 40, 28, 0.1)
    d.scene(22, rows[0] + 6, 40, 28, 0.1)
    d.box(22, rows[1] + 3, 46, 28, PLAIN, 4)
    for offset, width in ((10, 34), (17, 26), (24, 30)):
        d.path(f"M28,{rows[1] + offset} h{width}", FAINT, 3, stroke_linecap="round")
    d.box(22, rows[2] + 3, 46, 28, PLAIN, 4)
    for index, size in enumerate((12, 19, 7, 15, 10)):
        d.add("rect", x=28 + 7.5 * index, y=rows[2] + 27 - size, width=5, height=size, rx=1, fill=STATE)
    makers = (["vision tower,", "connector"], ["token", "embedding"], ["state", "projection"])
    for row, name, maker in zip(rows, ("cameras", "task text", "state"), makers, strict=True):
        middle = row + height / 2
        d.text(75, middle + 4, name)
        d.arrow((134, middle), (147, middle))
        d.box(148, row, 88, height, TRUNK if name != "state" else Paint(PAPER, STATE))
        d.lines(192, middle - 3.5, maker, 11.5, anchor="middle")
        d.arrow((236, middle), (TOKENS - 3, middle))
    tokens = [IMAGE] * 3 + [TEXT] * 3 + [STATE]
    for index, color in enumerate(tokens):
        d.cell(TOKENS, PREFIX_TOP - 2 + 17 * index, 14, color)


def draw_lanes(d: Drawing) -> None:
    """The trunk's layers, and beneath each the expert's layer that reads its keys and values."""
    d.text(LAYERS["0"], 30, "SmolVLM prefix", 15, font_weight="bold")
    d.text(LAYERS["0"] + 138, 30, "one pass over images, text and state", 12, MUTED)
    d.snowflake(690, 26)
    d.text(701, 30, "frozen by default", 12, MUTED)
    prefix_middle, expert_middle = (PREFIX_TOP + PREFIX_BOTTOM) / 2, (EXPERT_TOP + EXPERT_BOTTOM) / 2
    names = list(LAYERS)
    for index, (name, x) in enumerate(LAYERS.items()):
        center, is_cross = x + COLUMN / 2, int(name) % 2 == 1
        d.box(x, PREFIX_TOP, COLUMN, PREFIX_BOTTOM - PREFIX_TOP, TRUNK)
        d.text(center, prefix_middle - 3, "layer", 12, MUTED, "middle")
        d.text(center, prefix_middle + 14, name, 15, INK, "middle", font_weight="bold")
        d.arrow((center, PREFIX_BOTTOM), (center, EXPERT_TOP - 1), color=TRUNK.edge, width=2)
        d.box(x, EXPERT_TOP, COLUMN, EXPERT_BOTTOM - EXPERT_TOP, CROSS if is_cross else SELF)
        d.text(center, EXPERT_TOP + 22, "cross" if is_cross else "self", 14, INK, "middle", font_weight="bold")
        d.text(center, EXPERT_TOP + 38, "attention", 11, MUTED, "middle")
        for place in range(3):
            d.cell(center - 20 + 9 * place, EXPERT_BOTTOM - 32, 8, (IMAGE, TEXT, STATE)[place])
        for place in range(2):
            seen = {"fill": "none", "stroke": FAINT} if is_cross else {"fill": SUFFIX}
            d.cell(center + 8 + 9 * place, EXPERT_BOTTOM - 32, 8, **seen)
        before = TOKENS + 15 if index == 0 else LAYERS[names[index - 1]] + COLUMN
        if name != "14":
            d.arrow((before + 1, prefix_middle), (x - 1, prefix_middle))
            d.arrow((before + 1, expert_middle), (x - 1, expert_middle))
    for middle in (prefix_middle, expert_middle):
        start, end = LAYERS["3"] + COLUMN, LAYERS["14"]
        d.path(f"M{start + 1},{middle} h9", MUTED)
        d.arrow((end - 12, middle), (end - 1, middle))
        for place in (-7, 0, 7):
            d.add("circle", cx=(start + end) / 2 + place, cy=middle, r=1.8, fill=MUTED)
    d.lines(282, 199, ["keys and values", "of every layer"], 12, TRUNK.edge, "end")

    d.text(22, EXPERT_TOP + 14, "Shared expert", 15, font_weight="bold")
    d.text(22, EXPERT_TOP + 34, "a narrower layer for each of those", 12, MUTED)
    for index, color in enumerate([SUFFIX] * 4):
        d.cell(TOKENS, expert_middle - 34 + 17 * index, 14, color)
    for y, paint, words in (
        (50, SELF, "even layers read [prefix ; suffix]"),
        (70, CROSS, "odd layers read the prefix"),
    ):
        d.box(23, EXPERT_TOP + y - 1, 12, 12, paint, 3)
        d.text(42, EXPERT_TOP + y + 9, words)


def draw_heads(d: Drawing) -> None:
    """The two heads: what each learns to generate, from where, and in which stage."""
    expert_middle = (EXPERT_TOP + EXPERT_BOTTOM) / 2
    rows = {"latent": (362, LATENT), "action": (462, ACTION)}
    height = 78
    last = rows["action"][0] + height / 2
    d.path(f"M{LAYERS['15'] + COLUMN + 1},{expert_middle} H{RIGHT_RAIL} V{last}", MUTED, 1.6, stroke_linejoin="round")
    d.arrow((LEFT_RAIL, last), (LEFT_RAIL, expert_middle + 37), width=1.6)
    for name, (top, paint) in rows.items():
        middle = top + height / 2
        d.text(22, top + 17, f"{name.capitalize()} head", 15, paint.edge, font_weight="bold")
        stage = "Stage 2" if name == "latent" else "Stage 3"
        d.box(128, top + 3, 62, 19, Paint(paint.edge, paint.edge), 9.5)
        d.text(159, top + 17, stage, 12, PAPER, "middle", font_weight="bold")
        about = {
            "latent": ["S tokens of D: what happens", "next, in a teacher's code.", "Video, no action labels."],
            "action": ["T tokens of A: the robot's", "next actions. A few labelled", "demonstrations."],
        }[name]
        d.lines(22, top + 40, about, 12, MUTED)
        d.box(292, top, 88, height, paint)
        d.lines(336, middle - 4, ["embed", "x_t and t"], 12, anchor="middle")
        d.path(f"M291,{middle} H{LEFT_RAIL}", MUTED, 1.6)
        d.box(430, top, 212, height, PLAIN)
        d.arrow((429, middle), (381, middle), color=paint.edge)
        d.text(405, middle - 7, "+ noise", 11, MUTED, "middle")
        d.box(692, top, 80, height, paint)
        d.lines(732, middle - 4, ["velocity", "v_t"], 12, anchor="middle")
        d.arrow((RIGHT_RAIL, middle), (773, middle), color=MUTED, width=1.6)
        d.path(f"M643,{middle} H691", paint.edge, 1.4, stroke_dasharray="3 3")
        d.text(667, middle - 7, "loss", 11, MUTED, "middle")
    draw_latent_target(d, rows["latent"][0])
    draw_action_target(d, rows["action"][0])
    d.text(22, 563, "Flow matching: t = 1 is noise, t = 0 is data", 11.5, MUTED)
    d.text(292, 563, "x_t = t · noise + (1 − t) · target", 11.5, MUTED)
    d.text(772, 563, "loss = (v_t − (noise − target))²", 11.5, MUTED, "end")


def draw_latent_target(d: Drawing, top: float) -> None:
    """Two frames of a video, and the codes that the frozen teacher has for what happened between them."""
    for x, reach, words in ((438, 0.0, "now"), (487, 1.0, "gap later")):
        d.scene(x, top + 10, 42, 31, reach)
        d.text(x + 21, top + 55, words, 11, MUTED, "middle")
    d.arrow((531, top + 26), (545, top + 26))
    d.box(546, top + 9, 56, 34, TEACHER, 6)
    d.text(566, top + 23, "LAQ", 12, INK, "middle", font_weight="bold")
    d.text(574, top + 37, "teacher", 11, INK, "middle")
    d.snowflake(590, top + 19, 5)
    d.arrow((603, top + 26), (617, top + 26))
    for place in range(4):
        d.cell(621, top + 6 + 10.5 * place, 9, LATENT.edge, opacity=round(1 - 0.18 * place, 2))
    d.text(536, top + 71, "target: latent action [S, D]", 11.5, LATENT.edge, "middle")


def draw_action_target(d: Drawing, top: float) -> None:
    """A recorded frame and the actions that were recorded from there on."""
    d.scene(438, top + 10, 42, 31, 0.2)
    d.text(459, top + 55, "now", 11, MUTED, "middle")
    rows = ((9, 8, 6, 5, 3, 2.5, 2, 3, 4, 5), (2, 3, 4.5, 6, 7, 8, 8.5, 7, 5, 4), (5, 4, 3, 3, 5, 6, 8, 9, 10, 10))
    for row, values in enumerate(rows):
        for place, tenths in enumerate(values):
            d.cell(494 + 13.6 * place, top + 8 + 12.5 * row, 11, ACTION.edge, opacity=tenths / 10)
    d.text(561, top + 55, "actions from now on", 11, MUTED, "middle")
    d.text(536, top + 71, "target: action chunk [T, A]", 11.5, ACTION.edge, "middle")


# --- the masks --------------------------------------------------------------------------------------------------------

CELL = 17
PREFIX_KEYS = [(IMAGE, True)] * 3 + [(TEXT, True)] * 2 + [(TEXT, False)] + [(STATE, True)]  # colour, valid


def mask_cell(d: Drawing, x: float, y: float, color: str | None, is_padding: bool = False) -> None:
    """Filled with the key's colour where it is attended to."""
    inner = CELL - 2
    if is_padding:
        d.cell(x + 1, y + 1, inner, "url(#padding)", stroke=CARD_EDGE, stroke_width=0.8)
    elif color:
        d.cell(x + 1, y + 1, inner, color)
    else:
        d.cell(x + 1, y + 1, inner, PAPER, stroke=CARD_EDGE, stroke_width=0.8)


def draw_masks(d: Drawing) -> None:
    d.path(f"M22,582 H{WIDTH - 22}", CARD_EDGE, 1)
    d.text(22, 608, "Who attends to whom", 15, font_weight="bold")
    top = 662

    left, size = 70, len(PREFIX_KEYS)
    d.text(left, top - 26, "in the prefix", 12, INK, font_weight="bold")
    for name, first, count in (("image", 0, 3), ("text", 3, 3), ("state", 6, 1)):
        d.text(left + (first + count / 2) * CELL, top - 7, name, 11.5, MUTED, "middle")
        d.text(left - 6, top + (first + count / 2) * CELL + 4, name, 11.5, MUTED, "end")
    for row in range(size):
        for column, (color, valid) in enumerate(PREFIX_KEYS):
            hidden = column == size - 1 and row < size - 1
            unread = not PREFIX_KEYS[row][1]
            mask_cell(d, left + column * CELL, top + row * CELL, None if hidden else color, not valid or unread)

    left, num_tokens = 316, 4
    own = left + size * CELL + 8
    d.text(left, top - 26, "in the expert", 12, INK, font_weight="bold")
    d.text(left + size * CELL / 2, top - 7, "prefix", 11.5, MUTED, "middle")
    d.text(own + num_tokens * CELL / 2, top - 7, "suffix", 11.5, MUTED, "middle")
    for row in range(num_tokens):
        y = top + row * CELL
        for column, (color, valid) in enumerate(PREFIX_KEYS):
            mask_cell(d, left + column * CELL, y, color, not valid)
        for column in range(num_tokens):
            mask_cell(d, own + column * CELL, y, SUFFIX if column <= row else None)
    d.text(left - 6, top + num_tokens * CELL / 2 + 4, "suffix", 11.5, MUTED, "end")
    bottom, end = top + num_tokens * CELL, own + num_tokens * CELL
    for y, stop, words, paint in (
        (bottom + 8, left + size * CELL, "cross-attention layers", CROSS),
        (bottom + 34, end, "self-attention layers", SELF),
    ):
        d.path(f"M{left + 1},{y} v5 H{stop - 1} v-5", paint.edge, 1.6)
        d.text((left + stop) / 2, y + 18, words, 11.5, INK, "middle")

    x, y = 560, top - 30
    for words, color, padding in (
        ("attended to, in the key's colour", TEXT, False),
        ("hidden", None, False),
        ("padding: hidden as a key, and", None, True),
    ):
        mask_cell(d, x, y, color, padding)
        d.text(x + 25, y + 13, words, 12)
        y += 23
    d.text(x + 25, y + 6, "what it computes is never read", 12)
    notes = [
        "The prefix never sees the suffix: its one",
        "pass serves both heads, every flow draw",
        "and every Euler step.",
    ]
    d.lines(x, y + 38, notes, 12, MUTED)


def main() -> None:
    d = Drawing()
    d.parts.append(
        '<defs><pattern id="padding" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="5" height="5" fill="{PAPER}"/><rect width="1.6" height="5" fill="#c9c3b6"/></pattern></defs>'
    )
    d.add("rect", x=0.5, y=0.5, width=WIDTH - 1, height=HEIGHT - 1, rx=12, fill=CARD, stroke=CARD_EDGE)
    draw_inputs(d)
    draw_lanes(d)
    draw_heads(d)
    draw_masks(d)
    d.save(Path(__file__).with_name("architecture.svg"))


if __name__ == "__main__":
    main()
