"""Packed attention against loops in float64, its gradients, and how transformers calls it."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from tests.reference import attention_by_hand
from torch import Tensor

from cascadevl.model.attention import (
    attend_masked,
    attend_packed,
    register_attention,
    text_attention,
    vision_attention,
)
from cascadevl.model.layout import AttentionTable, packed_layout
from cascadevl.model.packed_attention import packed_attention
from cascadevl.model.varlen import can_use_varlen, varlen_attention

# A tree (0; 1 and 2 continue 0; 3 continues 2), a lone sample, padding; segments out of order.
TREE = [0] * 5 + [1] * 3 + [2] * 4 + [3] * 2 + [7] * 6 + [-1] * 2
TREE_PARENTS = [-1] * 5 + [0] * 7 + [2] * 2 + [-1] * 8
MIXED = [4, 2, 4, 2, 2, 4, -1, 9, 9, 4, 4, 2, 9, 9, 9, 9, 2, 2, 4, -1, 4, 2]
MIXED_PARENTS = [2 if s == 4 else -1 for s in MIXED]
TABLES = {
    "one bucket": AttentionTable(),
    "all cut": AttentionTable(max_queries=2, max_cells=16, merge_cells=0),
    "nothing kept": AttentionTable(short_keys=0),
    "some kept": AttentionTable(short_keys=5, merge_cells=0, max_queries=3),
}


def inputs(rows: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, tokens, 6, 4, generator=generator, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, rows, tokens, 2, 4, generator=generator, dtype=dtype).transpose(
        2, 3
    )
    return [t.requires_grad_() for t in (query, key, value)]


def trees() -> tuple[Tensor, Tensor]:
    return torch.tensor([TREE, MIXED]), torch.tensor([TREE_PARENTS, MIXED_PARENTS])


def run(states, segments, parents, *, window=None, sinks=None, table=None):
    layout = packed_layout(segments, parents, windows=(window,), table=table or AttentionTable())
    return attend_packed(*states, layout.of(window), scaling=0.5, window=window, sinks=sinks)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_equals_the_loops(table: AttentionTable, window: int | None, with_sinks: bool) -> None:
    segments, parents = trees()
    states = inputs(2, segments.shape[1])
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64) if with_sinks else None
    got = run(states, segments, parents, window=window, sinks=sinks, table=table)
    for row in range(2):
        expected = attention_by_hand.packed(
            *(state[row].tolist() for state in states),
            segments[row].tolist(),
            parents[row].tolist(),
            scaling=0.5,
            window=window,
            sinks=None if sinks is None else sinks.tolist(),
        )
        torch.testing.assert_close(
            got[row].detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_equal_finite_differences(table: AttentionTable, with_sinks: bool) -> None:
    segments, parents = (t[:, :14] for t in trees())
    states = inputs(2, 14)
    layout = packed_layout(segments, parents, windows=(3,), table=table).of(3)
    sinks = torch.zeros(6, dtype=torch.float64).requires_grad_() if with_sinks else None

    def outputs(query: Tensor, key: Tensor, value: Tensor, *sink: Tensor) -> Tensor:
        return attend_packed(
            query, key, value, layout, scaling=0.5, window=3, sinks=sink[0] if sink else None
        )

    assert torch.autograd.gradcheck(
        outputs, (*states, *([] if sinks is None else [sinks])), fast_mode=True
    )


def test_the_sink_gradient_of_every_head() -> None:
    segments, parents = trees()
    states = inputs(2, segments.shape[1])
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    run(states, segments, parents, sinks=sinks).square().sum().backward()
    states = [state.detach() for state in states]
    step = 1e-5
    for head in range(6):
        above, below = sinks.detach().clone(), sinks.detach().clone()
        above[head] += step
        below[head] -= step
        change = (
            run(states, segments, parents, sinks=above).square().sum()
            - run(states, segments, parents, sinks=below).square().sum()
        ) / (2 * step)
        assert math.isclose(float(sinks.grad[head]), float(change), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_sample_equals_itself_alone_with_its_gradients(dtype: torch.dtype) -> None:
    segments = torch.tensor([[0] * 20 + [1] * 7 + [2] * 33 + [-1] * 4])
    parents = torch.full_like(segments, -1)
    states = inputs(1, 64, dtype=dtype)
    weight = torch.randn(1, 64, 6, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    (run(states, segments, parents) * weight).sum().backward()
    for piece in (slice(0, 20), slice(20, 27), slice(27, 60)):
        alone = [s.detach()[:, :, piece].clone().requires_grad_() for s in states]
        own = segments[:, piece]
        out = run(alone, own, parents[:, piece])
        (out * weight[:, piece]).sum().backward()
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        for together, apart in zip(states, alone, strict=True):
            torch.testing.assert_close(
                together.grad[:, :, piece], apart.grad, rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_shared_prompt_equals_separate_rows_with_its_gradients(table: AttentionTable) -> None:
    prompt, first, second = 9, 4, 6
    segments = torch.tensor([[0] * prompt + [1] * first + [2] * second])
    parents = torch.tensor([[-1] * prompt + [0] * (first + second)])
    states = inputs(1, prompt + first + second, dtype=torch.float32)
    shared = run(states, segments, parents, table=table)
    shared[:, prompt:].square().sum().backward()
    apart_grads = [torch.zeros_like(s) for s in states]
    for branch in (range(prompt, prompt + first), range(prompt + first, segments.shape[1])):
        index = torch.tensor([*range(prompt), *branch])
        alone = [s.detach()[:, :, index].clone().requires_grad_() for s in states]
        plain = torch.zeros(1, len(index), dtype=torch.int64)
        out = run(alone, plain, torch.full_like(plain, -1))
        torch.testing.assert_close(out[:, prompt:], shared[:, list(branch)], rtol=0, atol=1e-6)
        out[:, prompt:].square().sum().backward()
        for total, state in zip(apart_grads, alone, strict=True):
            total.index_add_(2, index, state.grad)
    for state, total in zip(states, apart_grads, strict=True):
        torch.testing.assert_close(state.grad, total, rtol=1e-5, atol=1e-5)


def test_bfloat16_softmax_is_computed_in_float32() -> None:
    # 2,000 equal keys: a bfloat16 sum would stop growing at 256 and give weights 8 times too big.
    tokens = 2000
    query = torch.zeros(1, 1, tokens, 8, dtype=torch.bfloat16)
    value = torch.ones(1, 1, tokens, 8, dtype=torch.bfloat16)
    segments = torch.zeros(1, tokens, dtype=torch.int64)
    out = run([query, query, value], segments, torch.full_like(segments, -1))
    torch.testing.assert_close(out[0, -1].float(), torch.ones(1, 8), rtol=0, atol=0.01)


def test_padding_only_rows_and_empty_batches_give_zeros() -> None:
    segments = torch.full((2, 5), -1)
    states = inputs(2, 5)
    out = run(states, segments, torch.full_like(segments, -1))
    assert not out.any()
    out.sum().backward()
    assert not any(state.grad.any() for state in states)


def test_a_missing_parent_and_a_cycle_are_refused() -> None:
    with pytest.raises(ValueError, match="segment 3 of row 1"):
        packed_layout(torch.tensor([[0, 0], [3, 3]]), torch.tensor([[-1, -1], [5, 5]]))
    with pytest.raises(ValueError, match="tree"):
        packed_layout(torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))


def test_a_layer_with_an_unknown_window_is_refused() -> None:
    layout = packed_layout(torch.zeros(1, 3, dtype=torch.int64), -torch.ones(1, 3).long())
    with pytest.raises(ValueError, match="asks for 128"):
        layout.of(128)


def test_one_long_and_many_short_segments_do_not_share_a_bucket() -> None:
    lengths = [600] + [10] * 50
    segments = torch.repeat_interleave(torch.arange(51), torch.tensor(lengths))[None]
    shapes = packed_layout(segments, torch.full_like(segments, -1)).of(None).shapes
    cells = int(shapes[:, :3].prod(1).sum())
    least = 600 * 600 + 50 * 100
    assert cells < 1.5 * least  # one bucket for all would be 51 * 600 * 600
    assert len(shapes) <= 5


def test_the_operator_is_well_formed_for_compilers() -> None:
    segments, parents = trees()
    for sinks, table in ((None, "one bucket"), (torch.zeros(6).requires_grad_(), "some kept")):
        buckets = packed_layout(segments, parents, table=TABLES[table]).of(None)
        states = inputs(2, segments.shape[1], dtype=torch.float32)
        layout = [getattr(buckets, name) for name in buckets.__dataclass_fields__]
        torch.library.opcheck(packed_attention, (*states, sinks, *layout, 0.5, 0, True))


def test_a_compiler_sees_one_node_and_packs_of_other_sizes_need_no_new_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    plain = inspect.unwrap(attend_packed)  # compilers cannot read the run-time type checker
    compiled = torch.compile(plain, backend=backend, dynamic=True, fullgraph=True)
    for lengths in ((5, 9, 3), (8, 4, 6, 2), (30, 11)):
        segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
        parents = torch.full_like(segments, -1)
        states = [s.detach() for s in inputs(1, sum(lengths), dtype=torch.float32)]
        buckets = packed_layout(segments, parents).of(None)
        got = compiled(*states, buckets, scaling=0.5)
        torch.testing.assert_close(got, run(states, segments, parents))
    nodes = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    assert len(nodes) == 1
    assert sum("packed_attention" in node for node in nodes[0]) == 1
    assert not any("softmax" in node for node in nodes[0])


@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_masked_form_equals_the_packed_form(with_sinks: bool) -> None:
    segments = torch.tensor([[0] * 7, [-1] * 2 + [0] * 5])
    states = inputs(2, 7)
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64) if with_sinks else None
    expected = run(states, segments, torch.full_like(segments, -1), sinks=sinks)
    place = torch.arange(7)
    visible = (place <= place[:, None]) & (segments != -1)[:, None, None]
    got = attend_masked(*states, visible, scaling=0.5, sinks=sinks)
    real = segments != -1
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-6)


def flash_by_loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """torch's variable-length attention as documented: (tokens, heads, dim), aligned at the end."""
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1)
    longest = [0, 0]
    for first, last, begin, end in zip(
        query_starts[:-1], query_starts[1:], key_starts[:-1], key_starts[1:], strict=True
    ):
        longest = [max(longest[0], int(last - first)), max(longest[1], int(end - begin))]
        for token in range(int(first), int(last)):
            stop = int(end - (last - token)) + 1 + window_size[1]
            start = int(begin) if window_size[0] < 0 else max(int(begin), stop - 1 - window_size[0])
            for head in range(query.shape[1]):
                keys, values = key[start:stop, head // group], value[start:stop, head // group]
                out[token, head] = torch.softmax(keys @ query[token, head] * scale, 0) @ values
    assert longest == [longest_query, longest_key]
    return out


@pytest.mark.parametrize("window", [None, 3])
def test_the_variable_length_form_describes_the_same_attention(window: int | None) -> None:
    segments, parents = trees()
    states = [state.detach() for state in inputs(2, segments.shape[1])]
    layout = packed_layout(segments, parents, windows=(window,))
    got = varlen_attention(*states, layout, scaling=0.5, window=window, kernel=flash_by_loops)
    expected = run(states, segments, parents, window=window)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_variable_length_form_is_for_gpus() -> None:
    assert not can_use_varlen(torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16))


def test_text_attention_says_what_it_lacks() -> None:
    states = inputs(1, 3)
    with pytest.raises(ValueError, match="call the composite model"):
        text_attention(torch.nn.Identity(), *states, None, scaling=0.5)
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        text_attention(torch.nn.Identity(), *states, None, scaling=0.5, dropout=0.1)


@pytest.mark.parametrize("tokens", [65, 301])
def test_vision_attention_sees_the_whole_tile_at_any_length(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, tokens, 8, generator=generator)
    got, _ = vision_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3)
    expected = torch.softmax(query @ key.mT * 0.3, -1) @ value
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=0, atol=1e-6)


def test_both_functions_are_known_to_transformers() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    register_attention()
    for name, function in (("cascadevl", text_attention), ("cascadevl_dense", vision_attention)):
        assert ALL_ATTENTION_FUNCTIONS[name] is function
        assert ALL_MASK_ATTENTION_FUNCTIONS[name](1, 2, 3, attention_mask=None) is None
