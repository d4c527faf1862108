"""What the chart's values do beside pools."""

import json

import pytest
from harness.chart import CHART, Object, render, render_file
from modelfleet_tools.__main__ import app
from modelfleet_tools.exit_codes import ExitCode
from typer.testing import CliRunner

SERVERS = {"tokenizer": 8002, "pool-default": 8001, "manager": 8003}


@pytest.mark.parametrize(("name", "port"), SERVERS.items())
def test_probes_ask_the_server_by_grpc(name: str, port: int) -> None:
    container = render().container(name)

    assert container["readinessProbe"]["grpc"] == {"port": port}
    assert container["startupProbe"]["grpc"] == {"port": port}
    assert container["livenessProbe"]["grpc"] == {"port": port, "service": "liveness"}


@pytest.mark.parametrize("name", SERVERS)
def test_the_grace_period_covers_the_drain(name: str) -> None:
    rendered = render({"drain": {"preStopSeconds": 3, "delaySeconds": 7, "timeoutSeconds": 100}})
    pod = rendered.one("Deployment", name)["spec"]["template"]["spec"]

    assert pod["terminationGracePeriodSeconds"] == 3 + 7 + 100 + 10
    assert pod["containers"][0]["lifecycle"]["preStop"] == {"sleep": {"seconds": 3}}
    # A manager on SQLite ends before its successor starts: nobody could move away meanwhile.
    assert rendered.environment(name)["MODELFLEET_DRAIN_DELAY_S"] == ("0" if name == "manager" else "7")
    assert rendered.environment(name)["MODELFLEET_DRAIN_TIMEOUT_S"] == "100"


def test_a_manager_with_successors_beside_it_drains_like_the_others() -> None:
    rendered = render_file(CHART / "examples" / "production.yaml")

    assert rendered.environment("manager")["MODELFLEET_DRAIN_DELAY_S"] == "40"


@pytest.mark.parametrize("name", SERVERS)
def test_age_of_connections_and_sizes_of_calls_are_settings(name: str) -> None:
    values = {"maxAgeSeconds": 2.5, "maxMessageBytes": 1 << 30, "maxMetadataBytes": 1 << 20}
    variables = render({"connections": values}).environment(name)

    assert variables["MODELFLEET_MAX_CONNECTION_AGE_S"] == "2.5"
    assert variables["MODELFLEET_MAX_MESSAGE_BYTES"] == "1073741824"
    assert variables["MODELFLEET_MAX_METADATA_BYTES"] == "1048576"


def test_managers_and_tokenizers_go_before_workers_which_wait_for_them() -> None:
    rendered = render()
    (made,) = rendered.of("PriorityClass").values()
    classes = {name: rendered.one("Deployment", name)["spec"]["template"]["spec"] for name in SERVERS}

    assert made["value"] > 0
    assert classes["manager"]["priorityClassName"] == made["metadata"]["name"] == "ml-demo-modelfleet"
    assert classes["tokenizer"]["priorityClassName"] == made["metadata"]["name"]
    assert "priorityClassName" not in classes["pool-default"]


def test_whoever_may_make_no_priority_class_names_one_or_none() -> None:
    without = render({"priorityClass": {"create": False}})
    named = render({"priorityClass": {"create": False}, "manager": {"priorityClassName": "high"}})

    assert not without.of("PriorityClass")
    assert "priorityClassName" not in without.one("Deployment", "manager")["spec"]["template"]["spec"]
    assert named.one("Deployment", "manager")["spec"]["template"]["spec"]["priorityClassName"] == "high"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nodeSelector", {"pool": "cpu"}),
        ("tolerations", [{"key": "dedicated", "operator": "Exists"}]),
        ("runtimeClassName", "gvisor"),
        ("priorityClassName", "high"),
    ],
)
def test_common_scheduling_reaches_every_pod_and_job(key: str, value: object) -> None:
    values = {
        "scheduling": {key: value},
        "image": {"pullSecrets": [{"name": "registry"}]},
        "inference": {"poolDefaults": {"nodeSelector": {"nvidia.com/gpu.present": None}, "tolerations": []}},
        "models": {"initial": [{"name": "m", "source": "hf://a/b"}]},
        "batch": {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b"},
    }

    pods = dict(render(values).pods())

    assert len(pods) == 6
    for name, pod in pods.items():
        assert pod[key] == value, name
        assert pod["imagePullSecrets"] == [{"name": "registry"}], name


@pytest.mark.parametrize("component", ["tokenizer", "manager", "models", "batch", "test"])
def test_each_component_and_job_replaces_a_part_of_scheduling(component: str) -> None:
    values = {
        "scheduling": {"nodeSelector": {"common": "yes"}},
        "models": {"initial": [{"name": "m", "source": "hf://a/b"}]},
        "batch": {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b"},
    }
    values[component] = {**values.get(component, {}), "nodeSelector": {"own": "yes"}}

    own = [name for name, pod in render(values).pods() if pod.get("nodeSelector") == {"own": "yes"}]

    assert len(own) == 1
    assert component in own[0]


def test_labels_of_the_user_win_but_for_those_that_selectors_use() -> None:
    mine = {"app.kubernetes.io/part-of": "search", "app.kubernetes.io/name": "mine", "team": "search"}
    rendered = render({"commonLabels": mine, "tokenizer": {"podLabels": {"team": "text", **dict([*mine.items()][:2])}}})
    deployment = rendered.one("Deployment", "tokenizer")
    of_pods = deployment["spec"]["template"]["metadata"]["labels"]

    assert deployment["metadata"]["labels"]["app.kubernetes.io/part-of"] == "search"
    assert deployment["metadata"]["labels"]["app.kubernetes.io/name"] == "modelfleet"
    assert (of_pods["team"], of_pods["app.kubernetes.io/name"]) == ("text", "modelfleet")
    assert deployment["spec"]["selector"]["matchLabels"].items() <= of_pods.items()


@pytest.mark.parametrize("component", ["tokenizer", "manager"])
def test_a_variable_of_the_user_replaces_the_charts(component: str) -> None:
    """Server-side apply, which is Helm 4's way, refuses a name that stands twice."""
    own = [{"name": "MODELFLEET_DRAIN_DELAY_S", "value": "9"}, {"name": "OTHER", "value": "1"}]
    container = render({component: {"extraEnv": own}}).container(component)

    names = [variable["name"] for variable in container["env"]]
    assert len(names) == len(set(names))
    assert {"name": "MODELFLEET_DRAIN_DELAY_S", "value": "9"} in container["env"]
    assert "MODELFLEET_LOG_LEVEL" in names


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({}, "modelfleet/tokenizer:0.1.0"),
        ({"registry": "registry.example.com/ml/"}, "registry.example.com/ml/modelfleet/tokenizer:0.1.0"),
        ({"tag": "1.2"}, "modelfleet/tokenizer:1.2"),
    ],
)
def test_images_come_from_the_registry(image: dict, expected: str) -> None:
    assert render({"image": image}).container("tokenizer")["image"] == expected


def test_a_component_has_an_image_of_its_own_by_digest() -> None:
    image = {"repository": "example.com/t", "digest": "sha256:abc", "tag": "ignored"}

    assert render({"tokenizer": {"image": image}}).container("tokenizer")["image"] == "example.com/t@sha256:abc"


@pytest.mark.parametrize("component", ["tokenizer", "inference", "manager"])
def test_each_service_is_reached_through_one_address_or_all(component: str) -> None:
    services = render().of("Service")

    assert services[f"demo-modelfleet-{component}"]["spec"]["type"] == "ClusterIP"
    assert services[f"demo-modelfleet-{component}-headless"]["spec"]["clusterIP"] == "None"


def test_tokenizers_are_scaled_by_cpu() -> None:
    rendered = render({"tokenizer": {"autoscaling": {"enabled": True}}})

    spec = rendered.one("HorizontalPodAutoscaler", "tokenizer")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 10)
    assert "replicas" not in rendered.one("Deployment", "tokenizer")["spec"]


def test_a_manager_on_sqlite_is_alone_and_keeps_its_volume() -> None:
    rendered = render()
    deployment = rendered.one("Deployment", "manager")["spec"]

    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}
    claim = rendered.one("PersistentVolumeClaim", "manager")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "MODELFLEET_DATABASE_URL" not in rendered.environment("manager")


@pytest.mark.parametrize(("modes", "strategy"), [(["ReadWriteOnce"], "Recreate"), (["ReadWriteMany"], "RollingUpdate")])
def test_a_volume_of_one_node_is_let_go_before_the_next_manager_wants_it(modes: list[str], strategy: str) -> None:
    database = {"kind": "postgresql", "existingSecret": "db"}
    rendered = render({"manager": {"database": database, "persistence": {"accessModes": modes}}})

    assert rendered.one("Deployment", "manager")["spec"]["strategy"]["type"] == strategy


def test_managers_on_postgresql_and_s3_are_several_without_a_volume() -> None:
    rendered = render_file(CHART / "examples" / "production.yaml")
    deployment = rendered.one("Deployment", "manager")["spec"]

    assert deployment["replicas"] == 3
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert not rendered.of("PersistentVolumeClaim")
    variables = rendered.environment("manager")
    assert variables["MODELFLEET_DATABASE_URL"] == {"secretKeyRef": {"name": "modelfleet-database", "key": "url"}}
    assert variables["MODELFLEET_BLOB_URL"] == "s3://models/prod"
    assert variables["AWS_REGION"] == "eu-central-1"
    assert rendered.container("manager")["envFrom"] == [{"secretRef": {"name": "modelfleet-bucket"}}]


def test_initial_models_are_pushed_after_each_install_and_upgrade() -> None:
    job = render_file(CHART / "examples" / "production.yaml").one("Job", "models")

    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert json.loads(variables["MODELFLEET_INITIAL_MODELS"]) == [
        {"name": "minilm", "alias": "stable", "source": "hf://sentence-transformers/all-MiniLM-L6-v2@main"},
        {"name": "pii", "alias": "canary", "source": "s3://models/bundles/pii"},
        {"name": "e5", "alias": "stable", "source": "hf://org/e5", "graph": "onnx/model_O4.onnx"},
    ]
    assert container["envFrom"] == [{"secretRef": {"name": "modelfleet-hub"}}]
    assert (variables["HF_HOME"], variables["TMPDIR"]) == ("/scratch/hub", "/scratch")


def test_models_and_batches_may_have_pools_of_their_own() -> None:
    rendered = render(
        {
            "inference": {"pools": {"large": {}}},
            "models": {"initial": [{"name": "m", "source": "hf://a/b", "pools": ["large"]}]},
            "batch": {"enabled": True, "model": "m", "pool": "large", "input": "s3://a/*", "output": "s3://b"},
        }
    )
    variables = {
        name: {one["name"]: one.get("value") for one in job["spec"]["template"]["spec"]["containers"][0]["env"]}
        for name, job in rendered.of("Job").items()
    }
    (batch,) = (found for name, found in variables.items() if "batch" in name)
    models = variables["demo-modelfleet-models"]

    assert json.loads(models["MODELFLEET_INITIAL_MODELS"])[0]["pools"] == ["large"]
    assert models["MODELFLEET_INFERENCE"] == "dns:///demo-modelfleet-inference-headless.ml.svc:8001"
    assert batch["MODELFLEET_INFERENCE"] == "dns:///demo-modelfleet-pool-large.ml.svc:8001"


@pytest.mark.parametrize(("kind", "name"), [("Job", "models"), ("Pod", "test")])
def test_what_a_hook_made_does_not_outlive_the_release_and_its_log_is_read_before(kind: str, name: str) -> None:
    hook = render_file(CHART / "examples" / "production.yaml").one(kind, name)
    annotations = hook["metadata"]["annotations"]

    assert annotations["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    assert annotations["helm.sh/hook-output-log-policy"] == "hook-succeeded,hook-failed"
    if kind == "Job":
        assert hook["spec"]["ttlSecondsAfterFinished"] == 24 * 3600


@pytest.mark.parametrize("component", ["models", "batch"])
def test_a_job_mounts_what_the_user_has_such_as_a_private_ca(component: str) -> None:
    volume = {"name": "ca", "configMap": {"name": "ca"}}
    mount = {"name": "ca", "mountPath": "/etc/ca"}
    values = {
        "models": {"initial": [{"name": "m", "source": "s3://a/b"}]},
        "batch": {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b"},
    }
    values[component] |= {"extraVolumes": [volume], "extraVolumeMounts": [mount]}

    (job,) = (pod for name, pod in render(values).pods() if component in name)

    assert volume in job["volumes"]
    assert mount in job["containers"][0]["volumeMounts"]


def test_the_right_to_evict_goes_with_the_test() -> None:
    rendered = render()
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        policy = rendered.one(kind, "test")["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
        assert policy == "before-hook-creation,hook-succeeded", kind


def test_a_pod_that_its_node_gives_up_is_no_failure() -> None:
    for name, job in render_file(CHART / "examples" / "batch.yaml").of("Job").items():
        rules = job["spec"]["podFailurePolicy"]["rules"]
        assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules, name


def test_what_another_try_cannot_mend_ends_a_shard_at_once() -> None:
    ((_, job),) = ((n, j) for n, j in render_file(CHART / "examples" / "batch.yaml").of("Job").items() if "batch" in n)

    (rule,) = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailIndex"]
    assert rule["onExitCodes"] == {
        "operator": "In",
        "values": [ExitCode.USAGE, ExitCode.SOME_FAILED, ExitCode.ALL_FAILED],
    }


def test_a_finished_batch_stays_since_an_upgrade_would_begin_a_missing_one_again() -> None:
    def spec(**batch: object) -> Object:
        values = {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b", **batch}
        return next(job for name, job in render({"batch": values}).of("Job").items() if "batch" in name)["spec"]

    assert "ttlSecondsAfterFinished" not in spec()
    assert spec(ttlSecondsAfterFinished=60)["ttlSecondsAfterFinished"] == 60


def test_long_times_stay_whole_numbers() -> None:
    month = 30 * 24 * 3600
    batch = {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b", "ttlSecondsAfterFinished": month}
    models = {"initial": [{"name": "m", "source": "hf://a/b"}], "timeoutSeconds": month}
    rendered = render({"batch": batch, "models": models, "test": {"timeoutSeconds": month}})

    for name, job in (rendered.of("Job") | rendered.of("Pod")).items():
        seconds = job["spec"]["ttlSecondsAfterFinished" if "batch" in name else "activeDeadlineSeconds"]
        assert (seconds, type(seconds)) == (month, int), name


@pytest.mark.parametrize("component", ["models", "batch"])
def test_a_job_takes_the_identity_that_reads_its_bucket(component: str) -> None:
    values = {
        "models": {"initial": [{"name": "m", "source": "s3://a/b"}]},
        "batch": {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b"},
    }
    values[component]["serviceAccountName"] = "reader"

    accounts = {name: pod.get("serviceAccountName") for name, pod in render(values).pods() if "Job" in name}

    assert [name for name, account in accounts.items() if account == "reader" and component in name]
    assert sum(account == "reader" for account in accounts.values()) == 1


def test_arguments_of_a_batch_may_have_any_characters() -> None:
    values = {"enabled": True, "model": "m", "input": "s3://a/b: c #d/*", "output": "s3://b: #"}
    rendered = render({"batch": values})

    (job,) = (job for name, job in rendered.of("Job").items() if "batch" in name)
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--input=s3://a/b: c #d/*", "--output=s3://b: #"} <= set(arguments)


def test_initial_models_from_a_claim_are_mounted() -> None:
    job = render_file(CHART / "examples" / "batch.yaml").one("Job", "models")["spec"]["template"]["spec"]

    assert {"name": "models", "mountPath": "/models", "readOnly": True} in job["containers"][0]["volumeMounts"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "bundles", "readOnly": True}} in job["volumes"]


def test_a_batch_is_an_indexed_job_with_a_shard_for_each_pod() -> None:
    ((_, job),) = ((n, j) for n, j in render_file(CHART / "examples" / "batch.yaml").of("Job").items() if "batch" in n)
    spec = job["spec"]

    assert spec["completionMode"] == "Indexed"
    assert (spec["completions"], spec["parallelism"]) == (16, 8)
    assert spec["template"]["spec"]["containers"][0]["args"] == [
        "batch",
        "embed",
        "--model=minilm",
        "--input=texts/*.jsonl.gz",
        "--output=vectors.parquet",
        "--shard=$(JOB_COMPLETION_INDEX)/16",
        "--resume",
        "--keep=id",
    ]


def test_a_batch_is_told_what_its_command_knows() -> None:
    """Every argument of the chart's Jobs is an option of the command that it is for."""
    for file in (CHART / "examples" / "batch.yaml", None):
        for name, pod in render_file(file).pods():
            (container,) = pod["containers"]
            if arguments := container.get("args"):
                shown = CliRunner().invoke(app, [arguments[0], "--help"], env={"COLUMNS": "200"}).output
                for argument in arguments[1:]:
                    assert not argument.startswith("--") or argument.partition("=")[0] in shown, (name, argument)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": {"shards": 5}},
        {"batch": {"image": {"tag": "2"}}},
        {"image": {"pullSecrets": [{"name": "registry"}]}},
        {"security": {"pod": {"fsGroup": 5}}},
        {"commonLabels": {"team": "search"}},
        {"scheduling": {"nodeSelector": {"disk": "fast"}}},
    ],
    ids=str,
)
def test_whatever_changes_a_batch_makes_another_job_since_none_can_be_changed(change: dict) -> None:
    def name(changes: dict) -> str:
        batch = {"enabled": True, "model": "m", "input": "s3://a/*", "output": "s3://b", **changes.get("batch", {})}
        return next(name for name in render({**changes, "batch": batch}).of("Job") if "batch" in name)

    assert name({}) == name({"tokenizer": {"replicas": 5}})
    assert name({}) != name(change)


def test_the_test_checks_the_devices_and_drains_a_tokenizer() -> None:
    rendered = render()
    pod = rendered.one("Pod", "test")["spec"]

    assert "--pool=default=cuda" in pod["containers"][0]["args"]
    assert (
        "--evict=app.kubernetes.io/component=tokenizer,app.kubernetes.io/instance=demo,app.kubernetes.io/name=modelfleet"
        in pod["containers"][0]["args"]
    )
    assert rendered.one("Role", "test")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods/eviction"], "verbs": ["create"]},
    ]


def test_a_single_tokenizer_is_not_evicted() -> None:
    rendered = render({"tokenizer": {"replicas": 1}})

    assert "evict" not in str(rendered.one("Pod", "test"))
    assert "demo-modelfleet-test" not in rendered.of("Role")


def test_the_network_lets_in_callers_alone() -> None:
    policies = render_file(CHART / "examples" / "production.yaml").of("NetworkPolicy")
    tokenizer = policies["demo-modelfleet-tokenizer"]["spec"]

    calls, metrics = tokenizer["ingress"]
    assert calls["ports"] == [{"port": 8002}]
    components = [
        peer["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
        for peer in calls["from"]
        if "podSelector" in peer
    ]
    assert components == ["inference", None]
    assert {"namespaceSelector": {"matchLabels": {"team": "search"}}} in calls["from"]
    assert metrics["ports"] == [{"port": 9002}]
    assert tokenizer["policyTypes"] == ["Ingress", "Egress"]
    assert policies["demo-modelfleet-manager"]["spec"]["policyTypes"] == ["Ingress"]


def test_jobs_of_the_release_are_let_in() -> None:
    rendered = render_file(CHART / "examples" / "batch.yaml")
    jobs = {name: job["spec"]["template"] for name, job in rendered.of("Job").items()} | rendered.of("Pod")
    assert len(jobs) == 3
    for name, pod in jobs.items():
        assert pod["metadata"]["labels"]["modelfleet.dev/client"] == "true", name


def test_nothing_of_monitoring_is_made_unless_asked_for() -> None:
    assert not {found["kind"] for found in render().objects} & {"ServiceMonitor", "PrometheusRule", "ConfigMap"}


def test_a_monitor_finds_the_headless_services() -> None:
    rendered = render_file(CHART / "examples" / "production.yaml")
    selector = rendered.one("ServiceMonitor", "")["spec"]["selector"]["matchLabels"]

    found = {
        name
        for name, service in rendered.of("Service").items()
        if selector.items() <= service["metadata"]["labels"].items()
    }
    assert found == {f"demo-modelfleet-{component}-headless" for component in ("tokenizer", "inference", "manager")}


def test_two_of_these_charts_in_one_release_are_told_apart() -> None:
    one, two = (
        render({"nameOverride": name, "fullnameOverride": "demo-modelfleet"}).environment("manager")
        for name in ("one", "two")
    )

    assert one["MODELFLEET_POOL_SELECTOR"] != two["MODELFLEET_POOL_SELECTOR"]


def test_a_chart_that_depends_on_this_one_may_turn_it_off() -> None:
    assert render({"enabled": True}).objects == render().objects


def test_the_dashboard_is_json() -> None:
    data = render_file(CHART / "examples" / "production.yaml").one("ConfigMap", "dashboard")["data"]

    assert len(json.loads(data["modelfleet.json"])["panels"]) == 18


def test_the_dashboard_shows_a_cluster_without_namespaces_too_and_generated_text() -> None:
    """Prometheus beside `modelfleet up` gives series no namespace: `.*` fits them, an equality with a name does not."""
    dashboard = json.loads((CHART / "dashboards" / "modelfleet.json").read_text())
    (namespace,) = [one for one in dashboard["templating"]["list"] if one["name"] == "namespace"]
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]

    assert (namespace["includeAll"], namespace["allValue"], namespace["current"]["value"]) == (True, ".*", "$__all")
    assert all(query.count('{namespace=~"$namespace"}') == query.count("{") for query in queries)
    for metric in ("first_token_seconds", "token_seconds", "stream_tokens_total", "streams", "cache_tokens"):
        assert any(f"modelfleet_{metric}" in query for query in queries), metric


def test_notes_print_the_next_commands() -> None:
    notes = render().notes

    assert "helm test demo -n ml --logs" in notes  # which asks for the log of a pod, not of a Job
    assert "kubectl -n ml rollout status deployment/demo-modelfleet-pool-default" in notes
    assert "port-forward svc/demo-modelfleet-inference 8001" in notes
    assert "--set inference.pools.default.runtimeClassName=nvidia" in notes
    assert "runtimeClassName" not in render_file(CHART / "values-cpu.yaml").notes


def test_notes_say_how_to_reach_each_pool_where_there_are_several() -> None:
    assert "-pool-default.ml.svc" not in render().notes
    notes = render({"inference": {"pools": {"a10": {}}}}).notes

    assert "dns:///demo-modelfleet-pool-a10.ml.svc:8001" in notes
    assert "dns:///demo-modelfleet-pool-default.ml.svc:8001" in notes


def test_a_manager_that_shall_not_know_its_pools_has_no_token() -> None:
    rendered = render({"manager": {"pools": False}})

    assert "demo-modelfleet-manager" not in rendered.of("Role")
    pod = rendered.one("Deployment", "manager")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert "MODELFLEET_POOLS" not in rendered.environment("manager")
    assert "modelfleet pools" not in rendered.notes


def test_the_role_may_be_made_by_somebody_else() -> None:
    rendered = render({"manager": {"rbac": {"create": False}}})

    assert not {"demo-modelfleet-manager"} & {*rendered.of("Role"), *rendered.of("RoleBinding")}
    assert rendered.one("Deployment", "manager")["spec"]["template"]["spec"]["automountServiceAccountToken"] is True
    assert rendered.environment("manager")["MODELFLEET_POOLS"] == "kubernetes"


def test_the_manager_knows_its_pools_by_their_labels() -> None:
    rendered = render()
    selector = dict(part.split("=") for part in rendered.environment("manager")["MODELFLEET_POOL_SELECTOR"].split(","))

    found = {
        name
        for name, deployment in rendered.of("Deployment").items()
        if selector.items() <= deployment["metadata"]["labels"].items()
    }
    assert found == {"demo-modelfleet-pool-default"}
