"""What the documents name exists: links, commands, files, flags, names of the code, the tree of README.md."""

import functools
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.runs import ROOT

from cli.command_line import REMOVED, FlagParser
from cli.inherited_flags import REFUSED

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "zo/*.md", "bench/*.md", "research/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# A changelog and tables of measurements may name what has been removed.
REMOVED_FILES = {"bench/growth.py", "bench/memory.py", "bench/precision.py", "bench/scale.py"}
CHANGELOG = ROOT / "CHANGELOG.md"

# Flags of other programs that the documents use.
FOREIGN_FLAGS = {
    "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "max-restarts",  # torchrun
    "ntasks-per-node",  # srun
}  # fmt: skip
# Names in the documents that are no names of this code.
FOREIGN_NAMES = {
    "large_models", "zo_step", "zo_perturb_parameters", "zo_update", "forward_wrap_with_option_len",
    "write_metrics_to_file",  # MeZO's
    "FakeTensorMode",  # torch's
}  # fmt: skip


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_of(path: Path) -> list[str]:
    """Return what stands in backticks or in code blocks of a document."""
    text = text_of(path)
    blocks = re.findall(r"^```.*?^```", text, re.S | re.M)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [*blocks, *re.findall(r"`([^`\n]+)`", text)]


@functools.cache
def source() -> str:
    """Return the text of all Python files and scripts, which holds every name of the code."""
    paths = [
        p for p in ROOT.rglob("*.py") if not {".venv", "starter", "result"} & set(p.relative_to(ROOT).parts)
    ]
    paths = [p for p in paths if p != Path(__file__)]
    return "\n".join(
        text_of(p) for p in [*paths, *ROOT.glob("*.sh"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    )


@functools.cache
def known_flags() -> set[str]:
    """Return every flag that a document may name, without dashes in front."""
    of_programs = re.findall(r"add_argument\(\s*\"--([\w-]+)\"", source())
    return {*FlagParser().names, *REFUSED, *REMOVED, *of_programs, *FOREIGN_FLAGS, "help", "config"}


def ignored_by_git(name: str) -> bool:
    patterns = (ROOT / ".gitignore").read_text().split()
    return name.startswith(".") or any(fnmatch(name, pattern.strip("/")) for pattern in patterns)


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_and_images_point_to_files(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(file), re.M)
            slugs = {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }
            assert anchor in slugs, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_start_files_that_exist(path):
    code = "\n".join(code_of(path))
    for name in re.findall(
        r"(?:python|bash|torchrun)(?: -[a-z])?(?: --\S+ \S+)* ([\w/]+\.(?:py|sh))\b", code
    ):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"python3? -m ([\w.]+)", code):
        assert name in ("venv", "pytest") or (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for name in re.findall(r"(?:^|[`\n])make ([\w-]+)", text_of(path)):
        assert name in targets, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_files_that_are_named_exist(path):
    """Of names with a folder, such as `zo/methods.py`; the changelog names what has moved too."""
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not ignored_by_git(p.name)}
    names = re.findall(r"(?<![\w/.-])([\w-]+(?:/[\w-]+)+\.(?:py|sh|md|toml|txt|png))\b", text_of(path))
    for name in names:
        if name.split("/")[0] in folders and name not in REMOVED_FILES:
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_top_level_modules_that_are_named_exist(path):
    if path == CHANGELOG:
        return
    places = {p.name for p in ROOT.rglob("*.py") if ".venv" not in p.parts}
    allowed = {"file.py"} | ({"metrics.py"} if path.name == "XGBLORA_CHANGES_SUMMARY.md" else set())
    for name in re.findall(r"`([a-z_]+\.py)\b", text_of(path)):
        assert name in places | allowed, name


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_flags_exist(path):
    code = "\n".join(code_of(path))
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code):
        assert flag in known_flags(), f"--{flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_names_of_the_code_exist(path):
    """Words in backticks that look like names have an underscore, CamelCase or capitals, or are called."""
    if path == CHANGELOG or path.parent.name == "data":
        return
    text = re.sub(r"^```.*?^```", "", text_of(path), flags=re.S | re.M)
    words = set(re.findall(r"\w+", source()))
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.search(r"[\s/<>{}=…$-]", code.replace("(…)", "")):
            continue  # commands, paths, formulas
        for name in re.findall(
            r"\b(?:[A-Za-z]\w*_\w+\b(?!\.py)|[A-Z][a-z]+[A-Z]\w*|[A-Z]{5,}\b|\w+(?=\())", code
        ):
            assert name in words or name in FOREIGN_NAMES, name


def test_the_tree_of_the_readme_is_the_top_level():
    tree = next(block for block in code_of(ROOT / "README.md") if "\nrun.py " in block)
    lines = tree.splitlines()[1:-1]
    names = [name.strip() for line in lines for name in re.split(r"\s{2,}", line)[0].split(",")]
    entries = {p.name + "/" * p.is_dir() for p in ROOT.iterdir() if not ignored_by_git(p.name)}
    assert len(names) == len(set(names)) and set(names) == entries - {"README.md"}


def test_the_engine_of_the_readme_is_that_of_its_package():
    python = r"```python\n(.*?)```"
    engine = next(
        block for block in re.findall(python, text_of(ROOT / "README.md"), re.S) if "ZerothOrder" in block
    )
    assert engine in re.findall(python, text_of(ROOT / "zo" / "README.md"), re.S)
