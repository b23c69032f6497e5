"""The tables of a results/gpu_NAME.json, as `python -m tools.tables print` prints them."""

from tools import bench, runner

PAIRS = [  # (A, B, what is published of B / A)
    ("MAE ViT-L", "MAE ViT-L, mask tokens in encoder", "time 2.8, FLOPs 3.3 (MAE, Tables 1c, 2)"),
    *bench.PAIRS["ratios"],
    *[(theirs, ours, "") for ours, theirs, _ in bench.PAIRS["yardstick"]],
    ("timm:vit_base_patch16_224 224", "fine-tuning ViT-B", ""),
    ("timm:vit_base_patch16_224 224", "MAE ViT-B", "")]


def table(record):
    """Markdown: the machine, what was checked, memory of recipes, speed, ratios, CIFAR-10; what there is of these."""
    results, machine = record["results"], record["machine"]
    gpu = found(results, "machine", "machine").get("GPU", {}).get("name", "no GPU")
    parts = [f"{gpu}, torch {machine['torch']}, commit {record['commit']}, {record['date']}"]
    for title, rows in {"machine": flat(results, "machine"), "check": checks(results),
                        "recipe": flat(results, "memory"), "training step, bf16": speed(results),
                        "B / A": ratios(results), "CIFAR-10": flat(results, "cifar")}.items():
        if rows:
            parts.append(runner.markdown(title, rows))
    if not_ended := unfinished(results):
        parts.append(runner.markdown("step that did not end", not_ended))
    return "\n\n".join(parts)


def found(results, group, name):
    return results.get(group, {}).get(name, {}).get("found", {})


def text(value):
    """A cell: yes or no, or a number with three digits, or what there is."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return runner.number(value) if abs(value) >= 0.001 else f"{value:.1e}"
    if isinstance(value, list):
        return " ".join(text(number) for number in value)
    return "" if value is None else " ".join(str(value).split()).replace("|", "/")


def texts(row):
    return {name: text(value) for name, value in row.items()}


def flat(results, group):
    """{part: its numbers} of all steps of a group."""
    steps = results.get(group, {}).values()
    return {part: texts(row) for step in steps for part, row in step["found"].items()}


def checks(results):
    """Of a script in a row: is every part as it should be? With the largest difference that was found."""
    rows = {}
    for group in ("smoke", "faults"):
        for name, step in results.get(group, {}).items():
            for part, row in step["found"].items():
                details = [f"{key}: {text(value)}" for key, value in row.items() if key != "ok"]
                rows[f"{name}: {part}"] = {"as it should be": text(row["ok"]), "found": ", ".join(details)}
    return rows


def speed(results):
    rows = {}
    for name, step in results.get("speed", {}).items():
        for how, row in step["found"].items():
            rows[f"{name}, {how}"] = texts({key: value for key, value in row.items() if key != "ok"})
    return rows


def ratios(results):
    """Time and memory of one setting over those of another, at an equal number of images; of what was measured."""
    rows = {}
    for a, b, published in PAIRS:
        for how in ("eager", "compiled"):
            first, second = (found(results, "speed", name).get(how) for name in (a, b))
            if first and second:
                cells = {"time": text(second["ms a step"] / first["ms a step"])}
                if first["peak GB"]:
                    cells["memory"] = text(second["peak GB"] / first["peak GB"])
                rows[f"{b} / {a}, {how}"] = {**cells, "published": published}
    return rows


def unfinished(results):
    return {f"{group}: {name}": {"how": step["ended"]} for group, steps in results.items()
            for name, step in steps.items() if step["ended"] != "ended"}
