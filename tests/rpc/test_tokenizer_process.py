import asyncio
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from harness.processes import service_process
from harness.serving import until_serving
from harness.small_tokenizers import digest_of, wordpiece_json
from harness.worker import running_manager
from modelfleet.api.tokenizer.v1 import tokenizer_pb2 as pb
from modelfleet.api.tokenizer.v1.tokenizer_pb2_grpc import TokenizerServiceStub

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "modelfleet.tokenizer"]


def test_help_says_what_each_flag_means() -> None:
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout

    for word in ("--manager", "localhost:8003", "--cache-dir", "--encoder-threads", "MODELFLEET_LOG_LEVEL"):
        assert word in shown


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--port", "http"], {}, "--port (or MODELFLEET_PORT) is 'http'"),
        ([], {"MODELFLEET_ENCODER_THREADS": "0"}, "--encoder-threads (or MODELFLEET_ENCODER_THREADS) is '0'"),
        (["--prot", "1"], {}, "unrecognized arguments: --prot 1"),
    ],
)
def test_a_wrong_setting_is_named_and_exits_with_2(flags: list[str], environment: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [*COMMAND, *flags], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_without_manager_is_ready_serves_what_is_on_disk_and_exits_cleanly(tmp_path: Path) -> None:
    digest = digest_of(wordpiece_json())
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / f"{digest}.json").write_bytes(wordpiece_json())
    flags = ["--host=127.0.0.1", "--port=0", "--metrics-port=0", f"--cache-dir={tmp_path}", "--drain-delay-s=0"]
    with (
        service_process("-m", "modelfleet.tokenizer", *flags, "--manager=127.0.0.1:1") as service,
        grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel,
    ):
        request = pb.TokenizeRequest(tokenizer_digest=digest, texts=["the cat"])
        response = TokenizerServiceStub(channel).Tokenize(request, timeout=30)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(timeout=30) == 0

    assert len(response.ids) == 4 * 4


async def test_chats_are_rendered_by_a_child_while_assignments_are_watched(tmp_path: Path) -> None:
    """What gRPC does in a fork while a stream is open may kill the child; it says when it tries."""
    template = b"{% for message in messages %}{{ message.content }}{% endfor %}"
    async with running_manager() as (manager, address):
        await manager.assign({}, {})
        manager.contents[digest_of(template)] = template
        flags = ["--host=127.0.0.1", "--port=0", "--metrics-port=0", f"--cache-dir={tmp_path}", "--drain-delay-s=0"]
        with ExitStack() as stack:
            process = service_process("-m", "modelfleet.tokenizer", *flags, f"--manager={address}")
            service = await asyncio.to_thread(stack.enter_context, process)  # it asks the manager, which is here
            await until_serving(f"127.0.0.1:{service.port}")
            async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
                request = pb.RenderChatRequest(
                    template_digest=digest_of(template), messages=[pb.ChatMessage(role="user", content="Hello")]
                )
                rendered = await TokenizerServiceStub(channel).RenderChat(request, timeout=30)

    assert rendered.text == "Hello"
    assert service.others == []
