"""The tokenizer service: text to token ids and back, and chat templates."""

import os

# Before the first import of gRPC. Chat templates are rendered by a child process, and what gRPC does in a fork to go on
# in the child kills it while calls are under way; the child becomes another program anyway.
# https://github.com/grpc/grpc/blob/master/doc/fork_support.md
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
