"""
Builds the four images, runs the three services from them on one Docker network, and serves a model: `make images`.

Prints sizes, start times and the answer. Skips, saying why, where no Docker engine answers. Needs a BuildKit builder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from modelfleet_tools.output import tell
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole

ROOT = Path(__file__).parents[2]
PORTS = {"manager": 8003, "tokenizer": 8002, "inference": 8001}
DOCKER = os.environ.get("DOCKER", "docker")
# As the chart runs them: no privileges, nothing writable but what is mounted.
RESTRICTED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp:mode=1777")
TEXT = "My name is Ada Lovelace, my email is ada@gmail.com."


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    tag: str
    base_image: str
    ca: str
    network: str
    gpu: bool


def docker(*arguments: str, check: bool = True) -> str:
    """Run the Docker client and return what it writes. Raises RuntimeError with its errors."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True, env=environment, check=False)
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


def engine_problem() -> str:
    """Return why no image can be built here, empty when one can."""
    try:
        done = subprocess.run([DOCKER, "version"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"there is no {DOCKER!r}"
    return done.stderr.strip() if done.returncode else ""


def build(service: str, options: Options, *, accelerator: str = "cpu") -> str:
    """Build an image, say how long it took and how large it is, and return its name."""
    name = f"modelfleet/{service}:{options.tag}{'-gpu' if accelerator == 'gpu' else ''}"
    arguments = {"SERVICE": service, "ACCELERATOR": accelerator, "BASE_IMAGE": options.base_image}
    began = time.monotonic()
    docker(
        "build",
        *(part for key, value in arguments.items() if value for part in ("--build-arg", f"{key}={value}")),
        *(("--secret", f"id=ca,src={options.ca}") if options.ca else ()),
        *(("--network", options.network) if options.network else ()),
        *("--file", str(ROOT / "deploy/docker/Dockerfile"), "--tag", name, str(ROOT)),
    )
    size = int(docker("image", "inspect", "--format", "{{.Size}}", name))
    tell(f"{name}: {size / 1e6:.0f} MB, built in {time.monotonic() - began:.0f} s")
    return name


def check_contents(image: str) -> None:
    """Raise AssertionError unless the image runs as nobody special and holds nothing that only builds need."""
    config = json.loads(docker("image", "inspect", "--format", "{{json .Config}}", image))
    assert config["User"] == "10001:10001", config["User"]
    assert config["StopSignal"] == "SIGTERM", config["StopSignal"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    # The base may bring a pip of its own; what is added to it may not.
    script = "id -u; command -v gcc cc; find / -xdev -path '*/.cache/pip' -o -path '/opt/*/pip' 2>/dev/null; true"
    found = docker("run", "--rm", *RESTRICTED, "--entrypoint", "sh", image, "-c", script)
    assert found == "10001", f"{image} has {found.splitlines()[1:]}"


def check_refusal(image: str) -> None:
    """Raise AssertionError unless a worker that is started without its GPU ends at once and says why."""
    command = [DOCKER, "run", "--rm", *RESTRICTED, "--tmpfs", "/cache:uid=10001,mode=700", image, "--device", "cuda"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    sentence = done.stderr.splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert sentence.startswith("The worker cannot start: CUDAExecutionProvider was asked for"), done.stderr
    tell(f"Without a GPU, {image} ends after {time.monotonic() - began:.1f} s: {sentence}")


@contextmanager
def running(images: dict[str, str], network: str) -> Iterator[None]:
    """Run the three services on a network and say when each was healthy; stop them and check how they ended."""
    docker("network", "create", network)
    names = {service: f"{network}-{service}" for service in PORTS}
    try:
        for service, port in PORTS.items():
            began = time.monotonic()
            docker(
                *("run", "--detach", "--name", names[service], "--network", network, "--network-alias", service),
                *("--publish", f"127.0.0.1::{port}", *RESTRICTED),
                *("--tmpfs", "/data:uid=10001,mode=700", "--tmpfs", "/cache:uid=10001,mode=700"),
                *("--env", "MODELFLEET_MANAGER=manager:8003", "--env", "MODELFLEET_TOKENIZER=tokenizer:8002"),
                *("--env", "MODELFLEET_DRAIN_DELAY_S=1"),
                images[service],
            )
            wait_until_healthy(docker("port", names[service], str(port)).splitlines()[0], names[service])
            tell(f"{service}: healthy {time.monotonic() - began:.1f} s after `docker run`")
        yield
        for service, name in reversed(names.items()):
            began = time.monotonic()
            docker("stop", "--time", "40", name)
            code = docker("inspect", "--format", "{{.State.ExitCode}}", name)
            assert code == "0", f"{service} ended with {code}:\n{logs(name)}"
            tell(f"{service}: stopped with exit code 0 in {time.monotonic() - began:.1f} s")
    finally:
        for name in names.values():
            docker("rm", "--force", "--volumes", name, check=False)
        docker("network", "rm", network, check=False)


def wait_until_healthy(address: str, name: str) -> None:
    """Return once a service says that it is serving. Raises RuntimeError with its log after a minute."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                response = stub.Check(health_pb2.HealthCheckRequest(), timeout=1, wait_for_ready=True)
            except grpc.RpcError:
                continue
            if response.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(0.02)
    raise RuntimeError(f"{name} is not healthy after 60 s:\n{logs(name)}")


def logs(name: str) -> str:
    """Return the end of a container's log."""
    done = subprocess.run([DOCKER, "logs", "--tail", "30", name], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def tool(image: str, network: str, *arguments: str, options: Sequence[str] = ()) -> str:
    """Run `modelfleet` on the network and return its output."""
    targets = ("MODELFLEET_MANAGER=manager:8003", "MODELFLEET_TOKENIZER=tokenizer:8002")
    return docker(
        *("run", "--rm", "--network", network, *RESTRICTED),
        *(part for target in (*targets, "MODELFLEET_INFERENCE=inference:8001") for part in ("--env", target)),
        *options,
        image,
        *arguments,
    )


def serve(images: dict[str, str], network: str) -> None:
    """Check the cluster, push the sample model and ask it. Raises AssertionError for a wrong answer."""
    sample = find_sample("pii")
    folder = ROOT / ".cache" / "samples" / "pii"
    if not is_whole(sample, folder):
        fetch_sample(sample, folder)
    report = json.loads(tool(images["tools"], network, "check", "--device", "cpu", "--json"))
    tell(f"modelfleet check: answered on {report['provider']} in {report['seconds']:.1f} s")
    mount = ("--volume", f"{folder}:/models/pii:ro")
    models = json.dumps([{"name": "pii", "alias": "stable", "source": "/models/pii"}])
    job = (*mount, "--env", f"MODELFLEET_INITIAL_MODELS={models}", "--entrypoint", "python")
    tool(images["tools"], network, "-m", "modelfleet_tools.initial_models", options=job)
    push = ("push", "/models/pii", "--name", "pii", "--alias", "stable", "--wait")
    tell(tool(images["tools"], network, *push, options=mount))
    began = time.monotonic()
    answer = json.loads(tool(images["tools"], network, "entities", "pii", TEXT, "--json"))
    found = {entity["label"]: entity["text"] for entity in answer["results"][0]["entities"]}
    assert found.get("EMAIL") == "ada@gmail.com", answer
    tell(f"{TEXT!r} -> {found}, {time.monotonic() - began:.1f} s with the client's start")


def main() -> None:
    """Build, run, serve, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default="test", help="tag of the images")
    parser.add_argument("--base-image", default="", help="instead of the Dockerfile's")
    parser.add_argument("--ca", default="", help="file of certificates that pip shall trust")
    parser.add_argument("--network", default="", help="network of the build, such as host")
    parser.add_argument("--gpu", action="store_true", help="build the image for GPUs, too")
    options = Options(**vars(parser.parse_args()))
    if problem := engine_problem():
        tell(f"Skipped: no image can be built without a Docker engine: {problem}")
        sys.exit(0)
    images = {service: build(service, options) for service in (*PORTS, "tools")}
    for image in images.values():
        check_contents(image)
    if options.gpu:
        image = build("inference", options, accelerator="gpu")
        check_contents(image)
        check_refusal(image)
    network = f"modelfleet-{os.getpid()}"
    with running(images, network):
        serve(images, network)
    tell("All is well.")


if __name__ == "__main__":
    main()
