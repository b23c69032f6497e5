"""analyze.py: every command on a few small images, what it writes, and what it refuses."""

import html.parser
import json
import pickle
import types

import browser
import numpy as np
import pytest
import torch
import torchvision
from conftest import paint
from encoders import make_small
from PIL import Image

import models
from common import checkpoint, config, transforms, weights
from tools import analyses, analysis_figures, analyze, measures, networks, snapshots, tables
from tools.attention_maps import Watch


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders with an encoder.pt each: {name: path}."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    kinds = {"vit": ("vit_tiny", (16, 16), 4), "other": ("vit_tiny", (16, 16), 4), "swin": ("swin_tiny", (16, 16), 0),
             "large": ("vit_tiny", (32, 32), 4), "grey": ("vit_tiny", (16, 16), 4)}
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        encoder = models.build(*kind, in_chans=1 if name == "grey" else 3)
        (root / name).mkdir()
        found[name] = root / name / "encoder.pt"
        checkpoint.write(found[name], {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict(),
                                       "method": "MAE", "step": 3})
    return found


def analyse(call, name, *words, out):
    done = call(analyze.main, [name, *words, "--out", out])
    assert done.code == 0, done.err
    return done


def record_of(out, name):
    return json.loads((out / f"{name}.json").read_text())


class Links(html.parser.HTMLParser):
    """What a page names: addresses, and tags."""

    def __init__(self, path):
        super().__init__()
        self.found, self.tags = [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("href", "src")]


# Everything


def test_all(call, encoders, folder, tmp_path):
    """A figure and numbers each; one page, which needs no network and names nothing that is missing."""
    (encoders["vit"].parent / "log.jsonl").write_text('{"step": 2, "loss": 0.5}\n')
    done = analyse(call, "all", "--checkpoints", encoders["vit"], encoders["swin"], "random", "--data", folder,
                   "--images", 12, "--batch_size", 6, "--size", 48, "--masks", 2, out=tmp_path)
    names = ["distance", "entropy", "kl", "cka", "spectrum", "frequency", "attention", "avgdist", "hog", "curves"]
    written = {path.stem for path in tmp_path.glob("*.json")}
    assert written == set(names) and "left out: kernels: no network" in done.out
    for name in names:
        record = record_of(tmp_path, name)
        assert record["what"] == name and record["commit"] and record["machine"] and record["seeds"] == [0]
        assert str(folder) not in record["commands"][0]
        assert record["figures"] and all((tmp_path / figure).stat().st_size > 2000 for figure in record["figures"])
        assert tables.as_markdown(tmp_path / f"{name}.json").count("\n") >= 2 or name == "attention"

    page = Links(tmp_path / "index.html")
    assert page.tags.count("section") == page.tags.count("h2") == len(names) and "script" not in page.tags
    for link in page.found:
        assert not link.startswith(("http", "/", "file")), link
        assert (tmp_path / link).exists() or (link[0] == "#" and link[1:] in names)

    # Three networks in every comparison, five layers of a Swin, four of a ViT.
    for name in ("distance", "entropy"):
        for title, rows in record_of(tmp_path, name)["results"].items():
            layers = {network: list(cells) for network, cells in rows.items()}
            assert layers == {"vit": list("1234"), "swin": list("12345"), "random": list("1234")}, title
    matrices = record_of(tmp_path, "cka")["matrices"]
    assert len(matrices["vit"]["swin"]) == 4 and len(matrices["vit"]["swin"][0]) == 5
    assert all(matrices[name][name][i][i] == 1 for name in matrices for i in range(4))


def test_a_page_gathers_what_lies_in_its_folder(call, encoders, folder, tmp_path):
    analyse(call, "avgdist", "--mask_size", "32x64", "--unit", 8, "--masks", 2, out=tmp_path)
    analyse(call, "kl", "--checkpoints", encoders["vit"], "--data", folder, "--images", 4, out=tmp_path)
    page = Links(tmp_path / "index.html")
    assert [link for link in page.found if link.endswith(".json")] == ["kl.json", "avgdist.json"]


def test_the_page_in_a_browser(call, encoders, folder, tmp_path):
    """Wide and on a phone: nothing but a figure scrolls sideways, all figures are shown in a size that can be read, and
    nothing is asked of a network."""
    if browser.FOUND is None:
        pytest.skip("no Chromium")
    for name in ("kl", "cka"):
        analyse(call, name, "--checkpoints", *[encoders[name] for name in ("vit", "other", "swin")], "random", "random",
                "--data", folder, "--images", 8, out=tmp_path / "page")
    try:
        tab = browser.Browser(tmp_path / "browser")
    except (RuntimeError, OSError) as error:
        pytest.skip(f"{browser.FOUND} does not start: {error}")
    try:
        for width in (1500, 380):
            tab.open((tmp_path / "page" / "index.html").as_uri(), width=width)
            tab.run("document.querySelectorAll('img').forEach(img => img.loading = 'eager')")
            tab.wait_for("[...document.images].every(img => img.complete && img.naturalWidth)")
            assert tab.run("document.images.length") == 2 and tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run("Math.min(...[...document.images].map(img => img.clientWidth))") > 600
            assert not tab.problems() and all(url.startswith("file:") for url in tab.requests())
    finally:
        tab.close()


def test_checkpoints_of_one_name_are_seeds_of_one_row(call, encoders, folder, tmp_path):
    checkpoints = ["--checkpoints", f"MAE={encoders['vit']}", f"MAE={encoders['other']}", "random", "random"]
    words = ["--data", folder, "--images", 6]
    analyse(call, "distance", *checkpoints, *words, out=tmp_path / "both")
    analyse(call, "distance", "--checkpoints", encoders["other"], *words, out=tmp_path / "one")
    both, one = (record_of(tmp_path / out, "distance") for out in ("both", "one"))
    assert list(both["heads"]) == ["MAE", "random"]
    for layer, seeds in both["heads"]["MAE"].items():
        assert seeds[1] == pytest.approx(one["heads"]["other"][layer][0], rel=1e-4)
        assert len(seeds) == 2 and len(seeds[0]) == 4 and seeds[0] != seeds[1]
    assert both["heads"]["random"]["1"][0] != both["heads"]["random"]["1"][1]
    [means, spreads] = both["results"].values()
    heads = torch.tensor(both["heads"]["MAE"]["2"])  # (seeds, heads)
    assert means["MAE"]["2"] == pytest.approx(heads.mean(dim=1).tolist(), rel=1e-3)
    assert spreads["MAE"]["2"] == pytest.approx(heads.std(dim=1, correction=0).tolist(), rel=1e-2)


def test_numbers_do_not_depend_on_the_batch(call, encoders, folder, tmp_path):
    for size in (5, 15):
        for name in ("entropy", "spectrum", "frequency"):
            analyse(call, name, "--checkpoints", encoders["swin"], "--data", folder, "--batch_size", size,
                    out=tmp_path / str(size))
    for name in ("entropy", "spectrum", "frequency"):
        one, two = (record_of(tmp_path / out, name)["results"] for out in ("5", "15"))
        for title, rows in one.items():
            for layer, values in rows["swin"].items():
                assert values == pytest.approx(two[title]["swin"][layer], rel=2e-4, abs=1e-6)


def test_images_of_a_small_last_batch_count_where_they_are_seen(call, encoders, folder, tmp_path):
    """15 of them in batches of 6: CKA needs 4 at once."""
    for name, seen in (("cka", 12), ("kl", 15)):
        analyse(call, name, "--checkpoints", encoders["vit"], "--data", folder, "--batch_size", 6, out=tmp_path)
        assert record_of(tmp_path, name)["about"]["images"] == seen


def test_memory_does_not_grow_with_images(encoders):
    """What the analyses hold after 3 batches and after 12 is of one size."""
    found = networks.open_networks([str(encoders["vit"]), "random"], (0, 0), 0)
    sizes = []
    for count in (3, 12):
        streamed = [make() for make in analyses.STREAMED.values()]
        draw = torch.Generator().manual_seed(count)
        batches = (torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=draw) for _ in range(count))
        analyses.gather(found, batches, streamed)
        sizes.append(sum(len(pickle.dumps(vars(analysis))) for analysis in streamed))
    assert abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]


def test_images_are_normalised_as_each_network_is_used_to(call, encoders, folder, tmp_path):
    """Statistics in a file say how: with others it is another network, and the random one goes by the first."""
    saved = torch.load(encoders["vit"])
    torch.save({**saved, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}, tmp_path / "own.pt")
    found = networks.open_networks([str(tmp_path / "own.pt"), "random", str(encoders["other"])], (0, 0), 0)
    assert [network.mean for network in found] == [[0.1, 0.2, 0.3]] * 2 + [[0.485, 0.456, 0.406]]
    imgs = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    rank = analyses.STREAMED["spectrum"]()
    analyses.gather(found[:1], [imgs], [rank])
    with torch.no_grad():
        normalised = (imgs / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / \
            torch.tensor([0.5, 0.6, 0.7])[:, None, None]
        features = measures.Covariance()
        with Watch(found[0].encoder, on_features=lambda layer, maps: layer == 3 and features.add(maps.mean((2, 3)))):
            found[0].encoder(normalised)
    torch.testing.assert_close(rank.covariances[0, 3].spectrum(), features.spectrum())
    own = models.load(str(tmp_path / "own.pt"))  # the weights as they are in the file
    with torch.no_grad():
        torch.testing.assert_close(found[0].encoder(normalised), own(normalised))


def test_a_network_of_torchvision_with_other_statistics(tmp_path):
    """Its patches cannot be made to fit other ones, and need not be."""
    encoder = models.build("torchvision:convnext_tiny", (64, 64))
    checkpoint.write(tmp_path / "own.pt", {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict(),
                                           "method": "MAE", "step": 3, "mean": [0.5] * 3, "std": [0.5] * 3})
    [network] = networks.open_networks([str(tmp_path / "own.pt")], (0, 0), 0)
    assert network.mean == network.std == [0.5] * 3


def test_black_and_white_are_those_of_the_checkpoint(call, encoders, tmp_path):
    """16-bit images, of which the file says what is black and white; two files that say something else are refused."""
    (tmp_path / "images").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 500, (16, 16)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    saved = torch.load(encoders["grey"])
    for low, high in ((0, 1000), (0, 2000)):
        torch.save({**saved, "value_range": [low, high]}, tmp_path / f"{high}.pt")
    [network] = networks.open_networks([str(tmp_path / "1000.pt")], (0, 0), 0)
    args = types.SimpleNamespace(data=str(tmp_path / "images"), split="val", images=2, batch_size=2, seed=0,
                                 device="cpu")
    imgs = next(networks.image_batches(args, [network])[1])
    assert 120 < imgs.max() <= 128  # 500 of 1000
    words = ["--data", tmp_path / "images", "--out", tmp_path / "out"]
    said = fails(call, "kl", "--checkpoints", f"A={tmp_path / '1000.pt'}", f"B={tmp_path / '2000.pt'}", *words)
    assert "1000.pt: 0 to 1000" in said and "2000.pt: 0 to 2000" in said
    analyse(call, "kl", "--checkpoints", f"A={tmp_path / '1000.pt'}", "random", encoders["grey"], *words[:2],
            out=tmp_path / "out")


def test_torchvisions_weights_on_this_machine_are_taken(tmp_path, monkeypatch):
    """As torchvision would have fetched them: of a ResNet here, under the name of its best weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    published = torchvision.models.resnet18()
    path = weights.published_file("resnet18")
    path.parent.mkdir(parents=True)
    torch.save(published.state_dict(), path)
    [network] = networks.open_networks(["torchvision:resnet18"], (64, 64), 0)
    assert network.name == "torchvision:resnet18" and network.mean == [0.485, 0.456, 0.406]
    own = dict(network.encoder.named_parameters())
    assert any(tensor.shape == published.conv1.weight.shape and torch.equal(tensor, published.conv1.weight)
               for tensor in own.values())


def test_torchvisions_networks_see_images_as_in_their_training(tmp_path, monkeypatch):
    """Those of EfficientNetV2-L were normalised by 0.5."""
    monkeypatch.setattr(weights, "published_file", lambda name: tmp_path)
    monkeypatch.setattr(weights, "load_published", lambda encoder, name: None)
    [network] = networks.open_networks(["torchvision:efficientnet_v2_l"], (64, 64), 0)
    assert network.mean == network.std == [0.5] * 3


# One by one


def test_attention_of_chosen_patches(call, encoders, folder, tmp_path):
    """The maps of the last layer, of the token at the pixel; each sums up to 1."""
    analyse(call, "attention", "--checkpoints", encoders["vit"], encoders["swin"], "--data", folder, "--pictures", 1,
            "--queries", "1,14 10,6", "--layer", 3, out=tmp_path)
    record = record_of(tmp_path, "attention")
    maps = torch.tensor(record["maps"]["vit"])  # (images, queries, heads, h, w)
    assert maps.shape == (1, 2, 4, 4, 4) and record["queries"] == [[1, 14], [10, 6]] and record["layer"] == 3
    torch.testing.assert_close(maps.sum(dim=(3, 4)), torch.ones(1, 2, 4), atol=1e-3, rtol=0)

    encoder = models.load(str(encoders["vit"]))
    [network] = networks.open_networks([str(encoders["vit"])], (0, 0), 0)
    args = types.SimpleNamespace(data=str(folder), split="val", images=1, batch_size=1, seed=0, device="cpu")
    imgs = transforms.normalize(next(networks.image_batches(args, [network])[1]))
    q = torch.nn.functional.layer_norm
    with torch.no_grad():
        x = torch.cat([encoder.cls_token, encoder.embed(imgs) + encoder.pos_embed[:, 1:]], dim=1)
        for block in encoder.blocks[:2]:
            x = block(x)
        block = encoder.blocks[2]
        x = q(x, (96,), block.norm1.weight, block.norm1.bias, 1e-6)
        query, key, _ = block.attn.qkv(x).view(17, 3, 4, 24).permute(1, 2, 0, 3)  # each (heads, 17, 24)
        rows = (query @ key.transpose(1, 2) / 24**0.5).softmax(dim=2)[:, 1 + 0 * 4 + 3, 1:]  # row 0, column 3
    expected = (rows / rows.sum(dim=1, keepdim=True)).view(4, 4, 4)
    torch.testing.assert_close(maps[0, 0], expected, atol=1e-4, rtol=1e-3)


def test_what_a_window_does_not_hold_is_blank(call, folder, tmp_path):
    torch.manual_seed(0)
    encoder = models.build("swin_tiny", (64, 64), window=4)
    checkpoint.write(tmp_path / "swin.pt", {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict(),
                                            "method": "MAE", "step": 3})
    analyse(call, "attention", "--checkpoints", tmp_path / "swin.pt", "--data", folder, "--pictures", 1, "--layer", 1,
            "--queries", "40,40", out=tmp_path)
    [[[first, *_]]] = record_of(tmp_path, "attention")["maps"][tmp_path.name]  # (16, 16) of a head
    seen = [(i, j) for i, row in enumerate(first) for j, value in enumerate(row) if value is not None]
    assert seen == [(i, j) for i in range(8, 12) for j in range(8, 12)]


def test_places_lie_where_they_are_in_the_image(monkeypatch, tmp_path):
    """Of 40 pixels, 32 do not go into: the second place of the last stage of a pyramid reaches beyond the image."""
    torch.manual_seed(0)
    network = networks.Network("swin", "swin", models.build("swin_tiny", (40, 40)).eval())
    imgs = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    record = snapshots.attention([network], imgs, [(20, 20)], 0)
    side = len(record["maps"]["swin"][0][0][0])
    cell = record["cells"]["swin"]
    assert (side - 1) * cell < 40 < side * cell
    figures_made = []
    real = analysis_figures.figures.new_figure
    monkeypatch.setattr(analysis_figures.figures, "new_figure",
                        lambda *size: figures_made.append(real(*size)) or figures_made[-1])
    analysis_figures.attention(tmp_path / "a.png", record, "swin", imgs / 255)
    image, head = [axis.images[0].get_extent() for axis in figures_made[0][0].axes[:2]]
    assert image == [0, 40, 40, 0] and head == [0, side * cell, side * cell, 0]


def test_kernels(call, tmp_path):
    analyse(call, "kernels", "--checkpoints", "torchvision:convnext_tiny", "random", "--img_size", 64, out=tmp_path)
    record = record_of(tmp_path, "kernels")
    assert all("7x7" in layer for layer in record["layers"]["random"].values())
    for rows in record["kernels"].values():
        assert [len(seeds[0]) for seeds in rows["random"].values()] == [16, 16, 32, 64, 96]  # channels
    assert (tmp_path / "kernels.png").exists()


def test_torchvisions_weights_are_not_fetched(call, folder, tmp_path, monkeypatch):
    """Without a file, weights are random, and every name says so."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "nowhere"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    done = analyse(call, "kl", "--checkpoints", "torchvision:vit_b_32", "random", "--img_size", 32, "--data", folder,
                   "--images", 2, out=tmp_path)
    assert "has random weights here" in done.out and "nothing is downloaded" in done.out
    assert list(record_of(tmp_path, "kl")["heads"]) == ["torchvision:vit_b_32 (random weights)", "random"]


def test_curves(call, tmp_path):
    logs = {"mae": [{"step": 10, "loss": 2.0, "images_per_s": 5}, {"step": 20, "loss": 1.0},
                    {"step": 20, "knn_top1": 30.0}], "ft": [{"step": 7, "loss": 0.5, "top1": 60.0}]}
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "ft" / "result.json").write_text('{"top1": 61.5}')
    done = analyse(call, "curves", "--runs", tmp_path / "mae", f"tuned={tmp_path / 'ft'}", out=tmp_path)
    record = record_of(tmp_path, "curves")
    assert record["curves"]["loss"] == {"mae": [[10, 2.0], [20, 1.0]], "tuned": [[7, 0.5]]}
    table = (tmp_path / "curves.md").read_text()
    assert "| mae | 1.00 | 30.0 | 5.00 |" in table and "| tuned | 0.500 |" in table and "61.5" in table
    assert table.strip() in done.out


def test_runs_of_one_name_are_told_apart(call, encoders, folder, tmp_path):
    """As seeds are, and folders such as a/mae and b/mae; a path with = is a path."""
    runs = [tmp_path / "a" / "mae", tmp_path / "b" / "mae", tmp_path / "lr=1"]
    for i, path in enumerate(runs):
        path.mkdir(parents=True)
        (path / "log.jsonl").write_text(json.dumps({"step": 10, "loss": i}))
        (path / "encoder.pt").write_bytes(encoders["vit"].read_bytes())
    analyse(call, "curves", "--runs", *runs, f"MAE={runs[2]}", out=tmp_path / "out")
    assert record_of(tmp_path / "out", "curves")["curves"]["loss"] == {
        "mae": [[10, 0]], "mae (2)": [[10, 1]], "lr=1": [[10, 2]], "MAE": [[10, 2]]}
    seeds = [f"MAE={path / 'encoder.pt'}" for path in runs]
    analyse(call, "all", "--checkpoints", *seeds, "--data", folder, "--images", 4, "--size", 48, "--masks", 1,
            out=tmp_path / "all")
    assert record_of(tmp_path / "all", "curves")["curves"]["loss"] == {
        "MAE": [[10, 0]], "MAE (2)": [[10, 1]], "MAE (3)": [[10, 2]]}


def test_drop(call, encoders, made_up, tmp_path):
    """Through the queue: an edited encoder, then one fine-tuning for each task; the numbers by seed."""
    words = ["--seeds", "0 1", "--drops", "0 2", "--shuffled", 2, "--jobs", 1]
    own = tmp_path / "vit" / "own.pt"
    own.parent.mkdir()
    torch.save({**torch.load(encoders["vit"]), "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}, own)
    done = analyse(call, "drop", "--checkpoints", own, "random", *words, out=tmp_path / "out")
    record = record_of(tmp_path / "out", "drop")
    assert list(record["results"]) == ["classification: top-1, per cent", "segmentation: mIoU, per cent",
                                       "depth: RMSE, metres (less is better)", "keypoints: PCK, per cent"]
    for rows in record["results"].values():
        assert list(rows) == ["vit", "random"]
        assert list(rows["vit"]) == ["0 dropped", "2 dropped", "2 dropped, rest shuffled"]
        assert all(len(values) == 2 and None not in values for cells in rows.values() for values in cells.values())
    commands = made_up()
    assert sum("tools.convert" in command for command in commands) == 2 * 2 * 2
    assert sum("--shuffle_layers" in command for command in commands) == 2 * 2
    assert sum("--task depth" in command for command in commands) == 2 * 2 * 3
    [edited] = [command for command in commands if "finetune" in command and "vit_2_shuffled_seed1" in command]
    assert "runs/vit_2_shuffled_seed1/encoder.pt" in edited and "--seed 1" in edited
    assert (tmp_path / "out" / "drop.png").exists() and "| depth" in done.out
    saved = checkpoint.read(tmp_path / "out" / "runs" / "random_0.pt")
    assert saved["arch"]["model"] == "vit_tiny"
    assert saved["mean"] == [0.1, 0.2, 0.3] and saved["std"] == [0.5, 0.6, 0.7] and "value_range" not in saved


def test_hog(call, folder, tmp_path):
    analyse(call, "hog", "--data", folder, "--size", 48, "--images", 4, out=tmp_path / "new")
    record = record_of(tmp_path / "new", "hog")
    assert (tmp_path / "new" / "hog.png").exists() and record["images"] == 4 and record["sizes"] == [32]
    assert str(folder) not in json.dumps(record)
    assert len(record["results"]["SSIM of pictures, 32 px"]) == 16


# What is refused


def fails(call, *words):
    done = call(analyze.main, list(words))
    assert done.code == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err, done.err
    return done.err


def test_a_network_without_attention(call, folder, tmp_path):
    words = ["--checkpoints", "torchvision:convnext_tiny", "--img_size", 32, "--data", folder, "--out", tmp_path]
    for name in ("distance", "attention"):
        assert "no attention" in fails(call, name, *words)


def test_networks_that_do_not_fit_together(call, encoders, folder, tmp_path):
    """Another size, unless --img_size makes them fit; other channels; equal names; random alone."""
    words = ["--data", folder, "--images", 4, "--out", tmp_path]
    vit = encoders["vit"]
    assert "--img_size" in fails(call, "kl", "--checkpoints", vit, encoders["large"], *words)
    analyse(call, "kl", "--checkpoints", vit, encoders["large"], "--img_size", 16, *words[:-2], out=tmp_path)
    assert "1 channels" in fails(call, "kl", "--checkpoints", vit, encoders["grey"], *words)
    copy = tmp_path / "vit" / "encoder.pt"
    copy.parent.mkdir()
    copy.write_bytes(vit.read_bytes())
    assert "two checkpoints are called vit" in fails(call, "kl", "--checkpoints", vit, copy, *words)
    assert "name another one first" in fails(call, "kl", "--checkpoints", "random", *words)
    assert "no checkpoint at" in fails(call, "kl", "--checkpoints", tmp_path / "none.pt", *words)
    assert "does not divide" in fails(call, "kl", "--checkpoints", vit, "--img_size", 18, *words)


def test_too_few_images(call, encoders, folder, tmp_path):
    words = ["--checkpoints", encoders["vit"], "--data", folder, "--out", tmp_path]
    assert "needs 4" in fails(call, "cka", *words, "--images", 1)
    assert "needs 2" in fails(call, "spectrum", *words, "--batch_size", 1)
    assert "--images must be 1 or more" in fails(call, "kl", *words, "--images", 0)


def test_images_of_several_sizes_and_broken_ones(call, encoders, tmp_path):
    """Sizes may differ: all are cropped. A broken file is named; too many of them, and there is nothing to see."""
    for i, size in enumerate([(16, 16), (40, 24), (20, 90)]):
        paint(tmp_path / "images" / f"{i}.png", i, size)
    words = ["--checkpoints", encoders["vit"], "--data", tmp_path / "images", "--out", tmp_path / "out"]
    analyse(call, "kl", *words[:-2], out=tmp_path / "out")
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    done = call(analyze.main, ["kl", *words])
    assert done.code == 0 and "left out a broken image" in done.err and "2.png" in done.err
    assert record_of(tmp_path / "out", "kl")["about"]["images"] == 2
    analyse(call, "hog", "--data", tmp_path / "images", "--size", 48, out=tmp_path / "out")
    assert record_of(tmp_path / "out", "hog")["images"] == 2
    analyse(call, "attention", *words[:-2], out=tmp_path / "out")
    assert record_of(tmp_path / "out", "attention")["about"]["images"] in (1, 2)
    assert "images: 2" in (tmp_path / "out" / "index.html").read_text()
    paint(tmp_path / "four" / "0.png", 0)
    paint(tmp_path / "four" / "1.png", 1)
    paint(tmp_path / "four" / "2.png", 2)
    (tmp_path / "four" / "3.png").write_bytes(b"no picture")
    done = call(analyze.main, ["cka", *words[:2], "--data", tmp_path / "four", "--out", tmp_path / "out"])
    assert done.code == 2 and "no batch has 4 whole ones" in done.err.splitlines()[-1]
    for i in range(2):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"no picture")
    done = call(analyze.main, ["kl", *words])
    assert done.code == 2 and "3 of 3 images are broken" in done.err.splitlines()[-1]
    assert "/no/such" in fails(call, "kl", "--checkpoints", encoders["vit"], "--data", "/no/such", "--out", tmp_path)


def test_a_map_of_one_place(call, folder, tmp_path):
    """It has no frequencies, and all the rest is made."""
    torch.manual_seed(0)
    encoder = models.build("vit_tiny", (16, 16), 16)
    checkpoint.write(tmp_path / "one.pt", {"arch": config.to_plain(encoder.arch), "model": encoder.state_dict(),
                                           "method": "MAE", "step": 3})
    words = ["--checkpoints", tmp_path / "one.pt", "--data", folder, "--images", 4]
    assert "a map of one place" in fails(call, "frequency", *words, "--out", tmp_path)
    done = analyse(call, "all", *words, "--size", 48, "--masks", 1, out=tmp_path)
    assert "left out: frequency: a map of one place" in done.out and (tmp_path / "spectrum.png").exists()


@pytest.mark.parametrize("content,said", [("{", "kl.json is no JSON"), ("[]", "kl.json is none of analyze.py")])
def test_a_damaged_file_beside_is_named(content, said, call, tmp_path):
    (tmp_path / "kl.json").write_text(content)
    assert said in fails(call, "avgdist", "--masks", 1, "--out", tmp_path)


def test_names_are_drawn_as_they_are(call, encoders, folder, tmp_path, monkeypatch):
    """matplotlib would take $\\foo$ for a formula, and leave _ours out of a legend."""
    texts = []
    real = analysis_figures.figures.new_figure

    def new_figure(*size):
        figure, save = real(*size)

        def save_and_read(path):
            save(path)
            legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
            texts.extend(text.get_text() for legend in legends for text in legend.get_texts())
        return figure, save_and_read

    monkeypatch.setattr(analysis_figures.figures, "new_figure", new_figure)
    named = [f"$\\foo$={encoders['vit']}", f"_ours={encoders['other']}"]
    for name in ("kl", "cka", "spectrum", "frequency", "attention"):
        analyse(call, name, "--checkpoints", *named, "--data", folder, "--images", 4, out=tmp_path)
    assert texts.count(" _ours") == 2 and texts.count("\\$\\foo\\$") == 2


@pytest.mark.parametrize("words", [["--size", 100], ["--size", 16], ["--size", 0]])
def test_sizes_that_make_no_measure(words, call, folder, tmp_path):
    assert "--size takes a multiple of 16" in fails(call, "hog", "--data", folder, "--out", tmp_path, *words)


def test_other_nonsense(call, encoders, folder, tmp_path):
    out = ["--out", tmp_path]
    vit = ["--checkpoints", encoders["vit"], "--data", folder]
    for layer in (7, -1):
        assert f"--layer {layer}: vit has 4" in fails(call, "attention", *vit, "--layer", layer, *out)
    assert "--queries" in fails(call, "attention", *vit, "--queries", "3,99", *out)
    assert "--mask_size 40x40 must be divisible by 2 x --unit" in fails(call, "avgdist", "--mask_size", 40, *out)
    assert "--unit must be 1 or more" in fails(call, "avgdist", "--unit", 0, *out)
    assert "--unit must be 1 or more" in fails(call, "avgdist", "--unit", -16, *out)
    assert "--masks must be 1 or more" in fails(call, "avgdist", "--masks", 0, *out)
    assert "--mask_size 100x100" in fails(call, "all", *vit, "--mask_size", 100, *out)
    assert not list(tmp_path.glob("*.json"))  # said ahead of what takes long
    assert "invalid choice: 'foo'" in call(analyze.main, ["kl", *vit, "--split", "foo", *out]).err
    assert "log.jsonl" in fails(call, "curves", "--runs", tmp_path, *out)
    for text, said in (("", "nothing to draw"), ("[1]", "without a step"), ("[", "no log of a run")):
        (tmp_path / "log.jsonl").write_text(text)
        assert said in fails(call, "curves", "--runs", tmp_path, *out)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 1}')
    (tmp_path / "result.json").write_text("[" * 100_000)
    assert "result.json is no JSON" in fails(call, "curves", "--runs", tmp_path, *out)
    for option, said in (("--tasks", "--tasks is empty"), ("--seeds", "--seeds is empty"),
                         ("--drops", "--drops is empty")):
        assert said in fails(call, "drop", *vit[:2], option, "", *out)
    assert "keypoints, not foo" in fails(call, "drop", *vit[:2], "--tasks", "depth foo", *out)
    assert "none of" in fails(call, "kernels", "--checkpoints", encoders["vit"], *out)
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in fails(call, "kl", *vit, "--device", "cuda", *out)
    assert "drop knows ViT" in fails(call, "drop", "--checkpoints", "torchvision:convnext_tiny", *out)
