"""options.py: defaults, then YAML, then flags; what does not fit is one line that names it."""

import dataclasses

import pytest

import finetune
import mae
from common import options


@dataclasses.dataclass
class Config(options.RunConfig):
    """A small one, so that expectations can be written out."""
    depth: int = 8  # how deep
    ratio: float = 0.75  # how much
    size: options.Size = (224, 224)  # how large
    betas: tuple[float, float] = (0.9, 0.95)  # how fast
    name: str = "a"  # what it is called
    fast: bool = False  # whether to hurry


def configure(*words):
    return options.configure(Config, "A script.", list(map(str, words)))


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
    cfg = options.configure(mae.Config, "", ["--config", str(path)])
    assert (cfg.epochs, cfg.decoder_depth) == (7, 1)
    cfg = options.configure(finetune.Config, "", ["--config", str(path)])
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
    (["--dept", 3], ["--dept", "did you mean depth?"]),
    (["--batchsize", 3], ["--batchsize"]),
    (["--zzzzzz", 3], ["--zzzzzz", "--help"]),
    (["--depth", "three"], ["--depth", "int", "three"]),
    (["--depth", "3.5"], ["--depth", "3.5"]),
    (["--depth"], ["--depth", "int"]),
    (["--ratio", "nan"], ["--ratio", "nan"]),
    (["--ratio", "inf"], ["--ratio", "inf"]),
    (["--fast", "maybe"], ["--fast", "bool", "maybe"]),
    (["--size", "1x2x3"], ["--size", "1x2x3"]),
    (["--size", "axb"], ["--size", "a"]),
    (["--name"], ["--name", "str"]),
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
], ids=repr)
def test_yaml_that_does_not_fit(capsys, recipe, text, names):
    line = refused(capsys, "--config", recipe(text))
    assert all(name in line for name in names), line


def test_yaml_section_that_is_no_section(capsys, recipe):
    """Of the script itself: `mae: 3` where a mapping belongs."""
    with pytest.raises(SystemExit) as stop:
        options.configure(mae.Config, "", ["--config", str(recipe("mae: 3\n"))])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and "mae" in err


def test_yaml_that_is_binary(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(bytes(range(128, 256)))
    assert "recipe.yaml" in refused(capsys, "--config", tmp_path / "recipe.yaml")


def test_an_empty_recipe_changes_nothing(recipe):
    assert configure("--config", recipe("# only a comment\n")) == Config()


@pytest.mark.parametrize("script", [mae, finetune], ids=["mae", "finetune"])
def test_help_prints_every_field_with_its_comment(call, script):
    done = call(script.main, ["--help"])
    out = done.out
    assert done.code == 0 and done.err == ""
    comments = options.describe(script.Config)
    printed = {line.split()[0]: line for line in out.splitlines() if line.startswith("  --")}
    for field in dataclasses.fields(script.Config):
        assert comments.get(field.name), f"{field.name} has no comment"
        assert printed[f"--{field.name}"].rstrip().endswith(comments[field.name])
    assert next(iter(printed)) == f"--{next(iter(script.Config.__annotations__))}"  # the method's own fields come first
    assert script.__doc__.strip().splitlines()[0] in out


def test_help_shows_how_a_default_is_written():
    for script in (mae, finetune):  # what --help prints can be typed again
        for field in dataclasses.fields(script.Config):
            value = field.default
            text = "x".join(map(str, value)) if field.type is options.Size else \
                ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert getattr(options.configure(script.Config, "", [f"--{field.name}={text}"]), field.name) == value


def test_plain_and_fixed():
    cfg = mae.Config()
    assert options.plain({"a": (1, (2, 3))}) == {"a": [1, [2, 3]]}
    kept = options.fixed(cfg)
    assert {"mask_ratio", "batch_size", "seed", "data", "precision"} <= kept.keys()  # these decide the numbers
    assert not {"micro_batch", "workers", "out", "log_every", "max_steps", "device", "resume"} & kept.keys()
