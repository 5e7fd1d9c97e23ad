"""What is run: what fits the cache, and real tokens in it."""

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_bundle import TOKENIZER

from gemma_export.calibration.passages import PASSAGES
from gemma_export.errors import UsageError
from gemma_export.exporter.bench import plan as plan_module
from gemma_export.exporter.bench.plan import Depth, make_plan, physical_cores, real_tokens
from gemma_export.runtime.tokenizer import Tokenizer

LENGTHS = st.lists(st.integers(1, 600), max_size=5)
DEPTHS = st.lists(st.one_of(st.integers(0, 600), st.just("full")), max_size=5)


def test_what_does_not_fit_is_left_out_and_said() -> None:
    plan, left_out = make_plan(512, tokens=32, threads=3)
    assert (plan.prompts, plan.depths, plan.threads) == ((128, 512), (0, 480), 3)
    assert left_out == (
        "a prompt of 2,048: the cache has 512 slots",
        "32 tokens at depth 512: the cache has 512 slots",
        "32 tokens at depth 2048: the cache has 512 slots",
    )


def test_a_long_cache_takes_all() -> None:
    plan, left_out = make_plan(8192, threads=1)
    assert (plan.prompts, plan.depths, left_out) == ((128, 512, 2048), (0, 512, 2048, 8160), ())
    assert (plan.first_prompt, plan.lengths) == (128, (0, 128, 512, 2048, 8160))
    assert plan.slots == 8192  # to the last slot


@given(st.integers(2, 512), LENGTHS, DEPTHS, st.integers(1, 40))
def test_everything_is_either_run_or_left_out(
    slots: int, prompts: list[int], depths: list[Depth], tokens: int
) -> None:
    try:
        plan, left_out = make_plan(slots, prompts=prompts, depths=depths, tokens=tokens, threads=1)
    except UsageError:
        assert all(length > slots for length in prompts)
        assert all(depth == "full" or depth + tokens > slots for depth in depths)
        return
    assert plan.slots <= slots
    numbers = [slots - tokens if depth == "full" else depth for depth in depths]
    wanted = [*prompts, *numbers]
    run = [n for n in prompts if n in plan.prompts] + [n for n in numbers if n in plan.depths]
    assert len(run) + len(left_out) == len(wanted)
    assert list(plan.prompts) == sorted(set(plan.prompts))
    assert list(plan.depths) == sorted(set(plan.depths))


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"threads": 0}, {"prompts": [0]}, {"prompts": [], "depths": []}, {"tokens": 600}],
    ids=str,
)
def test_what_cannot_be_run(wrong: dict[str, object]) -> None:
    arguments = {"prompts": [600], "threads": 1} | wrong
    with pytest.raises(UsageError):
        make_plan(512, **arguments)


def test_tokens_are_those_of_the_passages_in_a_row() -> None:
    tokenizer = Tokenizer(TOKENIZER, 2048)
    once = list(chain.from_iterable(map(tokenizer.encode_plain, PASSAGES.values())))
    tokens = real_tokens(tokenizer, 2 * len(once) + 1)
    assert tokens == [tokenizer.bos, *once, *once]
    assert len(set(tokens)) > 400
    assert real_tokens(tokenizer, 5) == tokens[:5]


def test_threads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cores = {0: ("0", "0"), 1: ("0", "1"), 2: ("0", "0"), 3: ("1", "0"), 7: ("1", "9")}
    for cpu, (package, core) in cores.items():
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
    monkeypatch.setattr(plan_module, "_CPUS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert physical_cores() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5})  # of which the system says nothing
    assert physical_cores() == 2
