"""Make the built-in calibration corpora that no hand wrote: ``python calib/make_corpora.py [SOURCES]``.

Without an argument it writes the generated ones, arithmetic.txt and tables.txt, the same every time. With the folder
of unpacked public-domain packages that corpora/README.md describes, it also cuts prose.txt, narrative.txt and code.txt.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CORPORA = Path(__file__).parent / "corpora"

NAMES = (
    "Amina", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hiro", "Ines", "Jonas", "Kofi", "Leila",
    "Mateo", "Nadia", "Omar", "Priya", "Quinn", "Rosa",
)  # fmt: skip
GOODS = (
    "apples", "notebooks", "candles", "tickets", "bottles", "pencils", "postcards", "lamps", "chairs", "batteries",
    "tomatoes", "shirts",
)  # fmt: skip
PLACES = (
    "Lisbon", "Nairobi", "Oslo", "Kyoto", "Quito", "Hanoi", "Leeds", "Porto", "Bergen", "Accra", "Lima", "Turin",
    "Austin", "Tampa", "Dakar", "Cusco",
)  # fmt: skip


# --- arithmetic -------------------------------------------------------------------------------------------------------


def shopping(r: random.Random) -> tuple[str, str]:
    """Return a problem about a bill with a discount, and its solution."""
    who, (a, b) = r.choice(NAMES), r.sample(GOODS, 2)
    n, m, p, q, off = r.randint(2, 12), r.randint(2, 9), r.randint(2, 15), r.randint(3, 20), 5 * r.randint(1, 8)
    first, second, paid = n * p, m * q, (n * p + m * q) * (100 - off) / 100
    return (
        f"{who} buys {n} {a} at ${p} each and {m} {b} at ${q} each. The shop takes {off}% off the whole bill. "
        f"How much does {who} pay?",
        f"The {a} cost {n} * {p} = ${first}. The {b} cost {m} * {q} = ${second}. Together that is {first} + {second} = "
        f"${first + second}. With {off}% off, {who} pays {100 - off}% of it: "
        f"{first + second} * {(100 - off) / 100:g} = ${paid:.2f}.",
    )


def travel(r: random.Random) -> tuple[str, str]:
    """Return a problem about two trains, and its solution."""
    a, b = r.sample(PLACES, 2)
    v, w, hours, wait = 10 * r.randint(5, 12), 10 * r.randint(5, 12), r.randint(2, 6), r.choice([15, 20, 30, 45])
    return (
        f"A train leaves {a} at {v} km/h. After {hours} hours it waits {wait} minutes, then goes on at {w} km/h for "
        f"{hours + 1} hours until it reaches {b}. How long is the line, and how long does the journey take?",
        f"In the first {hours} hours the train covers {hours} * {v} = {hours * v} km. In the next {hours + 1} hours it "
        f"covers {hours + 1} * {w} = {(hours + 1) * w} km. The line is {hours * v} + {(hours + 1) * w} = "
        f"{hours * v + (hours + 1) * w} km long. The journey takes {hours} + {hours + 1} = {2 * hours + 1} hours and "
        f"{wait} minutes.",
    )


def sharing(r: random.Random) -> tuple[str, str]:
    """Return a problem about shares in a ratio, and its solution."""
    (a, b, c), goods = r.sample(NAMES, 3), r.choice(GOODS)
    x, y, z, unit = r.randint(1, 5), r.randint(1, 5), r.randint(1, 5), r.randint(3, 24)
    total = (x + y + z) * unit
    return (
        f"{a}, {b} and {c} share {total} {goods} in the ratio {x}:{y}:{z}. How many does each of them get?",
        f"There are {x} + {y} + {z} = {x + y + z} parts, so one part is {total} / {x + y + z} = {unit} {goods}. "
        f"{a} gets {x} * {unit} = {x * unit}, {b} gets {y} * {unit} = {y * unit} and {c} gets {z} * {unit} = "
        f"{z * unit}. Check: {x * unit} + {y * unit} + {z * unit} = {total}.",
    )


def equation(r: random.Random) -> tuple[str, str]:
    """Return a linear equation, and its solution step by step."""
    a, b, c, x = r.randint(4, 12), r.randint(1, 40), r.randint(2, 3), r.randint(-9, 15)
    right = a * x + b - c * x
    return (
        f"Solve for x: {a}x + {b} = {c}x + {right}.",
        f"Subtract {c}x from both sides: {a - c}x + {b} = {right}. Subtract {b}: {a - c}x = {right - b}. "
        f"Divide by {a - c}: x = {x}.".replace(" 1x", " x"),
    )


def rectangle(r: random.Random) -> tuple[str, str]:
    """Return a problem about a fence and a lawn, and its solution."""
    who, w, h, price = r.choice(NAMES), r.randint(4, 30), r.randint(4, 30), r.randint(2, 9)
    return (
        f"{who}'s garden is a rectangle of {w} m by {h} m. A fence costs ${price} a metre and grass ${price + 3} a "
        f"square metre. What do the fence and the lawn cost together?",
        f"The fence is 2 * ({w} + {h}) = {2 * (w + h)} m long and costs {2 * (w + h)} * {price} = "
        f"${2 * (w + h) * price}. The lawn has {w} * {h} = {w * h} square metres and costs {w * h} * {price + 3} = "
        f"${w * h * (price + 3)}. Together: ${2 * (w + h) * price + w * h * (price + 3)}.",
    )


def long_sum(r: random.Random) -> tuple[str, str]:
    """Return a sum of large numbers, worked column by column."""
    a, b = r.randint(10_000, 999_999), r.randint(10_000, 999_999)
    steps, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        steps.append(f"{x} + {y}" + (f" + {carry}" if carry else "") + f" = {total}")
        carry = total // 10
    worked = "; ".join(steps)
    return f"What is {a:,} + {b:,}?", f"From the right: {worked}. The answer is {a + b:,}."


def arithmetic(r: random.Random, size: int) -> Iterator[str]:
    """Yield problems, asked and answered in a few styles, until ``size`` characters are reached."""
    styles = ("Question: {}\nAnswer: {}", "Q: {}\n\nA: {}", "### Problem\n{}\n\n### Solution\n{}", "{}\n{}")
    kinds = (shopping, travel, sharing, equation, rectangle, long_sum)
    while size > 0:
        text = r.choice(styles).format(*r.choice(kinds)(r))
        size -= len(text)
        yield text


# --- tables -----------------------------------------------------------------------------------------------------------


def json_orders(r: random.Random) -> str:
    """Return an order as indented JSON."""
    lines: list[dict[str, Any]] = [
        {"sku": f"{r.choice('ABCX')}{r.randint(100, 9999)}", "name": r.choice(GOODS), "quantity": r.randint(1, 40),
         "unit_price": round(r.uniform(0.5, 99), 2), "in_stock": r.random() < 0.8}
        for _ in range(r.randint(2, 5))
    ]  # fmt: skip
    order = {
        "id": r.randint(10_000, 99_999), "customer": {"name": r.choice(NAMES), "city": r.choice(PLACES)},
        "created": f"202{r.randint(0, 6)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}", "lines": lines,
        "total": round(sum(x["quantity"] * x["unit_price"] for x in lines), 2),
        "note": r.choice([None, "leave at the door", "call before delivery", "gift"]),
    }  # fmt: skip
    return json.dumps(order, indent=2)


def json_lines(r: random.Random) -> str:
    """Return a look-up table with random keys, as one JSON object."""
    return json.dumps({f"{r.getrandbits(64):016x}": f"{r.getrandbits(32):08x}" for _ in range(r.randint(6, 14))})


def csv_table(r: random.Random) -> str:
    """Return measurements as comma-separated values."""
    rows = [
        f"{day},{r.choice(PLACES)},{r.uniform(-5, 35):.1f},{r.randint(20, 100)},{r.uniform(980, 1040):.1f}"
        for day in range(1, r.randint(8, 20))
    ]
    return "\n".join(["day,station,temperature_c,humidity_pct,pressure_hpa", *rows])


def markdown_table(r: random.Random) -> str:
    """Return a Markdown section with a table and a list."""
    rows = [
        f"| {r.choice(NAMES)} | {r.choice(PLACES)} | {r.randint(1, 60)} | {r.randint(0, 9999):,} | {r.random():.1%} |"
        for _ in range(r.randint(4, 9))
    ]
    items = [f"- **{g}**: {r.randint(1, 500)} in {r.choice(PLACES)}" for g in r.sample(GOODS, 3)]
    head = ["| Agent | Branch | Visits | Revenue | Growth |", "|---|---|---:|---:|---:|"]
    return "\n".join([f"## Results, quarter {r.randint(1, 4)}", "", *head, *rows, "", "Open orders:", "", *items])


def log_lines(r: random.Random) -> str:
    """Return a server's log."""
    lines, second = [], r.randint(0, 80_000)
    for _ in range(r.randint(6, 16)):
        second += r.randint(0, 40)
        clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.{r.randint(0, 999):03}"
        path = r.choice(["/api/orders", "/login", "/static/app.js", "/health", "/api/users/" + str(r.randint(1, 999))])
        level, code = r.choice([("INFO", 200), ("INFO", 204), ("INFO", 304), ("WARN", 404), ("ERROR", 500)])
        host = f"10.0.{r.randint(0, 9)}.{r.randint(1, 254)}"
        lines.append(f"{clock} {level:5} {host} GET {path} {code} {r.randint(1, 900)}ms")
    return "\n".join(lines)


def yaml_config(r: random.Random) -> str:
    """Return a deployment as YAML."""
    name = r.choice(GOODS)
    return textwrap.dedent(f"""\
        service: {name}-{r.choice(["api", "worker", "web"])}
        replicas: {r.randint(1, 12)}
        image:
          repository: registry.example/{name}
          tag: "{r.randint(0, 4)}.{r.randint(0, 20)}.{r.randint(0, 9)}"
        resources:
          limits: {{cpu: {r.choice([250, 500, 1000])}m, memory: {r.choice([256, 512, 1024])}Mi}}
        env:
          - {{name: LOG_LEVEL, value: {r.choice(["debug", "info", "warning"])}}}
          - {{name: TIMEOUT_SECONDS, value: "{r.randint(1, 90)}"}}
        regions: [{", ".join(x.lower() for x in r.sample(PLACES, 3))}]""")


def sql_script(r: random.Random) -> str:
    """Return a table's definition, its rows and a query over them."""
    table = r.choice(GOODS)
    rows = [
        f"  ({i}, '{r.choice(NAMES)}', {r.uniform(1, 500):.2f}, '{r.choice(PLACES)}')"
        for i in range(1, r.randint(4, 9))
    ]
    return (
        f"CREATE TABLE {table} (\n  id INTEGER PRIMARY KEY,\n  owner TEXT NOT NULL,\n  price REAL,\n  city TEXT\n);\n"
        f"INSERT INTO {table} (id, owner, price, city) VALUES\n" + ",\n".join(rows) + ";\n"
        f"SELECT city, COUNT(*) AS n, ROUND(AVG(price), 2) AS mean_price\nFROM {table}\n"
        f"WHERE price > {r.randint(5, 200)}\nGROUP BY city\nORDER BY n DESC, city\nLIMIT {r.randint(3, 20)};"
    )


def tables(r: random.Random, size: int) -> Iterator[str]:
    """Yield structured text of every kind until ``size`` characters are reached."""
    kinds: tuple[Callable[[random.Random], str], ...]
    kinds = (json_orders, json_lines, csv_table, markdown_table, log_lines, yaml_config, sql_script)
    while size > 0:
        text = r.choice(kinds)(r)
        size -= len(text)
        yield text


# --- what is cut from public-domain packages --------------------------------------------------------------------------

SQLITE_PAGES = (
    "whentouse", "atomiccommit", "howtocorrupt", "isolation", "queryplanner", "testing", "appfileformat",
    "flextypegood", "fasterthanfs", "wal", "tempfiles", "floatingpoint", "hirely", "quirks",
)  # fmt: skip
JARGON_CHAPTERS = (1, 4, 5, 7)
NOVELS = ("prideprejudice", "emma", "persuasion", "northangerabbey", "sensesensibility", "mansfieldpark")
CODE = (
    "sqlite3-3.40.1/src/hash.c", "docutils-0.23/docutils/statemachine.py", "sqlite3-3.40.1/ext/misc/csv.c",
    "sqlite3-3.40.1/ext/wasm/api/sqlite3-worker1-promiser.js", "docutils-0.23/docutils/io.py",
    "sqlite3-3.40.1/src/random.c", "sqlite3-3.40.1/tool/split-sqlite3c.tcl", "docutils-0.23/docutils/core.py",
    "sqlite3-3.40.1/ext/wasm/api/sqlite3-api-oo1.js", "tz/checktab.awk", "sqlite3-3.40.1/ext/misc/regexp.c",
    "sqlite3-3.40.1/ext/wasm/split-speedtest1-script.sh", "docutils-0.23/docutils/nodes.py", "tz/ziguard.awk",
    "sqlite3-3.40.1/src/walker.c",
)  # fmt: skip


class Text(HTMLParser):
    """The text of a page: paragraphs separated by blank lines, <pre> as it is, no navigation."""

    SKIP = ("script", "style", "title", "svg")
    BLOCK = ("p", "div", "li", "h1", "h2", "h3", "h4", "tr", "dt", "dd", "blockquote", "table", "ul", "ol")

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.hidden: list[str] = []  # open elements from the first hidden one on
        self.line, self.pre = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: D102
        classes = dict(attrs).get("class") or ""
        if self.hidden or tag in self.SKIP or re.search(r"nosearch|fancy_toc|startsearch|desktop|codefile", classes):
            self.hidden += [tag] if tag not in ("br", "img", "input", "hr", "meta", "link", "p", "li") else []
        elif tag in self.BLOCK or tag == "pre":
            self.flush()
            self.pre = self.pre or tag == "pre"

    def handle_endtag(self, tag: str) -> None:  # noqa: D102
        if self.hidden:
            if tag in self.hidden:
                del self.hidden[len(self.hidden) - 1 - self.hidden[::-1].index(tag) :]
        elif tag in self.BLOCK or tag == "pre":
            self.flush()
            self.pre = self.pre and tag != "pre"

    def handle_data(self, data: str) -> None:  # noqa: D102
        self.line += "" if self.hidden else data

    def flush(self) -> None:
        """End a block."""
        text = textwrap.dedent(self.line).strip("\n").rstrip() if self.pre else " ".join(self.line.split())
        self.blocks += [text] if text else []
        self.line = ""

    @classmethod
    def of(cls, path: Path) -> str:
        """Return the text of a page, with no blank at its ends."""
        page = cls()
        page.feed(path.read_text("utf-8"))
        page.flush()
        runs = (list(run) for _, run in itertools.groupby(page.blocks, cls.is_heading))
        return "\n\n".join(block for run in runs if len(run) < 4 or not cls.is_heading(run[0]) for block in run)

    @staticmethod
    def is_heading(block: str) -> bool:
        """Whether a block reads like one; four in a row are a table of contents or a navigation bar."""
        return len(block) < 80 and block[-1] not in ".:;?!"


def cut(text: str, size: int, start: int = 0) -> str:
    """Return about ``size`` characters, from one blank line to another."""
    begin = text.find("\n\n", start) + 2 if start else 0
    end = text.find("\n\n", begin + size)
    return text[begin : end if end > 0 else len(text)].strip("\n")


def prose(sources: Path) -> Iterator[str]:
    """Yield encyclopedic and technical prose: SQLite's documentation, tz's theory, the Jargon File, docutils' PEPs."""
    for name in SQLITE_PAGES:
        yield cut(Text.of(sources / f"sqlite3-doc/usr/share/doc/sqlite3/{name}.html"), 6000)
    yield cut(Text.of(sources / "sqlite3-doc/usr/share/doc/sqlite3/faq.html"), 8000, 2600)  # after its contents
    yield cut(Text.of(sources / "tz/theory.html"), 26_000, 300)
    with gzip.open(sources / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz", "rt", encoding="utf-8") as stream:
        chapters = re.split(r"\nChapter\s\d+\.\s", stream.read())
    for number in JARGON_CHAPTERS:
        text = re.sub(r"(?s)\n +Table of Contents\n.*?\n(?=\n   [A-Z][^\n]{60})", "\n", chapters[number])
        paragraphs = (re.sub(r"\s+", " ", x).strip() for x in text.split("\n\n"))
        yield cut("\n\n".join(re.sub(r"[{}]", "", x) for x in paragraphs), 8000)
    for number in (256, 257, 287):
        pep = (sources / f"docutils-0.23/docs/peps/pep-0{number}.rst").read_text("utf-8")
        yield cut(pep[pep.index("Abstract") :], 6000)


def narrative(sources: Path) -> Iterator[str]:
    """Yield chapters of Jane Austen's novels."""
    import rdata  # type: ignore[import-not-found]

    base = sources / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata"
    index = rdata.read_rds(base.with_suffix(".rdx"))["variables"]
    data = base.with_suffix(".rdb").read_bytes()
    for i, novel in enumerate(NOVELS):
        offset, length = (int(x) for x in index[novel])
        packed = data[offset + 4 : offset + length]  # after the unpacked length
        lines = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(packed)))
        paragraphs = "\n".join(map(str, lines)).split("\n\n")
        yield cut("\n\n".join(" ".join(x.split()) for x in paragraphs if x.strip()), 10_000, 20_000 + 40_000 * i)


def code(sources: Path) -> Iterator[str]:
    """Yield source code in seven languages."""
    for name in CODE:
        yield cut((sources / name).read_text("utf-8").expandtabs(4), 7000)


def main() -> None:
    """Write the corpora beside this file."""
    corpora: dict[str, Iterator[str]] = {
        "arithmetic": arithmetic(random.Random(1), 60_000),
        "tables": tables(random.Random(2), 60_000),
    }
    if len(sys.argv) > 1:
        sources = Path(sys.argv[1])
        corpora |= {"prose": prose(sources), "narrative": narrative(sources), "code": code(sources)}
    for name, documents in corpora.items():
        text = "\n\n\n".join(x.strip("\n") for x in documents) + "\n"
        (CORPORA / f"{name}.txt").write_text(text, "utf-8")
        print(f"{name}.txt: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
