"""Short ways to start, watch and judge rollouts in tests."""

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.duration_pb2 import Duration
from modelfleet.api.manager.v1 import model_service_pb2 as models_pb
from modelfleet.api.manager.v1 import rollout_service_pb2 as pb

from harness.manager import Manager, push

_POLL_S = 0.01


async def two_versions(manager: Manager) -> None:
    """Register pii@1 as `stable`, and pii@2."""
    await push(manager, "pii", {"model.onnx": b"1"}, alias="stable")
    await push(manager, "pii", {"model.onnx": b"2"})


def spec(model_version: int = 2, **changes: Any) -> pb.RolloutSpec:
    """Return a spec for `pii@stable` without a window for rolling back."""
    fields = {"model": "pii", "alias": "stable", "rollback_window": Duration(), **changes}
    return pb.RolloutSpec(model_version=model_version, **fields)


async def start(manager: Manager, model_version: int = 2, **changes: Any) -> int:
    """Start a rollout and return its number."""
    request = pb.CreateRolloutRequest(spec=spec(model_version, **changes))
    return (await manager.rollouts.CreateRollout(request)).rollout.rollout


async def state_of(manager: Manager, rollout: int) -> pb.Rollout:
    """Return a rollout as it is."""
    return (await manager.rollouts.GetRollout(pb.GetRolloutRequest(rollout=rollout))).rollout


async def until(
    manager: Manager,
    rollout: int,
    *states: str,
    holds: Callable[[pb.Rollout], bool] = lambda _: True,
    timeout_s: float = 60,
) -> pb.Rollout:
    """Return a rollout once it is in one of some states and a condition holds. Fails where it has ended otherwise."""
    over = {"SUCCEEDED", "FAILED", "ABORTED"} - set(states)
    async with asyncio.timeout(timeout_s):
        while True:
            found = await state_of(manager, rollout)
            if state_name(found) in states and holds(found):
                return found
            assert state_name(found) not in over, f"rollout {rollout} {state_name(found)}: {found.reason}"
            await asyncio.sleep(_POLL_S)


def state_name(message: pb.Rollout | pb.RolloutEvent) -> str:
    """Return a state without its prefix."""
    return pb.RolloutState.Name(message.state).removeprefix("ROLLOUT_STATE_")


def way(rollout: pb.Rollout) -> list[str]:
    """Return the states that a rollout entered."""
    return [state_name(event) for event in rollout.events]


async def place(manager: Manager, *pools: str) -> None:
    """Let some pools alone serve `pii`."""
    await manager.models.PlaceModel(models_pb.PlaceModelRequest(model="pii", pools=pools))


async def alias(manager: Manager, name: str = "stable") -> int:
    """Return the version that an alias of `pii` names in the registry, 0 for none."""
    model = (await manager.models.GetModel(models_pb.GetModelRequest(model="pii"))).model
    return {one.alias: one.model_version for one in model.aliases}.get(name, 0)
