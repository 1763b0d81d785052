"""The structure of models: lists of layers in all architectures, cuts before a layer, blocks of trained parameters."""

from collections.abc import Callable

import pytest
import torch
from tiny import HIDDEN, Block, Tower, bart, bert, lists, llama, lora, opt, swin, t5, tiny, vit
from torch import nn

from pyzo import layers


def names(parts: tuple[layers.Part, ...]) -> list[str]:
    return [part.name for part in parts]


# Architecture: its model, the list, how many layers, what is before them, what is behind them.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str, int, list[str], list[str]]] = {
    "OPT": (
        opt,
        "model.decoder.layers",
        3,
        ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
        ["model.decoder.final_layer_norm", "lm_head"],
    ),
    "OPT, classifier": (
        lambda: opt("OPTForSequenceClassification"),
        "model.decoder.layers",
        3,
        ["model.decoder.embed_tokens", "model.decoder.embed_positions"],
        ["model.decoder.final_layer_norm", "score"],
    ),
    "OPT-350m": (
        lambda: opt(word_embed_proj_dim=8, do_layer_norm_before=False),
        "model.decoder.layers",
        3,
        ["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_in"],
        ["model.decoder.project_out", "lm_head"],
    ),
    "LLaMA": (llama, "model.layers", 3, ["model.embed_tokens"], ["model.norm", "lm_head"]),
    "Mistral": (
        lambda: llama("MistralForSequenceClassification", "MistralConfig"),
        "model.layers",
        3,
        ["model.embed_tokens"],
        ["model.norm", "score"],
    ),
    "Qwen2": (
        lambda: llama("Qwen2ForCausalLM", "Qwen2Config"),
        "model.layers",
        3,
        ["model.embed_tokens"],
        ["model.norm", "lm_head"],
    ),
    "Qwen3, base": (lambda: llama("Qwen3Model", "Qwen3Config"), "layers", 3, ["embed_tokens"], ["norm"]),
    "Mixtral": (
        lambda: llama("MixtralForCausalLM", "MixtralConfig", num_local_experts=4),
        "model.layers",
        3,
        ["model.embed_tokens"],
        ["model.norm", "lm_head"],
    ),
    "RoBERTa": (
        lambda: bert("RobertaForSequenceClassification", "RobertaConfig"),
        "roberta.encoder.layer",
        3,
        ["roberta.embeddings"],
        ["classifier"],
    ),
    "BERT": (lambda: bert("BertModel"), "encoder.layer", 3, ["embeddings"], ["pooler"]),
    "BERT, two heads": (
        lambda: bert("BertForPreTraining"),
        "bert.encoder.layer",
        3,
        ["bert.embeddings"],
        ["bert.pooler", "cls"],
    ),
    "ViT": (
        vit,
        "vit.layers",
        3,
        ["vit.embeddings"],
        ["vit.layernorm", "classifier"],
    ),
    "Swin": (swin, "swin.encoder.layers", 8, ["swin.embeddings"], ["swin.layernorm", "classifier"]),
    "GPT2": (
        lambda: tiny("GPT2LMHeadModel", "GPT2Config", n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=8, vocab_size=32),
        "transformer.h",
        2,
        ["transformer.wte", "transformer.wpe"],
        ["transformer.ln_f", "lm_head"],
    ),
    "BLOOM": (  # two norms beside the list, both run where they are defined
        lambda: tiny("BloomForCausalLM", "BloomConfig", vocab_size=32, hidden_size=HIDDEN, n_layer=2, n_head=2),
        "transformer.h",
        2,
        ["transformer.word_embeddings", "transformer.word_embeddings_layernorm"],
        ["transformer.ln_f", "lm_head"],
    ),
    "torch": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, norm=nn.LayerNorm(8)),
        "layers",
        3,
        [],
        ["norm"],
    ),
    "Sequential": (lambda: nn.Sequential(*(Block() for _ in range(4))), "", 4, [], []),
    "Sequential of linears": (
        lambda: nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8)),
        "",
        2,
        ["0"],
        ["4"],
    ),
    "nested Sequential": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8)),
            nn.Sequential(*(Block() for _ in range(3))),
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)),
        ),
        "1",
        3,
        ["0"],
        ["2"],
    ),
    "numbered children": (
        lambda: Tower(nn.ModuleDict({f"block_{i}": Block() for i in range(3)}), head=nn.Linear(8, 2)),
        "blocks",
        3,
        ["embed"],
        ["head"],
    ),
    "head defined first": (
        lambda: nn.ModuleDict({"head": nn.Linear(8, 2), "enter": nn.Linear(4, 8), "tower": Tower(lists(2))}),
        "tower.blocks",
        2,
        ["enter", "tower.embed"],
        ["head"],
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_of_architectures(name):
    """Also as they are wrapped: compiled, frozen, with parameters around the list."""
    build, where, count, front, back = ARCHITECTURES[name]
    model = build()
    found = layers.stack(model)
    assert (found.name, len(found.layers), names(found.front), names(found.back)) == (where, count, front, back)
    assert all(part.is_layer for part in found.layers)
    assert not any(part.is_layer for part in (*found.front, *found.back))
    wrapped = nn.Module()
    wrapped.module = model.requires_grad_(False)
    wrapped.scale = nn.Parameter(torch.ones(1))
    found = layers.stack(torch.compile(wrapped))
    assert names(found.front) == ["_orig_mod.scale", *(f"_orig_mod.module.{part}" for part in front)]
    assert len(found.layers) == count and names(found.back) == [f"_orig_mod.module.{part}" for part in back]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_split_and_blocks_have_each_parameter_once(name):
    model = ARCHITECTURES[name][0]()
    found = layers.stack(model)
    everything = [name for name, _ in model.named_parameters()]
    sizes = []
    for k in range(len(found.layers) + 1):
        cut = layers.split(model, k)
        assert sorted(cut.before + cut.after) == sorted(everything)
        assert cut.k == k and cut.stack == found
        sizes.append(len(cut.before))
    assert sizes[0] == 0 and sizes == sorted(set(sizes))
    for by in ("layer", "linear"):
        inside = [name for block in layers.blocks(model, by) for name in block.parameters]
        assert sorted(inside) == sorted(everything)
    in_order = names((*found.front, *found.layers, *found.back))
    found_blocks = [block.name for block in layers.blocks(model)]
    assert found_blocks == [name for name in in_order if name in found_blocks]
    assert found_blocks[-1] == in_order[-1] or "lm_head" in in_order[-1]  # a tied head has nothing of its own


def test_split_takes_front_and_first_layers():
    cut = layers.split(opt(), 1)
    assert {name.split(".")[2] for name in cut.before} == {"embed_tokens", "embed_positions", "layers"}
    assert {name.split(".")[3] for name in cut.before if "layers" in name} == {"0"}
    assert "model.decoder.final_layer_norm.weight" in cut.after


def test_tied_weights_are_where_they_run_first():
    tied = opt(tie_word_embeddings=True)
    assert "model.decoder.embed_tokens.weight" in layers.split(tied, 1).before
    assert not any("lm_head" in name for name in layers.split(tied, 1).after)
    assert "lm_head" not in [block.name for block in layers.blocks(tied)]
    assert "lm_head.weight" in layers.split(opt(tie_word_embeddings=False), 1).after
    model = Tower(lists(2))  # under the name of the module that is defined first
    model = nn.ModuleDict({"head": nn.Linear(8, 10, bias=False), "tower": model})
    model["head"].weight = model["tower"].embed.weight
    assert layers.split(model, 1).before[0] == "head.weight"
    assert layers.split(model, 0).after[0] == "head.weight"


def test_stages_are_taken_apart():
    found = layers.stack(swin())
    assert names(found.layers)[:3] == [f"swin.encoder.layers.{i}" for i in ("0.blocks.0", "0.blocks.1", "1.blocks.0")]
    attached = {part.name: part.members[1:] for part in found.layers if len(part.members) > 1}
    assert attached == {f"swin.encoder.layers.{i}.blocks.1": (f"swin.encoder.layers.{i}.downsample",) for i in (0, 1)}


def test_what_begins_a_stage_is_attached_to_its_first_layer():
    sizes = {"num_stages": 2, "hidden_sizes": [4, 8], "depths": [1, 2]}
    found = layers.stack(tiny("ConvNextModel", "ConvNextConfig", **sizes))
    assert [part.members for part in found.layers] == [
        ("encoder.stages.0.layers.0",),
        ("encoder.stages.1.downsampling_layer", "encoder.stages.1.layers.0"),
        ("encoder.stages.1.layers.1",),
    ]


def test_what_is_between_layers_is_attached_to_the_layer_before():
    model = nn.Sequential(nn.Linear(4, 8), Block(), nn.LayerNorm(8), nn.ReLU(), Block(), nn.Linear(8, 2))
    found = layers.stack(model)
    assert [part.members for part in found.layers] == [("1", "2"), ("4",)]
    assert names(found.front) == ["0"] and names(found.back) == ["5"]


@pytest.mark.parametrize("experts", [(4, 4, 4), (0, 4, 4), (2, 4, 8)])
def test_experts_are_no_layers(experts):
    model = Tower(nn.ModuleList(Block(experts=n) for n in experts))
    assert names(layers.stack(model).layers) == ["blocks.0", "blocks.1", "blocks.2"]


def test_layers_of_several_classes():
    """Attention and recurrences in turn, as in Jamba: all are layers."""
    rnn = nn.ModuleList([nn.GRU(8, 8), nn.Linear(8, 8)])
    model = Tower(nn.ModuleList([Block(), Block(), rnn, Block()]))
    assert len(layers.stack(model).layers) == 4


def test_adapters_do_not_change_the_layers():
    """LoRA of PEFT on some of the layers: names as PEFT has them, adapters alone in blocks."""
    model = lora(llama(), "q_proj", "down_proj", layers_to_transform=[0, 2])
    found = layers.stack(model)
    assert names(found.layers) == [f"base_model.model.model.layers.{i}" for i in range(3)]
    assert [(block.name, len(block.parameters)) for block in layers.blocks(model)] == [
        ("base_model.model.model.layers.0", 4),
        ("base_model.model.model.layers.2", 4),
    ]
    assert len(layers.blocks(model, "linear")) == 8
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained.intersection(layers.split(model, 1).before)) == 4
    blocks = nn.Sequential(Block(), Block(), Block())  # its MLPs are lists, and adapters make these layers unlike
    adapted = lora(blocks, "1.mlp.0", "1.mlp.2")
    assert names(layers.stack(adapted).layers) == [f"base_model.model.{i}" for i in range(3)]


def test_classifier_that_peft_saves_is_one_block():
    model = lora(bert("BertForSequenceClassification"), "query", task_type="SEQ_CLS")
    found = [block.name for block in layers.blocks(model)]
    assert found == [*(f"base_model.model.bert.encoder.layer.{i}" for i in range(3)), "base_model.model.classifier"]


def test_blocks_by_layer():
    """OPT-1.3B has 27: each layer, both embeddings, the last norm."""
    found = layers.blocks(opt())
    last = ["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm"]
    assert [block.name for block in found] == [*last[:2], *(f"model.decoder.layers.{i}" for i in range(3)), last[2]]
    model = nn.Module()
    model.scale, model.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    model.tower = Tower(lists(2))
    model.tower.blocks[1].requires_grad_(False)
    assert [(block.name, len(block.parameters)) for block in layers.blocks(model)] == [
        ("scale", 1),
        ("tower.embed", 1),
        ("tower.blocks.0", 8),
    ]


def test_blocks_by_linear():
    found = layers.blocks(opt(), "linear")
    inside = [block.name.removeprefix("model.decoder.layers.1.") for block in found if ".layers.1." in block.name]
    attention = [f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    assert inside == [*attention, "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    assert [block.name for block in found[:2]] == ["model.decoder.embed_tokens", "model.decoder.embed_positions"]
    assert [block.parameters for block in layers.blocks(nn.Linear(2, 2), "linear")] == [("weight", "bias")]
    assert layers.blocks(nn.Linear(2, 2), "linear")[0].name == "Linear"


def test_blocks_of_an_encoder_and_a_decoder():
    found = [block.name for block in layers.blocks(t5())]
    sides = [[*(f"{side}.block.{i}" for i in range(2)), f"{side}.final_layer_norm"] for side in ("encoder", "decoder")]
    assert found == ["shared", *sides[0], *sides[1]]


def test_blocks_as_given():
    model = Tower(lists(2), head=nn.Linear(8, 10, bias=False))
    model.head.weight = model.embed.weight
    model.blocks[1].norm.requires_grad_(False)
    found = layers.blocks(model, ["embed", model.blocks[0], ("1.mix.weight", "blocks.1.mix.bias"), ["1.mlp"], "head"])
    assert [(block.name, len(block.parameters)) for block in found] == [
        ("embed", 1),
        ("blocks.0", 8),
        ("blocks.1.mix.weight, blocks.1.mix.bias", 2),
        ("blocks.1.mlp", 4),
    ]
    assert layers.blocks(model, [model])[0].name == "Tower"


@pytest.mark.parametrize(
    ("by", "error", "message"),
    [
        (["embed", "blocks.0"], ValueError, r"got none for 'blocks\.1\.mix\.weight', .* and 1 more"),
        (["embed", "blocks", "0.mix"], ValueError, r"'blocks\.0\.mix\.weight' in one block, got it in 'blocks' and"),
        (["embed", "blocks", "frozen"], ValueError, "trained parameters in every entry, got none in 'frozen'"),
        (["embed", "blocks", []], ValueError, "trained parameters in every entry, got none in ''"),
        (["embed", "mix"], ValueError, r"expected one of 'blocks\.0\.mix', 'blocks\.1\.mix', got 'mix'"),
        (["embed", "nothing"], ValueError, "expected a name in the model, got 'nothing'"),
        ([nn.Linear(2, 2)], ValueError, "expected modules of the model, got another Linear"),
        (["embed", 3], TypeError, "expected modules, names, or lists of these, got int at position 1"),
        ("layers", ValueError, "expected 'layer', 'linear' or a list, got 'layers'"),
    ],
)
def test_bad_blocks(by, error, message):
    model = Tower(lists(2), frozen=nn.Linear(2, 2).requires_grad_(False))
    model.blocks[1].add_module("more", nn.Linear(2, 2, bias=False))
    with pytest.raises(error, match=f"^blocks: .*{message}"):
        layers.blocks(model, by)


def test_nothing_to_train():
    for by in ("layer", "linear", ["blocks"]):
        with pytest.raises(ValueError, match=r"^model: expected parameters that require gradients"):
            layers.blocks(Tower(lists(2)).requires_grad_(False), by)


def test_two_lists_must_be_told_apart():
    model = t5()
    with pytest.raises(ValueError, match=r"^layers: expected one list.*'encoder\.block' \(2.*'decoder\.block' \(2"):
        layers.stack(model)
    found = layers.stack(model, layers="decoder.block")
    assert names(found.layers) == ["decoder.block.0", "decoder.block.1"]
    assert names(found.front) == ["shared", "encoder", "decoder.embed_tokens"]
    assert "encoder.block.1.layer.0.SelfAttention.q.weight" in layers.split(model, 1, layers="decoder.block").before


def test_small_lists_are_no_rivals():
    """Of a head, or of single modules, however large: embedding tables."""
    tables = nn.ModuleList(nn.Embedding(1000, 8) for _ in range(3))
    head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    found = layers.stack(Tower(lists(3), tables=tables, head=head), front=["tables"])
    assert names(found.layers) == [f"blocks.{i}" for i in range(3)]
    assert names(found.front) == ["embed", "tables"] and "head" in names(found.back)


def test_a_named_list_may_have_one_layer():
    model = Tower(lists(1))
    assert names(layers.stack(model, layers="blocks").layers) == ["blocks.0"]
    with pytest.raises(ValueError, match=r"^model: expected a list of layers.*found none in Tower"):
        layers.stack(model)
    with pytest.raises(ValueError, match=r"^layers: expected the name of a list of layers, got 'embed', a Embedding"):
        layers.stack(model, layers="embed")
    with pytest.raises(ValueError, match=r"^layers: expected a name in the model, got 'decoder'"):
        layers.stack(model, layers="decoder")


def test_a_module_used_many_times_is_one():
    block = Block()
    with pytest.raises(ValueError, match="found none in Tower"):
        layers.stack(Tower(nn.ModuleList([block, block, block])))


def test_front_declared():
    """BART's decoder applies `layernorm_embedding` before its layers, but defines it behind them."""
    model = bart()
    name = "model.decoder.layernorm_embedding"
    found = layers.stack(model, layers="decoder.layers")
    assert name in names(found.back)
    for front in ([name], ["decoder.layernorm_embedding.weight", "decoder.layernorm_embedding.bias"]):
        cut = layers.split(model, 1, layers="decoder.layers", front=front)
        assert f"{name}.weight" in cut.before and f"{name}.bias" in cut.before
    assert layers.split(model, 0, layers="decoder.layers", front=[name]).before == ()
    for wrong in ("decoder.layers.0.fc1", "decoder.layers", "model.decoder", "decoder.layers.0.fc1.weight"):
        with pytest.raises(ValueError, match=r"^front: expected names outside the layers"):
            layers.stack(model, layers="decoder.layers", front=[wrong])
    with pytest.raises(ValueError, match=r"^front: expected one of 'model\.encoder\.layernorm_embedding', "):
        layers.stack(model, layers="decoder.layers", front=["layernorm_embedding"])


@pytest.mark.parametrize("k", [-1, 4, True, 1.0, "1"])
def test_bad_cuts(k):
    with pytest.raises(ValueError, match=r"^k: expected an integer in \[0, 3\], got "):
        layers.split(Tower(lists(3)), k)
