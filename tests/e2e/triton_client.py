"""Drives a server as Triton's own client does. Run with a Python that has tritonclient[grpc]; prints JSON."""

import json
import sys

import numpy as np
import tritonclient.grpc as triton


def main(address: str) -> None:
    client = triton.InferenceServerClient(address)
    said = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("doubling"),
        "unknown_ready": client.is_model_ready("unknown"),
        "server": client.get_server_metadata(as_json=True)["name"],
    }
    for model in ("doubling", "pii", "minilm"):
        said[f"{model}.metadata"] = client.get_model_metadata(model, as_json=True)
        said[f"{model}.config"] = client.get_model_config(model, as_json=True)["config"]

    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = triton.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    doubled = client.infer("doubling", [tensor], outputs=[triton.InferRequestedOutput("y")], request_id="seven")
    said["doubled"] = doubled.as_numpy("y").tolist()
    said["id"] = doubled.get_response().id

    texts = np.array([["My name is Ada Lovelace."], ["Nothing here."]], dtype=np.object_)
    text = triton.InferInput("text", texts.shape, "BYTES")
    text.set_data_from_numpy(texts)
    said["entities"] = [json.loads(one) for one in client.infer("pii", [text]).as_numpy("entities").ravel()]
    said["embeddings"] = list(client.infer("minilm", [text]).as_numpy("embeddings").shape)

    wrong = triton.InferInput("x", [1, 3], "INT32")
    wrong.set_data_from_numpy(np.zeros((1, 3), np.int32))
    try:
        client.infer("doubling", [wrong])
    except triton.InferenceServerException as error:
        said["wrong_dtype"] = [error.status(), error.message()]
    said["statistics"] = client.get_inference_statistics("doubling", as_json=True)["model_stats"]
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
