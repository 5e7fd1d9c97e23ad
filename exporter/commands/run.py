"""The commands that let a bundle write."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from gemma_export.errors import PromptError
from gemma_export.exporter.commands import options
from gemma_export.exporter.commands.console import write_json
from gemma_export.exporter.process import err, show_error


def generate(
    bundle: options.Bundle,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    repetition_penalty: options.Penalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    draft_tokens: options.DraftTokens = 0,
    save_cache: options.SaveCache = None,
    load_cache: options.LoadCache = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Continue a text."""
    from gemma_export.runtime.session import load

    text = _read_stdin() if prompt == "-" else prompt
    session = load(bundle, threads=threads)
    prompt_cache = session.new_prompt_cache() if load_cache is None else session.load_cache(load_cache)
    if save_cache is not None:
        # Before it is continued: the next prompt starts like this one, not like the answer.
        session.read(text, prompt_cache)
        session.save_cache(prompt_cache, save_cache)
    generation = session.generate(
        text,
        prompt_cache=prompt_cache,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        draft_tokens=draft_tokens,
    )
    if as_json:
        write_json(
            {
                "text": str(generation),
                "tokens": list(generation.tokens),
                "finish_reason": generation.finish_reason,
                "stats": asdict(generation.stats),
            }
        )
        return
    _stream(generation)


def chat(
    bundle: options.Bundle,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    repetition_penalty: options.Penalty = 1.0,
    seed: options.Seed = None,
    draft_tokens: options.DraftTokens = 0,
    save_cache: options.SaveCache = None,
    load_cache: options.LoadCache = None,
    threads: options.Threads = None,
) -> None:
    """Talk with a model; each turn reads only what is new."""
    from gemma_export.errors import ContextFullError
    from gemma_export.runtime.session import load

    session = load(bundle, threads=threads)
    conversation = session.chat(None if load_cache is None else session.load_cache(load_cache))
    err.print("[dim]/reset begins again, /exit or Ctrl-D ends.[/]", highlight=False)
    while (text := _ask()) is not None:
        if text == "/reset":
            conversation = session.chat()
            continue
        if not text:
            continue
        try:
            answer = conversation.say(
                text,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                seed=seed,
                draft_tokens=draft_tokens,
            )
            _stream(answer)
        except (ContextFullError, PromptError) as error:
            show_error(error)
        except KeyboardInterrupt:
            err.print("\n[dim]interrupted; the answer counts as far as it came[/]", highlight=False)
    if save_cache is not None and conversation.tokens:
        session.save_cache(conversation.prompt_cache, save_cache)


def _stream(pieces: Any) -> None:
    """Writes a generation as it comes, and what it took to a person who watches."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if sys.stderr.isatty():
        stats = pieces.stats
        drafts = (
            f"{stats.accepted_tokens} of {stats.draft_tokens} drafted held, " if stats.draft_tokens else ""
        )
        err.print(
            f"[dim]{stats.prefill_tokens} tokens read in {stats.prefill_seconds:.2f} s, {stats.new_tokens} "
            f"written at {stats.decode_tokens_per_second:.1f} a second ({drafts}{pieces.finish_reason})[/]",
            highlight=False,
        )


def _ask() -> str | None:
    """One line from the person, or None when they are done."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        return None
    return None if line in ("/exit", "/quit") else line


def _read_stdin() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The prompt on standard input is not UTF-8: byte {error.start} cannot be decoded.",
            "Convert it to UTF-8 first.",
        ) from None
