"""README and documents: every command, path, key, module and link in them is there, and what can be run runs.

pytest tests/test_documentation.py
"""

import argparse
import ast
import fnmatch
import importlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from conftest import DEVICE, PYTHON, ROOT, TINY, jpeg, run_main
from PIL import Image
from sklearn.datasets import load_digits

import config
import models
from models.files import load_checkpoint
from tools.model_table import measure, memory

FOLLOWED = ROOT / "docs" / "new_kernel.md"  # tests/test_new_kernel.py does what it says
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += [page for page in sorted(ROOT.glob("docs/*.md")) if page != FOLLOWED]
OPERATIONS = sorted(ROOT.glob("models/ops/*/README.md"))
LINKED = [*PAGES, FOLLOWED, ROOT / "CHANGELOG.md", *OPERATIONS]

# Commands that are checked, but not run here: a pattern of them, and why.
NOT_RUN = {
    "git clone *": "needs the network",
    "cd polaformer": "follows it",
    "pip install *": "installs packages",
    "head *": "of the shell",
    "*make *": "minutes, or a test of its own",
    "python -m pytest *": "tests of their own",
    "*IMAGENET*": "needs ImageNet",
    "*pretrain.sh*": "trains for minutes; tests/test_quickstart.py and tests/test_survival.py run it",
    "* sbatch *": "needs Slurm; tests/test_survival.py runs the job with stand-ins",
    "*--data-path OUTPUT*": "needs what the command before it writes",
    "*photos.yaml --eval*": "needs the training before it; tests/test_own_images.py follows the page",
    "*--pretrained FILE.pth*": "trains for hours",
    "*--throughput*": "a large model, for the time that measuring takes",
    "*tools.prepare_imagenet*": "needs ImageNet; tests/test_prepare_imagenet.py",
    "*tools/prepare_lra.py*": "minutes, or files of others; tests/test_prepare_lra.py",
    "*configs/lra/*": "needs a prepared task; tests/test_lra.py",
    "*experiments/lra/run.sh*": "hours; tests/test_lra_runs.py",
    "*experiments.ablation*": "needs the runs; tests/test_ablation.py",
    "python -m benchmarks.*": "minutes; tests/test_benchmarks.py",
    "*--device cuda*": "needs a GPU",
    "*.ops.polarity_attention": "runs a compiler; tests/test_native.py",
    "*tools.model_table": "the test of the tables counts every model",
    "*tools.readme_picture": "trains for minutes and needs scikit-image",
}
EXIT_CODES = {"*--format onx*": 2, "*notes.png*": 1}  # of commands that show a mistake
WITHOUT_PARSER = ("tools.model_table", "models.ops.polarity_attention")


PROGRAMS = ("python", "torchrun", "bash", "sbatch", "make", "pip")


@dataclass(frozen=True)
class Command:
    """One command of a document, as it stands there: settings before it, and its words."""

    page: str
    text: str
    settings: tuple[tuple[str, str], ...]
    words: tuple[str, ...]


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield text


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands_in(page: Path) -> Iterator[Command]:
    """Those in blocks for a shell, and those that the text names."""
    lines = [line for text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    lines += [line[2:] for text in blocks(page, "console") for line in text.splitlines() if line.startswith("$ ")]
    lines += re.findall(rf"`((?:[A-Z]+=\S+ )*(?:{'|'.join(PROGRAMS)}) [^`\n]+)`", prose(page))
    for line in lines:
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            part, words = words[:end], words[end + 1 :]
            named = next((i for i, word in enumerate(part) if not re.match(r"[A-Z_]+=", word)), len(part))
            settings = tuple((name, value) for name, _, value in (word.partition("=") for word in part[:named]))
            yield Command(page.relative_to(ROOT).as_posix(), " ".join(part), settings, tuple(part[named:]))


COMMANDS = list({command.text: command for page in PAGES for command in commands_in(page)}.values())


def matching(text: str, patterns: dict) -> list[str]:
    return [pattern for pattern in patterns if fnmatch.fnmatchcase(text, pattern)]


RUN = [command for command in COMMANDS if not matching(command.text, NOT_RUN)]
assert all(command.words[0] == "python" for command in RUN), "other programs would do more than tests may"


def ids(command: Command) -> str:
    return f"{Path(command.page).stem}: {command.text}"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A folder that is the repository by links, and holds what the documents say that a user has."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("output", ".git", ".venv"):
            (folder / entry.name).symlink_to(entry)
    runs = folder / "output" / "quickstart"
    (runs / "20260131-120000").mkdir(parents=True)
    (runs / "latest").symlink_to("20260131-120000")
    for name in ("FILE.pth", "output/quickstart/latest/max_acc.pth"):
        (folder / name).write_bytes(b"")
    (runs / "latest" / "config.yaml").write_text(TINY)
    (folder / "photos.yaml").write_text(next(blocks(ROOT / "docs" / "own_images.md", "yaml")))
    for name in ("output/photos/default/max_acc.pth", "PHOTOS/cat/a.jpg", "PHOTOS/dog/a.jpg"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(jpeg(len(name) + ord(name[7])) if name.endswith("jpg") else b"")
    for split in ("IMAGENET/val", "IMAGENET_R", "PHOTOS", "photos", "lra/listops"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            number = len(list(folder.rglob("*.jpg")))
            (folder / split / label / f"{number}.jpg").write_bytes(jpeg(number, (64, 48)))
    for name in ("photo.jpg", "cat.jpg"):
        (folder / name).write_bytes(jpeg(len(name)))
    digits = load_digits().images[5].clip(0, 15) * 16
    for name in ("digit5.png", "three.png", "eight.png", "digits/val/0/1002.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.astype("uint8")).resize((32, 32)).save(folder / name)
    (folder / "notes.png").write_text("no image")
    return folder


@pytest.fixture(scope="session")
def trained(checkout) -> Path:
    """The checkout with a model of a few thousand parameters where the quickstart leaves its own."""
    run = checkout / "output" / "quickstart" / "latest"
    shutil.rmtree(run.resolve())
    path = checkout / "tiny.yaml"
    path.write_text(
        TINY.replace("NAME: tiny", "NAME: quickstart").replace(
            "EPOCHS: 2, WARMUP_EPOCHS: 1", "EPOCHS: 1, WARMUP_EPOCHS: 0"
        )
    )
    run_main("--cfg", path, "--output", checkout / "output", "--tag", "20260131-120000")
    assert load_checkpoint(run / "max_acc.pth")["epoch"] == 1
    shutil.copy(run / "max_acc.pth", checkout / "FILE.pth")
    for name in ("pola_swin_t/a", "pola_swin_t/b", "ablation/digits", "photos/default"):
        shutil.copytree(run, checkout / "output" / name, dirs_exist_ok=True)
    return checkout


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_not_run_stands_in_the_documents():
    for pattern in (*NOT_RUN, *EXIT_CODES):
        assert any(matching(command.text, {pattern: ""}) for command in COMMANDS), f"{pattern}: no such command"
    assert len(COMMANDS) > 60 and len(RUN) > 15


@pytest.mark.parametrize("command", COMMANDS, ids=ids)
def test_a_command_names_what_there_is(command, checkout, monkeypatch):
    assert "…" not in command.text, "a command can be copied as it is"
    monkeypatch.chdir(checkout)
    program, *words = command.words
    settings = dict(command.settings)
    if program in ("python", "torchrun"):
        check_python(words, settings, command)
    elif program in ("bash", "sbatch"):
        script = next(word for word in words if "/" in word or word.endswith(".sh"))
        check_script(script, words[words.index(script) + 1 :], settings)
    elif program == "make":
        tried = subprocess.run(["make", "-n", f"PYTHON={sys.executable}", *words], capture_output=True, text=True)
        assert tried.returncode == 0, tried.stderr
    elif program == "pip":
        check_packages(words)
    else:
        assert matching(command.text, NOT_RUN), f"{program} is not a program that the documents explain"


def check_python(words: list[str], settings: dict[str, str], command: Command) -> None:
    if "main.py" in words:
        check_main(words[words.index("main.py") + 1 :])
        return
    if words[0] == "-m":
        module, arguments = words[1], words[2:]
    else:
        assert (ROOT / words[0]).is_file()
        module, arguments = words[0].removesuffix(".py").replace("/", "."), words[1:]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in arguments if not word.startswith("-"))
    elif module == "config":
        check_main(arguments)
    elif module in WITHOUT_PARSER:
        assert not arguments and importlib.util.find_spec(module)
    else:
        expected = 2 if matching(command.text, EXIT_CODES) == ["*--format onx*"] else 0
        assert parse(module, arguments) == expected


class Parsed(Exception):
    """Ends a program at the point where it has read its arguments."""


def parse(module: str, arguments: list[str]) -> int:
    """The exit code of a program that is given these arguments and stops when it has understood them."""
    patched = ExitStack()
    for method in ("parse_args", "parse_intermixed_args"):
        read = getattr(argparse.ArgumentParser, method)

        def stop(parser, *given, read=read, **named):
            parser.allow_abbrev = False  # documents write flags out
            read(parser, *given, **named)
            raise Parsed

        patched.enter_context(mock.patch.object(argparse.ArgumentParser, method, stop))
    patched.enter_context(mock.patch("sys.argv", [module, *arguments]))
    with patched:
        try:
            runpy.run_module(module, run_name="__main__")
        except Parsed:
            return 0
        except SystemExit as end:
            return int(end.code or 0)
    raise AssertionError(f"{module} reads no arguments")


def check_main(arguments: list[str]) -> None:
    """main.py's arguments: flags, keys and values, the YAML file, and the file of --resume have to be there."""
    try:
        parsed = config.parse_command_line(arguments)
    except SystemExit:
        pytest.fail(f"main.py does not accept {shlex.join(arguments)}")
    if parsed.MODEL.PRETRAINED:
        assert Path(parsed.MODEL.PRETRAINED).is_file()
    if parsed.DATA.DATA_PATH and parsed.DATA.DATASET == "imagenet":
        assert Path(parsed.DATA.DATA_PATH).is_dir() or parsed.DATA.DATA_PATH == "OUTPUT"  # which the line before makes


def check_script(script: str, arguments: list[str], settings: dict[str, str]) -> None:
    """A script reads the settings that it is given, has those that it needs, and passes its arguments to main.py."""
    text = (ROOT / script).read_text()
    read = text + (ROOT / "pretrain.sh").read_text() if script.endswith(".sbatch") else text
    for name in settings:
        assert re.search(rf"\$\{{?{name}\b", read), f"{script} does not read {name}"
    for name in re.findall(r"\$\{(\w+):\?", text):
        assert name in settings or "NNODES > 1" in text, f"{script} needs {name}"
    yaml = settings.get("CONFIG", "configs/quickstart.yaml" if "lra" not in script else "configs/lra/listops.yaml")
    flags = ["--data-path", settings["DATA"]] if "DATA" in settings and "lra" not in script else []
    check_main(["--cfg", yaml, *flags, *arguments])


def check_packages(words: list[str]) -> None:
    """What pip is told to install is a file, this folder, or named in a file of requirements."""
    known = "".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    assert words[0] == "install"
    for word in words[1:]:
        assert word in ("-r", ".") or (ROOT / word).is_file() or re.search(rf"\b{word}\b", known), word


@pytest.mark.skipif(DEVICE == "cuda", reason="pictures and graphs of tiny models: the CPU is enough")
def test_commands_without_a_data_set_run(trained):
    failed = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    for command in RUN:
        arguments = [PYTHON if word == "python" else word for word in command.words]
        result = subprocess.run(
            arguments, cwd=trained, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        expected = next((EXIT_CODES[pattern] for pattern in matching(command.text, EXIT_CODES)), 0)
        if result.returncode != expected:
            failed.append(
                f"{ids(command)}: exit code {result.returncode}\n{result.stdout[-500:]}{result.stderr[-1500:]}"
            )
    assert not failed, "\n".join(failed)


def test_make_quickstart_leaves_a_link_to_its_newest_run(tmp_path):
    for name in ("Makefile", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "pretrain.sh").write_text('mkdir -p "${OUTPUT:-output}/quickstart/$TAG"; exit "${CODE:-0}"\n')
    runs = tmp_path / "elsewhere" / "quickstart"
    (runs / "20200101-000000").mkdir(parents=True)
    (runs / "latest").symlink_to("20200101-000000")
    for code, output in (("0", "elsewhere"), ("1", "output")):  # also of a run that did not finish
        settings = {**os.environ, "CODE": code, "OUTPUT": str(tmp_path / output)}
        made = subprocess.run(["make", "quickstart", "PYTHON=python3"], cwd=tmp_path, env=settings, capture_output=True)
        assert bool(made.returncode) == (code == "1")
        link = tmp_path / output / "quickstart" / "latest"
        assert re.fullmatch(r"\d{8}-\d{6}", os.readlink(link)) and link.is_dir() and os.readlink(link) > "2020"


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------

MULTIPLY_ADDS = {"b0": "0.7", "b1": "1.0", "b2": "2.7", "b3": "5.1", "b4": "11", "b5": "18"}  # reported, in G


def rows_of_models(page: Path) -> Iterator[dict[str, str]]:
    """By heading, of the table that has multiply-adds; a configuration without its quotes."""
    table = next(part for part in page.read_text().split("\n\n") if "| multiply-adds (G) |" in part)
    header, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines())
    return (dict(zip(header, row, strict=True)) for row in rows)


ROWS = [row for page in (ROOT / "README.md", ROOT / "docs" / "models.md") for row in rows_of_models(page)]
CONFIGURATIONS = sorted(path.stem for kind in ("pola", "nalaformer") for path in ROOT.glob(f"configs/{kind}_*.yaml"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tables_of_models_say_what_is_counted(name):
    """All models take seconds together, on the meta device."""
    rows = [row for row in ROWS if row["configuration"] == name]
    assert len(rows) == (1 if name == "nalaformer_xt_8m" else 2), f"{name} is not in both tables"
    size, parameters, flops = measure(name)
    for row in rows:
        assert (row["parameters (M)"], row["multiply-adds (G)"]) == (f"{parameters:.2f}", f"{flops / 2:.2f}")
        assert row.get("image", f"{size}²") == f"{size}²"
    if name.startswith("pola_pp"):
        reported = MULTIPLY_ADDS[name[-2:]]
        assert flops / 2 == pytest.approx(float(reported), abs=0.06 if "." in reported else 0.5)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if float(row["parameters (M)"]) < 17 else pytest.mark.slow, id=row["configuration"])
        for row in rows_of_models(ROOT / "README.md")
    ],
)
def test_memory_of_an_image_is_what_is_counted(row):
    assert float(row["memory (MiB)"]) == pytest.approx(memory(row["configuration"]), rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def test_readme_is_one_short_page_for_users():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert not re.search(r"\bbars?\b", text)  # a word of ours, for what measurements are held against


def test_python_of_the_readme_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "polaformer", models)
    (text,) = blocks(ROOT / "README.md", "python")
    names: dict = {}
    exec(text, names)
    assert names["logits"].shape == (1, 10)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_in_a_document_imports_what_there_is(page):
    for text in blocks(page, "python"):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(re.sub(r"^polaformer\b", "models", node.module))
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(re.sub(r"^polaformer\b", "models", name.name))
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("polaformer", "models"):
                assert hasattr(models, node.attr), ast.unparse(node)


SUFFIXES = r"(?:py|sh|md|yaml|sbatch|txt)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_modules_and_keys_in_a_document_are_there(page):
    text = prose(page)
    sections = {key.split(".")[0] for key in config.KEYS if "." in key}
    top = {entry.name for entry in ROOT.iterdir()}
    for code in re.findall(r"`([^`\n]+)`", text):
        first = code.split()[0]
        if re.fullmatch(rf"[\w/-]+\.{SUFFIXES}", first) and first.split("/")[0] in top and "TASK" not in first:
            assert (ROOT / first).is_file(), code
        if re.fullmatch(r"[A-Z]+(\.[A-Z_]+)+", first) and first.split(".")[0] in sections:
            section = any(key.startswith(first + ".") for key in config.KEYS)
            assert first in config.KEYS or section or config.is_dead_key(first), code
        module = re.fullmatch(
            r"((?:models|data|engine|utils|tools|benchmarks|experiments)(?:\.[a-z_]+)+)(?:\(.*\))?", code
        )
        if module:
            assert resolves(module[1]), code


def resolves(dotted: str) -> bool:
    """Whether a module, or a name in one, is there."""
    with suppress(ImportError):
        importlib.import_module(dotted)
        return True
    module, _, name = dotted.rpartition(".")
    return bool(module) and hasattr(importlib.import_module(module), name)


def test_every_promise_names_a_test():
    text = (ROOT / "docs" / "reliability.md").read_text()
    promises = re.findall(r"`(test_\w+)::(\w+)`", text)
    assert len(promises) > 30
    for file, words in promises:
        assert re.search(rf"def test_\w*{words}", (ROOT / "tests" / f"{file}.py").read_text()), f"{file}::{words}"


def anchors(page: Path) -> set[str]:
    """The places of a Markdown page that a link can lead to, as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


def test_every_document_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text()))
    for page in [*PAGES[1:], FOLLOWED, *OPERATIONS]:
        assert page.relative_to(ROOT).as_posix() in linked
