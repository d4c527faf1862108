"""Which version a reference names now."""

from modelfleet.bundle.reference import ModelReference
from modelfleet.client import AsyncClient
from modelfleet.client.answers import ServedModel
from modelfleet.runtime.errors import NotServedHereError


async def named_version(client: AsyncClient, model: str) -> ServedModel:
    """
    Return the version that a reference names now, so that one version answers to the end.

    Raises NotServedHereError when no worker has it ready.
    """
    reference = ModelReference.parse(model)
    for one in await client.served_models():
        named = one.model_version == reference.model_version or reference.alias in one.aliases
        if one.model == reference.model and named and one.state == "READY":
            return one
    raise NotServedHereError(f"{reference} is not served. List what is with `modelfleet models --served`.")
