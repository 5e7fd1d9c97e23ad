"""`generate` and `chat`: drafts, and caches that are kept from one prompt to the next."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Invoke

PROMPT = "ROMEO:\nI am a man that is a man.\n\nJULIET:\n"


def generated(invoke: Invoke, *arguments: object) -> dict[str, Any]:
    outcome = invoke(["generate", *arguments, "--json"])
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_drafts_are_counted(tiny_bundle: Path, invoke: Invoke) -> None:
    plain = generated(invoke, tiny_bundle, PROMPT, "--max-new-tokens", 60)
    drafted = generated(invoke, tiny_bundle, PROMPT, "--max-new-tokens", 60, "--draft-tokens", 7)
    assert drafted["tokens"] == plain["tokens"]
    stats = drafted["stats"]
    assert 0 < stats["accepted_tokens"] <= stats["draft_tokens"]
    assert plain["stats"]["draft_tokens"] == plain["stats"]["reused_tokens"] == 0


def test_a_cache_is_kept_for_the_next_prompt(tiny_bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    kept, longer = tmp_path / "kept", f"{PROMPT}What man art thou?"
    first = generated(invoke, tiny_bundle, PROMPT, "--save-cache", kept)
    alone = generated(invoke, tiny_bundle, longer)
    second = generated(invoke, tiny_bundle, longer, "--load-cache", kept, "--save-cache", kept)
    assert second["text"] == alone["text"]
    # What is saved is the prompt, read whole; its last token is run again for the logits behind it.
    total = alone["stats"]["prefill_tokens"]
    assert (first["stats"]["reused_tokens"], first["stats"]["prefill_tokens"]) == (
        generated(invoke, tiny_bundle, PROMPT)["stats"]["prefill_tokens"] - 1,
        1,
    )
    assert (second["stats"]["reused_tokens"], second["stats"]["prefill_tokens"]) == (total - 1, 1)
    third = generated(invoke, tiny_bundle, PROMPT, "--load-cache", kept)
    assert third["text"] == first["text"]
    assert third["stats"]["prefill_tokens"] < 5


def test_a_dialogue_is_kept(
    tiny_bundle: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"

    def answers(text: str, *arguments: object) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        outcome = invoke(["chat", tiny_bundle, "--max-new-tokens", "5", *arguments])
        assert outcome.code == 0, outcome.err
        return outcome.out.splitlines()

    whole = answers("Good day\nWho art thou\n")
    first = answers("Good day\n", "--save-cache", kept)
    assert first + answers("Who art thou\n", "--load-cache", kept) == whole
    assert first != whole


def test_what_is_no_saved_cache(tiny_bundle: Path, tmp_path: Path, invoke: Invoke) -> None:
    missing = invoke(["generate", tiny_bundle, PROMPT, "--load-cache", tmp_path / "missing"])
    assert missing.code == 2
    assert "is not there" in missing.err
    (tmp_path / "other").write_text("something")
    other = invoke(["generate", tiny_bundle, PROMPT, "--load-cache", tmp_path / "other"])
    assert other.code == 1
    assert "no saved cache" in other.err
