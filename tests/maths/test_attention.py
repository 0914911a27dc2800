"""Heads of attention as channels: which are found, and what a network without some computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dreamkit
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.pruning.record import PruningRecord
from dreamkit.sources.digits import Digits
from dreamkit.teachers.without_batch_norm import vision_transformer

SIZE = (1, 8, 8)
WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    """Attention as libraries write it.

    Args:
        fused: by torch's own function; else written out, with a product for each head.
        bias: each head has one of its own, added to how much tokens go together.
        says: the code reads the width of all heads from the module; else from the tokens.
    """

    def __init__(self, fused: bool = True, bias: bool = False, says: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.all_heads = HEADS, WIDTH // HEADS, WIDTH
        self.fused, self.says = fused, says
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(1, HEADS, 4, 4)) if bias else None

    def forward(self, x):
        images, tokens, width = x.shape
        parts = self.qkv(x).reshape(images, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            seen = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        flat = (images, tokens, self.all_heads if self.says else width)
        return self.proj(seen.transpose(1, 2).reshape(flat))


class Net(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 4, 4)
        self.attention = Attention(**options)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens)).mean(1))


def groups_of(model):
    found, skipped = ChannelGraph(model, SIZE).groups()
    return {group.name: group for group in found}, {left.group: left.reason for left in skipped}


@pytest.mark.parametrize("fused", [True, False])
def test_without_a_head_the_rest_computes_what_it_did(fused):
    torch.manual_seed(0)
    model = Net(fused=fused).eval()
    groups, _ = groups_of(model)
    heads = groups["attention.qkv"]
    assert heads.channels == HEADS
    (makes,) = [m for m in heads.members if m.axis == "out"]
    places = torch.arange(3 * WIDTH)
    assert torch.equal(makes.channel[makes.index.argsort()], places // (WIDTH // HEADS) % HEADS)
    expected = Net(fused=fused).eval()
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():  # what the second head puts out is not read
        expected.attention.proj.weight[:, WIDTH // HEADS : 2 * WIDTH // HEADS] = 0
    images = torch.randn(2, *SIZE)
    cut, record = ChannelGraph(model, SIZE).without({"attention.qkv": [1]})
    torch.testing.assert_close(cut(images), expected(images))
    assert (cut.attention.num_heads, cut.attention.head_dim, cut.attention.all_heads) == (2, 8, 16)
    again = Net(fused=fused).eval()
    PruningRecord.from_json(record.to_json()).rebuild(again)
    again.load_state_dict(cut.state_dict())
    torch.testing.assert_close(again(images), cut(images))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": True}, "each head has a bias of its own"),
        ({"says": False}, "the model's code fixes how many there are"),
    ],
)
def test_heads_stay_where_they_cannot_go(options, reason):
    groups, left = groups_of(Net(**options).eval())
    assert "attention.qkv" not in groups
    assert left["attention.qkv"] == reason


class NoAttention(nn.Module):
    """It has a number of heads, and mixes them.

    Args:
        mixes: what is done to (N, tokens, heads, channels of a head).
    """

    def __init__(self, mixes) -> None:
        super().__init__()
        self.num_heads, self.mixes = 4, mixes
        self.first, self.second = nn.Linear(WIDTH, 32), nn.LazyLinear(WIDTH)

    def forward(self, x):
        parts = self.first(x).view(*x.shape[:2], self.num_heads, -1)
        return self.second(self.mixes(parts))


@pytest.mark.parametrize("mixes", [lambda x: x.softmax(2).flatten(2), lambda x: x.mean(2)])
def test_heads_that_something_mixes_stay(mixes):
    model = Net().eval()
    model.attention = NoAttention(mixes)
    model(torch.zeros(1, *SIZE))
    groups, left = groups_of(model)
    assert "attention.first" not in groups
    assert "they are mixed by aten" in left["attention.first"]


def test_a_head_as_wide_as_there_are_heads():
    torch.manual_seed(0)
    model = vision_transformer(10, 1, size=8, patch=4, width=16, depth=1, heads=4).eval()
    groups, _ = groups_of(model)
    assert groups["blocks.0.attn.qkv"].channels == 4


class Reduced(Attention):
    """Keys and values are of fewer tokens, by a convolution over the map, as in PVT."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = WIDTH  # as many as the heads' channels together
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.sr, self.qkv = nn.Conv2d(WIDTH, WIDTH, 2, 2), nn.Identity()

    def forward(self, x):
        images, tokens, width = x.shape
        few = self.sr(x.permute(0, 2, 1).reshape(images, width, 2, 2)).flatten(2).transpose(1, 2)
        q = self.q(x).reshape(images, tokens, self.num_heads, -1).permute(0, 2, 1, 3)
        kv = self.kv(few).reshape(images, -1, 2, self.num_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v)
        return self.proj(seen.transpose(1, 2).reshape(images, tokens, self.dim))


def test_what_heads_are_given_is_no_part_of_them():
    torch.manual_seed(0)
    model = Net().eval()
    model.attention = Reduced()
    groups, _ = groups_of(model)
    assert groups["attention.q"].channels == HEADS
    assert groups.get("embed") is None or groups["embed"].channels == WIDTH


def test_timm_vision_transformers_lose_heads_and_what_is_between():
    torch.manual_seed(0)
    model = vision_transformer(10, 1, size=8, patch=4, width=WIDTH, depth=2, heads=HEADS).eval()
    groups, left = groups_of(model)
    assert {name: group.channels for name, group in groups.items()} == {
        "blocks.0.attn.qkv": 3,
        "blocks.0.mlp.fc1": 96,
        "blocks.1.attn.qkv": 3,
        "blocks.1.mlp.fc1": 96,
    }
    assert left["head"] == "makes the model's outputs"
    graph = ChannelGraph(model, SIZE)
    graph.remove({"blocks.0.attn.qkv": [0, 2], "blocks.1.mlp.fc1": [5]})
    assert model(torch.randn(2, *SIZE)).shape == (2, 10)
    assert model.blocks[0].attn.qkv.out_features == 24
    # A head that is alone stays.
    assert {g.name for g in graph.groups()[0] if g.channels == 1} == {"blocks.0.attn.qkv"}


def test_a_trained_transformer_loses_heads_and_keeps_what_it_knows():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (dreamkit[demo])")
    teacher = dreamkit.load_teacher("bundled:digits_vit")
    test = Digits("test").open(teacher.card)
    dreams = dreamkit.invert(teacher, 128, steps=60, jitter=0)
    limits = {"min_channels": 1, "exceptions": [{"layers": "*.mlp.*", "max_ratio": 0}]}
    small = dreamkit.prune(
        teacher, dreams, flops=0.85, limits=limits, recovery={"steps": 20, "batch_size": 32}
    )
    heads = [block.attn.num_heads for block in small.model.blocks]
    assert 4 <= sum(heads) < 12  # of four blocks
    with torch.no_grad():
        images, labels = test.batch(range(len(test)))
        found = small.model(teacher.card.normalise(images)).argmax(1)
    assert float((found == labels).float().mean()) > 0.8  # 0.1 is chance
