"""`modelfleet push | models | alias | place | delete`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from modelfleet.bundle.reference import ModelReference, check_alias_name, check_model_name
from modelfleet.client.answers import Model, ModelVersion
from modelfleet.client.client import Client
from modelfleet.runtime.errors import UnavailableError

from modelfleet_tools.consent import ForceOption, require_consent
from modelfleet_tools.loading_wait import wait_until_loaded
from modelfleet_tools.options import (
    DEFAULT_TIMEOUT_S,
    InferenceOption,
    JsonOption,
    ManagerOption,
    TimeoutOption,
    open_client,
)
from modelfleet_tools.output import print_json, print_table, tell
from modelfleet_tools.pushing import aliases_of, push_folder

_DIGITS = 12


@dataclass(frozen=True, slots=True)
class PushReport:
    """What `push --json` writes."""

    model: str
    model_version: int
    alias: str | None
    bundle_digest: str
    created: bool
    sent_bytes: int


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="The model's folder.")],
    *,
    name: Annotated[str, typer.Option("--name", "-n", help="The model's name.")],
    alias: Annotated[
        str | None, typer.Option(help="Point this alias at the version; requests that name none get `stable`.")
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Have this pool alone serve the model; may be given several times."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return only when a worker serves it. Needs --alias.")] = False,
    force: ForceOption = False,
    manager: ManagerOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Longest wait for each part.")] = 600,
    as_json: JsonOption = False,
) -> None:
    """
    Register the model in a folder as a new version. Only files that the manager lacks are sent.

    The folder is one of Hugging Face: an ONNX graph, config.json, tokenizer.json. What cannot be seen from these goes
    into modelfleet.yaml there. An alias that names another version already is moved only with consent: a rollout moves
    it once all workers have the new version, and watches it.

    Example: modelfleet push .cache/samples/pii --name pii --alias stable --wait
    """
    if wait and not alias:
        raise typer.BadParameter("--wait needs --alias: only versions that an alias names are served.")
    check_model_name(name)
    if alias:
        check_alias_name(alias)
    with open_client(manager=manager, timeout_s=min(timeout, DEFAULT_TIMEOUT_S)) as client:
        pushed = push_folder(client, folder, name, None, pools=pool or (), timeout_s=timeout)
        version = pushed.model_version
        named = aliases_of(client, name)
        if alias and named.get(alias) != version.model_version:
            if alias in named:
                require_consent(
                    f"{name}@{alias} names {name}@{named[alias]}, which is served; {name}@{version.model_version} "
                    "would take its place at once.",
                    force=force,
                    instead=f"{name}@{version.model_version} is registered. Move the alias under watch: "
                    f"modelfleet rollout start {name} {version.model_version} --alias {alias}.",
                )
            client.set_alias(name, alias, version.model_version)
        _tell_of_unknown_pools(client, pool or ())
        if wait:
            tell(f"Waiting until a worker serves {name}@{version.model_version} …")
            served = wait_until_loaded(client, name, version.model_version, timeout)
            if served.state_reason:
                tell(f"Note on {name}@{version.model_version}: {served.state_reason}.")
    if as_json:
        print_json(
            PushReport(name, version.model_version, alias, version.bundle_digest, pushed.created, pushed.sent_bytes)
        )
        return
    what = "registered" if pushed.created else "registered before, as the same files"
    print(f"{name}@{version.model_version} {what}" + (f"; {name}@{alias} names it" if alias else ""))
    if not alias:
        tell(_how_to_serve(name, version.model_version, named))


def _how_to_serve(name: str, number: int, aliases: Mapping[str, int]) -> str:
    naming = sorted(alias for alias, named in aliases.items() if named == number)
    if naming:
        return f"It is what {', '.join(f'{name}@{alias}' for alias in naming)} names already."
    if "stable" in aliases:
        return (
            f"{name}@stable names {name}@{aliases['stable']} still. Move it to this version, under watch: "
            f"modelfleet rollout start {name} {number}"
        )
    return f"No alias names it, so it is not served yet. Serve it: modelfleet alias {name}@stable {number}"


def models(
    model: Annotated[str | None, typer.Argument(metavar="[NAME]", help="List the versions of this model.")] = None,
    *,
    served: Annotated[bool, typer.Option("--served", help="List what a worker holds, in any state.")] = False,
    manager: ManagerOption = None,
    inference: InferenceOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    List the registered models, the versions of one, or what a worker serves.

    Examples: modelfleet models; modelfleet models pii --json; modelfleet models --served
    """
    with open_client(manager=manager, inference=inference, timeout_s=timeout) as client:
        if served:
            _print_served(client, model, as_json=as_json)
        elif model:
            _print_versions(client.model_versions(model), as_json=as_json)
        else:
            _print_models(client.models(), as_json=as_json)


def alias(
    reference: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="The alias of a model.")],
    model_version: Annotated[int | None, typer.Argument(metavar="[NUMBER]", min=1, help="What it shall name.")] = None,
    *,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the alias.")] = False,
    force: ForceOption = False,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """
    Point an alias at a version, or delete it.

    Examples: modelfleet alias pii@stable 2; modelfleet alias pii@canary --delete
    """
    parsed = ModelReference.parse(reference)
    if "@" not in reference or parsed.alias is None:
        raise typer.BadParameter(f"{reference!r} names no alias. Write NAME@ALIAS, such as pii@stable.")
    if delete == (model_version is not None):
        raise typer.BadParameter("Give the NUMBER of a version, or --delete.")
    with open_client(manager=manager, timeout_s=timeout) as client:
        before = aliases_of(client, parsed.model).get(parsed.alias)
        if model_version is None:
            if before:
                require_consent(f"Requests for {parsed}, which names {parsed.model}@{before}, would fail.", force=force)
            client.delete_alias(parsed.model, parsed.alias)
            print(f"{parsed} deleted")
        else:
            client.set_alias(parsed.model, parsed.alias, model_version)
            replaced = f", no longer {parsed.model}@{before}" if before not in (None, model_version) else ""
            print(f"{parsed} names {parsed.model}@{model_version}{replaced}")


def delete(
    reference: Annotated[str, typer.Argument(metavar="NAME@NUMBER", help="The version of a model.")],
    *,
    force: ForceOption = False,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """
    Delete a version for good; its number is never used again. One that an alias or a rollout names stays.

    Example: modelfleet delete pii@2
    """
    parsed = ModelReference.parse(reference)
    if parsed.model_version is None:
        raise typer.BadParameter(f"{reference!r} names no version. Write NAME@NUMBER, such as pii@2.")
    with open_client(manager=manager, timeout_s=timeout) as client:
        client.get_model_version(str(parsed))
        require_consent(f"{parsed} would be deleted for good.", force=force)
        client.delete_model_version(parsed.model, parsed.model_version)
    print(f"{parsed} deleted")


def place(
    model: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    pools: Annotated[
        list[str] | None, typer.Argument(metavar="[POOL]...", help="The pools that shall serve it.")
    ] = None,
    *,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="Let every pool serve it.")] = False,
    force: ForceOption = False,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """
    Say which pools serve a model; workers of the others unload it.

    Clients reach one pool by its own address, on Kubernetes RELEASE-pool-NAME.

    Examples: modelfleet place smollm2 gpu; modelfleet place pii --everywhere
    """
    if everywhere == bool(pools):
        raise typer.BadParameter("Give the names of pools, or --everywhere.")
    with open_client(manager=manager, timeout_s=timeout) as client:
        if pools and (there := {pool.pool for pool in client.pools()}).isdisjoint(pools):
            require_consent(
                f"There is no pool {', '.join(sorted(pools))} now, so nothing would serve {model}.",
                force=force,
                instead=f"There is {', '.join(sorted(there)) or 'none'}.",
            )
        placed = client.place_model(model, pools or ())
        _tell_of_unknown_pools(client, placed.pools)
    print(f"{model} is served by " + (f"the pools {', '.join(placed.pools)}" if placed.pools else "every pool"))


def _tell_of_unknown_pools(client: Client, pools: Sequence[str]) -> None:
    """Say so where a pool is not there, which it may be later: nothing serves the model until then."""
    if not pools:
        return
    try:
        there = {pool.pool for pool in client.pools()}
    except UnavailableError as error:
        tell(f"Whether these pools are there is not known: {error.message}")
        return
    if unknown := sorted(set(pools) - there):
        tell(f"There is no pool {', '.join(unknown)} now; there is {', '.join(sorted(there)) or 'none'}.")


def _print_models(found: tuple[Model, ...], *, as_json: bool) -> None:
    if as_json:
        print_json({"models": found})
        return
    rows = (
        (
            one.model,
            one.task,
            ", ".join(f"{alias} → {number}" for alias, number in one.aliases.items()) or "none",
            one.latest_model_version,
            ", ".join(one.pools) or "all",
            f"{one.create_time:%Y-%m-%d %H:%M}",
        )
        for one in found
    )
    print_table("Models", ("model", "task", "aliases", "latest version", "pools", "created (UTC)"), rows)


def _print_versions(found: tuple[ModelVersion, ...], *, as_json: bool) -> None:
    if as_json:
        print_json({"model_versions": found})
        return
    rows = (
        (
            f"{one.model}@{one.model_version}",
            one.bundle_digest[:_DIGITS],
            len(one.files),
            f"{sum(file.size for file in one.files) / 1e6:.1f} MB",
            f"{one.create_time:%Y-%m-%d %H:%M}",
        )
        for one in found
    )
    print_table("Versions", ("version", "digest", "files", "size", "created (UTC)"), rows)


def _print_served(client: Client, model: str | None, *, as_json: bool) -> None:
    found = [one for one in client.served_models() if model in (None, one.model)]
    if as_json:
        print_json({"served_models": found})
        return
    rows = (
        (
            f"{one.model}@{one.model_version}",
            one.task,
            f"{one.state}: {one.state_reason}" if one.state_reason else one.state,
            ", ".join(one.aliases) or "none",
            ", ".join(one.providers),
        )
        for one in found
    )
    print_table("Served", ("version", "task", "state", "aliases", "providers"), rows)
