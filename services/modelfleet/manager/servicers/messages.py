"""Domain objects as messages, for the servicers of this package."""

from google.protobuf.timestamp_pb2 import Timestamp

from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.manager.models import Alias, Model, ModelVersion


def model_version_message(version: ModelVersion) -> pb.ModelVersion:
    """Return the message of a model version."""
    created = Timestamp()
    created.FromDatetime(version.create_time)
    return pb.ModelVersion(
        model=version.model,
        model_version=version.model_version,
        bundle_digest=version.bundle_digest,
        manifest_json=version.manifest_json,
        files=[pb.BundleFile(path=file.path, sha256=file.sha256, size=file.size) for file in version.files],
        create_time=created,
    )


def model_message(model: Model) -> pb.Model:
    """Return the message of a model."""
    created = Timestamp()
    created.FromDatetime(model.create_time)
    return pb.Model(
        model=model.model,
        aliases=[alias_message(alias) for alias in model.aliases],
        latest_model_version=model.latest_model_version,
        task=model.task,
        create_time=created,
        pools=model.pools,
    )


def alias_message(alias: Alias) -> pb.Alias:
    """Return the message of an alias."""
    return pb.Alias(alias=alias.alias, model_version=alias.model_version)
