"""A page on which the method files are read side by side: one file, which needs no network and no server.

    python -m tools.read --methods mae simmim um_mae    # writes runs/read/index.html

The page holds all five methods. `--methods` are the two to five that it shows first; its reader may choose others.
"""

import argparse
import ast
import collections
import itertools
import json
import re
import typing
from pathlib import Path

from common import config
from tools.read_code import HEADINGS, METHODS, SECTIONS, align, align_options, cut, rank_options

TEMPLATE = Path(__file__).with_suffix(".html")
PAPERS = {"MAE": "2111.06377", "SimMIM": "2111.09886", "UM-MAE": "2205.10063", "FastMIM": "2212.06593",
          "LUT": "2310.13593", "BEiT": "2106.08254", "DeiT III": "2204.07118"}  # title: number on arXiv
OWNERS = {"run": [("common/engine", "Run")], "encoder": [("models", "Encoder"), ("models", "ViT")],
          "decoder": [("models", "Decoder")]}  # what an object is called in the method files: its classes

# In comments and docstrings: citations such as MAE, A.1 in brackets, arXiv 2111.06377, and shapes such as (B, N, 2)
CITATION = rf"(?:\(|(?<=;\s))(?:{'|'.join(PAPERS)})(?:'s [^();]*|,\s[^();]*)?(?=[;)])"
NUMBER = r"arXiv\s+\d{4}\.\d{5}"
FIRST_SIZE = r"(?:\d+|[A-Z](?:_\w+)?'?|[a-z]|num_\w+|world_size)(?:[*/^+ -]+\w+)*"
SHAPE = rf"\({FIRST_SIZE},(?:[\w.*/'^+\s-]+,?)*\)"
PART = re.compile(rf"\s*(?:({CITATION}|{NUMBER})|((?:# )?{SHAPE})|\(|\S+?(?=[\s(]|$))")

# Kinds of words in the style sheet of the page, by how the name of a token of Pygments begins; the first match counts
KINDS = {"Comment": "c", "Literal.String.Doc": "c", "Literal.String": "s", "Literal.Number": "n", "Keyword": "k",
         "Operator.Word": "k", "Name.Function": "f", "Name.Class": "f", "Name.Decorator": "k"}
TEXT = {"c", "h", "a"}  # kinds of words that occur in comments and docstrings: plain, a shape, a citation


class Word(typing.NamedTuple):
    kind: str  # one of KINDS or TEXT, or ""
    text: str  # with its white space in front
    reference: str = ""  # a citation's URL, or a name's key in `documented`


# ---------------------------------------- Words of a line

def lexer():
    """Pygments' for Python. ValueError, with the way out, if there is none."""
    try:
        from pygments.lexers import PythonLexer
    except ImportError as error:
        raise ValueError("the page needs the Pygments library: pip install pygments") from error
    return PythonLexer(stripnl=False)


def words_by_line(text, documented):
    """{line of the file: [Word]}, lines counted from 1."""
    lines, row, space = collections.defaultdict(list), 1, ""
    before = ["", ""]  # the two tokens ahead
    for token, text_of_token in lexer().get_tokens(text):
        token_name = str(token).removeprefix("Token.")
        kind = next((kind for name, kind in KINDS.items() if token_name.startswith(name)), "")
        dotted = f"{before[0]}.{text_of_token}"
        reference = dotted if before[1] == "." and dotted in documented else ""
        before = [before[1], text_of_token]

        words = in_words(text_of_token) if kind == "c" else [Word(kind, text_of_token, reference)]
        for word in words:
            for number, piece in enumerate(word.text.split("\n")):
                if number > 0:
                    row, space = row + 1, ""
                if piece.strip():
                    lines[row].append(word._replace(text=space + piece))
                    space = ""
                else:
                    space += piece
    return lines


def in_words(text):
    """[Word] of a comment or a docstring: citations, shapes, and what is between them."""
    words, end = [], 0
    for found in PART.finditer(text):
        citation, shape = found.groups()
        if citation:
            cited = citation.removeprefix("(")
            number = re.search(r"\d{4}\.\d{5}", cited)
            title = next((title for title in PAPERS if cited.startswith(title)), "")
            number = number[0] if number else PAPERS[title]
            words.append(Word("c", found[0].removesuffix(cited)))  # white space, and maybe a bracket
            words.append(Word("a", cited, f"https://arxiv.org/abs/{number}"))
        else:
            words.append(Word("h" if shape else "c", found[0]))
        end = found.end()
    return [*words, Word("c", text[end:])]


# ---------------------------------------- Docstrings of names

def documented(root):
    """{"layers.gather": [signature, docstring, "common/layers.py:40"]} of the functions and classes of common, models
    and data, and of the methods of OWNERS."""
    found = {}
    paths = [*sorted(root.glob("common/*.py")), root / "models.py", root / "data.py"]
    trees = {path.relative_to(root).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in paths}
    for place, tree in trees.items():
        add_documented(found, place.split("/")[-1], place, tree.body)
    for owner, classes in OWNERS.items():
        for place, name in classes:
            definitions = {getattr(node, "name", ""): node for node in trees[place].body}
            add_documented(found, owner, place, definitions[name].body)
    return found


def add_documented(found, owner, place, nodes):
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            signature = f"class {node.name}"
            if isinstance(node, ast.FunctionDef):
                signature = f"{node.name}({ast.unparse(node.args)})"
            found[f"{owner}.{node.name}"] = [signature, ast.get_docstring(node), f"{place}.py:{node.lineno}"]


# ---------------------------------------- Page

def paragraphs(docstring):
    """[[kind, no space above, [line]]] of a file's docstring: text that flows, or lines that stay as they are."""
    found = []
    for paragraph in docstring.split("\n\n"):
        drawn = paragraph.startswith("    ")
        rows = [row[4:] for row in paragraph.splitlines()] if drawn else [" ".join(paragraph.split())]
        lines = [[0, *map(short, in_words(row))] for row in rows]
        found.append(["pre" if drawn else "prose", 0, lines])
    return found


def short(word):
    """A Word as the page holds it: without what is empty."""
    if word.reference:
        return list(word)
    return [word.kind, word.text] if word.kind else word.text


def item(statement, lines, words, margin):
    """[kind, space above, [[indent, word, ...]]] of a statement; indents are counted from `margin`. Lines of a comment
    or a docstring flow; those of a long statement are indented by eight at most, so that they fit into a column."""
    above = lines[statement.first - 2].strip()
    space = int(not above or statement.name in HEADINGS)
    outer, rows = indent_of(lines[statement.first - 1]), []
    for row in range(statement.first, statement.last + 1):
        here = words[row]
        if not here:
            continue
        flows = row > statement.first and is_text(here) and is_text(words[row - 1])
        if flows:
            if here[0].text.strip() == "#":
                here = here[1:]
            first = here[0]._replace(text=" " + here[0].text.lstrip())
            rows[-1] += map(short, [first, *here[1:]])
            continue
        indent = indent_of(lines[row - 1])
        if indent > outer + 8:
            indent = outer + 4
        first = here[0]._replace(text=here[0].text.lstrip())
        here = [word._replace(text=re.sub("-----+", "---", word.text)) for word in [first, *here[1:]]]
        rows.append([indent - margin, *map(short, here)])
    return [statement.kind, space, rows]


def is_text(words):
    """Does a line hold a comment or a part of a docstring, and no code?"""
    return bool(words) and all(word.kind in TEXT for word in words)


def indent_of(line):
    return len(line) - len(line.lstrip())


def cut_all(texts):
    """{method: {section: [Statement]}} of {method: text of its file}; options are in one order, so that they align."""
    columns = {name: cut(text, METHODS[name]) for name, text in texts.items()}
    rank_options({name: sections["config"] for name, sections in columns.items()})
    return columns


def margins_of(lines, columns):
    """{section: the smallest indent that it has in any method}."""
    margins = {}
    for section in SECTIONS:
        firsts = [lines[name][statement.first - 1] for name in METHODS for statement in columns[name][section]]
        margins[section] = min(map(indent_of, firsts), default=0)
    return margins


def texts_of(root):
    """{method: text of its file}."""
    return {name: (root / f"{name}.py").read_text() for name in METHODS}


def content(root):
    """All that the page holds, as plain data. ValueError or OSError where a file is missing or no method."""
    texts, names = texts_of(root), documented(root)
    lines, columns = {name: text.splitlines() for name, text in texts.items()}, cut_all(texts)
    margins = margins_of(lines, columns)
    numbers, methods = {}, []  # {item as text: its number}: what several files have is kept once
    for name, title in METHODS.items():
        words, sections = words_by_line(texts[name], names), {}
        for section, statements in columns[name].items():
            items = [item(statement, lines[name], words, margins[section]) for statement in statements]
            if section == "idea":
                items = paragraphs(ast.get_docstring(ast.parse(texts[name])))
            first = statements[0].first if statements else 0
            own = [numbers.setdefault(json.dumps(one), len(numbers)) for one in items]
            sections[section] = [first, own]
        methods.append({"name": name, "title": title, "sections": sections})

    used = set(re.findall(r'"(\w+\.\w+)"\]', "".join(numbers)))
    return {"methods": methods, "sections": SECTIONS, "items": [json.loads(one) for one in numbers],
            "rows": rows_of_choices(columns), "names": {name: names[name] for name in sorted(used & names.keys())}}


def rows_of_choices(columns):
    """{choice: {section: rows}} for every choice of methods. Choices and rows are sums of 1, 2, 4, 8, 16, one for each
    method in the order of METHODS; a row tells which of them have a statement in it."""
    bits = {name: 1 << number for number, name in enumerate(METHODS)}
    rows = {}
    for count in range(1, len(METHODS) + 1):
        for choice in itertools.combinations(METHODS, count):
            key = sum(bits[name] for name in choice)
            rows[key] = {}
            for section in SECTIONS:
                chosen = {name: columns[name][section] for name in choice}
                aligned = align_options(chosen) if section == "config" else align(chosen)
                rows[key][section] = [sum(bits[name] for name in row) for row in aligned]
    return rows


def write(out, methods, root=config.ROOT):
    """Write OUT/index.html, which shows `methods` first. Returns its path."""
    data = {"first": methods, **content(root)}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text.replace("</", "<\\/"))
    path = Path(out) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS)[:3], metavar="METHOD",
                        help=f"two to five of {', '.join(METHODS)}: what the page shows first")
    parser.add_argument("--out", default="runs/read", help="folder of index.html")
    args = parser.parse_args(argv)

    with config.user_errors():
        chosen = set(args.methods)
        if not chosen <= METHODS.keys() or len(chosen) < 2:
            raise ValueError(f"--methods {' '.join(args.methods)}: give two to five of {', '.join(METHODS)}")
        path = write(args.out, [name for name in METHODS if name in chosen])
        config.print_once(f"written: {path}; open it in a browser")


if __name__ == "__main__":
    main()
