"""What the documents say is so."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gemma_export.exporter.cli import app
from gemma_export.exporter.config import SIZES
from gemma_export.exporter.request import LOGITS, PARITY_LEVELS, PRECISIONS, TARGETS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
SKIPPED = {"__pycache__", "build", "dist", "bundles", "node_modules"}
CHOICES = {
    "--size": SIZES,
    "--precision": PRECISIONS,
    "--target": TARGETS,
    "--parity": PARITY_LEVELS,
    "--logits": LOGITS,
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def synopsis() -> dict[str, str]:
    """Command → what the README shows of it, over as many lines as that takes."""
    commands: dict[str, str] = {}
    (block,) = [block for block in blocks(README, "text") if block.startswith("gemma-export build")]
    name = ""
    for line in block.splitlines():
        if line.startswith("gemma-export "):
            name = line.split()[1]
            commands[name] = ""
        commands[name] += f" {line}"
    return commands


def commands() -> dict[str, Any]:
    group = get_command(app)
    assert hasattr(group, "commands")
    return dict(group.commands)


def options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts if option.startswith("-")}


def files() -> Iterator[Path]:
    """Every file that is part of the project."""
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [
            name
            for name in inner
            if name not in SKIPPED
            and (not name.startswith(".") or name == ".ci")
            and not name.endswith(".egg-info")
        ]
        # What was compiled here is not part of it.
        yield from (Path(folder) / name for name in names if not name.endswith(".so"))


def test_the_synopsis_names_every_command() -> None:
    assert set(synopsis()) == set(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_synopsis_is_what_help_says(name: str) -> None:
    line, command = synopsis()[name], commands()[name]
    assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)) == options(command)
    metavars = [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
    assert [word for word in metavars if word and word not in line.split()] == []


@pytest.mark.parametrize("option", sorted(CHOICES))
def test_the_synopsis_has_the_choices_there_are(option: str) -> None:
    found = re.search(rf"{option} ([\w|-]+)", synopsis()["build"])
    assert found is not None
    assert tuple(found.group(1).split("|")) == tuple(CHOICES[option])


def test_commands_in_the_readme_could_be_typed() -> None:
    known = commands()
    lines = [
        line
        for block in blocks(README, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip().startswith("gemma-export ")
    ]
    assert lines
    for line in lines:
        _, name, *rest = shlex.split(line, comments=True)
        given = {word.split("=")[0] for word in rest if word.startswith("-") and word != "-"}
        assert given <= options(known[name]), line


def test_python_in_the_readme_compiles() -> None:
    examples = blocks(README, "python")
    assert examples
    for example in examples:
        compile(example, "README.md", "exec")


def test_the_readme_has_the_shipped_models_figures() -> None:
    trained = [
        json.loads((ROOT / "exporter" / size / "training.json").read_text(encoding="utf-8"))["held_out"]
        for size in ("tiny", "tiny2")
    ]
    for row, name in {
        "Shakespeare's plays": "shakespeare",
        "*Frankenstein*": "frankenstein",
        "both": "both",
    }.items():
        cells = [f"{texts[name]['perplexity']:.1f} | {texts[name]['bits_per_byte']:.2f}" for texts in trained]
        assert f"| {row} | {' | '.join(cells)} |" in README
    for texts in trained:
        assert f"a perplexity of {texts['both']['unigram_perplexity']:.0f}" in README


def test_links_in_the_documents_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_design_names_the_modules_there_are() -> None:
    listed: dict[str, set[str]] = {}
    room = ""
    (rooms,) = [block for block in blocks(DESIGN, "") if block.startswith("src/gemma_export/")]
    for line in rooms.splitlines():
        if not line.startswith(" "):
            room = line.split("/")[0]
        listed.setdefault(room, set()).update(re.findall(r"\b(\w+\.py)\b", line))
    for room in ("calibration", "exporter", "graphs", "runtime"):
        present = {path.name for path in (ROOT / room).rglob("*.py") if path.parent.name != "passes"} - {
            "__init__.py"
        }
        assert listed[room] == present, room


def test_no_file_speaks_of_the_machine_it_was_made_on() -> None:
    """A path of somebody's machine in a text, a weight file's header or a tokenizer's own settings."""
    names = ("work", "root", "opt", "mnt", "Users", f"home{os.sep}[a-z]")
    place = re.compile(rb"(?<![\w.~/}-])/(?:%s)/[\w.-]" % "|".join(names).encode())
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in files()
        if (match := place.search(_readable(path))) is not None
    }
    assert found == {}


def _readable(path: Path) -> bytes:
    """A file's bytes; of a weight file the header, since among weights every short string occurs."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")] if path.suffix == ".safetensors" else content
