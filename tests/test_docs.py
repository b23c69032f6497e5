"""What README.md, docs/ and recipes print, against the code: length, links, options, departures, tables, commands."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, paint
from torch.distributed.run import get_args_parser

from common import config

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPTS = ["mae", "simmim", "um_mae", "fastmim", "lut", "finetune"]
TOOLS = [f"tools.{path.stem}" for path in sorted((ROOT / "tools").glob("*.py"))]
ROOMS = ["", "common/", "tools/"]


def of_pages(pages=PAGES):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


# Text


def test_the_readme_fits_in_9000_bytes():
    assert len(README.read_bytes()) <= 9000


@of_pages()
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    missing = []
    for link in links:
        path, _, heading = link.partition("#")
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        if not target.exists():
            missing.append(link)
        elif heading and heading not in headings(target.read_text()):
            missing.append(link)
    assert not missing


def headings(text):
    """The anchors of a markdown page, as GitHub makes them."""
    found = []
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        kept = re.sub(r"[^\w\- ]", "", title.lower())
        found.append(kept.replace(" ", "-"))
    return found


@of_pages()
def test_no_page_counts_lines_of_code(page):
    """Such numbers are wrong after the next commit."""
    assert not re.findall(r"\b\d[\d,]* (?:lines|files|bytes|KB|MB)\b", page.read_text())


@of_pages(PAGES + RECIPES)
def test_what_is_named_exists(page):
    """Recipes, modules of tools/ and of common/, by their names in text."""
    text = page.read_text()
    recipes = re.findall(r"configs/[\w*]+\.yaml", text)
    rooms = [f"{room}/{name}.py" for room, name in re.findall(r"\b(common|tools)[./](\w+)", text) if name != "NAME"]
    missing = [name for name in recipes + rooms if not list(ROOT.glob(name))]
    assert not missing


@of_pages()
def test_options_in_the_text_exist(page):
    """Every --option is a field of a Config, or stands in the source of a tool or in torchrun's help."""
    known = set(re.findall(r"--([\w-]+)", get_args_parser().format_help())) | {"nproc", "help", "config"}
    for path in [ROOT / f"{name}.py" for name in SCRIPTS] + sorted((ROOT / "tools").glob("*.py")):
        text = path.read_text()
        known |= set(re.findall(r'"--(\w+)"', text))
        known |= set(re.findall(r"^    (\w+): ", text, re.M))  # a field of a dataclass
    known |= {field.name for field in dataclasses.fields(config.RunConfig)}
    known = {name.replace("-", "_") for name in known}
    named = set(re.findall(r"(?<![\w-])--(?:no_)?([a-z][\w-]*)", page.read_text()))
    assert not {name.replace("-", "_") for name in named} - known


def test_the_scripts_need_five_packages():
    packages = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M)
    assert packages == ["torch", "torchvision", "numpy", "tqdm", "pyyaml"]


# Departures


def departures():
    """[(file, text behind # DIFF:)] of the code; the text goes on as long as the next lines are comments, too."""
    found = []
    for path in sorted(path for room in ROOMS for path in ROOT.glob(f"{room}*.py")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "# DIFF: " not in line:
                continue
            text = [line.split("# DIFF: ")[1]]
            for following in lines[number + 1 :]:
                if not following.strip().startswith("# ") or "# DIFF: " in following:
                    break
                text.append(following.strip().removeprefix("# "))
            found.append((str(path.relative_to(ROOT)), " ".join(" ".join(text).split())))
    return found


def test_departures_are_the_marks_in_the_code():
    """docs/departures.md lists every mark, word by word, and nothing else."""
    rows = [f"| [{name}](../{name}) | {text} |" for name, text in departures()]
    listed = [line for line in (ROOT / "docs" / "departures.md").read_text().splitlines() if line.startswith("| [")]
    assert rows and sorted(listed) == sorted(rows), "the table should be:\n" + "\n".join(rows)


# Tables

# PYTHONPATH=.:tests python -c "import test_docs as t; [p.write_text(t.filled(p.read_text())) for p in t.PAGES]"
# prints all marked tables anew.
MARKED = re.compile(r"^<!-- table: ([^\n]*) -->\n(.*?)\n<!-- end of table -->$", re.M | re.S)


def printed_by(command):
    """What `python -m tools.tables print FILE` prints."""
    name, _, words = split(command)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        importlib.import_module(name).main(words)
    return output.getvalue().strip()


def filled(page):
    """A page with its marked tables as their commands print them now."""
    return MARKED.sub(lambda old: f"<!-- table: {old[1]} -->\n{printed_by(old[1])}\n<!-- end of table -->", page)


def cells_of(text):
    """{title: {row: {column: cell}}} of the markdown tables in a text; a title is the first cell of a table."""
    tables, rows = {}, None
    for line in text.splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        first, *cells = [cell.strip() for cell in line[1:-1].split("|")]
        if rows is None:
            columns, rows = cells, tables.setdefault(first, {})
        elif not first.startswith("---"):
            rows[first] = dict(zip(columns, cells, strict=True))
    return tables


def measured(name):
    """{title: {row: {column: cell}}} of a file in results/."""
    return cells_of(printed_by(f"python -m tools.tables print results/{name}"))


@of_pages()
def test_marked_tables_are_what_their_commands_print(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    assert text.count("<!-- table: ") == len(MARKED.findall(text))
    assert text == filled(text)


def test_the_first_table_of_the_readme_is_that_of_the_demo(monkeypatch):
    monkeypatch.chdir(ROOT)
    (arms,) = measured("demo.json").values()
    shown = cells_of(README.read_text())["top-1, per cent"]
    assert list(shown) == ["pre-trained", "scratch", "scratch, 4x budget"]
    assert all(arms[arm][labels] == cell for arm in shown for labels, cell in shown[arm].items())


def test_the_photographs_of_the_readme_are_those_that_were_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    [(title, rows)] = measured("cifar10.json").items()
    shown = cells_of(README.read_text())[title]
    assert list(shown) == ["MAE", "scratch", "scratch, 4x budget"]
    assert all(rows[row][labels] == cell for row in shown for labels, cell in shown[row].items())


def test_what_the_table_of_methods_shows_was_measured(monkeypatch):
    """Of "ViT: 64.2 against 23.4" in the row of SimMIM, both are means of three seeds with 500 labels."""
    monkeypatch.chdir(ROOT)
    (vit,), (pyramids,) = measured("learns_vit.json").values(), measured("learns_pyramids.json").values()
    shown = cells_of(README.read_text())["file, paper"]
    assert len(shown) == 5
    for first, cells in shown.items():
        method = re.search(r", \[([\w-]+)\]", first)[1]
        claims = re.findall(r"([\w-]+): (\d+\.\d) against (\d+\.\d)", list(cells.values())[-1])
        assert claims, method
        for backbone, *numbers in claims:
            row = (vit | pyramids)[f"{method} {backbone}"]
            texts = [row[f"500 labels: {arm}"] for arm in ("pre-trained", "scratch")]
            assert numbers == [text.split()[0] for text in texts], (method, backbone)
            assert not any("seeds" in text for text in texts)  # of fewer than the others have


FINAL_LOSSES = {  # script: the file with the log of its CPU command, and the row there
    "mae": ("demo.json", "pretraining_log", None),
    "simmim": ("learns_pyramids.json", "log", "SimMIM Swin"),
    "um_mae": ("learns_pyramids.json", "log", "UM-MAE Swin"),
    "fastmim": ("learns_vit.json", "log", "FastMIM ViT"),
    "lut": ("learns_vit.json", "log", "LUT ViT"),
}


@pytest.mark.parametrize("name", FINAL_LOSSES)
def test_the_loss_in_a_docstring_was_measured(name):
    """It is the mean over seeds of the last line of the log, to two digits."""
    file, key, row = FINAL_LOSSES[name]
    logs = json.loads((ROOT / "results" / file).read_text())[key]
    seeds = (logs[row] if row else logs).values()
    mean = sum(lines[-1]["loss"] for lines in seeds) / len(seeds)
    shown = re.search(r"loss (\d\.\d+)", importlib.import_module(name).__doc__)[1]
    assert shown == f"{mean:#.2g}"


def test_the_accuracy_in_the_docstring_of_finetune_was_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    (demo,) = measured("demo.json").values()
    shown = re.search(r"top-1 (\d+\.\d)", importlib.import_module("finetune").__doc__)[1]
    assert shown == demo["pre-trained"]["200 labels"].split()[0]


def test_the_tables_of_hog_stability_were_measured(monkeypatch):
    """Similarity of pictures at 128 px on photos, and the share of each target that changes."""
    monkeypatch.chdir(ROOT)
    tables = measured("hog_photos.json")
    page = cells_of((ROOT / "docs" / "results.md").read_text())
    shown, wins = page["resized to 128 px and back"], "images on which HOG is more alike"
    assert len(shown) >= 6
    for row, cells in shown.items():
        ssim, psnr = (tables[f"{measure}, 128 px"][row] for measure in ("SSIM of pictures", "PSNR of pictures, dB"))
        assert cells == {"SSIM: HOG": ssim["HOG"], "SSIM: pixels": ssim["pixels"],
                         "HOG more alike by SSIM": f"{float(ssim[wins]):.0f} of 25",
                         "HOG more alike by PSNR": f"{float(psnr[wins]):.0f} of 25"}

    shown, title = page["what changes, in per cent of the variance"], "change, per cent of the variance"
    row = "down bicubic antialiased, up bicubic antialiased"
    assert shown["128 px, bicubic and antialiased both ways"] == tables[f"{title}, 128 px"][row]
    noise = tables[f"{title}, noise of so many of 255 levels"]
    assert shown["noise of 8 of 255 levels"] == {target: cells["8"] for target, cells in noise.items()}


# Commands


def of_page(page):
    """The commands in the code blocks of a markdown page."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n *", "", block).splitlines()]
    return [line for line in lines if re.match(r"(\.venv/bin/)?python3? |make |torchrun ", line)]


def of_recipe(recipe):
    """The commands in the comments of a recipe."""
    return [line[1:].strip() for line in recipe.read_text().splitlines() if re.match(r"# +(python|torchrun) ", line)]


def of_docstring(name):
    """The commands in the docstring of a script or a tool; behind two spaces there is a remark."""
    text = importlib.import_module(name).__doc__ or ""
    lines = re.sub(r"\\\n *", "", text).splitlines()
    commands = [re.search(r"(?<![\w`])(?:python|torchrun) .*?(?=  |$)", line) for line in lines]
    return [command[0] for command in commands if command]


COMMANDS = [(page, command) for page in PAGES for command in of_page(page)]
COMMANDS += [(recipe, command) for recipe in RECIPES for command in of_recipe(recipe)]
OF_SCRIPTS = [(name, command) for name in SCRIPTS + TOOLS for command in of_docstring(name)]
FOREIGN = ("pip", "venv")  # modules that are not ours
SAME_OPTIONS = {"tools.corruptions": "finetune"}  # a tool: the script whose options it takes


def split(command):
    """A command -> (module, how many processes, its words)."""
    program, *words = shlex.split(command, comments=True)
    if program == "torchrun":
        args = get_args_parser().parse_args(words)
        processes = int(args.nproc_per_node) * int(args.nnodes.split(":")[0])
        return args.training_script.removesuffix(".py"), processes, args.training_script_args
    if words[0] == "-m":
        return words[1], 1, words[2:]
    return words[0].removesuffix(".py"), 1, words[1:]


class Parsed(Exception):
    """Raised where a tool has read its options, so that it does nothing else."""


def parse(name, words, monkeypatch):
    """The options that a script or a tool reads from `words`. SystemExit, as the user sees it, if it refuses them."""
    script = importlib.import_module(SAME_OPTIONS.get(name, name))
    if hasattr(script, "Config"):
        return config.parse(script.Config, script.__doc__, words)

    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(Parsed) as parsed:
        script.main()
    return parsed.value.args[0]


def check_command(command, monkeypatch):
    """Would it start? Its module exists, the options are known, their types right, its recipe is there, it has data and
    a folder to write to, and its batch can be shared."""
    monkeypatch.chdir(ROOT)
    name, processes, words = split(command)
    if name in FOREIGN or "--help" in words:
        return
    cfg = parse(name, words, monkeypatch)
    if not isinstance(cfg, config.RunConfig):
        return
    assert cfg.data
    assert "--out" in words or cfg.plan
    if not getattr(cfg, "eval", False):
        share = cfg.batch_size // processes
        assert cfg.batch_size % processes == 0 and share % min(cfg.micro_batch, share) == 0


@pytest.mark.parametrize("page,command", COMMANDS, ids=[f"{page.name}: {command}" for page, command in COMMANDS])
def test_a_command_can_be_started(page, command, monkeypatch):
    if not command.startswith("make "):
        return check_command(command, monkeypatch)
    makefile = (ROOT / "Makefile").read_text()
    for word in shlex.split(command, comments=True)[1:]:
        variable, is_one, _ = word.partition("=")
        known = rf"^{variable} \?=" if is_one else rf"^{word}:"
        assert re.search(known, makefile, re.M), word


@pytest.mark.parametrize("name,command", OF_SCRIPTS, ids=[f"{name}: {command}" for name, command in OF_SCRIPTS])
def test_a_command_of_a_docstring_can_be_started(name, command, monkeypatch):
    check_command(command, monkeypatch)


def output_of(command):
    """What a command writes below runs/: the folder behind --out, or the last word of tools.convert."""
    name, _, words = split(command)
    if "--out" in words:
        return words[words.index("--out") + 1]
    converts = name == "tools.convert" and words[0] != "show"
    return words[-1] if converts else None


def of_ours():
    """(page, command) of everything that is no make."""
    return [(page, command) for page, command in [*COMMANDS, *OF_SCRIPTS] if not command.startswith("make ")]


def test_what_a_command_reads_another_one_writes():
    """--init runs/mae/encoder.pt, where some command has --out runs/mae."""
    written = {output_of(command) for _, command in of_ours()}
    missing = []
    for page, command in of_ours():
        reads = {word for word in split(command)[2] if word.startswith("runs/")} - {output_of(command)}
        missing += [(page, word) for word in reads if word not in written and str(Path(word).parent) not in written]
    assert not missing


def test_a_page_can_be_pasted_from_top_to_bottom():
    """What a page writes, it writes before it reads it; and no run meets a folder that holds one, but for the same run
    started another way, as on eight GPUs."""
    pages = {}
    for page, command in of_ours():
        pages.setdefault(page, []).append(command)
    late, twice = [], []
    for page, commands in pages.items():
        outputs = [output_of(command) for command in commands]
        for i, command in enumerate(commands):
            name, _, words = split(command)
            own, before = outputs[i], set(outputs[:i])
            for word in (word for word in words if word.startswith("runs/") and word != own):
                folders = {word, str(Path(word).parent)}
                if folders & set(outputs) and not folders & before:
                    late.append((page, command, word))
            is_run = hasattr(importlib.import_module(name), "Config") if name not in FOREIGN else False
            if is_run and own and own in before and not {"--resume", "--overwrite"} & set(words):
                other = commands[outputs.index(own)]
                if sorted(split(other)[2]) != sorted(words) or split(other)[0] != name:
                    twice.append((page, command))
    assert len(pages) > 60 and not late and not twice


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_writes_below_runs_unless_told_otherwise(name, monkeypatch):
    """No command that a reader pastes changes a file under results/."""
    commands = [command for _, command in of_ours() if split(command)[0] == name]
    for command in commands:
        words = split(command)[2]
        parsed = vars(parse(name, words, monkeypatch))
        for option in ("out", "json"):
            path = str(parsed.get(option) or "runs/")
            is_given = path in words
            assert path.startswith("runs/") or (is_given and not path.startswith("results")), (command, option, path)


def test_files_of_numbers_are_named_after_what_they_hold():
    """results/bench_ratios_epyc_cpu.json: the measurement, and, where there are several, which of them."""
    for path in (ROOT / "results").rglob("*.json"):
        what = json.loads(path.read_text())["what"]
        assert path.stem == what or path.stem.startswith(f"{what}_"), path.name


def test_a_folder_belongs_to_one_recipe():
    recipes = {}
    for _, command in of_ours():
        words = split(command)[2]
        if "--config" in words and "--out" in words:
            recipes.setdefault(output_of(command), set()).add(words[words.index("--config") + 1])
    shared = {folder: names for folder, names in recipes.items() if len(names) > 1}
    assert len(recipes) > 50 and not shared


@of_pages(RECIPES)
def test_a_recipe_begins_with_its_command(page):
    """One that can be pasted: it names the recipe and data, and writes to a folder that is called like the recipe."""
    words = split(of_recipe(page)[0])[2]
    assert re.search(r"^data: ", page.read_text(), re.M) or words[words.index("--data") + 1].startswith("/data/")
    assert words[words.index("--config") + 1] == f"configs/{page.name}"
    assert "tiny" in page.stem or words[words.index("--out") + 1] == f"runs/{page.stem}"


# What is cheap enough to run, in this order; where it trains, for two steps.
CHEAP = """
    python mae.py --config configs/tiny.yaml --out runs/mae
    python finetune.py --config configs/finetune_tiny.yaml --init runs/mae/encoder.pt --out runs/finetune
    python finetune.py --eval --init runs/finetune/encoder.pt --data shapes --split test --out runs/eval
    python -m tools.dense --config configs/dense_tiny.yaml --init runs/mae/encoder.pt --out runs/segment
    python -m tools.convert export runs/mae/encoder.pt --to timm runs/mae_timm.pth
    python -m tools.convert --drop_layers 2 runs/mae/encoder.pt runs/mae_short.pt
    python finetune.py --config configs/finetune_tiny.yaml --init runs/mae_short.pt --out runs/finetune_short
    python -m tools.check_images my_photos
    python mae.py --config configs/tiny.yaml --data my_photos --crop_scale 0.2,1 --flip 0.5 --batch_size 8 \
--out runs/mine
    python finetune.py --config configs/finetune_tiny.yaml --init runs/mine/encoder.pt --data my_data --labels 0 \
--batch_size 8 --out runs/mine_tuned
    python -m tools.show cat.png --init runs/mine_tuned/encoder.pt
    python -m tools.show --confusion runs/finetune/result.json
"""


def test_cheap_commands_run_as_printed(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for i in range(10):
        split_and_class = Path("val" if i < 2 else "train", "cat" if i % 2 else "dog")
        paint(tmp_path / "my_data" / split_and_class / f"{i}.png", seed=i, size=(64, 64))
        paint(tmp_path / "my_photos" / f"{i}.png", seed=i, size=(64, 64))
    paint(tmp_path / "cat.png", seed=10, size=(64, 64))

    printed = {command for _, command in COMMANDS}
    for command in map(str.strip, CHEAP.strip().splitlines()):
        assert command in printed
        name, _, words = split(command)
        script = importlib.import_module(name)
        short = ["--max_steps", "2"] if hasattr(script, "Config") and "--eval" not in words else []
        done = call(script.main, [*words, *short])
        assert done.code == 0, (command, done.err)
