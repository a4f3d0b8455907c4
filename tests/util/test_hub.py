"""Models of the Hugging Face Hub, from a local server that speaks its protocol."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Capture, Patch, assert_equal, refusal
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save
from serving import COMMIT, Server, serving

import sst2_xlmr
from sst2_xlmr.model.classifier import load_tensors
from sst2_xlmr.model.encoders import find_encoder, is_hub_id
from sst2_xlmr.programs import fetch, predict

SETTINGS, TOKENIZER, WEIGHTS = "config.json", "sentencepiece.bpe.model", "model.safetensors"


@pytest.fixture
def server(tiny_encoder: Path, tmp_path: Path, monkeypatch: Patch) -> Iterator[Server]:
    """A Hub with one model, us/tiny, and an empty cache. huggingface_hub has read its environment already."""
    with serving() as state:
        state.models["us/tiny"] = {file.name: file.read_bytes() for file in tiny_encoder.iterdir()}
        state.models["us/tiny"].update({"onnx/model.onnx": b"unneeded", "pytorch_model.bin": b"unneeded"})
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        template = f"{state.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        yield state


def downloaded(server: Server) -> list[str]:
    return [path.rpartition("/")[2] for method, path in server.requests if method == "GET" and "/resolve/" in path]


@pytest.mark.parametrize("name", ["us/tiny", "us/tiny@v1", f"us/tiny@{COMMIT}"])
def test_needs_are_fetched_once(server: Server, tiny_encoder: Path, tmp_path: Path, name: str, capfd: Capture) -> None:
    encoder = find_encoder(name)
    assert encoder.name == name
    assert encoder.weights_file.parent == tmp_path / "hub" / "models--us--tiny" / "snapshots" / COMMIT
    for file in (encoder.weights_file, encoder.tokenizer_file):
        assert file.read_bytes() == (tiny_encoder / file.name).read_bytes()
    assert encoder.shape == find_encoder(str(tiny_encoder)).shape
    assert sorted(downloaded(server)) == [SETTINGS, WEIGHTS, TOKENIZER, "tokenizer_config.json"]
    assert capfd.readouterr() == ("", f"downloading {name} from {server.url}\n")
    server.requests.clear()
    assert find_encoder(name) == encoder
    assert not [path for _, path in server.requests if "/resolve/" in path]
    assert capfd.readouterr() == ("", "")


def test_other_files_are_fetched_where_they_are_all_there_is(server: Server, tiny_encoder: Path) -> None:
    files, written, tensors = server.models["us/tiny"], io.BytesIO(), load_file(tiny_encoder / WEIGHTS)
    torch.save(tensors, written)
    server.models["us/pickle"] = {**files, "pytorch_model.bin": written.getvalue()}
    del server.models["us/pickle"][WEIGHTS]
    assert find_encoder("us/pickle").weights_file.name == "pytorch_model.bin"
    shards = {f"model-0000{n}-of-00002.safetensors": sorted(tensors)[n - 1 :: 2] for n in (1, 2)}
    for gone in (TOKENIZER, WEIGHTS, "pytorch_model.bin"):
        del files[gone]
    files.update({shard: save({name: tensors[name] for name in names}) for shard, names in shards.items()})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    files["added_tokens.json"] = json.dumps({"[E1]": 700}).encode()
    encoder = find_encoder("us/tiny")
    wanted = [SETTINGS, "tokenizer_config.json", "added_tokens.json", "tokenizer.json", "model.safetensors.index.json"]
    assert {*wanted, *shards} <= {*downloaded(server)}
    assert encoder.tokenizer_file.name == "tokenizer.json"
    assert_equal(load_tensors(encoder), load_tensors(find_encoder(str(tiny_encoder))))
    server.requests.clear()
    assert find_encoder("us/tiny") == encoder
    assert downloaded(server) == []


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_fetched(server: Server) -> None:
    files = server.models["us/tiny"]
    settings = files[SETTINGS]
    cases: list[tuple[dict[str, bytes | None], str]] = [
        ({SETTINGS: settings.replace(b"xlm-roberta", b"camembert")}, "model_type is 'camembert'"),
        ({SETTINGS: None}, "has no config.json"),
        ({TOKENIZER: None, "tokenizer.json": None}, "has neither sentencepiece.bpe.model nor tokenizer.json"),
        ({WEIGHTS: None, "adapter_config.json": b"{}"}, "is an adapter (LoRA)"),
        ({WEIGHTS: None, "pytorch_model.bin": None}, "neither model.safetensors nor pytorch_model.bin"),
    ]
    for number, (changes, says) in enumerate(cases):
        changed = {**files, **changes}
        server.models[f"us/{number}"] = {file: body for file, body in changed.items() if body is not None}
        assert says in refusal(find_encoder, f"us/{number}")
    assert WEIGHTS not in downloaded(server)


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("us/tiny", {"status": 401, "headers": {"X-Error-Code": "GatedRepo"}}, "us/tiny is gated; ask for access at"),
        ("us/tiny", {"status": 403, "headers": {"X-Error-Code": "GatedRepo"}}, "us/tiny is gated; ask for access at"),
        ("us/tiny", {"status": 403}, "403"),
        ("models/tyni", {}, "models/tyni is neither a folder nor a model at"),
        ("us/tiny@v2", {}, "us/tiny has no revision v2"),
        ("us/tiny", {"body": b"short", "length": 99_999}, "cannot be downloaded from"),
    ],
)
def test_what_is_refused_is_named(server: Server, tmp_path: Path, name: str, answer: dict[str, Any], says: str) -> None:
    server.answers[f"/us/tiny/{WEIGHTS}"] = [answer]
    assert says in refusal(find_encoder, name)
    assert not list(tmp_path.glob(f"hub/*/snapshots/*/{WEIGHTS}"))
    server.answers.clear()
    find_encoder("us/tiny")


def test_without_a_connection_the_cache_is_taken(server: Server, monkeypatch: Patch) -> None:
    encoder = find_encoder("us/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # a privileged port that nobody serves
    assert find_encoder("us/tiny") == encoder
    message = refusal(find_encoder, "us/other")
    for says in (
        "us/other is not a local folder, and cannot be downloaded from http://127.0.0.1:1: ",
        "refused",
        "HF_HUB_CACHE",
    ):
        assert says in message


def test_the_environment_holds(server: Server, tmp_path: Path) -> None:
    """In processes of their own, two at once, as the library reads its environment once."""
    home = tmp_path / "home"
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret"}

    def start(name: str, **more: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, str(ROOT / "scripts" / "fetch.py"), name], subprocess.PIPE
        return subprocess.Popen(command, env={**environment, **more}, text=True, stdout=pipe, stderr=pipe)

    started = [start("us/tiny@v1") for _ in range(2)]
    folder = home / "hub" / "models--us--tiny" / "snapshots" / COMMIT
    says = (
        f"us/tiny@v1: {folder}\non another machine, set HF_HUB_CACHE to a copy of {home / 'hub'} and HF_HUB_OFFLINE=1\n"
    )
    for process in started:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, says)
        assert errors in ("", f"downloading us/tiny@v1 from {server.url}\n")
    of_model = [token for token, (_, path) in zip(server.tokens, server.requests) if "us/tiny" in path]
    assert set(of_model) == {"Bearer hf_secret"}
    server.requests.clear()

    assert start("us/tiny@v1", HF_HUB_OFFLINE="1").communicate(timeout=60) == (says, "")
    (folder / WEIGHTS).unlink()
    for name in ("us/tiny@v1", "us/other"):
        _, error = (process := start(name, HF_HUB_OFFLINE="1")).communicate(timeout=60)
        assert (process.returncode, error.count("\n")) == (2, 1)
        assert error.startswith(f"error: {name} is neither a folder nor whole in {home / 'hub'}; unset HF_HUB_OFFLINE;")
        assert f"`sst2-xlmr fetch {name}` elsewhere" in error
    assert server.requests == []


def test_a_trained_model_comes_from_the_hub_too(server: Server, model: Path, tmp_path: Path) -> None:
    server.models["us/trained"] = {file.name: file.read_bytes() for file in model.iterdir()}
    texts = ["a fine film", "a bad film"]
    found = sst2_xlmr.load("us/trained").probabilities(texts)
    assert (found == sst2_xlmr.load(model).probabilities(texts)).all()
    (tmp_path / "texts.csv").write_text("sentence\na fine film\n")
    predict.main(["--model", "us/trained", "--input", "texts.csv", "--output", "answers.tsv"])
    assert (tmp_path / "answers.tsv").read_text().startswith("sentence\t")


def test_a_folder_wins_over_an_id_which_has_one_slash(server: Server, tiny_encoder: Path, capsys: Capture) -> None:
    shutil.copytree(tiny_encoder, Path("us", "tiny"))
    assert find_encoder("us/tiny").weights_file == Path("us", "tiny", WEIGHTS)
    fetch.main(["us/tiny"])
    assert capsys.readouterr().out == "us/tiny: us/tiny\n"
    assert server.requests == []
    assert [name for name in ("a/b", "a/b@x/y", "a", "../a", "a/b/c") if is_hub_id(name)] == ["a/b", "a/b@x/y"]
