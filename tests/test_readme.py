"""Every command of the README exists as it is written there."""

import re
import shlex
from pathlib import Path

import pytest

import analyze
import train

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "&&" in words:
                    words = words[words.index("&&") + 1 :]
                if words[:3] in (["uv", "run", "python"],) or words[:1] == ["python"]:
                    words = words[3:] if words[0] == "uv" else words[1:]
                    yield pytest.param(words, id=f"{document.stem}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_the_command_is_understood(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, arguments = words[0], words[1:]
    if script == "-m":
        script = arguments.pop(0).replace(".", "/") + ".py"
    assert (ROOT / script).is_file()
    if script == "analyze.py":
        name = next(
            (name for name in (" ".join(arguments[:2]), arguments[0]) if name in analyze.COMMANDS),
            None,
        )
        assert name is not None, arguments
        if "--help" not in arguments:
            analyze.build_parser(name).parse_args(arguments)
    elif script == "train.py" and "--ckpt_path" not in arguments:
        with pytest.raises(SystemExit) as stopped:
            train.main([*(arguments or ["fit", "-c", str(train.DEMO)]), "--print_config"])
        assert stopped.value.code == 0, capsys.readouterr().err


def test_the_two_commands_are_those_of_the_continuous_integration():
    readme = (ROOT / "README.md").read_text()
    assert "pip install uv && uv run python train.py" in readme
    assert "\nuv run pytest" in readme
    assert "\nuv run pytest\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda each: each.name
)
def test_what_a_document_links_to_is_there(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        there = (document.parent / path) if path else document
        assert there.exists(), target
        if heading:
            assert heading in headings(there), target


def headings(document):
    """Anchors of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
