"""config.py: defaults, then YAML, then flags; what does not fit is one line that names it."""

import dataclasses
import os
import re

import pytest

import finetune
import mae
from common import config


@dataclasses.dataclass
class Config(config.RunConfig):
    """A small one, so that expectations can be written out."""
    depth: int = 8  # how deep
    ratio: float = 0.75  # how much
    size: config.Size = (224, 224)  # how large
    betas: tuple[float, float] = (0.9, 0.95)  # how fast
    name: str = "a"  # what it is called
    fast: bool = False  # whether to hurry


def configure(*words):
    return config.parse(Config, "A script.", list(map(str, words)))


def refused(capsys, *words):
    """The one line that the words are answered with."""
    with pytest.raises(SystemExit) as stop:
        configure(*words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    return err


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path
    return write


def test_flags_override_yaml_overrides_defaults(recipe):
    path = recipe("depth: 3\nratio: 0.5\n")
    assert (configure().depth, configure().ratio) == (8, 0.75)
    cfg = configure("--config", path)
    assert (cfg.depth, cfg.ratio, cfg.name) == (3, 0.5, "a")
    orders = ["--config", path, "--depth", 5], ["--depth", 5, "--config", path], ["--depth=5", f"--config={path}"]
    for words in orders:
        cfg = configure(*words)  # whichever comes first
        assert (cfg.depth, cfg.ratio) == (5, 0.5)


def test_a_later_recipe_overrides_an_earlier_one(recipe):
    one, two = recipe("depth: 3\nratio: 0.5\n", "one.yaml"), recipe("depth: 4\n", "two.yaml")
    cfg = configure("--config", one, "--config", two)
    assert (cfg.depth, cfg.ratio) == (4, 0.5)


def test_a_section_counts_for_its_script_alone(recipe):
    path = recipe("epochs: 3\nmae:\n  decoder_depth: 1\n  epochs: 7\nfinetune:\n  pool: cls\n")
    cfg = config.parse(mae.Config, "", ["--config", str(path)])
    assert (cfg.epochs, cfg.decoder_depth) == (7, 1)
    cfg = config.parse(finetune.Config, "", ["--config", str(path)])
    assert (cfg.epochs, cfg.pool) == (3, "cls")


def test_types(recipe):
    path = recipe("depth: 3\nratio: 1\nname: 7\nfast: true\nsize: [32, 64]\nbetas: 0.9,0.99\n")
    cfg = configure("--config", path)
    assert (cfg.depth, cfg.ratio, cfg.name, cfg.fast, cfg.size, cfg.betas) == (3, 1, "7", True, (32, 64), (0.9, 0.99))
    assert type(cfg.ratio) is float
    assert configure("--ratio", "1e-3").ratio == 1e-3
    assert configure("--config", recipe("ratio: 5e-4\n", "text.yaml")).ratio == 5e-4  # YAML 1.1 reads that as a text
    assert configure("--seed", "-1").seed == -1  # a value may begin with one dash


def test_tuples():
    assert configure("--size", "96x160").size == (96, 160)
    assert configure("--size", "32").size == (32, 32)
    assert configure("--betas", "0.5,0.6").betas == (0.5, 0.6)


def test_bare_and_explicit_booleans():
    assert configure("--fast").fast is True
    assert configure("--fast", "--depth", 2).fast is True
    assert configure("--fast", "false").fast is False
    assert configure("--fast=True").fast is True


@pytest.mark.parametrize("words,names", [
    (["--dept", 3], ["--dept", "did you mean --depth?"]),
    (["--batchsize", 3], ["--batchsize"]),
    (["--zzzzzz", 3], ["--zzzzzz", "--help"]),
    (["--depth", "three"], ["--depth", "int", "three"]),
    (["--depth", "3.5"], ["--depth", "3.5"]),
    (["--depth"], ["--depth", "whole number"]),
    (["--ratio", "nan"], ["--ratio", "nan"]),
    (["--ratio", "inf"], ["--ratio", "inf"]),
    (["--fast", "maybe"], ["--fast", "true or false", "maybe"]),
    (["--size", "1x2x3"], ["--size", "1x2x3"]),
    (["--size", "axb"], ["--size", "a"]),
    (["--name"], ["--name", "a value"]),
    (["depth=3"], ["depth=3", "--key value"]),
    (["--a.depth", 3], ["--a.depth"]),
    (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
], ids=lambda v: " ".join(map(str, v)) if isinstance(v, list) else None)
def test_flags_that_do_not_fit(capsys, words, names):
    line = refused(capsys, *words)
    assert all(name in line for name in names), line


@pytest.mark.parametrize("text,names", [
    ("dept: 3\n", ["recipe.yaml", "dept", "depth"]),
    ("depth: three\n", ["depth", "int", "three"]),
    ("depth: 3.0\n", ["depth", "int"]),
    ("depth: true\n", ["depth", "int"]),
    ("depth:\n", ["depth"]),
    ("ratio: [1, 2]\n", ["ratio"]),
    ("name: {a: 1}\n", ["recipe.yaml", "name"]),
    ("name: [a]\n", ["name"]),
    ("fast: 1\n", ["fast"]),
    ("nomethod:\n  depth: 3\n", ["recipe.yaml", "nomethod"]),
    ("1: 2\n", ["recipe.yaml", "1"]),
    ("- depth\n", ["recipe.yaml", "key: value"]),
    ("just words\n", ["recipe.yaml", "key: value"]),
    ("depth: [1, 2\nratio: }", ["recipe.yaml"]),
    ("depth: !!python/object/apply:os.system ['touch /tmp/never']\n", ["recipe.yaml"]),
    ("\x00\x01", ["recipe.yaml"]),
    ("depth: 2001-99-99\n", ["recipe.yaml"]),
    ("depth: !!timestamp x\n", ["recipe.yaml"]),
    (f"depth: {'9' * 5000}\n", ["recipe.yaml"]),
    ("depth: " + 50_000 * "[", ["recipe.yaml", "too deep"]),
    (50_000 * "[\n", ["recipe.yaml", "too deep"]),
    (50_000 * "- ", ["recipe.yaml", "too deep"]),
    (50_000 * "? ", ["recipe.yaml"]),
    (f"depth: [{'1, ' * 20_000}]", ["recipe.yaml", "too many"]),
    ("name: " + 200_000 * "a", ["recipe.yaml", "200006 characters"]),
    ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
     ["recipe.yaml", "many"]),
    ("a0: &a0 {x: y}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
     ["recipe.yaml", "many"]),
    ("a: &a [*a]\n", ["recipe.yaml"]),
], ids=lambda value: repr(value)[:40])
def test_yaml_that_does_not_fit(capsys, recipe, text, names):
    line = refused(capsys, "--config", recipe(text))
    assert all(name in line for name in names), line


def test_yaml_section_that_is_no_section(capsys, recipe):
    """Of the script itself: `mae: 3` where a mapping belongs."""
    with pytest.raises(SystemExit) as stop:
        config.parse(mae.Config, "", ["--config", str(recipe("mae: 3\n"))])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "mae" in err


def test_yaml_that_is_binary(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(bytes(range(128, 256)))
    assert "recipe.yaml" in refused(capsys, "--config", tmp_path / "recipe.yaml")


def test_an_alias_of_yaml_still_stands_for_its_value(recipe):
    assert configure("--config", recipe("size: &both [32, 64]\nbetas: [0.5, 0.6]\n")).size == (32, 64)
    assert configure("--config", recipe("depth: &n 3\nname: *n\n")).name == "3"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_recipe_that_is_no_regular_file_is_not_read(capsys, tmp_path, kind):
    path = {"pipe": tmp_path / "a.yaml", "device": "/dev/zero", "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    assert "no regular" in refused(capsys, "--config", path)


def test_an_error_line_is_never_longer_than_people_read(capsys):
    assert len(refused(capsys, "--depth", "9" * 6000)) < 2100


def test_an_empty_recipe_changes_nothing(recipe):
    assert configure("--config", recipe("# only a comment\n")) == Config()


@pytest.mark.parametrize("script", [mae, finetune], ids=["mae", "finetune"])
def test_help_prints_every_field_with_its_comment(call, script):
    done = call(script.main, ["--help"])
    out = done.out
    assert done.code == 0 and done.err == ""
    comments = config.describe(script.Config)
    printed = {line.split()[0]: line for line in out.splitlines() if line.startswith("  --")}
    for field in dataclasses.fields(script.Config):
        assert comments.get(field.name), f"{field.name} has no comment"
        assert printed[f"--{field.name}"].rstrip().endswith(comments[field.name][1])
    own = [name for name in printed if name != "--config"]
    assert own[0] == f"--{next(iter(script.Config.__annotations__))}"  # the method's own fields come first
    headings = [line.rstrip(":") for line in out.splitlines() if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    assert [name for name in headings if name != "Options"] == ["The method", "The recipe", "Data", "Run", "Log"]
    assert script.__doc__.strip().splitlines()[0] in out


def test_help_shows_how_a_default_is_written():
    for script in (mae, finetune):  # what --help prints can be typed again
        defaults, words = script.Config(), []
        for field in dataclasses.fields(script.Config):
            value = field.default
            if isinstance(value, tuple):
                value = ("x" if field.type is config.Size else ",").join(map(str, value))
            words.append(f"--{field.name}={value}")
        parsed = config.parse(script.Config, "", words)
        assert all(getattr(parsed, name) == value for name, value in vars(defaults).items())


def test_plain_and_fixed():
    cfg = mae.Config()
    assert config.to_plain({"a": (1, (2, 3))}) == {"a": [1, [2, 3]]}
    kept = cfg.fixed_options()
    assert {"mask_ratio", "batch_size", "seed", "data", "precision"} <= kept.keys()  # these decide the numbers
    assert not {"micro_batch", "workers", "out", "log_every", "max_steps", "device", "resume"} & kept.keys()


def test_hyphens_and_negated_booleans():
    assert configure("--log-every", 7, "--no-fast").log_every == 7
    assert configure("--fast", "--no_fast").fast is False  # the last one counts


@pytest.mark.parametrize("word,meant", [("lr", "--base_lr"), ("batch", "--batch_size"), ("batchsize", "--batch_size"),
                                        ("mask-ration", "--mask_ratio"), ("decay", "--weight_decay")])
def test_the_nearest_option_is_named(capsys, word, meant):
    with pytest.raises(SystemExit):
        config.parse(mae.Config, "", [f"--{word}", "1"])
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_one_of_and_in_range():
    cfg = mae.Config(data="shapes")
    config.one_of(cfg, mask="random grid")
    config.in_range(cfg, mask_ratio="[0, 1)", epochs="(0, inf)", flip="[0.5, 0.5]")
    for check, ranges, names in [
            (config.one_of, {"mask": "grid block"}, ["--mask", "grid, block", "random"]),
            (config.in_range, {"mask_ratio": "[0, 0.75)"}, ["--mask_ratio", "[0, 0.75)", "0.75"]),
            (config.in_range, {"flip": "(0.5, 1]"}, ["--flip", "(0.5, 1]"]),
            (config.in_range, {"epochs": "[2000, inf)"}, ["--epochs", "1600"])]:
        with pytest.raises(ValueError) as error:
            check(cfg, **ranges)
        assert all(name in str(error.value) for name in names)


def test_data_is_required(call, tmp_path):
    """A recipe whose --data was forgotten must not train on something else."""
    done = call(mae.main, ["--model", "vit_tiny", "--out", tmp_path / "run"])
    assert done.code == 2 and done.err.startswith("error: --data is required") and not list(tmp_path.iterdir())


def test_the_next_command_suits_the_images(tmp_path):
    """A folder is no data set of torchvision's, whatever its name; a folder of other images needs labels."""
    def words(**options):
        return " ".join(mae.Config(out="runs/mae", img_size=(32, 32), batch_size=8, **options).next_commands()[0])

    labelled = tmp_path / "cifar_of_mine"
    (labelled / "train" / "cat").mkdir(parents=True)
    assert f"configs/finetune_tiny.yaml --init runs/mae/encoder.pt --data {labelled} --labels 0 --batch_size 8 --out" \
        in words(data=str(labelled), data_dir="elsewhere")
    assert "--data FOLDER_WITH_LABELS " in words(data=str(tmp_path))
    assert "configs/cifar10_finetune.yaml " in words(data="torchvision:STL10", data_dir="elsewhere")
    assert "--data_dir elsewhere " in words(data="cifar100", data_dir="elsewhere")
