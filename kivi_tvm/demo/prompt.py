"""The demo's prompt: the bundled story and a question about it, or the user's own."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from kivi_tvm.errors import UserError

STORY = "data/story.txt"
QUESTION = "data/question.txt"


def story() -> str:
    """The bundled story (see data/PROVENANCE.md)."""
    return _bundled(STORY)


def default_prompt() -> str:
    """The story and a question about it."""
    return f"{story()}\n\n{_bundled(QUESTION)}"


def _bundled(name: str) -> str:
    return files("kivi_tvm.demo").joinpath(name).read_text("utf-8").strip()


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt that the options `--prompt` and `--prompt-file` ask for.

    Raises
    ------
    UserError
        The file cannot be read as UTF-8 text, or there is no text.
    """
    name, prompt = "--prompt", text
    if file is not None:
        name, prompt = "--prompt-file", read_text("--prompt-file", file)
    if prompt is None:
        return default_prompt()
    if not prompt.strip():
        raise UserError(f"`{name}` must have text, got an empty prompt")
    return prompt


def last_paragraph(prompt: str, limit: int = 200) -> str:
    """What a person is shown of a long prompt: the end, where the question usually is."""
    text = " ".join(prompt.strip().split("\n\n")[-1].split())
    return text if len(text) <= limit else f"... {text[-limit:]}"


def read_text(option: str, file: Path) -> str:
    """The text of the file that was given as `option`.

    Raises
    ------
    UserError
        It cannot be read as UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"`{option}` must be a readable file, got {str(file)!r} ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"`{option}` must be UTF-8 text, got {str(file)!r}") from error
