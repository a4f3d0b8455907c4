"""torchtext's own `RobertaModel`, to compare with; tests that use it skip where torchtext does not load."""

from __future__ import annotations

import pytest
from torch import nn

from sst2_xlmr.model.roberta import PAD_ID, SequenceClassifier
from sst2_xlmr.util import versions

needs_torchtext = pytest.mark.skipif(not versions.has_torchtext(), reason=f"this is {versions.description()}")


def our_name(theirs: str) -> str:
    names = {
        "encoder.transformer.layers.layers.": "encoder.layers.",
        "encoder.transformer.token_embedding.": "encoder.tokens.",
        "encoder.transformer.positional_embedding.embedding.": "encoder.positions.",
        "encoder.transformer.embedding_layer_norm.": "encoder.norm.",
        "self_attn.in_proj_": "qkv.",
        "self_attn.out_proj.": "out.",
        "linear1.": "up.",
        "linear2.": "down.",
        "head.out_proj": "head.out",
    }
    for old, new in names.items():
        theirs = theirs.replace(old, new)
    return theirs


def torchtext_model(classifier: SequenceClassifier) -> nn.Module:
    """Return the same model in torchtext's modules, with copies of the weights, in evaluation mode; no dropout."""
    if not versions.has_torchtext():
        pytest.skip(f"this is {versions.description()}")
    from torchtext.models import RobertaClassificationHead, RobertaEncoderConf, RobertaModel

    shape = classifier.shape
    sizes = {"vocab_size": shape.vocab_size, "embedding_dim": shape.hidden, "ffn_dimension": shape.ffn}
    sizes.update(padding_idx=PAD_ID, max_seq_len=shape.positions, num_attention_heads=shape.heads)
    conf = RobertaEncoderConf(**sizes, num_encoder_layers=shape.layers, dropout=0.0)
    head = RobertaClassificationHead(classifier.outputs, shape.hidden, dropout=0.0, activation=nn.Tanh)
    model = RobertaModel(conf, head)
    for module in model.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = shape.layer_norm_eps
    ours = classifier.state_dict()
    model.load_state_dict({name: ours[our_name(name)] for name in model.state_dict()})
    return model.eval()
