import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lora_files import random_lora
from ziplora.errors import ShapeMismatch
from ziplora.lora import (
    Layer,
    LoRA,
    Mergers,
    concat,
    delta,
    digest,
    max_rank,
    n_bytes,
    scaled,
    select,
    stacked,
    tensor_bytes,
    to,
    zip_merge,
    zipped,
)

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
SHAPES = {Q: (6, 5), CONV: (4, 3, 3, 3), TEXT: (7, 6)}


def mergers(lora: LoRA, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.randn(x.down.shape[1], generator=generator) for path, x in lora.layers.items() if path == Q}


def test_delta_is_up_times_down_for_linear_layers_and_convolutions():
    layers = random_lora(SHAPES, rank=2).layers
    assert torch.equal(delta(layers[Q]), layers[Q].up @ layers[Q].down)
    conv = layers[CONV]
    x = torch.randn(2, 3, 8, 8)
    in_two_steps = torch.conv2d(torch.conv2d(x, conv.down), conv.up)
    assert torch.allclose(torch.conv2d(x, delta(conv)), in_two_steps, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_concat_is_the_exact_sum_of_deltas(ranks, seed):
    loras = [random_lora(SHAPES, rank=r, seed=seed + i, dtype=torch.float64) for i, r in enumerate(ranks)]
    total = concat(loras)
    for path in SHAPES:
        assert total.layers[path].rank == sum(ranks)
        assert torch.equal(delta(total.layers[path]), sum(delta(lora.layers[path]) for lora in loras))


def test_concat_keeps_a_module_that_only_one_lora_has():
    subject, style = random_lora({Q: (6, 5), TEXT: (7, 6)}), random_lora({Q: (6, 5), CONV: (4, 3, 3, 3)}, seed=1)
    total = concat([subject, style])
    assert set(total.layers) == {Q, TEXT, CONV}
    assert total.layers[TEXT] is subject.layers[TEXT]
    assert total.layers[CONV] is style.layers[CONV]


def test_zip_merge_is_equation_2():
    """ΔW_m = m_c⊗ΔW_c + m_s⊗ΔW_s, element j on column j; the rest is summed."""
    subject = random_lora(SHAPES, rank=2, dtype=torch.float64)
    style = random_lora(SHAPES, rank=3, seed=1, dtype=torch.float64)
    m = Mergers(mergers(subject, 2), mergers(style, 3))
    merged = zip_merge(subject, style, m, targets=[Q])
    dense = torch.zeros(6, 5, dtype=torch.float64)
    for j in range(5):
        dense[:, j] += m.subject[Q][j].double() * delta(subject.layers[Q])[:, j]
        dense[:, j] += m.style[Q][j].double() * delta(style.layers[Q])[:, j]
    assert merged.layers[Q].rank == 5
    assert torch.allclose(delta(merged.layers[Q]), dense, rtol=0, atol=1e-15)
    for path in (CONV, TEXT):
        assert torch.equal(delta(merged.layers[path]), delta(subject.layers[path]) + delta(style.layers[path]))


def test_mergers_of_one_and_nought_give_the_subject_alone_and_of_ones_the_direct_merge():
    subject, style = random_lora({Q: (6, 5)}, rank=2), random_lora({Q: (6, 5)}, rank=3, seed=1)
    ones, noughts = {Q: torch.ones(5)}, {Q: torch.zeros(5)}
    alone = zip_merge(subject, style, Mergers(ones, noughts))
    assert torch.equal(delta(alone.layers[Q]), delta(subject.layers[Q]))
    direct = zip_merge(subject, style, Mergers(ones, ones))
    assert digest(direct) == digest(concat([subject, style]))


def test_a_module_that_one_lora_lacks_counts_as_rank_nought():
    subject, style = random_lora({Q: (6, 5)}), random_lora({CONV: (4, 3, 3, 3)})
    merged = zip_merge(subject, style, Mergers({Q: torch.full((5,), 2.0)}, {}), targets=[Q])
    assert torch.equal(delta(merged.layers[Q]), 2 * delta(subject.layers[Q]))


def test_stacked_parts_have_their_rows_at_the_same_place_everywhere():
    subject = random_lora({Q: (6, 5), CONV: (4, 3, 3, 3)}, rank=lambda path: 2 if path == Q else 4)
    style = random_lora({Q: (6, 5), TEXT: (7, 6)}, rank=3, seed=1)
    both = stacked([subject, style])
    for path, layer in concat([subject, style]).layers.items():
        assert both.layers[path].rank == 4 + 3
        assert torch.equal(delta(both.layers[path]), delta(layer))
    without_style = {path: Layer(layer.down[:4], layer.up[:, :4]) for path, layer in both.layers.items()}
    for path, layer in subject.layers.items():
        assert torch.equal(delta(without_style[path]), delta(layer))
    assert not delta(without_style[TEXT]).any()


def test_zipped_halves_add_up_to_the_merge():
    subject, style = random_lora(SHAPES, rank=2), random_lora(SHAPES, rank=3, seed=1)
    m = Mergers(mergers(subject, 2), mergers(style, 3))
    assert digest(concat(zipped(subject, style, m))) == digest(zip_merge(subject, style, m))


def test_zip_merge_refuses_what_does_not_fit():
    subject, style = random_lora({Q: (6, 5)}), random_lora({Q: (6, 5)}, seed=1)
    with pytest.raises(ShapeMismatch, match=r"the style's mergers lack 1 merge targets, such as unet\.mid_block"):
        zip_merge(subject, style, Mergers({Q: torch.ones(5)}, {}), targets=[Q])
    with pytest.raises(ShapeMismatch, match=r"the subject's mergers have 1 modules that it lacks, such as unet\.other"):
        zip_merge(subject, style, Mergers({"unet.other": torch.ones(5)}, {}))
    with pytest.raises(ShapeMismatch, match=r"mergers of shape \[6\] on a LoRA down of shape \[4, 5\]"):
        zip_merge(subject, style, Mergers({Q: torch.ones(6)}, {}))
    with pytest.raises(ShapeMismatch, match=r"one LoRA changes a weight of shape \[6, 5\], another one of \[6, 8\]"):
        concat([subject, random_lora({Q: (6, 8)})])


def test_scaled_scales_the_update():
    lora = random_lora(SHAPES)
    for path, layer in scaled(lora, 0.5).layers.items():
        assert torch.equal(delta(layer), 0.5 * delta(lora.layers[path]))


def test_select_to_and_sizes():
    lora = random_lora(SHAPES, rank=lambda path: 7 if path == TEXT else 2)
    assert set(select(lora, lambda path: path.startswith("unet.")).layers) == {Q, CONV}
    assert max_rank(lora) == 7
    assert max_rank(LoRA({})) == 0
    values = 2 * (6 + 5) + 2 * (4 + 27) + 7 * (7 + 6)
    assert n_bytes(lora) == 4 * values
    assert n_bytes(to(lora, torch.float16)) == 2 * values
    assert to(lora, torch.float32).layers[Q].down is lora.layers[Q].down


def test_digest_depends_on_content_alone():
    lora = random_lora(SHAPES)
    shuffled = LoRA(dict(reversed(lora.layers.items())))
    assert digest(lora) == digest(shuffled) == digest(random_lora(SHAPES))
    changed = dict(lora.layers)
    changed[Q] = Layer(changed[Q].down.clone(), changed[Q].up)
    changed[Q].down[0, 0] += 1
    others = [LoRA(changed), to(lora, torch.float64), select(lora, lambda path: path != Q), random_lora(SHAPES, seed=1)]
    assert len({digest(lora), *map(digest, others)}) == 5


def test_tensor_bytes_are_the_values_row_by_row():
    values = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    assert bytes(tensor_bytes(values.T)) == bytes(tensor_bytes(values.T.contiguous()))
    assert (
        bytes(tensor_bytes(values.bfloat16()))
        == values.float().view(torch.int32).numpy().view("<u2")[:, 1::2].tobytes()
    )
    assert bytes(tensor_bytes(torch.tensor(1.0))) == b"\x00\x00\x80\x3f"
