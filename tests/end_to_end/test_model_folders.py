"""Model folders as people have them, made with transformers, and as training writes them: its ids and logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, SAMPLE_DATA, SMALL_ENCODER, needs_small_encoder, refusal, sst2_sentences, train_options
from safetensors.torch import load_file, save_file

from sst2_xlmr import load, train
from sst2_xlmr.model.classifier import load_classifier, load_tensors
from sst2_xlmr.model.encoders import TOKENIZER_NAME, find_encoder
from sst2_xlmr.model.tokenizer_files import JSON_NAME, SETTINGS_NAME
from sst2_xlmr.programs import export

transformers = pytest.importorskip("transformers")

# Decomposed characters are left out: transformers' own conversion cuts them otherwise than SentencePiece.
TEXTS = [
    "A fine film.",
    "",
    " ",
    "  two  spaces,\ta tab \n and a line ",
    "no\u00a0break, zero\u200bwidth, wide\u3000space, thin\u2009space",
    "ﬁne ① ½ ｆｕｌｌ width ～ ™ Ⅷ ㎏",  # noqa: RUF001
    "Ünïcödé çà et là; łódź, İstanbul, ǅ",
    "Очень скучная книга, я не дочитал её.",
    "الفندق نظيف والموقع ممتاز.",
    "यह फ़ोन दो दिन में ख़राब हो गया।",
    "อาหารอร่อยมาก",
    "この本を読んで本当によかった。배터리가 하루도 못 가요.",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "[E1] begins, and ends with [E1]",
    "x[E1]y [E1] , [e1] [E1 ] [E1][E1]",
    "newword newwords renewword newword, NEWWORD",
    "the film was <user> and <user>!",
    "word " * 60,
    "12345 67,890.12 €3 50% #tag @name http://a.b/c?d=e&f=g",
    "\"quoted\" 'single' `back` «guillemets» „low“ – — …",  # noqa: RUF001
    "A" * 40,
    "it's don't can't won't I'm",
    "▁ already ▁there",
    "MiXeD CaSe LETTERS",
]
PAIRS = list(zip(TEXTS[:12], ["It was good.", *TEXTS[:11]]))

Make = Callable[[Path], Any]


def save(folder: Path, kind: str = "XLMRoberta", **settings: Any) -> Any:
    """Save a random model, and the tokenizer that is in the folder already, as transformers does; returns the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes["max_position_embeddings"] = 66 if kind == "XLMRoberta" else 64
    labels = {} if {"num_labels", "id2label"} & settings.keys() else {"id2label": {0: "bad", 1: "so so", 2: "good"}}
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": len(tokenizer), "initializer_range": 0.3, **sizes, **labels, **settings}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def change(folder: Path, file: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> Any:
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    content = {key: value for key, value in {**content, **changes}.items() if key not in drop}
    (folder / file).write_text(json.dumps(content), encoding="utf-8")


def rename(folder: Path, new_name: Callable[[str], str], **more: torch.Tensor) -> Any:
    tensors = load_file(folder / "model.safetensors")
    tensors = {**{new_name(name): tensor for name, tensor in tensors.items()}, **more}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def to_bin(folder: Path, wrap: Callable[[Any], Any] = dict) -> Any:
    torch.save(wrap(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def changed(file: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> Make:
    return lambda folder: (save(folder), change(folder, file, drop, **changes))


def renamed(new_name: Callable[[str], str]) -> Make:
    return lambda folder: (save(folder), rename(folder, new_name))


def remove(folder: Path, *names: str) -> Any:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def only(folder: Path, *kept: str) -> Any:
    remove(folder, *{TOKENIZER_NAME, JSON_NAME, "added_tokens.json", "special_tokens_map.json"} - {*kept})


def with_sentencepiece(folder: Path, make: Make) -> Any:
    """Make a form, and have the SentencePiece model in it, which transformers 5 does not save."""
    content = (folder / TOKENIZER_NAME).read_bytes()
    make(folder)
    (folder / TOKENIZER_NAME).write_bytes(content)


def add_tokens(folder: Path, *tokens: Any, special: bool = False) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    else:
        tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


def with_options(content: str) -> Any:
    return transformers.AddedToken(content, lstrip=True, rstrip=True, single_word=True)


def shard(folder: Path, model: Any, name: str = "model", kind: str = "safetensors") -> Any:
    (folder / "model.safetensors").unlink()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files = [f"{name}-{number:05}-of-00002.{kind}" for number in (1, 2)]
    weight_map = {tensor: files[number % 2] for number, tensor in enumerate(tensors)}
    for file in files:
        part = {tensor: tensors[tensor] for tensor in tensors if weight_map[tensor] == file}
        torch.save(part, folder / file) if kind == "bin" else save_file(part, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{name}.{kind}.index.json").write_text(json.dumps(index))


def move_into(folder: Path, inner: str, *names: str) -> Any:
    (folder / inner).mkdir()
    for file in [file for file in folder.iterdir() if file.is_file() and (not names or file.name in names)]:
        file.rename(folder / inner / file.name)


def rewrite(folder: Path, *options: str) -> Any:
    save(folder)
    theirs = folder.rename(folder.with_name("theirs"))
    export.main(["--model", str(theirs), "--format", "hf", "--output", str(folder), *options])


def trim(folder: Path) -> Any:
    texts = folder.with_name("texts.txt")
    texts.write_text("\n".join(text.replace("\n", " ") for text in TEXTS[2:]), encoding="utf-8")
    rewrite(folder, "--keep-vocabulary-of", str(texts))


def put_normalizer(folder: Path, *steps: dict[str, Any]) -> Any:
    change(folder, JSON_NAME, normalizer={"type": "Sequence", "normalizers": [*steps]})


FORMS: dict[str, Make] = {
    "as saved": save,
    "SentencePiece only": lambda f: (with_sentencepiece(f, save), only(f, TOKENIZER_NAME)),
    "tokenizer.json only": lambda f: (save(f), only(f, JSON_NAME)),
    "both": lambda f: with_sentencepiece(f, save),
    "no tokenizer_config.json": lambda f: (with_sentencepiece(f, save), remove(f, SETTINGS_NAME)),
    "five labels": lambda f: save(f, id2label={i: f"star {i}" for i in range(5)}),
    "labels without names": lambda f: save(f, num_labels=4),
    "scores": lambda f: save(f, num_labels=1),
    "several labels a text": lambda f: save(f, problem_type="multi_label_classification"),
    "two labels, as is the default": lambda f: (save(f, num_labels=2), change(f, drop=("id2label", "label2id"))),
    "no architectures": changed(drop=("architectures",)),
    "a body's class": changed(architectures=["XLMRobertaModel"]),
    "bf16": lambda f: save(f).to(torch.bfloat16).save_pretrained(f),
    "fp16": lambda f: save(f).to(torch.float16).save_pretrained(f),
    "pytorch_model.bin": lambda f: (save(f), to_bin(f)),
    "gamma and beta": renamed(lambda n: n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
    "other heads' weights": lambda f: (
        save(f),
        rename(f, str, **{"lm_head.bias": torch.ones(3), "roberta.pooler.dense.weight": torch.ones(32, 32)}),
    ),
    "shards": lambda f: shard(f, save(f)),
    "shards in .bin": lambda f: shard(f, save(f), "pytorch_model", "bin"),
    "gelu_python": lambda f: save(f, hidden_act="gelu_python"),
    "fewer layers than stored": changed(num_hidden_layers=1),
    "no layer_norm_eps": lambda f: (save(f, layer_norm_eps=1e-12), change(f, drop=("layer_norm_eps",))),
    "a large layer_norm_eps": lambda f: save(f, layer_norm_eps=1e-2),
    "two token types": lambda f: save(f, type_vocab_size=2),
    "more positions": lambda f: save(f, max_position_embeddings=130),
    "a shorter longest text": changed(SETTINGS_NAME, model_max_length=16),
    "more rows than tokens": lambda f: save(f, vocab_size=700),
    "BERT with XLM-R's tokenizer": lambda f: save(f, "Bert"),
    "BERT, SentencePiece only": lambda f: (
        with_sentencepiece(f, lambda g: save(g, "Bert")),
        only(f, TOKENIZER_NAME),
        change(f, SETTINGS_NAME, tokenizer_class="XLMRobertaTokenizer"),
    ),
    "BERT with more rows, one token type": lambda f: save(f, "Bert", vocab_size=700, type_vocab_size=1),
    "added tokens": lambda f: (add_tokens(f, "[E1]", "newword"), save(f)),
    "added tokens, SentencePiece too": lambda f: with_sentencepiece(f, FORMS["added tokens"]),
    "added tokens, BERT": lambda f: (add_tokens(f, "[E1]", "newword"), save(f, "Bert")),
    "special tokens added": lambda f: (add_tokens(f, "<user>", "[E1]", special=True), save(f)),
    "added tokens with options": lambda f: (add_tokens(f, *map(with_options, ["[E1]", "newword", "<user>"])), save(f)),
    "our own": rewrite,
    "our own, tokenizer.json only": lambda f: (rewrite(f), only(f, JSON_NAME)),
    "our own, with added tokens": lambda f: (add_tokens(f, "[E1]", with_options("newword")), rewrite(f)),
    "our own, trimmed": trim,
    "our own, trimmed, with added tokens": lambda f: (add_tokens(f, "[E1]", "newword"), trim(f)),
    "our own, trimmed, tokenizer.json only": lambda f: (trim(f), only(f, JSON_NAME)),
    "our own, saved by transformers again": lambda f: (rewrite(f), save(f)),
}

# Those that transformers does not open as they are: it opens what they are made from.
MOVED: dict[str, Make] = {
    "SentencePiece under another name": lambda f: (f / TOKENIZER_NAME).rename(f / "spiece.model"),
    "a tokenizer's folder": lambda f: move_into(f, "tokenizer", TOKENIZER_NAME, JSON_NAME, SETTINGS_NAME),
    "sentence-transformers": lambda f: move_into(f, "0_Transformer"),
}

REFUSED: dict[str, tuple[Make, str]] = {
    "another kind of head": (changed(problem_type="ranking"), "3 outputs for ranking is not supported; with --encoder"),
    "no head": (renamed(lambda n: n.replace("classifier", "other")), "no classification head"),
    "another number of labels": (changed(id2label={"0": "a", "1": "b"}), "id2label must name the 3 labels of the head"),
    "CamemBERT": (changed(model_type="camembert"), "model_type is 'camembert'; only XLM-R"),
    "a decoder": (changed(is_decoder=True), "is_decoder is True"),
    "relative positions": (changed(position_embedding_type="rel"), "position_embedding_type is 'rel'"),
    "8 bits": (changed(quantization_config={"load_in_8bit": True}), "weights are quantized"),
    "lower case": (changed(SETTINGS_NAME, do_lower_case=True), "do_lower_case is True"),
    "cut at the beginning": (changed(SETTINGS_NAME, truncation_side="left"), "truncation_side is 'left', which is un"),
    "lower case in JSON": (lambda f: (save(f), put_normalizer(f, {"type": "Lowercase"})), "normalizer has Lowercase"),
    "BERT's own tokenizer": (
        lambda f: (save(f, "Bert"), only(f), (f / "vocab.txt").write_text("[UNK]\n")),
        "(BERT's vocab.txt is another tokenizer)",
    ),
    "DataParallel": (renamed("module.{}".format), "tensors are named module.roberta...."),
    "a wrapper": (renamed(lambda n: "0.auto_model." + n.replace("roberta.", "")), "tensors are named 0.auto_model...."),
    "Lightning": (
        lambda f: (save(f), to_bin(f, lambda tensors: {"epoch": 3, "state_dict": tensors})),
        "is not a state_dict(); save only that",
    ),
    "LoRA": (
        lambda f: (save(f), remove(f, "model.safetensors"), (f / "adapter_config.json").write_text("{}")),
        "is an adapter (LoRA); merge it with merge_and_unload()",
    ),
    "a folder of checkpoints": (lambda f: (save(f), move_into(f, "checkpoint-500")), "model in it, {f}/checkpoint-500"),
    "a shard is missing": (
        lambda f: (shard(f, save(f)), remove(f, "model-00002-of-00002.safetensors")),
        "has no model-00002-of-00002.safetensors",
    ),
}


@pytest.fixture
def folder(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A folder with a tokenizer, as that of XLM-R on the Hub."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (TOKENIZER_NAME, SETTINGS_NAME, JSON_NAME):
        shutil.copy(tiny_encoder / name, folder)
    change(folder, SETTINGS_NAME, tokenizer_class="XLMRobertaTokenizer")
    content = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
    put_normalizer(folder, *[step for step in content["normalizer"]["normalizers"] if step["type"] == "Precompiled"])
    split = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, content["decoder"]]}
    change(folder, JSON_NAME, pre_tokenizer=split)
    (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')  # for AutoTokenizer
    return folder


def check_same_logits(ours: Path, theirs: Path, texts: list[str] = TEXTS) -> None:
    classifier, tokenizer, task = load_classifier(ours, CPU, bf16=False)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(theirs).eval().float()
    for text, pair in [*((text, None) for text in texts), *PAIRS]:
        if pair == "":
            continue  # transformers takes it for no pair
        expected = their_tokenizer(text, pair, truncation=True, max_length=tokenizer.max_length, return_tensors="pt")
        ids, lengths = tokenizer.flat_ids([text], None if pair is None else [pair])
        assert ids.tolist() == expected["input_ids"][0].tolist(), (text, pair)
        with torch.no_grad():
            found = classifier(torch.from_numpy(ids).long(), torch.from_numpy(lengths))
            torch.testing.assert_close(found, model(**expected).logits, atol=1e-4, rtol=0)
    assert task.label_names == [model.config.id2label[number] for number in range(model.config.num_labels)]


@pytest.mark.parametrize("form", FORMS)
def test_form_has_the_logits_of_transformers(folder: Path, form: str) -> None:
    FORMS[form](folder)
    check_same_logits(folder, folder)


@pytest.mark.parametrize("form", MOVED)
def test_form_that_transformers_does_not_open(folder: Path, form: str) -> None:
    with_sentencepiece(folder, save)
    theirs = shutil.copytree(folder, folder.with_name("theirs"))
    MOVED[form](folder)
    check_same_logits(folder, theirs)


@pytest.mark.parametrize("form", REFUSED)
def test_form_is_refused_by_name(folder: Path, form: str) -> None:
    make, says = REFUSED[form]
    make(folder)
    assert says.replace("{f}", str(folder)) in refusal(load_classifier, folder, CPU, bf16=False)


@pytest.mark.parametrize("form", ["another kind of head", "no head"])
def test_body_of_a_model_with_another_head_is_an_encoder(folder: Path, form: str) -> None:
    REFUSED[form][0](folder)
    assert "encoder.layers.1.qkv.weight" in load_tensors(find_encoder(str(folder)))


@pytest.mark.parametrize("begins_with", ["ours", "theirs, tokenizer.json only"])
def test_training_goes_from_and_to_what_transformers_opens(
    folder: Path, tiny_encoder: Path, small_data: Path, tmp_path: Path, begins_with: str
) -> None:
    FORMS["tokenizer.json only"](folder)
    encoder, model = tiny_encoder if begins_with == "ours" else folder, tmp_path / "run" / "model"
    train.main(train_options(encoder, small_data, tmp_path / "run", "--max-steps", 7, "--lr", 0.01))
    check_same_logits(model, model, [*TEXTS, *(["e\u0301, 각"] if begins_with == "ours" else [])])
    ours = load(model, precision="fp32", device="cpu")
    answers = transformers.pipeline("text-classification", str(model))(TEXTS, top_k=None, truncation=True)
    by_label = [{entry["label"]: entry["score"] for entry in row} for row in answers]
    theirs = [[row[name] for name in ours.label_names] for row in by_label]
    np.testing.assert_allclose(theirs, ours.probabilities(TEXTS), atol=1e-4)


@pytest.mark.slow
@needs_small_encoder
def test_real_sentences_have_the_ids_and_logits_of_transformers(tmp_path: Path) -> None:
    """But for one of 872: where two cuts of a word score alike, sums in fp32 and fp64 may choose differently."""
    options = ["--max-steps", 30, "--batch-size", 16, "--lr", 1e-4, "--max-length", 256]
    train.main(train_options(SMALL_ENCODER, SAMPLE_DATA, tmp_path / "run", *options))
    model, texts = tmp_path / "run" / "model", sst2_sentences()
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(model), load(model, precision="fp32", device="cpu")
    same = [text for text in texts if ours.encode([text])[0].tolist() == tokenizer(text)["input_ids"]]
    assert len(same) >= len(texts) * (1 - 1 / 500)
    check_same_logits(model, model, [*TEXTS, *same])
    assert len(set(ours.predict(texts))) == 2
