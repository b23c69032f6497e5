"""For tools/read.py: a method file cut into sections and statements, and the statements of several files aligned."""

import ast
import bisect
import collections
import dataclasses
import functools
import io
import itertools
import re
import tokenize

METHODS = {"mae": "MAE", "simmim": "SimMIM", "um_mae": "UM-MAE", "fastmim": "FastMIM", "lut": "LUT"}  # file: title
SECTIONS = {  # in the order of the files: title
    "idea": "The idea", "imports": "Imports", "config": "Config", "check": "Config.check", "masks": "Masks and parts",
    "init": "__init__", "forward": "forward", "mask": "mask", "encode": "encode", "decode": "decode",
    "target": "target", "loss": "loss", "teacher": "Teacher", "prepare": "prepare", "reconstruct": "reconstruct",
    "main": "main"}
OF_SOME = {"masks", "teacher"}  # sections that a method need not have
FUNCTIONS = ("prepare", "reconstruct", "main")  # of a file, each a section
STEPS = ("forward", "mask", "encode", "decode", "target", "loss")  # methods of the model, each the start of a section
HEADINGS = ("The method", "The recipe")  # comments that stand over the options of a Config
TEACHERS = ("teach", "distil")  # methods that begin the section of the teacher

# How much alike two statements are: the share of their words that both have, from 0 to 1.
THRESHOLD = 0.5  # they may stand beside each other above it
SAME_NAME = 0.3  # is added where both assign or define the same name
OTHER_FUNCTION = 0.3  # is taken away where they belong to functions of different names


@dataclasses.dataclass(eq=False)
class Statement:
    """A statement or the first line of a block, a comment, the head of a function with its docstring, or an option."""
    kind: str  # code, comment, head, field
    first: int  # line of the file, counted from 1
    last: int
    name: str  # that it assigns or defines, or ""
    function: str  # that it belongs to, or ""
    words: collections.Counter  # of its code, or of a comment
    rank: int = 0  # of an option, among those of all methods


# ---------------------------------------- Cutting

def logical_lines(text):
    """[[kind, first line, last line]] of all statements, and of comments that stand alone. Decorators and a docstring
    belong to the head between them. kind: code, comment, head, decorator, docstring (of the file)."""
    lines, found, first = text.splitlines(), [], None
    skipped = (tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row = token.start[0]
        above = found[-1] if found else ["", 0, 0]
        if token.type == tokenize.COMMENT and first is None:
            goes_on = above[0] == "comment" and above[2] == row - 1
            if goes_on:
                above[2] = row
            else:
                found.append(["comment", row, row])
        elif token.type == tokenize.NEWLINE:
            kind = kind_of(lines[first - 1].strip())
            if above[0] == "decorator":
                above[:] = [kind, above[1], row]
            elif kind == "docstring" and above[0] == "head":
                above[2] = row
            else:
                found.append([kind, first, row])
            first = None
        elif first is None and token.type not in skipped:
            first = row
    return found


def kind_of(code):
    """Of a statement, by how it begins."""
    beginnings = {"@": "decorator", "def ": "head", "class ": "head", '"""': "docstring", 'r"""': "docstring"}
    return next((kind for word, kind in beginnings.items() if code.startswith(word)), "code")


def section_starts(tree, title):
    """[(line, section)] of the file of a method, ascending: a section goes on until the next one starts."""
    starts = [(1, "idea")]
    for node in tree.body:
        name, line = getattr(node, "name", ""), first_line(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            starts.append((line, "imports"))
        elif name == "Config":
            starts.append((line, "config"))
            starts += [(first_line(part), "check") for part in node.body if isinstance(part, ast.FunctionDef)]
        elif name == title.replace("-", ""):
            starts.append((line, "init"))
            steps = [part for part in node.body if getattr(part, "name", "") in STEPS]
            teachers = [part for part in node.body if getattr(part, "name", "") in TEACHERS]
            starts += [(first_line(part), part.name) for part in steps]
            starts += [(first_line(part), "teacher") for part in teachers]
        elif name in FUNCTIONS:
            starts.append((line, name))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
            starts.append((line, "masks"))
    return sorted(starts)


def first_line(node):
    """Of a statement, decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def function_of_lines(tree):
    """{line: name of the innermost function whose body it is in}."""
    found = {}
    for node in ast.walk(tree):  # outer ones first
        if isinstance(node, ast.FunctionDef):
            found.update(dict.fromkeys(range(node.lineno + 1, node.end_lineno + 1), node.name))
    return found


def cut(text, title):
    """{section: [Statement]} of the file of a method. ValueError if a section is missing that every method has."""
    lines, tree = text.splitlines(), ast.parse(text)
    starts, functions = section_starts(tree, title), function_of_lines(tree)
    sections = {section: [] for section in SECTIONS}
    comments = []  # ahead of a statement, whose section is theirs
    for kind, first, last in logical_lines(text):
        code = "\n".join(lines[first - 1 : last]).strip()
        if kind == "comment":
            comments.append(Statement(kind, first, last, "", functions.get(first, ""), words_of(code)))
            continue
        section = starts[bisect.bisect(starts, (first, "~")) - 1][1]  # "~" comes behind every name
        statement = Statement(kind, first, last, name_of(code), functions.get(first, ""), words_of(code))
        if section == "config" and kind == "code":
            statement.kind = "field"
            name_headings(comments, statement)
        sections[section] += [*comments, statement]
        comments = []
    missing = [name for name, statements in sections.items() if not statements and name not in OF_SOME]
    if missing:
        raise ValueError(f"the file of {title} has no {', '.join(missing)}")
    return sections


def name_headings(comments, field):
    """Comments ahead of an option: "# The method" is a field of its own, anything else belongs to the option."""
    for comment in list(comments):
        text = " ".join(comment.words)
        if text in HEADINGS:
            comment.kind, comment.name = "field", text
        else:
            field.first = comment.first
            comments.remove(comment)


def name_of(code):
    """What a statement assigns, defines or returns: "mask" of `def mask(`, "ids, mask" of `ids, mask = ...`, "return";
    "" if nothing."""
    code = re.sub(r"^(@.*\n\s*)+", "", code)
    found = re.match(r"(?:def|class) (\w+)|(return)\b|([\w., ]+?)(?:: [^=\n]+?)? [+]?= ", code)
    return next(filter(None, found.groups()), "") if found else ""


def words_of(code):
    """How often each word occurs in a statement, without comments, docstring and `self`; or in a comment."""
    if not code.startswith("#"):
        code = re.sub(r'r?""".*?"""|  # .*?$|\bself\b', "", code, flags=re.S | re.M)
    return collections.Counter(re.findall(r"\w+", code))


# ---------------------------------------- Alignment

@functools.cache
def score(one, two):
    """How well two statements stand beside each other; not at all if it is 0 or less."""
    if one.kind != two.kind:
        return 0.0
    in_both = (one.words & two.words).total()
    likeness = 2 * in_both / max(1, one.words.total() + two.words.total())
    if one.name and one.name == two.name:
        likeness += SAME_NAME
    if one.function != two.function:
        likeness -= OTHER_FUNCTION
    return likeness - THRESHOLD


def add_column(rows, column, statements):
    """Rows {column: statement} with one column more: its statements, in their order, stand in the rows that they are
    most like, or in new ones. The sum of scores is the highest that any such order has."""
    gains = [[max(score(cell, statement) for cell in row.values()) for statement in statements] for row in rows]
    best = [[0.0] * (len(statements) + 1) for _ in range(len(rows) + 1)]  # from here to the end
    for i, j in itertools.product(reversed(range(len(rows))), reversed(range(len(statements)))):
        best[i][j] = max(best[i + 1][j], best[i][j + 1], best[i + 1][j + 1] + gains[i][j])

    merged, i, j = [], 0, 0
    while i < len(rows) or j < len(statements):
        both = i < len(rows) and j < len(statements)
        if both and gains[i][j] > 0 and best[i][j] == best[i + 1][j + 1] + gains[i][j]:
            merged.append({**rows[i], column: statements[j]})
            i, j = i + 1, j + 1
        elif j == len(statements) or (both and best[i][j] == best[i + 1][j]):
            merged.append(rows[i])
            i += 1
        else:
            merged.append({column: statements[j]})
            j += 1
    return merged


def align(columns):
    """Rows {column: statement} of {column: [Statement]}: each statement once, in order, beside those it is like."""
    rows = []
    for column, statements in columns.items():
        rows = add_column(rows, column, statements)
    return rows


def rank_options(columns):
    """Bring the options of all methods, {column: [Statement]}, into one order, so that those of a name share a row."""
    order = []
    for options in columns.values():
        place = 0
        for option in options:
            if option.name in order:
                place = order.index(option.name) + 1
            else:
                order.insert(place, option.name)
                place += 1
    for options in columns.values():
        for option in options:
            option.rank = order.index(option.name)
        options.sort(key=lambda option: option.rank)


def align_options(columns):
    """Rows {column: Statement} of options that have their ranks: one row for each name."""
    rows = {}
    for column, options in columns.items():
        for option in options:
            rows.setdefault(option.rank, {})[column] = option
    return [rows[rank] for rank in sorted(rows)]
