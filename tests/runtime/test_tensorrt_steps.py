import pytest

from gemma_export.errors import BundleError
from gemma_export.runtime.manifest import ProfileInfo, Range
from gemma_export.runtime.tensorrt_steps import Launch, capacity, plan_step

PREFILL = ProfileInfo("prefill", Range(1, 1, 1), Range(1, 4, 8), 0)
DECODE = ProfileInfo("decode", Range(1, 1, 1), Range(1, 1, 1), 0)
ANY_BATCH = ProfileInfo("decode-batch", Range(1, 4, 4), Range(1, 1, 1), 0)
FIXED_BATCH = ProfileInfo("decode-batch", Range(4, 4, 4), Range(1, 1, 1), 0)

ALONE = (PREFILL, DECODE)
ANY = (*ALONE, ANY_BATCH)
FIXED = (*ALONE, FIXED_BATCH)


def rows(launches: tuple[Launch, ...]) -> list[tuple[int, int, int, int]]:
    return [(launch.profile, launch.row, launch.rows, launch.padded) for launch in launches]


def chunks(launches: tuple[Launch, ...]) -> list[tuple[int, int, int]]:
    return [(launch.row, launch.token, launch.tokens) for launch in launches]


@pytest.mark.parametrize("profiles", [ALONE, ANY, FIXED], ids=["one row", "up to 4 rows", "4 rows"])
def test_one_token_of_one_row_is_decoded(profiles: tuple[ProfileInfo, ...]) -> None:
    assert plan_step(profiles, 1, 1) == (Launch(1, 0, 1, 1, 0, 1),)


def test_the_order_of_profiles_does_not_matter() -> None:
    assert plan_step((DECODE, PREFILL), 1, 1)[0].profile == 0
    assert plan_step((DECODE, PREFILL), 1, 5)[0].profile == 1


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(2, [2]), (8, [8]), (9, [8, 1]), (16, [8, 8]), (21, [8, 8, 5])],
)
def test_a_prompt_is_run_in_chunks_of_the_prefill_profile(tokens: int, sizes: list[int]) -> None:
    launches = plan_step(FIXED, 1, tokens)
    assert [launch.tokens for launch in launches] == sizes
    assert [launch.token for launch in launches] == [sum(sizes[:index]) for index in range(len(sizes))]
    assert {launch.profile for launch in launches} == {0}


def test_rows_are_prefilled_one_by_one() -> None:
    assert chunks(plan_step(FIXED, 2, 9)) == [(0, 0, 8), (0, 8, 1), (1, 0, 8), (1, 8, 1)]
    assert all(launch.padded == 1 for launch in plan_step(FIXED, 2, 9))


def test_rows_are_decoded_together_where_a_profile_holds_them() -> None:
    assert rows(plan_step(ANY, 3, 1)) == [(2, 0, 3, 3)]
    assert rows(plan_step(FIXED, 4, 1)) == [(2, 0, 4, 4)]


def test_rows_are_padded_where_only_a_larger_batch_exists() -> None:
    assert rows(plan_step(FIXED, 3, 1)) == [(2, 0, 3, 4)]


def test_more_rows_than_a_profile_holds_are_run_in_groups() -> None:
    assert rows(plan_step(ANY, 6, 1)) == [(2, 0, 4, 4), (2, 4, 2, 2)]
    assert rows(plan_step(FIXED, 6, 1)) == [(2, 0, 4, 4), (2, 4, 2, 4)]
    assert rows(plan_step(FIXED, 5, 1)) == [(2, 0, 4, 4), (1, 4, 1, 1)]
    assert rows(plan_step(ALONE, 3, 1)) == [(1, 0, 1, 1), (1, 1, 1, 1), (1, 2, 1, 1)]


@pytest.mark.parametrize(
    ("profiles", "batch", "wanted"),
    [(ALONE, 3, 3), (ANY, 3, 3), (FIXED, 1, 1), (FIXED, 3, 4), (FIXED, 5, 5), (FIXED, 6, 8)],
)
def test_a_cache_has_memory_for_the_padding(
    profiles: tuple[ProfileInfo, ...], batch: int, wanted: int
) -> None:
    assert capacity(profiles, batch) == wanted


@pytest.mark.parametrize("profiles", [ALONE, ANY, FIXED], ids=["one row", "up to 4 rows", "4 rows"])
@pytest.mark.parametrize("batch", range(1, 11))
@pytest.mark.parametrize("tokens", [1, 2, 8, 17])
def test_every_token_is_run_once_within_a_profile(
    profiles: tuple[ProfileInfo, ...], batch: int, tokens: int
) -> None:
    run = []
    for launch in plan_step(profiles, batch, tokens):
        profile = profiles[launch.profile]
        assert profile.batch.min <= launch.padded <= profile.batch.max
        assert profile.tokens.min <= launch.tokens <= profile.tokens.max
        assert launch.rows <= launch.padded
        assert launch.row + launch.padded <= capacity(profiles, batch)
        run += [
            (launch.row + row, launch.token + token)
            for row in range(launch.rows)
            for token in range(launch.tokens)
        ]
    assert len(run) == len(set(run)) == batch * tokens
    for row in range(batch):  # A later token reads what the earlier ones wrote.
        assert [token for each, token in run if each == row] == list(range(tokens))


def test_without_a_prefill_profile_a_prompt_is_run_token_by_token() -> None:
    assert chunks(plan_step((DECODE,), 1, 3)) == [(0, 0, 1), (0, 1, 1), (0, 2, 1)]


def test_profiles_that_hold_no_step() -> None:
    two = ProfileInfo("prefill", Range(1, 1, 1), Range(2, 4, 8), 0)
    with pytest.raises(BundleError, match="no profile") as caught:
        plan_step((two,), 1, 1)
    assert "gemma-export compile" in caught.value.hint
