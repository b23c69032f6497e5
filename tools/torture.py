"""What a run must survive, tried many times: kills at random moments, damaged images, hostile files.

    python -m tools.torture                             # or: make torture; at most 20 minutes on two slow cores
    python -m tools.torture --only "lut; --out" --minutes 2

Every row is tried some times and counts how often the project held: "held 12 of 12". Runs are those of the command
line, on images of 16 pixels, in processes of their own; what is random comes from --seed. Fewer --minutes try less.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import checkpoint, config
from tools import hostile, runner, trials
from tools.torture_runs import (
    SCRIPTS,
    Broke,
    Place,
    content,
    require_end,
    require_log,
    require_one_line,
    require_same,
    write_images,
)

# ---------------------------------------- Rows: one trial, `i` of those of its row

def killed(place, draw, i, script):
    """SIGKILL at any moment of a run, or in the midst of a save, once or twice, and then --resume."""
    (whole, seconds), out = place.undisturbed(script), place.new(f"killed {script}")
    for _ in range(draw.choice([1, 1, 2])):
        process = trials.fork(*place.words(script, out, "--resume"))
        time.sleep(draw.uniform(0, seconds))
        late = time.monotonic() + seconds
        while i % 2 and not list(out.glob("last.pt*.tmp")) and time.monotonic() < late:
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(60)
        with contextlib.redirect_stdout(None):
            checkpoint.read_newest(out / "last.pt")  # ValueError if neither it nor the one before is whole
    require_end(trials.fork(*place.words(script, out, "--resume")))
    require_same(out, whole)


def worker_killed(place, draw, i):
    """An image-loading process is killed: the run ends within ten seconds, with one line."""
    script = draw.choice(["mae.py", "lut.py", "finetune.py", "-m tools.dense"])
    words = place.words(script, place.new("worker"), "--workers", 2, "--save_epochs", 1000, epochs=3000)
    process = trials.fork(*words)
    trials.wait_for(process, f"step {draw.randint(1, 9)}/")
    [run] = trials.children(process.pid)
    workers = trials.children(run)
    os.kill(draw.choice(workers), signal.SIGKILL)
    begin = time.monotonic()
    require_one_line(process, "an image-loading process was killed")
    if time.monotonic() - begin > 10 or not trials.ended_within(2, workers):
        raise Broke(f"{script} took {time.monotonic() - begin:.0f} s to end")


def rank_killed(place, draw, i):
    """One of two processes is killed: with --max-restarts torchrun starts both again, and they go on."""
    out = place.new("restarted")
    words = place.words("mae.py", out, "--resume", "--max_steps", 40, epochs=3000)
    process = trials.start(*trials.torchrun(2, "--max-restarts", 2, *words))
    trials.wait_for(process, f"step {draw.randint(2, 12)}/")
    os.kill(draw.choice(trials.children(process.pid)), signal.SIGKILL)
    code, _, err = trials.finish(process)
    require_log(out, 40)
    if code:
        raise Broke(f"exit code {code}: {err.strip()[-300:]}")


def torchrun_killed(place, draw, i):
    """torchrun is killed: its two processes save, and end within 20 seconds."""
    out, step = place.new("torchrun"), draw.randint(2, 12)
    process = trials.start(*trials.torchrun(2, *place.words("mae.py", out, "--save_epochs", 1000, epochs=3000)))
    trials.wait_for(process, f"step {step}/")
    ranks = trials.children(process.pid)
    process.kill()
    if not trials.ended_within(20, ranks):
        for rank in trials.alive(ranks):
            os.kill(rank, signal.SIGKILL)
        raise Broke("a process went on")
    process.communicate(timeout=60)
    if checkpoint.read(out / "last.pt")["step"] < step:
        raise Broke("it was not saved")


def two_runs(place, draw, i):
    """A second run in the --out of one is refused; the first one ends as if it were alone."""
    (whole, _), out = place.undisturbed("mae.py"), place.new("shared")
    first = trials.fork(*place.words("mae.py", out))
    trials.wait_for(first, "step 1/")
    second = [(), ("--resume",), ("--overwrite",)][i % 3]
    require_one_line(trials.fork(*place.words("mae.py", out, *second)), "is in use by another run")
    require_end(first)
    require_same(out, whole)


def damaged_images(place, draw, i):
    """Of 1,000 images 500 are damaged: each is named, once, and no other; and by default a run refuses so many."""
    root, out = place.new("damaged"), place.new("on damaged")
    write_images(root / "val", 8)
    broken = draw.sample(write_images(root / "train", 1000), 500)
    for path in broken:
        hostile.damage_image(path, draw)
    options = ["--data", root, "--batch_size", 40, "--micro_batch", 40, "--save_epochs", 1000]
    words = [["-m", "tools.check_images", root], place.words("mae.py", out, *options, "--max_bad", 1, epochs=1),
             place.words("finetune.py", out, *options, "--max_bad", 1, epochs=1), place.words("mae.py", out, *options)]
    code, output, err = trials.finish(trials.fork(*words[i % 4]))
    if i % 4 == 3:
        is_held = code == 2 and re.search(r"^error: \d+ of 1000 images are broken so far", err, re.M)
    else:
        found = sorted(re.findall(r"train/class\d/\d+\.png(?=: [A-Z])", output + err))
        is_held = code == (0 if i % 4 else 1) and found == sorted(str(path.relative_to(root)) for path in broken)
    if not is_held:
        raise Broke(f"exit code {code}: {err.strip()[-300:]}")


def hostile_file(place, draw, i):
    """A file made to harm ends in one line, soon, and nothing in it is executed."""
    kind, name = hostile.ALL[i % len(hostile.ALL)]
    out, mark = place.new("hostile"), place.new("executed")
    script = "mae.py" if kind == "last.pt" else "finetune.py"
    whole = place.undisturbed(script)[0]
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("previous.*"))
    path = {"--config": out / "config.yaml", "image": out / "a.png"}.get(kind, out / kind)
    if kind == "image":
        shutil.copy(next((place.images / "train").rglob("*.png")), path)
    path = hostile.KINDS[kind][name](path, mark, draw) or path
    words = {"last.pt": place.words(script, out, "--resume"),
             "encoder.pt": ["-m", "tools.show", place.images / "train/class0/000.png", "--init", path],
             "result.json": ["-m", "tools.show", "--confusion", path],
             "image": ["-m", "tools.show", path, "--init", out / "encoder.pt"],
             "--config": place.words(script, place.new("from hostile"), "--config", path)}[kind]
    process = trials.fork(*words)
    try:
        require_one_line(process, seconds=20)
    except Broke as error:
        # A flipped bit may lie where nothing is stored, or make another picture that is whole.
        is_whole = name.startswith("flip") and process.returncode == 0 and (kind != "last.pt" or content(path))
        if not is_whole:
            raise Broke(f"{kind}, {name}: {error}") from error
    if mark.exists():
        raise Broke(f"{kind}, {name}: it was executed")


ROWS = {  # name: (trial, how many in 20 minutes)
    **{f"SIGKILL of {script}": (functools.partial(killed, script=script), 12) for script in SCRIPTS},
    "SIGKILL of an image-loading process": (worker_killed, 12),
    "SIGKILL of one of two processes, --max-restarts": (rank_killed, 3),
    "SIGKILL of torchrun": (torchrun_killed, 3),
    "two runs in one --out": (two_runs, 9),
    "500 of 1,000 images damaged": (damaged_images, 4),
    "hostile files": (hostile_file, len(hostile.ALL))}


# ---------------------------------------- Command line

def try_row(place, name, trial, times, seed, late):
    """{"held", "of", "seconds", "broke": what was said of the others} of a row."""
    begin, held, broke = time.monotonic(), 0, []
    for i in range(times):
        if time.monotonic() > late:
            break
        try:
            trial(place, random.Random(f"{seed} {name} {i}"), i)
            held += 1
        except (Broke, AssertionError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            broke.append(f"trial {i}: {error}".replace(f"{place.out}{os.sep}", ""))
    return {"held": held, "of": held + len(broke), "seconds": round(time.monotonic() - begin), "broke": broke,
            "commit": config.git_commit()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything; fewer try less often")
    parser.add_argument("--only", default="", help="rows whose names hold one of these words, separated by ;")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/torture/torture.json"), help="file of the numbers")
    parser.add_argument("--out", type=Path, default=Path("runs/torture"), help="folder of what is tried")
    args = parser.parse_args(argv)
    wanted = [word.strip() for word in args.only.split(";")]
    rows = {name: row for name, row in ROWS.items() if any(word in name for word in wanted)}
    if not rows:
        config.fail(f"--only {args.only}: no row is called so; there are {'; '.join(ROWS)}")

    path, late = args.json.resolve(), time.monotonic() + 60 * args.minutes
    command = f"python -m tools.torture {shlex.join(map(str, sys.argv[1:] if argv is None else argv))}".strip()
    before = json.loads(path.read_text()) if path.exists() and args.only else {"commands": [], "rows": {}}
    found = before["rows"]
    place = Place((args.out / "tried").resolve())
    for name, (trial, times) in rows.items():
        found[name] = try_row(place, name, trial, max(1, round(times * args.minutes / 20)), args.seed, late)
        ordered = {name: found[name] for name in ROWS if name in found}
        table = {name: {"held": f"{row['held']} of {row['of']}"} for name, row in ordered.items()}
        record = runner.new_record("torture", [*before["commands"], command], [args.seed], rows=ordered,
                                   results={"what is tried": table})
        runner.write(path, record)
        print(f"{found[name]['seconds']:5.0f} s  {name}: held {table[name]['held']}", *found[name]["broke"],
              sep="\n           ", flush=True)
    shutil.rmtree(place.out)
    config.print_once(f"\nnumbers  {args.json}")
    if any(row["broke"] for row in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
