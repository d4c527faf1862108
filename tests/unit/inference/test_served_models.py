import asyncio
from collections import Counter

import prometheus_client
import pytest
from harness import graphs
from modelfleet.bundle.reference import ModelReference
from modelfleet.inference.assignment import AssignedVersion, Route, VersionKey, WeightedVersion
from modelfleet.inference.models import LoadedModel
from modelfleet.inference.served_models import NotHeldError, ServedModels, ServedVersion
from modelfleet.inference.states import FOLLOWING, VersionState, follows
from modelfleet.runtime.errors import ModelLoadingError

SAMPLE = graphs.tensor_bundle(graphs.affine())
ON_THE_WAY = [VersionState.VERIFYING, VersionState.WARMING, VersionState.READY, VersionState.DRAINING]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return graphs.load(SAMPLE, tmp_path_factory.mktemp("model"))


def add(served: ServedModels, number: int = 1, *, name: str = "m", state: VersionState | None = None) -> ServedVersion:
    version = served.add(AssignedVersion(VersionKey(name, number), SAMPLE.bundle))
    if state is VersionState.FAILED:
        served.move(version, state, "it is broken")
    elif state:
        for step in ON_THE_WAY[: ON_THE_WAY.index(state) + 1]:
            served.move(version, step)
    return version


def ready(served: ServedModels, model: LoadedModel, number: int = 1) -> ServedVersion:
    version = add(served, number, state=VersionState.READY)
    version.model = model
    return version


def route(served: ServedModels, *targets: tuple[int, int], alias: str = "stable") -> None:
    shares = tuple(WeightedVersion(number, weight) for number, weight in targets)
    served.set_routes({("m", alias): Route("m", alias, shares)})


def ask(reference: str) -> ModelReference:
    return ModelReference.parse(reference)


def test_the_states_follow_one_another_as_the_table_says() -> None:
    """Read aloud: before -> after."""
    pairs = {f"{before} -> {after}" for before, afters in FOLLOWING.items() for after in afters}
    assert pairs == {
        "DOWNLOADING -> DOWNLOADING",
        "DOWNLOADING -> VERIFYING",
        "DOWNLOADING -> FAILED",
        "DOWNLOADING -> UNLOADED",
        "VERIFYING -> VERIFYING",
        "VERIFYING -> WARMING",
        "VERIFYING -> FAILED",
        "VERIFYING -> UNLOADED",
        "WARMING -> VERIFYING",
        "WARMING -> READY",
        "WARMING -> FAILED",
        "WARMING -> UNLOADED",
        "READY -> DRAINING",
        "READY -> FAILED",
        "DRAINING -> UNLOADED",
        "UNLOADED -> DOWNLOADING",
        "FAILED -> DOWNLOADING",
        "FAILED -> UNLOADED",
    }
    assert set(FOLLOWING) == set(VersionState)


def test_a_state_that_may_not_follow_is_refused() -> None:
    for before in VersionState:
        for after in set(VersionState) - FOLLOWING[before]:
            with pytest.raises(AssertionError, match=f"{after} cannot follow {before}"):
                follows(before, after)


def test_a_ready_version_is_used_by_number_and_by_alias(model: LoadedModel) -> None:
    served = ServedModels()
    ready(served, model, 3)
    route(served, (3, 1))
    for reference in ("m@3", "m@stable", "m"):
        with served.use(ask(reference)) as held:
            assert held == (VersionKey("m", 3), model)


@pytest.mark.parametrize("reference", ["other", "m@2", "m@canary"])
def test_what_is_not_held_is_for_the_manager_to_judge(model: LoadedModel, reference: str) -> None:
    served = ServedModels()
    ready(served, model)
    route(served, (1, 1))
    with pytest.raises(NotHeldError), served.use(ask(reference)):
        pass


def test_an_alias_of_a_version_that_is_not_held_is_for_the_manager_to_judge() -> None:
    served = ServedModels()
    route(served, (1, 1))
    with pytest.raises(NotHeldError), served.use(ask("m")):
        pass


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "m@1 is still loading on this worker (DOWNLOADING). Retry."),
        (VersionState.VERIFYING, "m@1 is still loading on this worker (VERIFYING). Retry."),
        (VersionState.WARMING, "m@1 is still loading on this worker (WARMING). Retry."),
        (VersionState.DRAINING, "m@1 is being unloaded on this worker (DRAINING). Retry."),
    ],
)
def test_a_version_on_its_way_asks_for_a_retry(state: VersionState | None, message: str) -> None:
    served = ServedModels()
    add(served, state=state)
    with pytest.raises(ModelLoadingError) as raised, served.use(ask("m@1")):
        pass
    assert raised.value.message == message
    assert raised.value.retry_after_s


def test_a_version_that_waits_for_the_manager_says_so() -> None:
    served = ServedModels()
    served.move(add(served), VersionState.DOWNLOADING, "The manager cannot be reached.")
    with (
        pytest.raises(ModelLoadingError, match=r"\(DOWNLOADING\): The manager cannot"),
        served.use(ask("m@1")),
    ):
        pass


def test_a_failed_version_says_why_and_asks_for_a_retry_elsewhere() -> None:
    served = ServedModels()
    add(served, state=VersionState.FAILED)
    with pytest.raises(ModelLoadingError) as raised, served.use(ask("m@1")):
        pass
    assert (
        raised.value.message
        == "m@1 could not be loaded on this worker: it is broken. Ask a replica that has loaded it."
    )
    assert raised.value.retry_after_s


def test_a_canary_gets_its_share(model: LoadedModel) -> None:
    served = ServedModels()
    ready(served, model, 1)
    ready(served, model, 2)
    route(served, (1, 9), (2, 1))
    used: Counter[int] = Counter()
    for _ in range(2000):
        with served.use(ask("m")) as (key, _):
            used[key.model_version] += 1
    assert 100 < used[2] < 320  # 200 expected; beyond 7 standard deviations otherwise


@pytest.mark.parametrize("state", [VersionState.FAILED, VersionState.WARMING, None])
def test_while_one_of_an_alias_s_versions_cannot_answer_here_the_other_has_its_share(
    model: LoadedModel, state: VersionState | None
) -> None:
    served = ServedModels()
    ready(served, model, 1)
    if state:
        add(served, 2, state=state)
    route(served, (2, 50), (1, 50))
    for _ in range(4):
        with served.use(ask("m")) as (key, _):
            assert key.model_version == 1


def test_looking_up_a_version_is_no_use_of_it(model: LoadedModel) -> None:
    served = ServedModels()
    wanted: list[ServedVersion] = []
    served.on_wanted(wanted.append)
    first, second = ready(served, model, 1), ready(served, model, 2)
    route(served, (1, 1), (2, 2))
    served.evict(second)
    assert served.look_up(ask("m")) is served.look_up(ask("m@stable")) is second  # of the largest share
    assert served.look_up(ask("m@1")) is first
    assert (first.last_used, second.last_used, wanted) == (0, 0, [])


def test_aliases_of_a_version_are_sorted(model: LoadedModel) -> None:
    served = ServedModels()
    ready(served, model)
    shares = (WeightedVersion(1, 1),)
    served.set_routes({("m", alias): Route("m", alias, shares) for alias in ("stable", "canary")})
    assert served.aliases(VersionKey("m", 1)) == ["canary", "stable"]
    assert served.aliases(VersionKey("m", 2)) == []
    assert served.routed() == {VersionKey("m", 1)}


def test_versions_are_ordered_by_name_and_number() -> None:
    served = ServedModels()
    for name, number in (("b", 1), ("a", 10), ("a", 9)):
        add(served, number, name=name)
    assert [str(version.key) for version in served.versions()] == ["a@9", "a@10", "b@1"]


async def test_a_version_is_drained_once_the_last_request_has_ended(model: LoadedModel) -> None:
    served = ServedModels()
    version = ready(served, model)
    first, second = served.use(ask("m@1")), served.use(ask("m@1"))
    first.__enter__()
    second.__enter__()
    served.move(version, VersionState.DRAINING)
    drained = asyncio.create_task(served.drained(version))
    first.__exit__(None, None, None)
    await asyncio.sleep(0)
    assert not drained.done()
    second.__exit__(None, None, None)
    await asyncio.wait_for(drained, 1)


async def test_an_idle_version_is_drained_at_once(model: LoadedModel) -> None:
    served = ServedModels()
    version = ready(served, model)
    with served.use(ask("m@1")):
        pass
    await asyncio.wait_for(served.drained(version), 1)


def test_listeners_hear_of_each_change() -> None:
    served, heard = ServedModels(), []
    served.on_change(lambda: heard.append([version.state.value for version in served.versions()]))
    version = add(served)
    served.move(version, VersionState.FAILED, "x")
    served.move(version, VersionState.UNLOADED)
    assert heard == [["DOWNLOADING"], ["FAILED"], []]


def test_the_series_of_a_version_end_with_it() -> None:
    def state_series() -> dict[str, float | None]:
        return {
            state.value: prometheus_client.REGISTRY.get_sample_value(
                "modelfleet_version_state", {"model": "gone@1", "state": state.value}
            )
            for state in VersionState
        }

    served = ServedModels()
    version = add(served, name="gone", state=VersionState.FAILED)
    assert state_series() == {state.value: float(state is VersionState.FAILED) for state in VersionState}
    served.move(version, VersionState.UNLOADED)
    assert set(state_series().values()) == {None}
