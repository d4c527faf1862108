"""What holds with any values: the chart lints, its objects are valid, pods are restricted, upgrades go through."""

import importlib.util
import tomllib
from pathlib import Path

import helm_python
import kubernetes_validate
import pytest
from harness.chart import CHART, VALUES_FILES, Manifests, render, render_file

# The oldest and newest version of Kubernetes that the chart's README names.
KUBERNETES = ("1.30", "1.37")
CUSTOM = ("ServiceMonitor", "PrometheusRule", "ScaledObject")

each_file = pytest.mark.parametrize("file", VALUES_FILES, ids=lambda path: path.stem if path else "default")


@each_file
def test_it_lints_without_a_warning(file: Path | None) -> None:
    values = helm_python.values_from_yaml(file.read_text()) if file else {}

    report = helm_python.lint(CHART, values, strict=True, namespace="ml", kube_version="v1.30.0")

    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@each_file
@pytest.mark.parametrize("version", KUBERNETES)
def test_its_objects_are_valid_with_no_unknown_field(file: Path | None, version: str) -> None:
    for found in render_file(file).objects:
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(dict(found), version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_names_that_look_like_numbers_stay_text(version: str) -> None:
    values = {"inference": {"pools": {"4090": {"autoscaling": {"enabled": True}}}}, "networkPolicy": {"enabled": True}}
    for found in render({**values, "monitoring": {"serviceMonitor": {"enabled": True}}}, release="1e3").objects:
        if found["kind"] not in CUSTOM:
            kubernetes_validate.validate(dict(found), version, strict=True)
        else:
            assert "1e3" in found["spec"]["selector"]["matchLabels"].values()


def test_the_validation_would_see_a_wrong_field() -> None:
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": {"replica": 1}}

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


def test_the_readme_names_the_versions_that_are_tested() -> None:
    assert f"Kubernetes {KUBERNETES[0]} to {KUBERNETES[1]}" in (CHART / "README.md").read_text().replace("\n", " ")
    with helm_python.Chart.load(CHART) as chart:
        assert chart.metadata["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_chart_images_and_package_have_one_version() -> None:
    root = CHART.parents[2]
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]

    assert f"ARG VERSION={version}\n" in (root / "deploy" / "docker" / "Dockerfile").read_text()
    with helm_python.Chart.load(CHART) as chart:
        assert chart.metadata["appVersion"] == version


def test_schema_and_readme_are_fresh() -> None:
    specification = importlib.util.spec_from_file_location("document", CHART.parent / "document.py")
    assert specification
    assert specification.loader
    document = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(document)

    for path, text in document.outputs().items():
        assert path.read_text() == text, f"{path.name} is not fresh. Run `make chart`."


@each_file
def test_names_are_unique_and_short_enough(file: Path | None) -> None:
    named = [(found["kind"], found["metadata"]["name"]) for found in render_file(file).objects]

    assert len(named) == len(set(named))
    assert max(len(name) for _, name in named) <= 63


@each_file
def test_pods_meet_the_restricted_standard(file: Path | None) -> None:
    allowed = {"configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for name, pod in render_file(file).pods():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"]), name
        kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= allowed | ({"hostPath"} if name.endswith("h100-slice") else set()), name


@each_file
def test_why_a_container_ended_is_kept_with_its_pod(file: Path | None) -> None:
    for name, pod in render_file(file).pods():
        for container in pod["containers"]:
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", name


@each_file
def test_only_pods_that_call_the_api_have_a_token(file: Path | None) -> None:
    with_token = {name for name, pod in render_file(file).pods() if pod["automountServiceAccountToken"]}

    assert with_token <= {"Deployment demo-modelfleet-manager", "Pod demo-modelfleet-test"}


@each_file
def test_services_select_the_pods_that_listen(file: Path | None) -> None:
    manifests = render_file(file)
    for name, service in manifests.of("Service").items():
        selected = [
            deployment
            for deployment in manifests.of("Deployment").values()
            if service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert selected, name
        for deployment in selected:
            (container,) = deployment["spec"]["template"]["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for port in service["spec"]["ports"]:
                assert port["port"] == ports[port["targetPort"]], name


@each_file
def test_immutable_fields_are_those_of_the_first_release(file: Path | None) -> None:
    """With others, `helm upgrade` would be refused: a selector, a clusterIP and a binding's role never change."""
    manifests = render_file(file)
    first = {"app.kubernetes.io/name": "modelfleet", "app.kubernetes.io/instance": "demo"}
    for name, deployment in manifests.of("Deployment").items():
        component = name.removeprefix("demo-modelfleet-")
        pool = {"modelfleet.dev/pool": component.removeprefix("pool-")} if component.startswith("pool-") else {}
        expected = {**first, "app.kubernetes.io/component": "inference" if pool else component, **pool}
        assert deployment["spec"]["selector"] == {"matchLabels": expected}
        assert expected.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    for name, service in manifests.of("Service").items():
        headless = name.endswith("-headless") or "-pool-" in name
        assert service["spec"].get("clusterIP") == ("None" if headless else None), name
    for name, binding in manifests.of("RoleBinding").items():
        assert binding["roleRef"]["name"] == name


@each_file
def test_jobs_are_hooks_or_named_by_what_they_do(file: Path | None) -> None:
    """A Job's template cannot change: hooks are made anew, and a batch with other values is another Job."""
    for name, job in render_file(file).of("Job").items():
        hook = "helm.sh/hook" in job["metadata"].get("annotations", {})
        assert hook != ("-batch-" in name), name


def test_pods_do_not_restart_for_another_version_of_the_chart() -> None:
    for _, labels in _template_labels(render_file(None)):
        assert "helm.sh/chart" not in labels
        assert "app.kubernetes.io/version" not in labels


def _template_labels(manifests: Manifests) -> list[tuple[str, dict[str, str]]]:
    return [
        (name, deployment["spec"]["template"]["metadata"]["labels"])
        for name, deployment in manifests.of("Deployment").items()
    ]
