"""read.py: every section of every method is found by its name, what is alike stands side by side in every choice of
methods, and the page works in a real browser, by day and night, on a phone and on paper."""

import builtins
import itertools
import json
import random
import re
from html.parser import HTMLParser

import browser
import pytest
from conftest import ROOT

from tools import read, read_code
from tools.read_code import METHODS, SECTIONS

CHOICES = [choice for count in range(2, 6) for choice in itertools.combinations(METHODS, count)]


@pytest.fixture(scope="module")
def columns():
    """{method: {section: [Statement]}}."""
    return read.cut_all(read.texts_of(ROOT))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return read.write(tmp_path_factory.mktemp("page"), ["mae", "simmim", "um_mae"])


@pytest.fixture(scope="module")
def page(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def lines_of(name):
    return (ROOT / f"{name}.py").read_text().splitlines()


def first_lines(name, statements):
    return [lines_of(name)[statement.first - 1].strip() for statement in statements]


# Sections


@pytest.mark.parametrize("name", METHODS)
def test_every_line_of_a_file_is_in_one_section(name, columns):
    rows = [row for statements in columns[name].values() for statement in statements
            for row in range(statement.first, statement.last + 1)]
    with_text = [number for number, line in enumerate(lines_of(name), start=1) if line.strip()]
    assert len(rows) == len(set(rows)) and set(with_text) <= set(rows)


@pytest.mark.parametrize("name", METHODS)
def test_a_section_begins_with_what_it_is_called_after(name, columns):
    for section, statements in columns[name].items():
        assert statements or section in read_code.OF_SOME
        defined = [statement.name for statement in statements if statement.kind == "head"]
        if section in (*read_code.STEPS, *read_code.FUNCTIONS, "check"):
            assert defined[0] == section
    assert "".join(first_lines(name, columns[name]["idea"])).startswith('r"""')
    assert all(line.startswith(("import ", "from ")) for line in first_lines(name, columns[name]["imports"]))
    heads = [statement.name for statement in columns[name]["init"] if statement.kind == "head"]
    assert heads[:2] == [METHODS[name].replace("-", ""), "__init__"]
    fields = [statement.name for statement in columns[name]["config"]]
    assert fields[:3] == ["Config", "The method", "model"]
    assert {"img_size", "The recipe", "clip_grad"} <= set(fields)
    assert (name in ("fastmim", "lut")) == bool(columns[name]["teacher"])


def test_masks_and_parts_hold_what_stands_outside_of_the_model(columns):
    found = {name: [s.name for s in sections["masks"] if s.kind == "head"] for name, sections in columns.items()}
    assert {"random_scores", "block_scores"} <= set(found["mae"]) and "window_normalise" in found["simmim"]
    assert "secondary_mask" in found["um_mae"] and "hog" in found["fastmim"] and "TwoViews" in found["lut"]


def test_sections_are_found_by_name_wherever_they_are(columns):
    text = (ROOT / "mae.py").read_text()
    text = text.replace("    flip: float", "    # What is new\n    blur: int = 4  # pixels\n    flip: float")
    text = text.replace("    def decode(", "    def help(self):\n        return 1\n\n    def decode(")
    cut = read_code.cut(text, "MAE")
    assert [s.name for s in cut["config"]].index("blur") == [s.name for s in cut["config"]].index("flip") - 1
    assert [s.name for s in cut["encode"] if s.kind == "head"] == ["encode", "help"]
    for section in set(SECTIONS) - {"config", "encode"}:
        assert [s.words for s in cut[section]] == [s.words for s in columns["mae"][section]], section


def test_a_file_without_a_section_is_refused():
    text = (ROOT / "mae.py").read_text().replace("def decode(", "def expand(")
    with pytest.raises(ValueError, match="MAE has no decode"):
        read_code.cut(text, "MAE")


# Alignment


def statement(code, function="", kind="code"):
    return read_code.Statement(kind, 1, 1, read_code.name_of(code), function, read_code.words_of(code))


def total(rows):
    return sum(read_code.score(*row.values()) for row in rows if len(row) == 2)


def best_by_definition(one, two):
    """The highest sum of scores over all ways to pair two lists in order."""
    if not one or not two:
        return 0.0
    options = [best_by_definition(one[1:], two), best_by_definition(one, two[1:])]
    gain = read_code.score(one[0], two[0])
    if gain > 0:
        options.append(gain + best_by_definition(one[1:], two[1:]))
    return max(options)


def test_the_alignment_of_two_is_the_best_there_is():
    draw = random.Random(0)
    for _ in range(30):
        one, two = ([statement(f"{draw.choice('abc')} = f({draw.choice('xyz')}, {draw.choice('pq')}, 1)")
                     for _ in range(draw.randint(0, 5))] for _ in range(2))
        rows = read_code.align({"one": one, "two": two})
        assert total(rows) == pytest.approx(best_by_definition(one, two))


def test_what_is_alike_stands_in_a_row():
    one = [statement(code) for code in ("tokens = embed(imgs)", "x = 1", "latent = encode(tokens)", "return latent")]
    two = [statement(code) for code in ("tokens = embed(compact(imgs))", "latent = encode(tokens)", "a(b)",
                                        "return latent[:, 1:]")]
    rows = read_code.align({"one": one, "two": two})
    pairs = [(one.index(row["one"]), two.index(row["two"])) for row in rows if len(row) == 2]
    assert pairs == [(0, 0), (2, 1), (3, 3)] and len(rows) == 5


def test_the_same_name_counts_and_another_function_counts_against():
    plain = read_code.score(statement("a = f(x)"), statement("b = f(y)"))
    named = read_code.score(statement("a = f(x)"), statement("a = f(y)"))
    apart = read_code.score(statement("a = f(x)", "one"), statement("a = f(y)", "two"))
    assert named > plain and named > apart
    assert read_code.score(statement("a = 1"), statement("# a = 1", kind="comment")) == 0


@pytest.mark.parametrize("choice", CHOICES, ids="+".join)
def test_every_choice_shows_each_statement_once_and_in_order(choice, columns, data):
    key = sum(1 << list(METHODS).index(name) for name in choice)
    for section in SECTIONS:
        chosen = {name: columns[name][section] for name in choice}
        rows = read_code.align_options(chosen) if section == "config" else read_code.align(chosen)
        for name in choice:
            assert [row[name] for row in rows if name in row] == columns[name][section]
        bits = [sum(1 << list(METHODS).index(name) for name in row) for row in rows]
        assert data["rows"][str(key)][section] == bits


SIDE_BY_SIDE = [("forward", "def forward"), ("forward", "ids_keep, "), ("encode", "tokens = self.encoder.embed("),
                ("encode", "coords = layers.places"), ("decode", "x = self.decoder.embed(latent)"),
                ("decode", "patches = torch.cat"), ("target", "return (patches - mean) / std"),
                ("loss", "return (error * "), ("prepare", "guesses = "), ("main", "lr = schedule.lr(step)"),
                ("main", "optimizer.zero_grad("), ("init", "def __init__(self, cfg):"), ("init", "self.cfg = cfg")]


@pytest.mark.parametrize("section,code", SIDE_BY_SIDE)
def test_counterparts_are_in_one_row_in_every_choice(section, code, columns):
    def of(name):
        found = [s for s in columns[name][section] if lines_of(name)[s.first - 1].strip().startswith(code)]
        return found[:1]

    for choice in CHOICES:
        wanted = [found for name in choice for found in of(name)]
        rows = read_code.align({name: columns[name][section] for name in choice})
        rows_with = [row for row in rows if any(s in row.values() for s in wanted)]
        assert len(rows_with) <= 1, choice
    assert sum(len(of(name)) for name in METHODS) >= 2


@pytest.mark.parametrize("choice", CHOICES, ids="+".join)
def test_options_stand_field_by_field(choice, columns):
    rows = read_code.align_options({name: columns[name]["config"] for name in choice})
    names = [{option.name for option in row.values()} for row in rows]
    assert all(len(row) == 1 for row in names)
    found = [name for row in names for name in row]
    assert len(found) == len(set(found)) > 20
    first = [option.name for option in sorted(columns["mae"]["config"], key=lambda option: option.first)]
    assert [option.name for option in columns["mae"]["config"]] == first  # it comes first: its order is its file's


# The page


def test_the_page_is_small_and_whole(page):
    assert len(page.encode()) < 500_000
    assert "{{data}}" not in page


def test_nothing_is_loaded_from_elsewhere(page):
    code = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S)
    assert "default-src 'none'" in code
    assert not re.findall(r"\bsrc=|<link|@import|url\(|import\(|fetch\(|XMLHttpRequest|https?://", code)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_has_one_title_and_a_way_past_the_controls(page):
    found = Elements(page).found
    assert [tag for tag, _ in found].count("h1") == 1
    links = [attributes for tag, attributes in found if tag == "a"]
    assert links[0] == {"class": "skip", "href": "#content"} and ("main", "content") in [
        (tag, attributes.get("id")) for tag, attributes in found]
    assert ("html", {"lang": "en"}) in found and "title" in [tag for tag, _ in found]


def test_one_page_holds_all_methods_whatever_is_shown_first(tmp_path, data, call):
    done = call(read.main, ["--methods", "lut", "mae", "--out", tmp_path])
    assert done.code == 0 and str(tmp_path / "index.html") in done.out
    other = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / "index.html").read_text(), re.S)[1])
    assert other.pop("first") == ["mae", "lut"]
    assert other == {key: value for key, value in data.items() if key != "first"}


@pytest.mark.parametrize("words,name", [(["mae"], "two to five"), (["mae", "mae"], "two to five"),
                                        (["mae", "beit"], "beit"), ([], "two to five")])
def test_what_is_wrong_with_methods_is_one_line(words, name, tmp_path, call):
    done = call(read.main, ["--out", tmp_path, "--methods", *words])
    assert done.code == 2 and done.err.startswith("error: ") and len(done.err.splitlines()) == 1 and name in done.err
    assert not list(tmp_path.iterdir())


def test_a_missing_pygments_is_one_line(tmp_path, call, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *args: real(
        "no_such_library" if name.startswith("pygments") else name, *args))
    done = call(read.main, ["--out", tmp_path])
    assert done.code == 2 and done.err.startswith("error: ") and "pip install pygments" in done.err


def test_citations_link_to_papers(data):
    words = [word for _, _, lines in data["items"] for line in lines for word in line[1:]]
    links = {word[1].strip(): word[2] for word in words if word[0] == "a"}
    assert links["MAE, Table 8 and A.1"] == links["arXiv 2111.06377"] == "https://arxiv.org/abs/2111.06377"
    for title in METHODS.values():
        assert any(text.startswith(f"{title}, ") for text in links), title
    text = " ".join((ROOT / f"{name}.py").read_text() for name in METHODS)
    for number in re.findall(r"arXiv\s+(\d+\.\d+)", text):
        assert f"https://arxiv.org/abs/{number}" in links.values()


def test_citations_and_shapes_in_a_text():
    def found(text):
        return [(word.kind, word.text.strip()) for word in read.in_words(text) if word.kind != "c"]
    assert found("hidden first (MAE, Fig. 6\n  middle; BEiT, Algorithm 1)") == [
        ("a", "MAE, Fig. 6\n  middle"), ("a", "BEiT, Algorithm 1")]
    assert found("noise (B, N) -> (B, 1 + N_keep, D') or (N,)") == [
        ("h", "(B, N)"), ("h", "(B, 1 + N_keep, D')"), ("h", "(N,)")]
    assert found("# (V*B, p*p*C), as MAE has it (ours), floor(K * (1 - ratio))") == [("h", "# (V*B, p*p*C)")]
    assert found("latent (B, P + K /\n    up^2, D'), P first") == [("h", "(B, P + K /\n    up^2, D')")]
    for text in ("a (B, N) b (MAE, 3); c", "(", "x (LUT's released code)", ""):
        assert "".join(word.text for word in read.in_words(text)) == text


def test_names_of_common_and_models_have_their_docstrings(data):
    names = data["names"]
    assert {"layers.patchify", "models.build", "models.Decoder", "optim.clip", "run.begin"} <= set(names)
    signature, text, place = names["layers.gather"]
    assert signature.startswith("gather(") and text and place.startswith("common/layers.py:")
    used = {word[2] for item in data["items"] for line in item[2] for word in line[1:]
            if isinstance(word, list) and len(word) == 3 and word[0] != "a"}
    assert used == set(names) and len(used) > 40


def palette(page):
    """{name: (colour by day, by night)} of the style sheet."""
    return {name: (day, night) for name, day, night in
            re.findall(r"--(\w+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", page)}


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, two):
    """As WCAG 2 defines it, 1 to 21."""
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_every_text_is_legible_on_every_ground(page):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    colours = palette(page)
    grounds, texts = ("paper", "panel", "own", "mark"), ("ink", "comment", "keyword", "string", "shape", "link")
    pairs = [*itertools.product(texts, grounds), ("dim", "paper"), ("dim", "panel")]
    assert set(colours) == {*grounds, *texts, "dim", "line", "gap"}
    low = {(text, ground, contrast(colours[text][i], colours[ground][i])) for text, ground in pairs for i in (0, 1)}
    assert not [pair for pair in low if pair[2] < 4.5]


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if browser.FOUND is None:
        pytest.skip("no Chromium here")
    try:
        opened = browser.Browser(tmp_path_factory.mktemp("browser"))
    except (RuntimeError, OSError) as error:
        pytest.skip(f"{browser.FOUND} does not start: {error}")
    yield opened
    opened.close()


@pytest.fixture
def show(tab, path):
    """`show("mae+lut/encode")` opens the page at a choice; afterwards, nothing was wrong and nothing was loaded."""
    url = path.as_uri()

    def opened(choice="", **options):
        tab.open(f"{url}#{choice}", **options)
        return tab
    yield opened
    assert tab.problems() == []
    assert {address.partition("#")[0] for address in tab.requests()} == {url}


COLUMNS = "[...document.querySelectorAll('#forward .heads b')].map(b => b.textContent)"
HASH = "location.hash.slice(1)"


def test_the_browser_tells_what_is_wrong(tab, path):
    tab.open(path.as_uri())
    assert tab.problems() == []
    tab.run("console.error('wrong')")
    tab.run("setTimeout(() => { throw new Error('thrown') })")
    tab.run("fetch('http://127.0.0.1:9/').catch(() => 0)")
    tab.settle()
    text = str(tab.problems())
    assert "wrong" in text and "thrown" in text and "Content Security Policy" in text


def test_columns_are_as_the_address_says(show):
    tab = show()
    assert tab.run(COLUMNS) == ["MAE", "SimMIM", "UM-MAE"] and tab.run(HASH) == "mae+simmim+um_mae"
    for choice in ("simmim+lut", "mae+simmim+um_mae+fastmim+lut"):
        show(choice)
        assert tab.run(COLUMNS) == [METHODS[name] for name in choice.split("+")] and tab.run(HASH) == choice
    for nonsense in ("mae", "beit+mae", "%", "lut+mae+mae/nowhere"):
        show(nonsense)
        assert tab.run(COLUMNS) == (["MAE", "LUT"] if "lut" in nonsense else ["MAE", "SimMIM", "UM-MAE"])


def test_keys_and_boxes_switch_columns(show):
    tab = show("mae+simmim+um_mae")
    tab.press("5")
    assert tab.run(COLUMNS) == ["MAE", "SimMIM", "UM-MAE", "LUT"] and tab.run(HASH) == "mae+simmim+um_mae+lut"
    tab.press("1")
    tab.press("3")
    assert tab.run(COLUMNS) == ["SimMIM", "LUT"] and tab.run(HASH) == "simmim+lut"
    tab.press("2")  # there are two columns at least
    assert tab.run(COLUMNS) == ["SimMIM", "LUT"]
    assert tab.run("document.getElementById('status').textContent") == "Two methods or more are shown."
    tab.run("document.querySelector('#choice [value=fastmim]').click()")
    assert tab.run(COLUMNS) == ["SimMIM", "FastMIM", "LUT"]
    checked = "[...document.querySelectorAll('#choice input')].filter(box => box.checked).map(box => box.value)"
    assert tab.run(checked) == ["simmim", "fastmim", "lut"]
    tab.run("location.hash = 'mae+um_mae/loss'")
    tab.wait_for("document.querySelectorAll('#forward .heads p').length === 2")
    assert tab.run(COLUMNS) == ["MAE", "UM-MAE"]


def test_keys_go_through_the_sections(show):
    tab = show("mae+simmim", height=1600)  # so high that the last sections cannot get to the top
    current = "document.querySelector('nav [aria-current]').textContent"
    titles = list(SECTIONS.values())
    assert tab.run(current) == titles[0]
    for name, title in list(SECTIONS.items())[1:]:
        tab.press("j")
        assert tab.run(current) == title and tab.run(HASH) == f"mae+simmim/{name}"
        assert tab.run("document.activeElement.textContent") == title
        top = tab.run(f"document.getElementById('title-{name}').getBoundingClientRect().top")
        assert 0 < top < 1600  # it is to be seen
    assert top > 800
    tab.press("j")
    assert tab.run(current) == titles[-1]
    for title in titles[-2::-1]:
        tab.press("k")
        assert tab.run(current) == title
    tab.press("k")
    assert tab.run(current) == titles[0]


def test_a_reader_who_scrolls_goes_on_from_there(show):
    tab = show("mae+simmim/loss")
    assert tab.run("document.getElementById('title-loss').getBoundingClientRect().top") > 0
    tab.run("scrollBy(0, document.getElementById('prepare').getBoundingClientRect().top - 60)")
    tab.settle()
    tab.press("j")
    assert tab.run(HASH) == "mae+simmim/reconstruct"
    tab.press("4")  # the section stays where it is on the screen
    assert tab.run(HASH) == "mae+simmim+fastmim/reconstruct"
    assert 0 < tab.run("document.getElementById('title-reconstruct').getBoundingClientRect().top") < 200


# Of every section and column: is the text that of the items, in their order, and does nothing lie on anything else?
CHECK_GRIDS = """(() => {
  const wrong = [];
  const plain = text => text.replace(/\\s+/g, "");
  const textOf = word => typeof word === "string" ? word : word[1];
  document.getElementById("fold").checked = false;
  for (let key = 1; key < 32; key++) {
    const shown = methods.filter((method, i) => key & (1 << i));
    if (shown.length < 2) continue;
    chosen = shown;
    render();
    for (const section of sectionNames) {
      const found = [...document.querySelectorAll(`#${section} .column`)];
      if (found.length !== shown.length) wrong.push([key, section, "columns"]);
      found.forEach((column, c) => {
        const numbers = shown[c].sections[section][1];
        const wanted = numbers.flatMap(n => items[n][2]).flatMap(line => line.slice(1)).map(textOf).join("");
        if (plain(column.textContent) !== plain(wanted)) wrong.push([key, section, "text"]);
        const rows = [...column.children].map(cell => [Number(cell.style.gridRowStart), Number(cell.style.gridRowEnd)]);
        const overlap = rows.some(([start, end], i) => start >= end || (i > 0 && start < rows[i - 1][1]));
        if (overlap) wrong.push([key, section, "rows"]);
      });
    }
  }
  return wrong;
})()"""


def test_every_choice_shows_every_line_once(show):
    assert show("mae+simmim", height=800).run(CHECK_GRIDS) == []


def test_counterparts_lie_at_one_height(show):
    tab = show("mae+simmim+um_mae+lut")
    tops = """(code => [...document.querySelectorAll('.l')].filter(line => line.textContent.trim().startsWith(code))
              .map(line => line.getBoundingClientRect().top))"""
    for code, count in (("return self.loss(pred, self.target(imgs), mask)", 3), ("x = self.decoder.embed(latent)", 3),
                        ("mask_ratio: float", 3), ("batch_size: int", 4), ("optimizer.zero_grad(", 0)):
        found = tab.run(f"{tops}({json.dumps(code)})")
        assert len(found) >= count and len({round(top) for top in found}) <= 1, code


def test_differences_are_marked_by_word_and_what_is_alike_is_dim(show):
    tab = show("mae+um_mae")
    marked = """[...document.querySelectorAll('#forward .column')]
                .map(column => [...column.querySelectorAll('mark')].map(mark => mark.textContent))"""
    assert tab.run(marked) == [["ids_restore", "mask", "ids_restore"], ["is_secondary", "is_secondary", "ids_keep"]]
    same = "[...document.querySelectorAll('#forward .same')].map(line => line.textContent)"
    loss = "    return self.loss(pred, self.target(imgs), mask)"
    assert sorted(tab.run(same)) == [loss, loss, "def forward(self, imgs, noise):", "def forward(self, imgs, noise):"]
    tab = show("mae+simmim")  # SimMIM leaves out `, ids_restore`: its line is not the same
    lines = "[...document.querySelectorAll('#forward .l')]"
    line = f"{lines}.find(line => line.textContent.trim() === 'pred = self.decode(latent)')"
    assert tab.run(f"{line}.className") == "l" and tab.run(f"{line}.querySelectorAll('.gap').length") == 1
    assert tab.run("document.querySelectorAll('#config .own').length") > 3
    assert tab.run("[...document.querySelectorAll('.own')].every(cell => !cell.querySelector('.same'))")
    shape = "getComputedStyle(document.querySelector('.same .h')).color"
    assert tab.run(shape) != tab.run("getComputedStyle(document.querySelector('.same')).color")


def test_what_is_alike_folds(show):
    tab = show("mae+simmim")
    shown = "[...document.querySelectorAll('#main .l')].filter(line => line.offsetHeight > 0).length"
    few = tab.run(shown)
    buttons = "[...document.querySelectorAll('#main .fold')].map(button => button.textContent)"
    assert few < 10 and any("lines alike: main" in text for text in tab.run(buttons))
    tab.run("document.querySelectorAll('#main .fold').forEach(button => button.click())")
    assert tab.run(shown) > 100
    assert tab.run("document.querySelector('#main .fold').getAttribute('aria-expanded')") == "true"
    tab.run("document.querySelectorAll('#main .fold').forEach(button => button.click())")
    assert tab.run(shown) == few
    tab.press("f")
    assert tab.run(shown) > 100 and tab.run(buttons) == []


def test_a_name_shows_its_docstring_on_hover_and_on_focus(show, data):
    tab = show("mae+simmim/encode")
    tip = "document.getElementById('tip')"
    assert tab.run(f"{tip}.hidden")
    name = "document.querySelector('#encode [data-name=\"layers.gather\"]')"
    x, y = tab.run(f"(box => [box.x + 4, box.y + 4])({name}.getBoundingClientRect())")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.settle()
    _, text, place = data["names"]["layers.gather"]
    assert text in tab.run(f"{tip}.textContent") and place in tab.run(f"{tip}.textContent")
    assert tab.run(f"{tip}.offsetHeight") > 0 and tab.run(f"{name}.getAttribute('aria-describedby')") == "tip"
    tab.press("Escape")
    tab.wait_for(f"{tip}.hidden")
    tab.run("document.querySelector('#encode [data-name=\"encoder.embed\"]').focus()")
    assert not tab.run(f"{tip}.hidden") and "tokens (B, N, D)" in tab.run(f"{tip}.textContent")


def test_the_first_stop_of_the_keyboard_leads_past_the_controls(show):
    tab = show("mae+simmim")
    tab.press("Tab")
    assert tab.run("document.activeElement.textContent") == "Skip to the code"
    assert tab.run("document.activeElement.getBoundingClientRect().top") >= 0
    tab.press("Enter")
    tab.run("document.activeElement.click()")
    assert tab.run("document.activeElement.id") == "content" and tab.run(HASH) == "mae+simmim"
    assert tab.run("[...document.querySelectorAll('input')].every(input => input.labels[0].textContent.trim())")
    assert tab.run("document.querySelectorAll('h1').length") == 1


# Of every line that is to be read: the contrast of its colour on the ground that is behind it.
LOWEST_CONTRAST = """(() => {
  const light = colour => {  // such as "rgb(1, 2, 3)" or "rgba(0, 0, 0, 0)"
    const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
    const part = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return {a, l: 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b)};
  };
  const known = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    let element = node.parentElement;
    if (!node.data.trim() || !element.offsetHeight) continue;
    const style = getComputedStyle(element);
    if (style.opacity !== "1") return 0;
    while (element !== document.documentElement && light(getComputedStyle(element).backgroundColor).a === 0)
      element = element.parentElement;
    const pair = [style.color, getComputedStyle(element).backgroundColor];
    known.set(String(pair), pair);
  }
  const of = ([text, ground]) => {
    const [low, high] = [light(text).l, light(ground).l].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  return [known.size, Math.min(...[...known.values()].map(of))];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_what_is_drawn_is_legible_by_day_and_night(show, dark):
    tab = show("mae+simmim+um_mae+fastmim+lut", dark=dark)
    pairs, lowest = tab.run(LOWEST_CONTRAST)
    assert pairs > 15 and lowest >= 4.5
    ground = tab.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(21, 23, 27)") == dark
    tab.run("document.getElementById('theme').click()")
    assert tab.run("getComputedStyle(document.documentElement).backgroundColor") != ground


@pytest.mark.parametrize("width", [390, 360])
def test_a_phone_shows_one_method_and_does_not_scroll_sideways(show, width):
    tab = show("mae+simmim", width=width, height=844)
    shown = "[...document.querySelectorAll('#decode .heads p')].filter(p => p.offsetHeight > 0).map(p => p.textContent)"
    for name in METHODS:
        tab.run(f"document.querySelector('#tabs [value={name}]').click()")
        assert len(tab.run(shown)) == 1 and tab.run(shown)[0].startswith(METHODS[name] + " ")
        assert tab.run("document.documentElement.scrollWidth") == width
        assert tab.run("document.querySelector('#tabs :checked').value") == name
        tab.press("j")
        assert tab.run("scrollX") == 0
    assert tab.run("document.getElementById('choice').offsetHeight") == 0
    tab.run("document.querySelector('nav li:nth-child(9) a').click()")
    tab.settle()
    assert tab.run(HASH) == "mae+simmim/encode" and tab.run(shown)[0].startswith("LUT ")
    visible = "[...document.querySelectorAll('#encode .column')].filter(c => c.firstChild.offsetHeight > 0).length"
    assert tab.run(visible) == 1


@pytest.mark.parametrize("choice,width", [("mae+simmim+um_mae+fastmim+lut", 1600), ("mae+lut", 800)])
def test_no_page_scrolls_sideways_and_wrapped_lines_hang(show, choice, width):
    tab = show(choice, width=width)
    assert tab.run("document.documentElement.scrollWidth") == width
    hanging = """[...document.querySelectorAll('.l')].filter(line => line.offsetHeight > 30).slice(0, 200).map(line => {
      const range = document.createRange();
      range.selectNodeContents(line);
      const boxes = [...range.getClientRects()].filter(box => box.width > 0);
      const padding = line.getBoundingClientRect().left + parseFloat(getComputedStyle(line).paddingLeft);
      return Math.min(...boxes.filter(box => box.top >= boxes[0].bottom).map(box => box.left)) - padding;
    })"""
    found = [offset for offset in tab.run(hanging) if offset is not None]
    assert len(found) > 50 and all(abs(offset) < 1 for offset in found)  # at the padding, three letters into the line


def test_on_paper_there_is_code_and_nothing_to_click(show):
    tab = show("mae+simmim", width=1123, media="print", dark=True)
    for hidden in ("#choice", "nav", "#theme", ".skip", "footer"):
        assert tab.run(f"document.querySelector('{hidden}').offsetHeight") == 0, hidden
    assert tab.run("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("document.querySelector('h1').offsetHeight") > 0
    assert len(tab.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]) > 100_000
